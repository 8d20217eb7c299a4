"""fedlora aggregate over rounds: state, personal adapters, residuals and robust rules by flags, as by the Python call."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from make_adapters import write
from round_problems import (
    EQUAL,
    REMEMBERING,
    federation,
    files_below,
    in_rounds,
    report_of,
    reported,
    same_adapter,
    same_result,
)

import fedlora_kernels as fk
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.cli import main
from fedlora_kernels.engine.state import STATE_NAME, State
from fedlora_kernels.methods.contract import make_method, method_class

pytestmark = pytest.mark.usefixtures("unsynced")


def folders(root, number=0, ranks=EQUAL, **options):
    """Clients of a round on disc, as ``name=folder``; and the pairs themselves."""
    pairs = federation(number, ranks, **options)
    return [f"{name}={write(Path(root) / f'{number}_{name}', *pair)}" for name, pair in pairs.items()], pairs


def run(*arguments):
    return main(["aggregate", *map(str, arguments), "--quiet"])


def failed(capsys, *arguments):
    """The one line of a run that ends with status 2."""
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("method", sorted(REMEMBERING))
def test_three_rounds_equal_the_python_call(tmp_path, method):
    ranks = REMEMBERING[method]
    wanted = in_rounds(method, ranks, 3)
    before = []
    for number in range(3):
        clients, pairs = folders(tmp_path, number, ranks)
        more = ["--per-client"] if "personal" in method_class(method).gives else []
        if state := reported(method, pairs):
            path = tmp_path / f"state_{number}.json"
            path.write_text(json.dumps(state["client_state"]))
            more += ["--client-state", path]
        out = tmp_path / f"round_{number}"
        assert run(*clients, "-o", out, "--method", method, *before, *more) == 0
        before = ["--previous", out]
        report = report_of(out)
        assert (report["round"], report["method"]["name"]) == (number, method)
        assert report["modules"] == json.loads(json.dumps(wanted[number].report["modules"]))
        if wanted[number].adapter is not None:
            assert same_adapter(fk.open_adapter(out), wanted[number].adapter)
        for name, adapter in wanted[number].personal.items():
            assert same_adapter(fk.open_adapter(out / "clients" / name), adapter)
        if "state" in method_class(method).gives:
            assert same_result(
                aggregate(federation(number + 1, ranks), method, previous=State.load(out)),
                aggregate(federation(number + 1, ranks), method, previous=wanted[number]),
            )


def test_rounds_in_one_folder(tmp_path):
    """--previous OUT -o OUT --overwrite: the old round is read while the new one is written."""
    out = tmp_path / "out"
    wanted = in_rounds("fedtree", EQUAL, 3)
    for number in range(3):
        clients, pairs = folders(tmp_path, number)
        state = tmp_path / "state.json"
        state.write_text(json.dumps(reported("fedtree", pairs)["client_state"]))
        again = ["--previous", out, "--overwrite"] if number else []
        assert run(*clients, "-o", out, "--method", "fedtree", "--per-client", "--client-state", state, *again) == 0
        for name, adapter in wanted[number].personal.items():
            assert same_adapter(fk.open_adapter(out / "clients" / name), adapter)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))} == {"out"}


def test_each_client_has_its_folder(tmp_path, capsys):
    clients, pairs = folders(tmp_path)
    assert main(["aggregate", *clients, "-o", str(tmp_path / "out"), "--method", "clair", "--per-client"]) == 0
    assert capsys.readouterr().out
    result = aggregate(pairs, "clair")
    for row in report_of(tmp_path / "out")["clients"]:
        assert same_adapter(
            fk.open_adapter(tmp_path / "out" / row["folder"]), result.for_client(row["name"], scale=1.0)
        )


def test_the_residual_has_its_folder(tmp_path):
    clients, pairs = folders(tmp_path)
    assert run(*clients, "-o", tmp_path / "out", "--method", "fedex", "--weights", "1,2,3,4,5") == 0
    result = aggregate(pairs, "fedex", weights=[1, 2, 3, 4, 5])
    assert same_adapter(fk.open_adapter(tmp_path / "out" / "residual"), result.residual)
    assert "clients" not in os.listdir(tmp_path / "out")


def test_what_goes_wrong_with_a_previous_is_one_line_in_words_of_the_command_line(tmp_path, capsys):
    clients, _ = folders(tmp_path)
    out = ["-o", tmp_path / "out"]
    assert run(*clients, "-o", tmp_path / "it", "--method", "fedit") == 0
    assert run(*clients, "-o", tmp_path / "tree", "--method", "fedtree", "--per-client") == 0
    rot = [*clients, *out, "--method", "fedrot"]
    tree = [*clients, *out, "--method", "fedtree", "--per-client"]
    line = failed(capsys, *rot, "--round", "2")
    assert "method 'fedrot' in round 2 needs --previous, the result of the round before" in line
    assert line.endswith("start with --round 0")
    assert "there is no such folder" in failed(capsys, *rot, "--previous", tmp_path / "nowhere")
    assert "previous is a result of method 'fedit'" in failed(capsys, *rot, "--previous", tmp_path / "it")
    assert "report.json cannot be read" in failed(capsys, *rot, "--previous", tmp_path / "0_ada")
    (tmp_path / "tree" / STATE_NAME).write_bytes(b"short")
    assert f"{STATE_NAME}: 5 bytes" in failed(capsys, *tree, "--previous", tmp_path / "tree")
    (tmp_path / "tree" / STATE_NAME).unlink()
    assert f"previous holds no {STATE_NAME}" in failed(capsys, *tree, "--previous", tmp_path / "tree")
    assert not (tmp_path / "out").exists()


def test_a_method_of_personal_pairs_asks_for_the_flag(tmp_path, capsys):
    clients, _ = folders(tmp_path)
    line = failed(capsys, *clients, "-o", tmp_path / "out", "--method", "fedsa")
    assert "method 'fedsa' has no common pair; --per-client writes each client's own under OUT/clients/" in line
    assert "per_client" not in line


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("3", "client_state is of type int"),
        ('"x"', "client_state is of type str"),
        ("[0.5]", "client_state holds 1 entries for 5 clients"),
        ('{"nobody": 0.5}', "no client 'nobody' in this round"),
        ('{"ada": NaN}', "client_state of client 'ada'"),
        (None, "No such file or directory"),
    ],
)
def test_a_client_state_that_cannot_be_used(tmp_path, capsys, text, found):
    clients, _ = folders(tmp_path)
    path = tmp_path / "state.json"
    if text is not None:
        path.write_text(text)
    line = failed(
        capsys, *clients, "-o", tmp_path / "out", "--method", "fedtree", "--per-client", "--client-state", path
    )
    assert found in line
    assert "client_state" in line or "--client-state" in line


def test_other_methods_take_no_client_state(tmp_path, capsys):
    clients, _ = folders(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    line = failed(capsys, *clients, "-o", tmp_path / "out", "--client-state", tmp_path / "state.json")
    assert "method 'florist' takes no client_state" in line


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--robust", "krum", "--set", "krum.f=1"], fk.Krum(f=1)),
        (["--robust", "multi_krum", "--set", "multi_krum.f=1", "--set", "multi_krum.q=2"], fk.MultiKrum(f=1, q=2)),
        (["--robust", "trimmed_mean", "--set", "trimmed_mean.beta=0.2", "--set", "trimmed_mean.scope=matrix"],
         fk.TrimmedMean(beta=0.2, scope="matrix")),
        (["--robust", "trimmed_mean", "--set", "trimmed_mean.one-sided=yes"], fk.TrimmedMean(one_sided=True)),
        (["--robust", "geometric_median"], fk.GeometricMedian()),
        (["--robust", "norm_clip", "--set", "norm_clip.max_update_norm=20"], fk.NormClip(max_update_norm=20.0)),
        (["--robust", "norm_clip", "--set", "norm_clip.max_update_norm=median"], fk.NormClip()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["florist", "fedrot"])
def test_robust_rules_by_flags(tmp_path, flags, rule, method):
    clients, pairs = folders(tmp_path)
    assert run(*clients, "-o", tmp_path / "out", "--method", method, *flags) == 0
    result = aggregate(pairs, method, robust=rule)
    assert same_adapter(fk.open_adapter(tmp_path / "out"), result.adapter)
    assert report_of(tmp_path / "out")["robust"] == json.loads(json.dumps(result.report["robust"]))


def test_an_option_named_like_an_argument_of_the_call_by_flags(tmp_path):
    """``weights`` of fedrot is an option of the method, the ``--weights`` of clients are others."""
    clients, pairs = folders(tmp_path)
    counts = ["--weights", "10,20,30,40,50"]
    assert run(*clients, "-o", tmp_path / "out", "--method", "fedrot", "--set", "weights=uniform", *counts) == 0
    result = aggregate(pairs, make_method("fedrot", {"weights": "uniform"}), weights=[10, 20, 30, 40, 50])
    assert same_adapter(fk.open_adapter(tmp_path / "out"), result.adapter)
    assert report_of(tmp_path / "out")["method"]["options"]["weights"] == "uniform"
    assert not same_adapter(result.adapter, aggregate(pairs, "fedrot", weights=[10, 20, 30, 40, 50]).adapter)


def test_a_robust_rule_as_method_by_flags(tmp_path, capsys):
    clients, pairs = folders(tmp_path)
    assert run(*clients, "-o", tmp_path / "out", "--method", "krum", "--set", "f=1") == 0
    wanted = aggregate(pairs, "florist", rule=fk.Energy(1.0), robust=fk.Krum(f=1))
    assert same_adapter(fk.open_adapter(tmp_path / "out"), wanted.adapter)
    for arguments, text in (
        (["--method", "krum"], "krum: f is None"),
        (["--robust", "krum"], "--robust krum, --set krum.OPTION=VALUE: krum: f is None"),
        (["--robust", "krumm"], "--robust: unknown method 'krumm'"),
        (["--robust", "florist"], "a robust rule"),
        (["--robust", "krum", "--set", "krum.g=1"], "method 'krum' has no option 'g'; known options: scope, f"),
        (["--robust", "krum", "--set", "f=1"], "method 'florist' has no option 'f'"),
        (["--robust", "krum", "--set", "krum.f=3"], "needs at least 9 clients; 5 take part"),
        (["--method", "krum", "--set", "f=1", "--robust", "norm_clip"], "is a robust rule already"),
        (["--method", "krum", "--set", "f=1", "--energy", "0.9"], "does not choose its rank by a rule"),
    ):
        assert text in failed(capsys, *clients, "-o", tmp_path / "other", *arguments)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("policy", ["drop", "clip"])
def test_policies_and_a_rule_by_flags(tmp_path, policy):
    clients, _ = folders(tmp_path)
    flags = ["--policy", policy, "--robust", "krum", "--set", "krum.f=1"]
    assert run(*clients, "-o", tmp_path / "out", *flags, "--min-clients", "5", "--min-weight", "1") == 0
    statuses = [row["status"] for row in report_of(tmp_path / "out")["clients"]]
    assert statuses.count("rejected") == 4


def test_frozen_factors_that_differ_name_both_clients(tmp_path, capsys):
    clients, _ = folders(tmp_path)
    line = failed(capsys, *clients, "-o", tmp_path / "out", "--method", "ffa")
    assert "clients 'ada' and 'ben', module 'model.layers.0.mlp.down_proj': row 0 of lora_A differs" in line


def test_no_measure(tmp_path, capsys):
    clients, pairs = folders(tmp_path)
    assert main(["aggregate", *clients, "-o", str(tmp_path / "out"), "--method", "fedit", "--no-measure"]) == 0
    assert "nan" not in capsys.readouterr().out.lower()
    assert report_of(tmp_path / "out")["totals"]["error"] is None
    assert same_adapter(fk.open_adapter(tmp_path / "out"), aggregate(pairs, "fedit").adapter)


def test_overwriting_clients_and_residual(tmp_path, capsys):
    clients, _ = folders(tmp_path)
    out = tmp_path / "out"
    assert run(*clients, "-o", out, "--method", "fedex", "--per-client") == 0
    assert "--overwrite" in failed(capsys, *clients, "-o", out)
    assert run(*clients, "-o", out, "--overwrite") == 0
    assert files_below(out) == ["adapter_config.json", "adapter_model.safetensors", "report.json"]
    (out / "clients").mkdir()
    (out / "clients" / "mine.txt").write_text("x")
    assert "'clients/mine.txt', which was not written here" in failed(capsys, *clients, "-o", out, "--overwrite")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_an_ended_run_with_folders_of_clients_leaves_no_output(tmp_path, number):
    """The folder in which all is made is gone, or, after SIGKILL, apart and swept by the next run."""
    shapes = {f"model.layers.{k}.q_proj": (1031, 517) for k in range(24)}
    clients, _ = folders(tmp_path / "in", shapes=shapes) if (tmp_path / "in").mkdir() is None else (None, None)
    root = tmp_path / "root"
    root.mkdir()
    argv = [*clients, "-o", str(root / "out"), "--method", "clair", "--per-client", "--quiet", "--memory", "1MiB"]
    script = "import sys; from fedlora_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    for _ in range(5):  # on a busy machine a run may be done before the signal is sent
        child = subprocess.Popen(
            [sys.executable, "-c", script, "aggregate", *argv], stderr=subprocess.PIPE, env=environment, text=True
        )
        begin = time.perf_counter()
        while not list(root.glob(".out.partial-*/clients/*")):
            if child.poll() is not None or time.perf_counter() - begin > 100:
                break
            time.sleep(0.001)
        child.send_signal(number)
        _, error = child.communicate(timeout=100)
        if child.returncode != 0:
            break
        shutil.rmtree(root / "out")
    assert child.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number], error
    assert not (root / "out").exists()
    assert bool(list(root.iterdir())) == (number == signal.SIGKILL)
    assert list(tmp_path.glob("fedlora-*")) == []
    small, _ = folders(tmp_path)
    assert run(*small, "-o", root / "out") == 0
    assert [path.name for path in root.iterdir()] == ["out"]


def test_the_seed_and_the_dtype_reach_the_folders_of_clients(tmp_path):
    clients, pairs = folders(tmp_path)
    flags = ["--method", "flexlora", "--per-client", "--seed", "5", "--dtype", "bfloat16"]
    assert run(*clients, "-o", tmp_path / "out", *flags) == 0
    result = aggregate(pairs, "flexlora", seed=5, dtype=torch.bfloat16)
    for name in pairs:
        assert same_adapter(fk.open_adapter(tmp_path / "out" / "clients" / name), result.for_client(name, scale=1.0))
