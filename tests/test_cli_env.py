"""fedlora env: what it says about this machine, and that a wrong or broken backend cannot pass its self-test."""

import platform

import pytest
import torch

from fedlora_kernels import backends, environment, linalg
from fedlora_kernels.cli import main
from fedlora_kernels.errors import BackendError


def test_env_says_versions_processor_and_backends(capsys, monkeypatch):
    monkeypatch.setenv("FEDLORA_SOMETHING", "va\x1blue")
    assert main(["env"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    for text in (platform.python_version(), torch.__version__, "FEDLORA_SOMETHING=va?lue", "passed", "Backends"):
        assert text in captured.out
    for name, (on, _) in backends.status().items():
        (line,) = (line for line in captured.out.splitlines() if line.split()[:1] == [name])
        assert line.split()[1] == ("on" if on else "off")


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("FEDLORA_BACKEND", "bogus", ["unknown backend 'bogus'", *backends.NAMES]),
        ("FEDLORA_NUM_THREADS", "many", ["FEDLORA_NUM_THREADS='many'", "whole number"]),
        ("FEDLORA_NUM_THREADS", "0", ["FEDLORA_NUM_THREADS='0'", "whole number"]),
    ],
)
def test_a_variable_that_ends_every_run_is_a_problem(capsys, monkeypatch, variable, value, named):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(backends, "status", dict)
    assert main(["env"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "problem: " in out
    for text in named:
        assert text in out.partition("problem: ")[2]


@pytest.mark.parametrize("value", ["", "auto", "reference"])
def test_a_variable_that_can_be_used_is_none(monkeypatch, value):
    monkeypatch.setenv("FEDLORA_BACKEND", value)
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "1")
    monkeypatch.setattr(backends, "status", dict)
    report = environment.survey()
    assert report["problems"] == []
    assert report["healthy"]


def test_env_stays_narrow_in_a_pipe(capsys, monkeypatch):
    reason = "cannot be loaded: " + "/a/long/path/" * 30 + "lib.so: " + "no such symbol, " * 20
    status = {"cpu": (False, reason), "reference": (True, "always there")}
    monkeypatch.setattr(backends, "status", lambda: status)
    monkeypatch.setenv("FEDLORA_SOMETHING", "x" * 500)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    joined = "".join(out.split())
    assert reason.replace(" ", "") in joined
    assert "x" * 500 in joined


@pytest.mark.parametrize("name", backends.NAMES)
def test_each_backend_here_passes(name):
    on, reason = backends.status()[name]
    if not on:
        pytest.skip(f"{name}: {reason}")
    found = environment.self_test(name)
    assert found["passed"], found
    assert found["tested"]
    assert found["error"] <= found["limit"]


def test_a_wrong_answer_fails(monkeypatch, capsys):
    right = linalg.core_svd

    def wrong(C, *, backend="auto", **more):
        return right(C * (1.0 if backend == "reference" else 1.0 + 1e-9), backend=backend, **more)

    monkeypatch.setattr(linalg, "core_svd", wrong)
    found = environment.self_test("torch")
    assert not found["passed"]
    assert "core_svd: error 1.0e-09" in found["failure"]
    assert main(["env"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_answer_fails(monkeypatch, value):
    monkeypatch.setattr(linalg, "update_gram", lambda *_, backend, **__: torch.full((3, 3), value, dtype=torch.float64))
    assert not environment.self_test("torch")["passed"]


def test_a_crash_fails_and_is_named(monkeypatch):
    def crash(*_, **__):
        raise OSError("symbol not found")

    monkeypatch.setattr(linalg, "stacked_qr", crash)
    found = environment.self_test("torch")
    assert "stacked_qr: OSError: symbol not found" in found["failure"]


def test_an_operation_not_served_is_left_out(monkeypatch):
    def refuse(*_, **__):
        raise BackendError("not served")

    monkeypatch.setattr(linalg, "procrustes_rotation", refuse)
    found = environment.self_test("torch")
    assert found["passed"]
    assert found["left_out"] == ["procrustes_rotation: not served"]
    assert "procrustes_rotation" not in found["tested"]


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("sse4_2 ssse3 sse4_1 popcnt cx16", "x86-64-v2"),
        ("avx2 bmi1 bmi2 f16c fma movbe", "x86-64-v3"),
        ("avx512f avx512bw avx512cd avx512dq avx512vl avx2", "x86-64-v4"),
        ("avx512f", "x86-64"),
    ],
)
def test_simd_level_of_x86(monkeypatch, flags, level):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(environment, "_cpuinfo", lambda: {"flags": flags, "model name": "Some CPU"})
    assert environment.processor()["simd"] == level
    assert environment.processor()["name"] == "Some CPU"


def test_a_machine_without_cpuinfo(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(environment, "_cpuinfo", dict)
    assert environment.processor()["simd"] == "NEON"
