"""fedlora bench: structure of the report, accuracy gates, refusals. Times are never looked at."""

import json
import math
import time

import pytest
import torch

from fedlora_kernels import backends, bench
from fedlora_kernels.bench import floors, peers, timing
from fedlora_kernels.bench.comparison import Comparison, Peer, Setting
from fedlora_kernels.bench.timing import measure, summary
from fedlora_kernels.cli import main
from fedlora_kernels.testing import Check

FIGURES = {"seconds", "q20", "q80", "runs", "threads", "seconds_by_threads", "accuracy"}


@pytest.fixture(scope="module")
def quick():
    """One report of all suites on tiny problems."""
    return bench.run(quick=True, seconds=1e-4, threads=2)


def test_every_suite_has_rows_and_every_row_a_green_gate(quick):
    assert quick["passed"]
    assert {row["suite"] for row in quick["rows"]} == set(bench.SUITES) == set(quick["suites"])
    for row in quick["rows"]:
        assert row["red"] == []
        assert row["reason"] is None
        assert row["backend"] in backends.names()
        assert not row["failed_peers"]


def test_ours_and_every_peer_have_times_quantiles_and_accuracy(quick):
    for row in quick["rows"]:
        assert row["peers"]
        for figures in (row["ours"], *row["peers"].values()):
            assert set(figures) == FIGURES
            assert 0 < figures["q20"] <= figures["seconds"] <= figures["q80"]
            assert figures["accuracy"]
            assert all(math.isfinite(value) for value in figures["accuracy"].values())
            assert set(figures["accuracy"]) == set(row["ours"]["accuracy"])
        best = row["peers"][row["peer"]]
        assert best["seconds"] == min(figures["seconds"] for figures in row["peers"].values())
        assert row["ratio"] == pytest.approx(best["seconds"] / row["ours"]["seconds"])


def test_both_numbers_of_threads_were_tried(quick):
    assert quick["threads"] == [1, 2]
    assert set(quick["rates"]) == {"1", "2"}
    for row in quick["rows"]:
        assert set(row["ours"]["seconds_by_threads"]) == {"1", "2"}


def test_the_report_says_on_what_it_was_taken(quick):
    assert quick["packages"]["torch"]
    assert quick["processor"]["name"]
    assert quick["absent"] == []
    assert all(row["load"] is not None for row in quick["rows"])


@pytest.mark.skipif(not backends.status()["cpu"][0], reason="the rate of multiply-adds is the native library's")
def test_floors_are_counted_from_the_rates_of_the_run(quick):
    assert all(value > 0 for rate in quick["rates"].values() for value in rate.values())
    for row in quick["rows"]:
        assert row["floor"] > 0
        assert row["times_floor"] == pytest.approx(row["ours"]["seconds"] / row["floor"])
        assert row["floor"] == pytest.approx(sum(stage["seconds"] for stage in row["stages"]))


def test_a_stage_takes_the_longer_of_moving_and_computing():
    rates = floors.Rates(float64=10.0, float32=20.0, copy=5.0)
    assert floors.Stage("", 50.0, 20.0, 40.0).seconds(rates) == 10.0
    assert floors.Stage("", 5.0, 20.0, 40.0).seconds(rates) == 4.0
    assert floors.Stage("", 50.0, 20.0).bound(rates) == "memory"
    assert floors.Stage("", 5.0, 20.0).bound(rates) == "multiply-add"
    assert math.isnan(floors.Stage("", 1.0, 1.0).seconds(floors.Rates(math.nan, math.nan, 5.0)))


def test_the_best_rate_counts_at_whichever_number_of_threads():
    assert floors.best([floors.Rates(1.0, 5.0, 2.0), floors.Rates(3.0, 4.0, 1.0)]) == (3.0, 5.0, 2.0)


def test_without_the_library_floors_are_unknown_and_the_rest_stays(monkeypatch, capsys):
    status = {**backends.status(), "cpu": (False, "not built")}
    monkeypatch.setattr(backends, "status", lambda: status)
    report = bench.run(["polar"], quick=True, seconds=1e-4, threads=1)
    assert all(row["floor"] is None and row["times_floor"] is None and row["ratio"] for row in report["rows"])
    assert main(["bench", "polar", "--quick", "--seconds", "1e-4", "--threads", "1"]) == 0
    assert "unknown Gflop/s" in capsys.readouterr().out


def test_no_ratio_of_a_wrong_answer(monkeypatch, capsys, tmp_path):
    suite = bench.SUITES["polar"]

    def wrong(setting):
        for row in suite(setting):
            fields = {**vars(row), "gate": lambda *_: [Check("orthogonality", 1e-3, 1e-9), Check("fine", 0.0, 1.0)]}
            yield Comparison(**fields)

    monkeypatch.setattr(bench, "SUITES", {"polar": wrong})
    target = tmp_path / "figures.json"
    assert main(["bench", "--quick", "--seconds", "1e-4", "--threads", "1", "--json", str(target)]) == 1
    assert "REFUSED: orthogonality 1.0e-03, limit 1.0e-09" in capsys.readouterr().out
    report = json.loads(target.read_text())
    assert not report["passed"]
    assert [row["ratio"] for row in report["rows"]] == [None]


