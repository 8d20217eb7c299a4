"""Merges with weights of any sign: the sum as asked for, how far it cancels, and that its certificate holds when little is left."""

import json
import math

import mpmath
import pytest
import torch
from adapter_problems import FIRST, PREFIX, SHAPES, changed, client, clients, distance, products, updates, weighted
from make_adapters import dense, make_adapter

import fedlora_kernels as fk
from fedlora_kernels.cli import main
from fedlora_kernels.errors import InputError

ALL = fk.Energy(1.0)
MERGE = {"normalize": False, "rule": ALL}


def expected(pairs, weights):
    """Cancellation of each module and of the model, from dense updates."""
    parts = [updates(pair) for pair in pairs]
    D = weighted(pairs, weights, normalize=False)
    rows = {}
    for name, whole in D.items():
        sizes = [abs(w) * float(part[name].norm()) for w, part in zip(weights, parts, strict=True)]
        rows[name] = (float(whole.norm()) / math.fsum(sizes)) ** 2, sizes
    energy = math.fsum(float(whole.norm()) ** 2 for whole in D.values())
    total = math.fsum(
        abs(w) * math.sqrt(math.fsum(float(part[name].norm()) ** 2 for name in D))
        for w, part in zip(weights, parts, strict=True)
    )
    return rows, energy / total**2


@pytest.mark.parametrize("weights", [[1.0, -1.0, 0.5], [2.0, 0.0, -3.0], [1.0, 1.0, 1.0], [-1.0, -2.0, -0.25]])
def test_the_sum_and_its_cancellation(weights):
    pairs = clients((4, 2, 5), dtype=torch.float64)
    result = fk.aggregate(pairs, weights=weights, **MERGE)
    assert distance(products(result.adapter), weighted(pairs, weights, normalize=False)) < 1e-13
    used = [(pair, w) for pair, w in zip(pairs, weights, strict=True) if w]
    rows, total = expected(*zip(*used, strict=True))
    for row in result.report["modules"]:
        cancellation, sizes = rows[row["name"]]
        assert row["cancellation"] == pytest.approx(cancellation, rel=1e-12)
        assert row["contributions"] == pytest.approx(sizes, rel=1e-12)
    assert result.report["totals"]["cancellation"] == pytest.approx(total, rel=1e-12)


def test_updates_that_agree_do_not_cancel():
    pair = client(dtype=torch.float64)
    report = fk.aggregate([pair, pair, pair], weights=[2.0, 0.5, 3.0], **MERGE).report
    assert report["totals"]["cancellation"] == pytest.approx(1.0, rel=1e-12)
    assert {row["cancellation"] <= 1.0 for row in report["modules"]} == {True}


def test_weights_that_are_normalised_are_not_looked_at():
    report = fk.aggregate(clients()).report
    assert report["totals"]["cancellation"] is None
    assert {row["cancellation"] for row in report["modules"]} == {None}


def test_on_the_command_line(tmp_path, capsys):
    folders = [str(make_adapter(tmp_path / name, rank=k + 2, seed=k)) for k, name in enumerate("abc")]
    argv = [
        "aggregate",
        *folders,
        "-o",
        str(tmp_path / "out"),
        "--no-normalize",
        "--weights",
        "1,-1,0.5",
        "--energy",
        "1",
    ]
    assert main(argv) == 0
    D = [dense(folder) for folder in folders]
    wanted = {name: D[0][name] - D[1][name] + 0.5 * D[2][name] for name in SHAPES}
    assert distance(dense(tmp_path / "out"), wanted) < 1e-6
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 < report["totals"]["cancellation"] < 1
    assert "cancellation" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gauge", [1.0, 3.0])
