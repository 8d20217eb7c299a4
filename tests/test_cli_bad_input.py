"""Anything wrong in arguments or input: exit status 2, one line that names it, no traceback, nothing left behind."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_adapters import PREFIX, SHAPES, config, factors, first, make_adapter, make_clients, poison, write
from safetensors.torch import save_file

from fedlora_kernels.cli import main

MODULE = "model.layers.0.self_attn.q_proj"
BAD = "c9"


def snapshot(root):
    """Every path under ``root`` with its content: what must not change."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path(root).rglob("*"))}


def refused(capsys, root, argv, *named, status=2):
    """Run, and check everything that holds for every refusal; return the line."""
    before = snapshot(root)
    assert main(argv) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fedlora: error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    for text in named:
        assert text in captured.err, captured.err
    assert snapshot(root) == before
    return captured.err


def no_folder(path):
    pass


def a_file(path):
    path.write_text("not a folder")


def no_config(path):
    make_adapter(path)
    (path / "adapter_config.json").unlink()


def no_tensors(path):
    make_adapter(path)
    (path / "adapter_model.safetensors").unlink()


def truncated(path):
    make_adapter(path)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_safetensors(path):
    make_adapter(path)
    (path / "adapter_model.safetensors").write_bytes(b"PK\x03\x04 this is a zip file, surely" * 10)


def empty(path):
    make_adapter(path)
    (path / "adapter_model.safetensors").write_bytes(b"")


def zero_tensors(path):
    write(path, {}, config())


def broken_json(path):
    make_adapter(path)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": ')


def endless_number(path):
    make_adapter(path)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": ' + "9" * 10_000 + "}")


def endless_nesting(path):
    make_adapter(path)
    (path / "adapter_config.json").write_text("[" * 100_000)


def a_number_for_a_config(path):
    make_adapter(path)
    (path / "adapter_config.json").write_text("7")


def not_text(path):
    make_adapter(path)
    (path / "adapter_config.json").write_bytes(b"\xff\xfe\x00{}")


def huge_config(path):
    make_adapter(path, padding="x" * (1 << 20))


def slow_pattern(path):
    make_adapter(path, rank_pattern={"(a+)+b": 4})


def inner_dimensions(path):
    def change(tensors):
        key = first(tensors, "lora_B")
        tensors[key] = torch.ones(37, 8)

    make_adapter(path, change=change)


def lone_a(path):
    make_adapter(path, change=lambda tensors: tensors.pop(first(tensors, "lora_B")))


def lone_b(path):
    make_adapter(path, change=lambda tensors: tensors.pop(first(tensors, "lora_A")))


def other_shape(path):
    make_adapter(path, shapes={**SHAPES, MODULE: (37, 29)})


def missing_module(path):
    make_adapter(path, shapes={name: shape for name, shape in SHAPES.items() if name != MODULE})


def other_prefix(path):
    make_adapter(path, shapes={f"transformer.{name}": shape for name, shape in SHAPES.items()})


def nan(path):
    make_adapter(path, change=poison("lora_B"))


def infinite(path):
    make_adapter(path, change=poison("lora_A", float("-inf")))


def dora(path):
    make_adapter(path, use_dora=True)


def dora_by_tensor(path):
    def change(tensors):
        tensors[f"{PREFIX}{MODULE}.lora_magnitude_vector"] = torch.ones(37)

    make_adapter(path, change=change)


def lokr(path):
    make_adapter(path, peft_type="LOKR")


def adalora(path):
    make_adapter(path, peft_type="ADALORA")


def wrong_rank(path):
    write(path, factors(rank=4), config(rank=16))


def int8(path):
    def change(tensors):
        key = first(tensors, "lora_A")
        tensors[key] = tensors[key].to(torch.int8)

    make_adapter(path, change=change)


def two_names(path):
    tensors = {
        key.replace(".weight", f".{name}.weight"): value.clone() for key, value in factors().items() for name in "xy"
    }
    write(path, tensors, config())


