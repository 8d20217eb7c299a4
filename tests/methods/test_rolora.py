"""RoLoRA: A frozen in even rounds, B in odd ones; exact in each."""

from dataclasses import replace

import pytest
import torch
from common_problems import EQUAL, OUTPUTS, batched, common_A, common_B, products, without
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import Problem, distance, normalised, product, standard

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import MismatchError
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods import factors
from fedlora_kernels.methods.contract import Previous, make_method

BACKENDS = ("torch", "reference", "auto")
EVEN, ODD = None, Previous(round=0)
ROUNDS = {"even": (common_A, EVEN), "odd": (common_B, ODD)}


def made(turn, **fields) -> Problem:
    return ROUNDS[turn][0](ranks=fields.pop("ranks", EQUAL), **fields)


def run(turn, problem, **fields):
    return problem.run("rolora", previous=ROUNDS[turn][1], **fields)


def combine(turn, problems, **fields):
    return make_method("rolora", {}).combine(batched(problems, round=int(turn == "odd"), **fields), None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turn", ROUNDS)
@pytest.mark.parametrize("shape", [{}, {"m": 6}, {"n": 6}, {"m": 3}, {"n": 2}, {"ranks": (1, 1)}, {"ranks": (7,)}])
def test_the_product_is_the_weighted_sum_in_each_round(turn, shape, backend):
    p = made(turn, **shape)
    outcome = run(turn, p, backend=backend)
    off = distance(product(outcome), p.dense())
    assert off < 1e-14
    assert float(outcome.error[0]) == 0.0
    assert off <= float(outcome.error_bound[0]) < 1e-13
    assert float(outcome.energy[0]) == pytest.approx(float(p.dense().norm()) ** 2, rel=1e-12)


def test_even_rounds_average_B_and_keep_A():
    p = made("even")
    outcome = run("even", p)
    assert torch.equal(outcome.A[0], p.A[0])
    mean = sum(w * s * b for w, s, b in zip(p.weight, p.scale, p.B, strict=True))
    assert distance(outcome.B[0], mean) < 1e-15
    assert torch.equal(outcome.B, p.run("ffa").B)


def test_odd_rounds_average_A_and_keep_the_folded_B():
    p = made("odd")
    outcome = run("odd", p)
    assert torch.equal(outcome.B[0], p.scale[0] * p.B[0])
    assert distance(outcome.A[0], sum(w * a for w, a in zip(p.weight, p.A, strict=True))) < 1e-15


def test_rounds_alternate_from_A():
    method = make_method("rolora", {})
    assert [method.frozen_factor(t) for t in range(4)] == ["A", "B", "A", "B"]
    assert method.needs_round
    assert method.equal_ranks
    assert method.broadcast_rank((6, 6), 6, 0) == 3.0


def test_the_wrong_parity_is_wrong():
    """Guards against an answer that ignores the round: where only B is common, averaging B is not D."""
    p = made("odd")
    assert distance(product(run("even", p)), p.dense()) > 0.05


@pytest.mark.parametrize("turn", ROUNDS)
def test_exact_methods_and_fedit_agree(turn):
    p = made(turn)
    for method, rule in (("florist", Energy(1.0)), ("flora", None)):
        assert distance(product(p.run(method, rule=rule)), product(run(turn, p))) < 1e-12
    assert distance(product(p.run("fedit")), product(run(turn, p))) < 1e-12


@pytest.mark.parametrize("turn", ROUNDS)
@given(
    weight=st.lists(st.floats(-2.0, 2.0).filter(lambda w: w == 0.0 or abs(w) > 1e-3), min_size=5, max_size=5).filter(
        any
    ),
    seed=st.integers(0, 50),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_weights_are_exact_whatever_they_sum_to(turn, weight, seed):
    p = replace(made(turn, seed=seed), weight=weight)
    size = sum(abs(w) * float(d.norm()) for w, d in zip(weight, p.updates(), strict=True))
    assert float((product(run(turn, p)) - p.dense()).norm()) < 1e-14 * size


@pytest.mark.parametrize("turn", ROUNDS)
@pytest.mark.parametrize("clip", [(1.0, 0.3, 1.0, 0.01, 0.7), (0.5, 0.3, 0.9, 0.0, 0.9)])
def test_clipped_clients_count_as_much_less(turn, clip):
    """Clipping multiplies s_k: what was frozen in common then differs by known factors, and the product stays D."""
    p = made(turn)
    clipped = replace(p, scale=[s * c for s, c in zip(p.scale, clip, strict=True)])
    outcome = run(turn, clipped)
    assert distance(product(outcome), clipped.dense()) < 1e-14
    if turn == "odd":
        assert distance(outcome.B[0], max(clip) * p.scale[0] * p.B[0]) < 1e-15


def test_an_unclipped_client_keeps_B_bitwise():
    p = made("odd")
    clipped = replace(p, scale=[0.3 * p.scale[0], *p.scale[1:]])
    assert torch.equal(run("odd", clipped).B[0], p.scale[0] * p.B[0])


@pytest.mark.parametrize("turn", ROUNDS)
@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("stored", OUTPUTS)
def test_every_dtype_in_and_out(turn, stored, dtype):
    p = made(turn, dtype=stored)
    outcome = run(turn, p, dtype=dtype)
    off = distance(product(outcome), p.dense())
    assert outcome.B.dtype == outcome.A.dtype == dtype
    assert off <= float(outcome.error_bound[0]) < 4 * torch.finfo(dtype).eps + 1e-13
    if torch.promote_types(stored, dtype) == dtype:
        kept = outcome.A[0] if turn == "even" else outcome.B[0]
        assert torch.equal(kept.double(), p.A[0].double() if turn == "even" else p.scale[0] * p.B[0].double())


@pytest.mark.parametrize("turn", ROUNDS)
def test_one_client_and_identical_clients_return_that_update(turn):
    one = made(turn, ranks=(7,))
    for copies in (1, 4):
        p = Problem(one.B * copies, one.A * copies, one.scale * copies, normalised([1, 2, 4, 5][:copies]))
        assert distance(product(run(turn, p)), one.dense()) < 1e-14


@pytest.mark.parametrize("turn", ROUNDS)
def test_splitting_a_client_and_their_order_change_nothing(turn):
    p = made(turn)
    order = [0, 1, 1, 4, 3, 2]
    split = replace(p.permuted(order), weight=[p.weight[k] / (2 if k == 1 else 1) for k in order])
    assert distance(product(run(turn, split)), product(run(turn, p))) < 1e-14


@pytest.mark.parametrize("turn", ROUNDS)
def test_two_levels_equal_one(turn):
    p = made(turn)
    parts = []
    for chosen in ([0, 2], [1, 3, 4]):
        mass = sum(p.weight[k] for k in chosen)
        part = p.permuted(chosen)
        outcome = run(turn, replace(part, weight=[w / mass for w in part.weight]))
        parts.append((outcome.B[0], outcome.A[0], mass))
    top = Problem([b for b, _, _ in parts], [a for _, a, _ in parts], [1.0, 1.0], [mass for _, _, mass in parts])
    assert distance(product(run(turn, top)), p.dense()) < 1e-14


@pytest.mark.parametrize("turn", ROUNDS)
def test_scaling_every_update_scales_the_product(turn):
    p = made(turn)
    scaled = replace(p, scale=[7.0 * s for s in p.scale])
    assert distance(product(run(turn, scaled)), 7.0 * product(run(turn, p))) < 1e-14


def test_mixed_ranks_are_refused():
    for previous in (EVEN, ODD):
        with pytest.raises(MismatchError, match=r"layers\.0\.q_proj.*4, 8, 12"):
            standard().run("rolora", previous=previous)


@pytest.mark.parametrize("turn", ROUNDS)
def test_a_client_without_the_module_adds_nothing(turn):
    p = made(turn)
    for weight in ([0.0, 0.2, 0.1, 0.3, 0.4], p.weight):  # renormalised over the owners, or kept for a zero update
        absent = without(p, 0, weight)
        outcome = run(turn, absent)
        assert distance(product(outcome), absent.dense()) < 1e-14
        assert int(outcome.info[0]) == 0


@pytest.mark.parametrize("turn", ROUNDS)
def test_what_has_weight_zero_is_not_read(turn):
    p = made(turn)
    p.B[0][:] = float("nan")
    p.A[0][:] = float("inf")
    p = replace(p, weight=[0.0, 0.25, 0.25, 0.25, 0.25])
    outcome = run(turn, p)
    assert int(outcome.info[0]) == 0
    assert distance(product(outcome), p.permuted([1, 2, 3, 4]).dense()) < 1e-14


@pytest.mark.parametrize("turn", ROUNDS)
def test_zero_update_has_a_note_and_no_error(turn):
    p = made(turn)
    outcome = run(turn, replace(p, B=[torch.zeros_like(b) for b in p.B]))
    assert int(outcome.notes[0]) == Note.ZERO
    assert int(outcome.info[0]) == 0
    assert float(outcome.error[0]) == float(outcome.error_bound[0]) == 0.0
    empty = Problem([b[:, :0] for b in p.B], [a[:0] for a in p.A], [0.0] * 5, p.weight)
    assert int(run(turn, empty).notes[0]) == Note.ZERO


@pytest.mark.parametrize("turn", ROUNDS)
def test_overflow_is_flagged(turn):
    assert int(run(turn, made(turn, scale=(2.0**20,) * 5)).info[0]) == 0
    p = made(turn)
    wide = replace(p, B=[1e6 * b for b in p.B])
    assert int(run(turn, wide, dtype=torch.float16).info[0]) == Info.OVERFLOW


@pytest.mark.parametrize("turn", ROUNDS)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("k", [0, 3])
def test_bad_numbers_of_any_client_are_flagged_for_their_module_alone(turn, bad, factor, k):
    problems = [made(turn, seed=seed) for seed in range(3)]
    clean = combine(turn, problems)
    getattr(problems[1], factor)[k][2, 1] = bad
    outcome = combine(turn, problems)
    assert [int(code) & Info.NONFINITE for code in outcome.info] == [0, Info.NONFINITE, 0]
    assert torch.equal(outcome.B[::2], clean.B[::2])
    assert torch.equal(outcome.A[::2], clean.A[::2])


@pytest.mark.parametrize("turn", ROUNDS)
def test_work_in_pieces_is_bitwise_the_same(monkeypatch, turn):
    problems = [made(turn, seed=seed) for seed in range(4)]
    problems[2] = replace(problems[2], weight=[0.0, 0.25, 0.25, 0.25, 0.25])
    whole = combine(turn, problems)
    monkeypatch.setattr(factors, "CHUNK", 1)
    part = combine(turn, problems)
    for field in ("B", "A", "rank", "notes", "info", "error"):
        assert torch.equal(getattr(part, field), getattr(whole, field))
    assert distance(products(part), torch.stack([p.dense() for p in problems])) < 1e-14