def test_a_client_minus_itself_is_a_zero_module_of_rank_1(dtype, gauge):
    """In another gauge too, as far as its dtype can hold one: never directions of rounding noise."""
    pair = client(rank=6, dtype=dtype)
    other = pair
    if dtype == torch.float64:
        other = changed(changed(pair, "B", lambda x: x * 2.0**gauge), "A", lambda x: x / 2.0**gauge)
    result = fk.aggregate([pair, other], weights=[1.0, -1.0], **MERGE)
    row = next(row for row in result.report["modules"] if row["name"] == FIRST)
    assert "ZERO" in row["notes"]
    assert (row["rank"], row["numerical_rank"], row["energy"], row["error"], row["error_bound"]) == (
        1,
        0,
        0.0,
        0.0,
        0.0,
    )
    assert row["cancellation"] == 0.0
    assert result.report["totals"]["cancellation"] == 0.0
    pair = result.adapter[FIRST]
    assert not pair.B.any()
    assert torch.equal(pair.A[0], torch.eye(1, pair.A.shape[1], dtype=pair.A.dtype)[0])
    assert any("updates cancel" in note for note in result.report["notes"])
    dropped = fk.aggregate([client(dtype=dtype)] * 2 + [client(1)], weights=[1, -1, 1], **MERGE)
    assert {row["rank"] for row in dropped.report["modules"]} == {4}


def test_what_cancels_can_be_left_out():
    bias = f"{PREFIX}{FIRST}.lora_B.bias"
    state, settings = client(lora_bias=True)
    pair = {**state, bias: torch.ones(37)}, settings
    with pytest.raises(InputError, match="no modules to write"):
        fk.aggregate([pair, pair], weights=[1, -1], write=fk.WriteOptions(drop_zero=True), **MERGE)


def exact_difference(first, second, name, weights):
    """``w_1 s B_1 A_1 + w_2 s B_2 A_2`` with 50 digits, rounded once."""
    found = []
    for state, settings in (first, second):
        B, A = (state[f"{PREFIX}{name}.lora_{part}.weight"].double().tolist() for part in "BA")
        found.append((B, A, mpmath.mpf(settings["lora_alpha"]) / settings["r"]))
    with mpmath.workdps(50):
        rows, columns = len(found[0][0]), len(found[0][1][0])
        return torch.tensor(
            [
                [
                    float(
                        mpmath.fsum(
                            w * s * mpmath.fsum(mpmath.mpf(b) * A[j][n] for j, b in enumerate(B[m]))
                            for w, (B, A, s) in zip(weights, found, strict=True)
                        )
                    )
                    for n in range(columns)
                ]
                for m in range(rows)
            ],
            dtype=torch.float64,
        )


SMALL = {"a.q_proj": (13, 9)}


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", [ALL, fk.Rank(2), fk.Energy(0.9)], ids=str)
def test_the_certificate_holds_when_little_is_left(delta, dtype, rule):
    """A client minus a copy that differs by delta: against 50 digits, the error is what the report says it is at most."""
    if dtype == torch.float32 and delta < 1e-6:
        delta = 2.0**-23  # the smallest difference that its numbers have
    first = client(rank=4, dtype=dtype, shapes=SMALL, target_modules=["q_proj"])
    made = torch.Generator().manual_seed(9)
    second = changed(
        first,
        "B",
        lambda x: (x * (1 + delta * torch.randn(x.shape, generator=made, dtype=torch.float64))).to(dtype),
        "a.q_proj",
    )
    weights = [1.0, -1.0]
    D = exact_difference(first, second, "a.q_proj", weights)
    S = torch.linalg.svdvals(D)
    result = fk.aggregate([first, second], weights=weights, normalize=False, rule=rule, dtype="float64")
    row = result.report["modules"][0]
    p = row["rank"]
    error = float((products(result.adapter)["a.q_proj"] - D).norm() / D.norm())
    assert error <= row["error_bound"] < error + 0.05
    tail = float(S[p:].norm() / S.norm())
    assert row["error"] == pytest.approx(tail, abs=1e-5)
    values = torch.tensor(row["singular_values"], dtype=torch.float64)
    assert float(((values - S[:p]).abs() / S[:p]).max()) <= row["sigma_err"] < 0.05
    size = float(updates(first)["a.q_proj"].norm() + updates(second)["a.q_proj"].norm())
    assert row["cancellation"] == pytest.approx((float(S.norm()) / size) ** 2, rel=1e-3)
    assert row["cancellation"] < 100 * delta**2