def sub_folder(path):
    make_adapter(path / "inner")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (no_folder, [BAD]),
        (a_file, [BAD, "adapter_config.json"]),
        (no_config, [BAD, "adapter_config.json"]),
        (no_tensors, [BAD, "adapter_model.safetensors"]),
        (truncated, [BAD, "adapter_model.safetensors"]),
        (not_safetensors, [BAD, "adapter_model.safetensors"]),
        (empty, [BAD, "adapter_model.safetensors"]),
        (zero_tensors, [BAD, "no tensors"]),
        (broken_json, [BAD, "adapter_config.json"]),
        (endless_number, [BAD, "adapter_config.json"]),
        (endless_nesting, [BAD, "adapter_config.json"]),
        (a_number_for_a_config, [BAD, "adapter_config.json"]),
        (not_text, [BAD, "adapter_config.json"]),
        (huge_config, [BAD, "adapter_config.json", "1048576"]),
        (slow_pattern, [BAD, "(a+)+b"]),
        (inner_dimensions, [BAD, MODULE, "lora_A (4, 23)", "lora_B (37, 8)"]),
        (lone_a, [BAD, MODULE, "lora_A without lora_B"]),
        (lone_b, [BAD, MODULE, "lora_B without lora_A"]),
        (other_shape, [BAD, MODULE, "37 x 29", "37 x 23"]),
        (missing_module, [BAD, MODULE, "--missing renormalize"]),
        (other_prefix, [BAD, "'transformer.model.layers.0", "prefix"]),
        (nan, [BAD, MODULE, "lora_B", "nan", "(1, 2)"]),
        (infinite, [BAD, MODULE, "lora_A", "-inf", "(1, 2)"]),
        (dora, [BAD, "DoRA", "use_dora"]),
        (dora_by_tensor, [BAD, "DoRA", "lora_magnitude_vector"]),
        (lokr, [BAD, "LoKr", "LOKR"]),
        (adalora, [BAD, "AdaLoRA", "ADALORA"]),
        (wrong_rank, [BAD, "rank 16", "--rank-from tensor"]),
        (int8, [BAD, MODULE, "lora_A", "int8"]),
        (two_names, [BAD, "--adapter-name"]),
        (sub_folder, [BAD, "inner"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_one_bad_client_stops_everything(tmp_path, capsys, make, named):
    clients = make_clients(tmp_path)
    make(tmp_path / BAD)
    refused(capsys, tmp_path, ["aggregate", *clients, str(tmp_path / BAD), "-o", str(tmp_path / "out")], *named)


@pytest.mark.parametrize("make", [broken_json, lone_a, other_shape, nan, infinite, dora, no_folder])
def test_policy_drop_goes_on_without_the_bad_client(tmp_path, capsys, make):
    clients = make_clients(tmp_path)
    make(tmp_path / BAD)
    argv = ["aggregate", clients[0], str(tmp_path / BAD), *clients[1:], "--policy", "drop", "--weights", "1,2,3,1"]
    assert main([*argv, "-o", str(tmp_path / "out"), "--energy", "1"]) == 0
    out = capsys.readouterr().out
    assert BAD in out
    assert "dropped" in out
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["clients"]
    assert [row["status"] for row in rows] == ["used", "dropped", "used", "used"]
    assert [row["weight"] for row in rows] == pytest.approx([0.2, 0.0, 0.6, 0.2])
    assert BAD in rows[1]["reason"]

    without = ["aggregate", *clients, "--weights", "1,3,1", "-o", str(tmp_path / "without"), "--energy", "1", "--quiet"]
    assert main(without) == 0
    tensors = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "without")]
    assert tensors[0][-1000:] == tensors[1][-1000:]


