"""fedlora aggregate: the flags reach the engine, the answer is right, each stream carries what belongs there."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from make_adapters import SHAPES, dense, factors, make_adapter, make_clients

from fedlora_kernels import cli, request
from fedlora_kernels.cli import main
from fedlora_kernels.errors import ConvergenceError, InputError
from fedlora_kernels.methods.contract import Method

WEIGHTS = (120, 80, 200)
WRITTEN = ["adapter_config.json", "adapter_model.safetensors", "report.json"]


def mean(clients, weights):
    total = sum(weights)
    updates = [dense(client) for client in clients]
    return {name: sum(w / total * d[name] for w, d in zip(weights, updates, strict=True)) for name in SHAPES}


def distance(found, expected):
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def report_of(out):
    return json.loads((Path(out) / "report.json").read_text())


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_the_exact_mean_of_the_updates(tmp_path, backend):
    clients, out = make_clients(tmp_path), tmp_path / "out"
    argv = ["aggregate", *clients, "-o", str(out), "--energy", "1", "--weights", "120,80,200", "--backend", backend]
    assert main(argv) == 0
    assert distance(dense(out), mean(clients, WEIGHTS)) < 1e-6
    assert sorted(os.listdir(out)) == WRITTEN


def test_energy_09_is_the_default(tmp_path):
    clients = make_clients(tmp_path)
    assert main(["aggregate", *clients, "-o", str(tmp_path / "a"), "--quiet"]) == 0
    assert main(["aggregate", *clients, "-o", str(tmp_path / "b"), "--quiet", "--energy", "0.9"]) == 0
    tensors = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert tensors[0] == tensors[1]
    expected = mean(clients, (1, 1, 1))
    found, report = dense(tmp_path / "a"), report_of(tmp_path / "a")
    for row in report["modules"]:
        error = float((found[row["name"]] - expected[row["name"]]).norm() / expected[row["name"]].norm())
        assert error**2 <= 0.1 + 1e-6
        assert row["error"] == pytest.approx(error, rel=1e-4)
        assert row["error_bound"] >= row["error"]


@pytest.mark.parametrize(
    ("flags", "rank"),
    [
        (["--rank", "3"], 3),
        (["--max-rank", "2"], 2),
        (["--energy", "1"], 11),
        (["--energy", "1", "--max-rank", "5"], 5),
        (["--sv-ratio", "1"], 1),
        (["--sv-cumulative", "1"], 11),
        (["--sv-fro", "1"], 11),
        (["--absolute", "0"], 11),
        (["--absolute", "1e9"], 1),
        (["--budget", "11.7kB"], 11),
        (["--budget", "2112"], 2),
        (["--budget", "1MiB", "--max-rank", "3"], 3),
    ],
)
def test_rule_flags_decide_the_rank(tmp_path, flags, rank):
    assert main(["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out"), "--quiet", *flags]) == 0
    assert [row["rank"] for row in report_of(tmp_path / "out")["modules"]] == [rank] * len(SHAPES)


def test_weights_of_any_sign_without_normalising(tmp_path):
    clients, out = make_clients(tmp_path, 2), tmp_path / "out"
    argv = ["aggregate", *clients, "-o", str(out), "--energy", "1", "--quiet", "--no-normalize", "--weights", "-1,2.5"]
    assert main(argv) == 0
    first, second = (dense(client) for client in clients)
    assert distance(dense(out), {name: 2.5 * second[name] - first[name] for name in SHAPES}) < 1e-6


@pytest.mark.parametrize("method", ["fedit", "zero_pad", "hetlora", "flora"])
def test_methods_without_a_rule(tmp_path, method):
    out = tmp_path / "out"
    clients = make_clients(tmp_path, ranks=(4, 4, 4))
    assert main(["aggregate", *clients, "-o", str(out), "--method", method]) == 0
    assert report_of(out)["method"]["name"] == method


def test_output_flags_reach_the_file(tmp_path):
    from safetensors.torch import load_file

    clients, out = make_clients(tmp_path), tmp_path / "out"
    argv = [
        "aggregate",
        *clients,
        "-o",
        str(out),
        "--quiet",
        "--energy",
        "0.8",
        "--uniform-rank",
        "--dtype",
        "bfloat16",
    ]
    assert main([*argv, "--output", "balanced"]) == 0
    tensors = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len({tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key}) == 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    B, A = (
        next(tensor.double() for key, tensor in tensors.items() if f".{name}." in key) for name in ("lora_B", "lora_A")
    )
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=0.02)


def test_float64_and_vllm(tmp_path):
    from safetensors.torch import load_file

    clients, out = make_clients(tmp_path), tmp_path / "out"
    assert main(["aggregate", *clients, "-o", str(out), "--quiet", "--target", "vllm", "--dtype", "float64"]) == 0
    tensors = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}
    assert "rank_pattern" not in json.loads((out / "adapter_config.json").read_text())


def test_clip_scales_a_client_down(tmp_path):
    clients = [*make_clients(tmp_path), str(make_adapter(tmp_path / "loud", alpha=800, seed=5))]
    argv = [
        "aggregate",
        *clients,
        "-o",
        str(tmp_path / "out"),
        "--policy",
        "clip",
        "--max-update-norm",
        "300",
        "--quiet",
    ]
    assert main([*argv, "--energy", "1"]) == 0
    rows = report_of(tmp_path / "out")["clients"]
    updates = [dense(client) for client in clients]
    norms = [float(sum(d.square().sum() for d in update.values()).sqrt()) for update in updates]
    for row, norm in zip(rows, norms, strict=True):
        assert row["norm"] == pytest.approx(norm, rel=1e-6)
        assert row["factor"] == pytest.approx(min(1.0, 300 / norm), rel=1e-6)
        assert row["status"] == ("clipped" if norm > 300 else "used")
    factor = [row["factor"] / 4 for row in rows]
    expected = {name: sum(f * d[name] for f, d in zip(factor, updates, strict=True)) for name in SHAPES}
    assert distance(dense(tmp_path / "out"), expected) < 1e-6


def test_missing_renormalize(tmp_path):
    name = next(iter(SHAPES))
    clients = make_clients(tmp_path, 2)
    shapes = {other: shape for other, shape in SHAPES.items() if other != name}
    clients.append(str(make_adapter(tmp_path / "less", shapes=shapes)))
    argv = ["aggregate", *clients, "-o", str(tmp_path / "out"), "--missing", "renormalize", "--energy", "1", "--quiet"]
    assert main(argv) == 0
    first, second = (dense(client)[name] for client in clients[:2])
    assert distance({name: dense(tmp_path / "out")[name]}, {name: (first + second) / 2}) < 1e-6


def test_extras_and_rank_from(tmp_path):
    def extra(tensors):
        tensors["base_model.model.stray.weight"] = torch.ones(3, 2)

    clients = [str(make_adapter(tmp_path / f"c{k}", seed=k, change=extra)) for k in range(2)]
    argv = ["aggregate", *clients, "-o", str(tmp_path / "out"), "--quiet"]
    assert main(argv) == 2
    assert main([*argv, "--extras", "ignore"]) == 0


def test_rank_from_the_tensors(tmp_path, capsys):
    from make_adapters import config, write

    client = str(write(tmp_path / "c", factors(rank=4), config(rank=16)))
    argv = ["aggregate", client, "-o", str(tmp_path / "out"), "--rank-from", "tensor", "--quiet"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("fedlora: warning: ")
    assert "rank 16" in captured.err
    assert len(set(captured.err.splitlines())) == len(captured.err.splitlines())


def test_adapter_name_picks_one(tmp_path):
    from make_adapters import config, write

    tensors = {}
    for name, seed in (("x", 0), ("y", 1)):
        tensors |= {key.replace(".weight", f".{name}.weight"): value for key, value in factors(seed=seed).items()}
    client = str(write(tmp_path / "two", tensors, config()))
    alone = str(make_adapter(tmp_path / "alone", seed=1))
    argv = ["aggregate", client, "-o", str(tmp_path / "out"), "--adapter-name", "y", "--energy", "1", "--quiet"]
    assert main(argv) == 0
    assert distance(dense(tmp_path / "out"), dense(alone)) < 1e-6


def test_names_given_to_clients_stand_in_report_and_table(tmp_path, capsys):
    clients = make_clients(tmp_path)
    argv = ["aggregate", f"site A={clients[0]}", f"b={clients[1]}", clients[2], "-o", str(tmp_path / "out")]
    assert main(argv) == 0
    assert [row["name"] for row in report_of(tmp_path / "out")["clients"]] == ["site A", "b", "c2"]
    assert "site A" in capsys.readouterr().out


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path):
    client = str(make_adapter(tmp_path / "lr=3e-4"))
    assert main(["aggregate", client, "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert report_of(tmp_path / "out")["clients"][0]["name"] == "lr=3e-4"


def test_seed_and_round_stand_in_the_report(tmp_path):
    argv = ["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out"), "--seed", "7", "--round", "3", "--quiet"]
    assert main(argv) == 0
    report = report_of(tmp_path / "out")
    assert (report["seed"], report["round"], report["schema"]) == (7, 3, 1)
    assert report["method"]["rule"] == "Energy(0.9)"


def test_the_round_follows_the_previous_one(tmp_path):
    clients = make_clients(tmp_path)
    assert main(["aggregate", *clients, "-o", str(tmp_path / "r0"), "--quiet"]) == 0
    argv = ["aggregate", *clients, "-o", str(tmp_path / "r1"), "--previous", str(tmp_path / "r0"), "--quiet"]
    assert main(argv) == 0
    assert [report_of(tmp_path / name)["round"] for name in ("r0", "r1")] == [0, 1]


def test_table_to_stdout_and_nothing_to_stderr(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["aggregate", *make_clients(tmp_path), "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for text in (str(out), "florist", "Energy(0.9)", "3 of 3", "c1", *SHAPES):
        assert text in captured.out


def test_quiet_shows_no_table_but_warnings(tmp_path, capsys):
    clients = [
        *make_clients(tmp_path),
        str(make_adapter(tmp_path / "x", seed=9, base_model_name_or_path="other/model")),
    ]
    assert main(["aggregate", *clients, "-o", str(tmp_path / "out"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fedlora: warning: ")
    assert "other/model" in captured.err


def test_reports_are_copies_without_nan(tmp_path):
    argv = ["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*argv, "--report", str(tmp_path / "a.json"), "--report", str(tmp_path / "b.json")]) == 0

    def strict(text):
        raise AssertionError(text)

    texts = [(tmp_path / name).read_text() for name in ("a.json", "b.json", "out/report.json")]
    contents = [json.loads(text, parse_constant=strict) for text in texts]
    assert contents[0] == contents[1] == contents[2]
    totals = contents[0]["totals"]
    assert (totals["modules"], totals["clients"]) == (len(SHAPES), 3)


def test_control_characters_in_names_reach_neither_terminal_nor_path(tmp_path, capsys):
    name = "c\x1b]0;owned\x07\x1b[2J"
    client = make_adapter(tmp_path / "plain")
    assert main(["aggregate", f"{name}={client}", "-o", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "c?]0;owned??[2J" in captured.out
    assert sorted(os.listdir(tmp_path / "out")) == WRITTEN


def test_verbose_logs_to_stderr(tmp_path, capsys):
    assert main(["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out"), "--quiet", "--verbose"]) == 0
    assert capsys.readouterr().out == ""
    assert logging.getLogger("fedlora_kernels").level == logging.NOTSET


def test_log_level_from_the_environment(tmp_path, capsys, monkeypatch):
    argv = ["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out"), "--quiet"]
    monkeypatch.setenv("FEDLORA_LOG", "loud")
    assert main(argv) == 2
    assert "FEDLORA_LOG is 'loud'" in capsys.readouterr().err
    monkeypatch.setenv("FEDLORA_LOG", "warning")
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("first line\nsecond line"), 2, "first line; second line"),
        (ValueError("a fault of ours"), 1, "unexpected ValueError: a fault of ours"),
        (ConvergenceError("did not converge"), 1, "did not converge"),
        (OSError(28, "No space left on device", "out"), 1, "out: No space left on device"),
        (OSError(5, "Input/output error"), 1, "Input/output error"),
        (PermissionError(13, "Permission denied", "out"), 2, "out: Permission denied"),
        (MemoryError("12 GB"), 1, "out of memory: 12 GB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (KeyError("a fault of ours"), 1, "unexpected KeyError"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_statuses(tmp_path, capsys, monkeypatch, error, status, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(request, "aggregate", fail)
    assert main(["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out")]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == (1 if said else 0)
    assert said in captured.err


def test_options_of_a_failure_are_named_as_flags(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise InputError("use missing='zero', rank_from='tensor', normalize=False or overwrite=True")

    monkeypatch.setattr(request, "aggregate", fail)
    assert main(["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "use --missing zero, --rank-from tensor, --no-normalize or --overwrite" in capsys.readouterr().err


@dataclass(frozen=True)
class Knobs(Method):
    """Options of every type that --set reads."""

    name: ClassVar[str] = "knobs"
    count: int = 1
    share: float = 0.5
    on: bool = False
    mode: Literal["a", "b"] = "a"
    limit: float | None = None
    either: int | str = 0
    sizes: tuple[int, ...] = ()
    odd: dict | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("count=3", 3), ("share=1e-3", 1e-3), ("on=true", True), ("on=0", False), ("mode=b", "b"), ("limit=none", None),
        ("limit=2", 2.0), ("either=7", 7), ("either=seven", "seven"), ("sizes=1,2,3", (1, 2, 3)),
    ],
)  # fmt: skip
def test_set_reads_values_by_their_type(text, value):
    found = request.method_options(Knobs, [text])
    assert found == {text.split("=")[0]: value}
    assert type(next(iter(found.values()))) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("count=1.5", "no integer"), ("share=much", "no number"), ("on=maybe", "neither true nor false"), ("mode=c", "none of a, b"),
        ("limit=low", "no number"), ("odd={}", "no plain value"), ("other=1", "known options: count, share"), ("count", "option=value"),
    ],
)  # fmt: skip
def test_set_refuses(text, said):
    with pytest.raises(InputError, match=said):
        request.method_options(Knobs, [text])
    with pytest.raises(InputError, match="given twice"):
        request.method_options(Knobs, ["count=1", "count=2"])


def test_a_closed_pipe_is_no_failure(tmp_path):
    script = f"'{sys.executable}' -m fedlora_kernels aggregate {' '.join(make_clients(tmp_path))} -o {tmp_path}/out"
    command = f"{{ {script}; echo status $? >&2; }} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == "status 0\n"
    assert sorted(os.listdir(tmp_path / "out")) == WRITTEN


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["aggregate", str(tmp_path / "absent"), "-o", str(tmp_path / "out")]) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_main_runs_outside_the_main_thread(tmp_path):
    argv = ["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out"), "--quiet"]
    found = []
    thread = threading.Thread(target=lambda: found.append(cli.main(argv)))
    thread.start()
    thread.join()
    assert found == [0]