def with_extras(seed, value, kind):
    state, settings = client(seed, modules_to_save=["score"] if kind == "score" else None, lora_bias=kind == "bias")
    if kind == "score":
        return {**state, f"{PREFIX}score.weight": torch.full((2, 3), value)}, settings
    biases = {f"{PREFIX}{name}.lora_B.bias": torch.full((shape[0],), value) for name, shape in SHAPES.items()}
    return {**state, **biases}, settings


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, 1.0], [2.0, -0.5]])
def test_absolute_values_need_weights_that_sum_to_1(tmp_path, weights):
    pairs = [with_extras(0, 3.0, "score"), with_extras(1, 5.0, "score")]
    steps = []
    with pytest.raises(InputError, match=r"score.weight.*weights sum to .*extras='first'"):
        fk.aggregate(pairs, weights=weights, out=tmp_path / "out", progress=lambda *step: steps.append(step), **MERGE)
    assert not steps, "said before anything was read"
    assert not list(tmp_path.iterdir())
    first = fk.aggregate(pairs, weights=weights, read=fk.ReadOptions(extras="first"), **MERGE)
    assert torch.equal(first.adapter.extra("score.weight"), torch.full((2, 3), 3.0))
    assert distance(products(first.adapter), weighted(pairs, weights, normalize=False)) < 1e-6


def test_weights_that_sum_to_1_may_be_negative():
    pairs = [with_extras(0, 3.0, "score"), with_extras(1, 5.0, "score")]
    result = fk.aggregate(pairs, weights=[1.5, -0.5], **MERGE)
    assert torch.equal(result.adapter.extra("score.weight"), torch.full((2, 3), 2.0))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, 1.0], [2.0, -0.5]])
def test_changes_of_a_bias_add_up_with_any_weights(weights):
    pairs = [with_extras(0, 3.0, "bias"), with_extras(1, 5.0, "bias")]
    result = fk.aggregate(pairs, weights=weights, **MERGE)
    wanted = 2.0 * (weights[0] * 3.0 + weights[1] * 5.0)  # the scale is 8 / 4
    assert torch.equal(result.adapter.extra(f"{FIRST}.lora_B.bias"), torch.full((37,), wanted))


def test_the_refusal_names_the_flags(tmp_path, capsys):
    def change(tensors):
        tensors["base_model.model.score.weight"] = torch.ones(2, 3)

    folders = [
        str(make_adapter(tmp_path / n, seed=k, change=change, modules_to_save=["score"])) for k, n in enumerate("ab")
    ]
    argv = ["aggregate", *folders, "-o", str(tmp_path / "out"), "--no-normalize", "--weights", "1,-1", "--quiet"]
    assert main(argv) == 2
    assert "--extras first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--extras", "first"]) == 0


def test_weights_whose_squares_underflow_are_not_said_to_cancel():
    for weights in ([1e-200, 1e-200, 1e-200], [3e-170, 1e-170, 1e-170]):
        report = aggregate_tiny(weights).report
        assert not any("updates cancel" in note for note in report["notes"])
        assert report["totals"]["cancellation"] is None
    assert any("updates cancel" in note for note in aggregate_tiny([1e-100, -1e-100], same=True).report["notes"])


def aggregate_tiny(weights, same=False):
    pairs = [client(0 if same else k) for k in range(len(weights))]
    if same:
        pairs[1] = changed(pairs[1], "B", lambda B: B * (1.0 + 1e-6))
    return fk.aggregate(pairs, rule=fk.Energy(1.0), weights=weights, normalize=False, dtype=torch.float64)