def test_policy_drop_stops_below_its_limits(tmp_path, capsys):
    clients = make_clients(tmp_path)
    nan(tmp_path / BAD)
    argv = ["aggregate", *clients, str(tmp_path / BAD), "-o", str(tmp_path / "out"), "--policy", "drop"]
    refused(capsys, tmp_path, [*argv, "--min-clients", "4"], "3", "4")
    refused(capsys, tmp_path, [*argv, "--weights", "1,1,1,9"], "0.25", "0.5")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--weights", "1,2"], ["2 weights for 3 clients"]),
        (["--weights", "1,2,3,4"], ["4 weights for 3 clients"]),
        (["--weights", "1,-2,3"], ["'c1'", "-2", "--no-normalize"]),
        (["--weights", "0,0,0"], ["all 0"]),
        (["--weights", "1,nan,3"], ["'c1'", "nan"]),
        (["--weights", "1,2,inf"], ["'c2'", "inf"]),
        (["--weights", "1,x,3"], ["--weights", "'x'"]),
        (["--energy", "1.5"], ["--energy", "1.5", "<= 1"]),
        (["--energy", "0"], ["--energy", "0.0"]),
        (["--energy", "nan"], ["--energy", "nan"]),
        (["--rank", "0"], ["--rank", "0"]),
        (["--sv-ratio", "0.5"], ["--sv-ratio", "0.5"]),
        (["--absolute", "-1"], ["--absolute", "-1"]),
        (["--method", "florest"], ["florest", "florist"]),
        (["--method", "fedit", "--energy", "0.9"], ["--energy", "fedit"]),
        (["--method", "fedit", "--max-rank", "4"], ["--max-rank", "fedit"]),
        (["--set", "option=1"], ["option", "florist"]),
        (["--set", "option"], ["option=value"]),
        (["--set", "rule=Energy"], ["--energy"]),
        (["--backend", "abacus"], ["abacus", "known backends", "reference"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--memory", "lots"], ["--memory", "lots"]),
        (["--max-update-norm", "median"], ["--max-update-norm", "--policy clip"]),
        (["--policy", "drop", "--min-weight", "2"], ["min_weight", "2"]),
        (["--min-clients", "9"], ["Add clients, or lower --min-clients or --min-weight"]),
        (["--previous", "absent"], ["--previous", "absent"]),
        (["--report", "r.txt"], ["--report", "r.txt", ".json", ".html"]),
        (["--report", "absent/r.json"], ["--report", "absent"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--robust", "krum"], ["--robust"]),
    ],
)
def test_wrong_arguments(tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    refused(capsys, tmp_path, ["aggregate", *make_clients(tmp_path), "-o", str(tmp_path / "out"), *flags], *named)


@pytest.mark.parametrize("value", ["a=", "=x", "=", "c0=elsewhere"])
def test_wrong_client_names(tmp_path, capsys, value):
    refused(capsys, tmp_path, ["aggregate", *make_clients(tmp_path), value, "-o", str(tmp_path / "out")], value[:1])


@pytest.mark.parametrize("policy", ["strict", "drop"])
def test_an_empty_path_is_not_the_current_folder(tmp_path, capsys, monkeypatch, policy):
    clients = make_clients(tmp_path)
    monkeypatch.chdir(clients[0])
    out = str(tmp_path / "out")
    refused(capsys, tmp_path, ["aggregate", "", *clients[1:], "-o", out, "--policy", policy], "path is empty")
    refused(capsys, tmp_path, ["aggregate", f"a={clients[1]}", "", "-o", out], "path is empty")
    refused(capsys, tmp_path, ["inspect", ""], "path is empty")
    refused(capsys, tmp_path, ["aggregate", *clients, "-o", ""], "output '' is not a path")
    refused(capsys, tmp_path, ["aggregate", *clients, "-o", out, "--previous", ""], "--previous")


def test_the_output_must_have_a_place(tmp_path, capsys):
    clients = make_clients(tmp_path)
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/out", "absent/out"):
        refused(
            capsys, tmp_path, ["aggregate", *clients, "-o", str(tmp_path / out)], "file" if "file" in out else "absent"
        )


def test_a_strangers_folder_is_never_replaced(tmp_path, capsys):
    clients = make_clients(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        refused(capsys, tmp_path, ["aggregate", *clients, "-o", str(out), *flags], "out", "thesis.tex")


def test_a_strangers_file_among_ours_is_never_replaced(tmp_path, capsys):
    clients = make_clients(tmp_path)
    out = tmp_path / "out"
    assert main(["aggregate", *clients, "-o", str(out), "--quiet"]) == 0
    (out / "notes.txt").write_text("mine")
    refused(capsys, tmp_path, ["aggregate", *clients, "-o", str(out), "--overwrite"], "notes.txt")


def test_our_own_output_needs_overwrite(tmp_path, capsys):
    clients = make_clients(tmp_path)
    argv = ["aggregate", *clients, "-o", str(tmp_path / "out"), "--quiet"]
    assert main(argv) == 0
    refused(capsys, tmp_path, argv, "out", "--overwrite")
    assert main([*argv, "--overwrite", "--rank", "1"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 1


def test_the_output_is_checked_before_any_data_is_read(tmp_path, capsys):
    nan(tmp_path / BAD)
    (tmp_path / "file").write_text("x")
    line = refused(capsys, tmp_path, ["aggregate", str(tmp_path / BAD), "-o", str(tmp_path / "file" / "out")])
    assert "lora_B" not in line


def test_all_bad_clients_are_named_in_one_line(tmp_path, capsys):
    clients = make_clients(tmp_path)
    nan(tmp_path / "c8")
    lone_a(tmp_path / BAD)
    line = refused(
        capsys, tmp_path, ["aggregate", *clients, str(tmp_path / BAD), str(tmp_path / "absent"), "-o", "out"]
    )
    assert BAD in line
    assert "absent" in line


def test_names_in_errors_hold_no_escapes(tmp_path, capsys):
    evil = tmp_path / "c\x1b[31m\x07"
    lone_a(evil)
    line = refused(capsys, tmp_path, ["aggregate", str(evil), "-o", str(tmp_path / "out")])
    assert not any(ord(char) < 32 for char in line.rstrip("\n"))


def test_a_traceback_only_with_verbose(tmp_path, capsys):
    assert main(["aggregate", str(tmp_path / "absent"), "-o", str(tmp_path / "out"), "--verbose"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("fedlora: error: ")
    assert os.listdir(tmp_path) == []


def test_float16_overflow_is_a_failure_of_the_run(tmp_path, capsys):
    clients = make_clients(tmp_path, alpha=10**7)
    argv = ["aggregate", *clients, "-o", str(tmp_path / "out"), "--dtype", "float16"]
    refused(capsys, tmp_path, argv, "module", "float16", status=1)


def test_a_missing_config_beside_pickled_weights(tmp_path, capsys):
    clients = make_clients(tmp_path)
    folder = make_adapter(tmp_path / BAD)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    refused(capsys, tmp_path, ["aggregate", *clients, str(folder), "-o", str(tmp_path / "out")], BAD, "safetensors")


def test_a_header_larger_than_the_file(tmp_path, capsys):
    folder = make_adapter(tmp_path / BAD)
    save_file({"x": torch.ones(3)}, folder / "adapter_model.safetensors")
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    refused(capsys, tmp_path, ["aggregate", str(folder), "-o", str(tmp_path / "out")], BAD, "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_bytes_end_in_one_line_or_in_a_result(tmp_path, capsys, name):
    clients = make_clients(tmp_path / "clients", 1)
    path = make_adapter(tmp_path / "clients" / BAD) / name
    whole, draw = path.read_bytes(), random.Random(7)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3))):
            damaged[draw.randrange(min(len(whole), 700))] = draw.choice((draw.randrange(256), *b'"{}[],:0-'))
        path.write_bytes(damaged[: draw.choice((len(whole), len(whole), draw.randrange(len(whole))))])
        argv = ["aggregate", *clients, str(path.parent), "-o", str(tmp_path / "out"), "--quiet", "--overwrite"]
        status = main(argv)
        err = capsys.readouterr().err
        assert status in (0, 2), (bytes(damaged), err)
        if status == 2:
            refusals += 1
            assert err.count("\n") == 1
            assert err.startswith("fedlora: error: client 'c9'"), err
            assert sorted(os.listdir(tmp_path)) in (["clients"], ["clients", "out"])
    assert refusals > 75


def test_status_and_line_of_a_real_process(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fedlora_kernels",
        "aggregate",
        str(tmp_path / "absent"),
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fedlora: error: client 'absent'")
    assert os.listdir(tmp_path) == []