def test_a_perturbed_kernel_turns_its_gate_red(monkeypatch):
    kernel = backends.get("torch")

    class Spoilt:
        name, bitwise = "torch", kernel.bitwise
        serves = staticmethod(kernel.serves)

        def core_svd(self, groups):
            return [raw._replace(U=raw.U * (1 + 1e-5)) for raw in kernel.core_svd(groups)]

    real = backends.get
    monkeypatch.setattr(backends, "get", lambda name: Spoilt() if name == "torch" else real(name))
    report = bench.run(["small_svd"], backend="torch", quick=True, seconds=1e-4, threads=1)
    assert not report["passed"]
    assert all(row["red"] and row["ratio"] is None for row in report["rows"])


def test_a_peer_that_breaks_down_is_named():
    def fail():
        raise ValueError("did not converge\nat all")

    figures = {"error": 0.0}
    one = Peer(lambda: 1, 1, lambda _: figures)
    row = Comparison(
        suite="sums", case={}, op="weighted_sum", count=1, accuracy=lambda _: figures, gate=lambda *_: [],
        ours=lambda: bench.suites.linalg.weighted_sum([torch.ones(2, 2)]), floor=[],
        peers={"bad": Peer(fail, 1, lambda _: figures), "good": one},
    ).run(Setting("auto", (1,), 1e-4, True), {1: floors.Rates(1.0, 1.0, 1.0)})  # fmt: skip
    assert row["failed_peers"] == {"bad": "ValueError: did not converge"}
    assert row["peer"] == "good"
    assert row["floor"] is None


def test_what_a_named_backend_does_not_serve_is_a_row_with_its_reason(monkeypatch, capsys):
    class Refusing:
        name, bitwise = "torch", frozenset()

        def serves(self, op, *_):
            return op != "core_svd", "not today"

        def __getattr__(self, op):
            return getattr(kernel, op)

    kernel, real = backends.get("torch"), backends.get
    monkeypatch.setattr(backends, "get", lambda name: Refusing() if name == "torch" else real(name))
    argv = ["bench", "--backend", "torch", "--quick", "--seconds", "1e-4", "--threads", "1"]
    assert main([*argv, "small_svd", "polar"]) == 0
    assert "not today" in capsys.readouterr().out
    assert main([*argv, "small_svd"]) == 1
    assert "not today" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["svds"], ["unknown suite 'svds'", "small_svd"]),
        (["--backend", "bogus"], ["unknown backend 'bogus'"]),
        (["--threads", "0"], ["--threads"]),
        (["--seconds", "nan"], ["--seconds"]),
        (["--seconds", "0"], ["--seconds"]),
        (["--json", "figures"], ["--json figures", ".json"]),
        (["--json", "no/such/folder/figures.json"], ["no folder"]),
        (["--fast"], ["--fast"]),
    ],
)
def test_wrong_arguments_are_one_line(capsys, argv, named):
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(text in err for text in named)


def test_threads_and_their_variable_are_put_back(monkeypatch):
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "1")
    before = torch.get_num_threads()
    bench.run(["polar"], quick=True, seconds=1e-4, threads=2)
    assert torch.get_num_threads() == before
    assert bench.os.environ["FEDLORA_NUM_THREADS"] == "1"


def test_a_short_call_is_repeated_within_its_turn(monkeypatch):
    monkeypatch.setattr(timing, "TURN", 0.01)
    prepared = []
    took = measure({"a": lambda: None, "b": lambda: time.sleep(0.02)}, seconds=1e-9, prepare=prepared.append)
    assert took["a"].runs > 10 * took["b"].runs


def test_calls_are_interleaved_and_prepared(monkeypatch):
    monkeypatch.setattr(timing, "TURN", 0.0)
    order, prepared = [], []
    took = measure(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=1e-9, prepare=prepared.append
    )
    assert order == prepared
    assert order[-6:] == ["a", "b"] * 3
    assert {timing.runs for timing in took.values()} == {3}


def test_quantiles():
    timing = summary([5.0, 1.0, 4.0, 2.0, 3.0])
    assert timing == (3.0, 2.0, 5.0, 5)


def test_peers_agree_with_each_other():
    torch.manual_seed(0)
    B, A = torch.randn(2, 37, 8, dtype=torch.float64), torch.randn(2, 8, 41, dtype=torch.float64)
    exact = torch.linalg.svdvals(B @ A)[:, :8]
    for route in (peers.qr_qr_core, peers.thin_svds, peers.gram_eigh, peers.cholesky_qr_core, peers.dense):
        U, S, Vh = route(B, A)
        assert (S[:, :8] - exact).abs().max() < 1e-9 * exact.max()
        assert (U[..., :8] * S[:, None, :8] @ Vh[:, :8] - B @ A).abs().max() < 1e-6
    U, S, Vh = peers.randomised(B[0], A[0], 3)
    assert (S[:3] - exact[0, :3]).abs().max() < 1e-6
    Q, R = peers.cholesky_qr(B[0], twice=True)
    assert (Q @ R - B[0]).abs().max() < 1e-12
    assert (Q.mT @ Q - torch.eye(8)).abs().max() < 1e-14


def test_an_absent_library_is_named(monkeypatch):
    monkeypatch.setattr(peers, "optional", lambda name: None)
    report = bench.run(["small_svd"], quick=True, seconds=1e-4, threads=1)
    assert report["absent"] == ["numpy", "scipy"]
    assert all(name.startswith("torch") for row in report["rows"] for name in row["peers"])
