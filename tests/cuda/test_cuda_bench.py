"""The problems of the GPU benchmark, tiny, on the simulated device: the answers that are to be timed pass their gates."""

import sys
from pathlib import Path

import pytest

from fedlora_kernels import backends

BENCH = Path(__file__).resolve().parents[2] / "bench"
SUITES = ("small_svd", "core_svd", "stacked_qr", "product_svd", "align_factors")

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the source tree")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_kernels

    yield gpu_kernels
    for name in ("gpu_kernels", "timing"):
        sys.modules.pop(name, None)


def test_no_suite_is_left_out(benchmark):
    assert set(benchmark.SUITES) == set(SUITES)


@pytest.mark.parametrize("suite", SUITES)
def test_gates_are_green(benchmark, simt, monkeypatch, suite):
    monkeypatch.setattr(backends, "_load", lambda name: (simt, True, ""))
    for case in benchmark.SUITES[suite](benchmark.Setting("cpu", "cuda", 0.0, True)):
        answer = case.ours()
        assert [check for check in case.gate(answer) if not check.passed] == [], case.facts
        assert all(value < 1e-5 for value in case.accuracy(answer).values()), case.facts
