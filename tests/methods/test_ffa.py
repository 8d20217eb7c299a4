"""FFA-LoRA: one frozen A, nested where ranks differ; the mean of B is exact."""

from dataclasses import replace

import pytest
import torch
from common_problems import EQUAL, OUTPUTS, batched, common_A, cut, products, without
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import RANKS, Problem, distance, normalised, product, zero_client

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods import factors
from fedlora_kernels.methods.contract import Group, make_method

BACKENDS = ("torch", "reference", "auto")
SHAPES = {
    "standard": {"m": 48, "n": 40},
    "m_below_R": {"m": 19, "n": 41},
    "n_below_R": {"m": 53, "n": 17},
    "m_is_rank": {"m": 12, "n": 29},
    "n_is_rank": {"m": 29, "n": 12},
    "one_client": {"ranks": (5,)},
    "rank_one": {"m": 7, "n": 5, "ranks": (1, 1)},
    "row": {"m": 1, "n": 17, "ranks": (2, 1, 3)},
    "column": {"m": 17, "n": 1, "ranks": (2, 1, 3)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_the_weighted_sum_with_nested_frozen_A(shape, backend):
    p = common_A(**SHAPES[shape])
    outcome = p.run("ffa", backend=backend)
    assert distance(product(outcome), p.dense()) < 1e-14
    assert int(outcome.rank[0]) == max(b.shape[1] for b in p.B)
    assert float(outcome.error[0]) == 0.0
    assert distance(product(outcome), p.dense()) <= float(outcome.error_bound[0]) < 1e-13
    assert float(outcome.energy[0]) == pytest.approx(float(p.dense().norm()) ** 2, rel=1e-12)


def test_all_exact_methods_and_fedit_agree_where_A_is_common():
    p = common_A(ranks=EQUAL)
    for method, rule in (("florist", Energy(1.0)), ("flora", None), ("fedit", None), ("zero_pad", None)):
        assert distance(product(p.run(method, rule=rule)), product(p.run("ffa"))) < 1e-12


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("stored", OUTPUTS)
def test_A_comes_back_bitwise_where_the_dtype_holds_it(stored, dtype):
    p = common_A(dtype=stored)
    outcome = p.run("ffa", dtype=dtype)
    assert outcome.B.dtype == outcome.A.dtype == dtype
    if torch.promote_types(stored, dtype) == dtype:
        assert torch.equal(outcome.A[0].to(stored), p.A[-1])
    assert distance(outcome.A[0].double(), p.A[-1].double()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_the_bound_holds_the_rounding_of_the_answer(dtype, size):
    p = common_A()
    p = replace(p, scale=[size * s for s in p.scale])
    outcome = p.run("ffa", dtype=dtype)
    off = distance(product(outcome), p.dense())
    assert 0.0 < off <= float(outcome.error_bound[0])
    if size == 1.0:
        assert float(outcome.error_bound[0]) < 4 * torch.finfo(dtype).eps


def test_clients_of_mixed_storage_dtypes_are_summed_after_upcast():
    p = common_A(dtype=torch.float16)
    kinds = (torch.float16, torch.float32, torch.float64, torch.float32, torch.float16)
    mixed = replace(p, A=[a.to(d) for a, d in zip(p.A, kinds, strict=True)])
    first, second = mixed.run("ffa", dtype=torch.float32), p.run("ffa", dtype=torch.float32)
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)


def test_A_is_that_of_the_owner_of_largest_rank_first_on_a_tie():
    p = common_A(ranks=(3, 7, 7, 2))
    p.A[2] += 1.0
    assert torch.equal(p.run("ffa").A[0], p.A[1])


def test_B_holds_scale_and_weight_of_every_client():
    """Catches an accumulator that keeps client 0 alone, and a missing or doubled scale."""
    p = common_A(m=97, ranks=EQUAL)
    stacked = torch.stack([b.flatten() for b in p.B], 1)
    got = torch.linalg.lstsq(stacked, p.run("ffa").B[0].flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(got, torch.tensor([w * s for w, s in zip(p.weight, p.scale, strict=True)]).double())


@given(
    weight=st.lists(st.floats(-2.0, 2.0).filter(lambda w: w == 0.0 or abs(w) > 1e-3), min_size=5, max_size=5).filter(
        any
    ),
    seed=st.integers(0, 50),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_weights_are_exact_whatever_they_sum_to(weight, seed):
    p = replace(common_A(seed=seed), weight=weight)
    size = sum(abs(w) * float(d.norm()) for w, d in zip(weight, p.updates(), strict=True))
    outcome = p.run("ffa")
    assert float((product(outcome) - p.dense()).norm()) < 1e-14 * size
    assert int(outcome.rank[0]) == max(r for r, w in zip(RANKS, weight, strict=True) if w != 0.0)


def test_one_client_and_identical_clients_return_that_update():
    one = common_A(ranks=(7,))
    for copies in (1, 4):
        p = Problem(one.B * copies, one.A * copies, one.scale * copies, normalised([1, 2, 4, 5][:copies]))
        assert distance(product(p.run("ffa")), one.dense()) < 1e-14


def test_splitting_a_client_and_their_order_change_nothing():
    p = common_A()
    order = [0, 1, 1, 4, 3, 2]
    split = replace(p.permuted(order), weight=[p.weight[k] / (2 if k == 1 else 1) for k in order])
    assert distance(product(split.run("ffa")), product(p.run("ffa"))) < 1e-14


def test_two_levels_equal_one():
    p = common_A()
    parts = []
    for chosen in ([0, 2], [1, 3, 4]):
        mass = sum(p.weight[k] for k in chosen)
        part = p.permuted(chosen)
        outcome = replace(part, weight=[w / mass for w in part.weight]).run("ffa")
        parts.append((outcome.B[0], outcome.A[0], mass))
    top = Problem([b for b, _, _ in parts], [a for _, a, _ in parts], [1.0, 1.0], [mass for _, _, mass in parts])
    assert distance(product(top.run("ffa")), p.dense()) < 1e-14


@pytest.mark.parametrize("c", [0.3, 7.0])
def test_scaling_every_update_scales_the_product(c):
    p = common_A()
    scaled = replace(p, scale=[c * s for s in p.scale])
    assert distance(product(scaled.run("ffa")), c * product(p.run("ffa"))) < 1e-14


def test_a_gauge_of_one_client_breaks_what_the_method_relies_on():
    p = common_A(ranks=EQUAL)
    assert distance(product(p.gauged().run("ffa")), p.dense()) > 0.05


def test_a_client_without_the_module_adds_nothing():
    p = common_A()
    for weight in ([0.1, 0.2, 0.0, 0.3, 0.4], p.weight):  # renormalised over the owners, or kept for a zero update
        absent = without(p, 2, weight)
        outcome = absent.run("ffa")
        assert distance(product(outcome), absent.dense()) < 1e-14
        assert int(outcome.info[0]) == 0


def test_without_the_owner_of_largest_rank_the_next_one_leads():
    absent = without(common_A(), 4, [0.25, 0.25, 0.25, 0.25, 0.0])
    outcome = absent.run("ffa")
    assert int(outcome.rank[0]) == 8
    assert torch.equal(outcome.A[0], absent.A[2])


def test_what_has_weight_zero_is_not_read():
    p = common_A()
    p.B[4][:] = float("nan")
    p.A[4][:] = float("inf")
    p = replace(p, weight=[0.25, 0.25, 0.25, 0.25, 0.0])
    outcome = p.run("ffa")
    assert int(outcome.info[0]) == 0
    assert int(outcome.rank[0]) == 8
    assert distance(product(outcome), p.permuted([0, 1, 2, 3]).dense()) < 1e-14


def test_what_has_weight_zero_in_one_module_is_read_in_the_others():
    first, second = common_A(), replace(common_A(seed=3), weight=[0.5, 0.0, 0.5, 0.0, 0.0])
    for k in (1, 4):
        second.B[k][:] = float("nan")
    outcome = make_method("ffa", {}).combine(batched([first, second]), None, None)
    assert outcome.info.tolist() == [0, 0]
    assert bool((outcome.error_bound < 1e-13).all())
    for i, p in enumerate((first, second.permuted([0, 2]))):
        assert distance(product(cut(outcome, i)), p.dense()) < 1e-14


def test_modules_with_other_leaders_go_in_one_batch():
    first, second = common_A(), replace(common_A(seed=3), weight=[0.25, 0.25, 0.5, 0.0, 0.0])
    outcome = make_method("ffa", {}).combine(batched([first, second]), None, None)
    assert outcome.rank.tolist() == [12, 8]
    for i, p in enumerate((first, second)):
        assert distance(product(cut(outcome, i)), p.dense()) < 1e-14
    assert not outcome.A[1, 8:].any()


def test_nobody_has_the_module():
    p = common_A(ranks=(3, 3))
    empty = Problem([b[:, :0] for b in p.B], [a[:0] for a in p.A], [0.0, 0.0], p.weight)
    outcome = empty.run("ffa")
    assert outcome.rank.tolist() == [1]
    assert int(outcome.notes[0]) == Note.ZERO
    assert not outcome.B.any()


def test_zero_update_and_exact_cancellation_have_a_note_and_no_error():
    p = common_A(ranks=(4, 4), scale=(2.0, 2.0))
    zero = zero_client(zero_client(p, 0), 1)
    cancelling = replace(p, B=[p.B[0], -p.B[0]], weight=[0.5, 0.5])
    for q in (zero, cancelling):
        outcome = q.run("ffa")
        assert int(outcome.notes[0]) == Note.ZERO
        assert torch.equal(outcome.A[0], p.A[0])
        assert float(outcome.error[0]) == float(outcome.error_bound[0]) == 0.0


def test_overflow_is_flagged():
    outcome = common_A(scale=(1e6,) * 5).run("ffa", dtype=torch.float16)
    assert int(outcome.info[0]) == Info.OVERFLOW


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("k", [0, 4])
def test_bad_numbers_of_any_client_are_flagged_for_their_module_alone(bad, factor, k):
    group = batched([common_A(seed=1), common_A(seed=2), common_A(seed=3)])
    clean = make_method("ffa", {}).combine(group, None, None)
    getattr(group, factor)[k][1, 2, 1] = bad
    outcome = make_method("ffa", {}).combine(group, None, None)
    assert [int(code) & Info.NONFINITE for code in outcome.info] == [0, Info.NONFINITE, 0]
    assert torch.equal(outcome.B[::2], clean.B[::2])
    assert torch.equal(outcome.A[::2], clean.A[::2])


def test_an_owner_of_larger_rank_and_weight_zero_does_not_widen_the_pair():
    p = replace(common_A(ranks=(3, 3, 7)), weight=[0.5, 0.5, 0.0])
    outcome = p.run("ffa")
    assert outcome.B.shape[2] == outcome.A.shape[1] == 3


def test_large_numbers_whose_sum_overflows_are_finite():
    p = common_A(dtype=torch.float32)
    p = replace(p, A=[torch.full_like(a, 2e38) for a in p.A])
    outcome = make_method("ffa", {}).combine(p.group(measure=False), None, None)
    assert not outcome.info.any()
    assert torch.equal(outcome.A[0], p.A[-1])


def test_measuring_can_be_left_out():
    outcome = make_method("ffa", {}).combine(common_A().group(measure=False), None, None)
    assert bool(outcome.error.isnan().all())
    assert outcome.energy is None


def test_work_in_pieces_is_bitwise_the_same(monkeypatch):
    problems = [common_A(seed=seed) for seed in range(4)]
    problems[2] = replace(problems[2], weight=[0.25, 0.25, 0.25, 0.25, 0.0])
    group = batched(problems)
    whole = make_method("ffa", {}).combine(group, None, None)
    monkeypatch.setattr(factors, "CHUNK", 1)
    part = make_method("ffa", {}).combine(group, None, None)
    for field in ("B", "A", "rank", "notes", "info", "error"):
        assert torch.equal(getattr(part, field), getattr(whole, field))
    assert distance(products(part), torch.stack([p.dense() for p in problems])) < 1e-14


def test_what_it_declares():
    method = make_method("ffa", {})
    assert method.frozen_factor(0) == method.frozen_factor(1) == "A"
    assert method.client_rank(4, 12) == 4
    assert method.broadcast_rank((4, 12), 12, 0) == 4.0  # B[:, :4] to one, all of B to the other
    assert not method.equal_ranks


def test_it_is_no_plain_sum_where_the_client_of_largest_rank_does_not_count():
    def outline(*weights):
        B, A = (
            [torch.empty(2, *shape, device="meta") for shape in shapes]
            for shapes in ([(7, 3), (7, 5)], [(3, 4), (5, 4)])
        )
        weight = torch.tensor([weights] * 2, dtype=torch.float64)
        names = ("a", "b")
        return Group(
            names, "linear", 7, 4, tuple(B), tuple(A), torch.full_like(weight, 2.0), weight, (0, 1), torch.float32
        )

    assert make_method("ffa", {}).sums(outline(1.0, 0.0), None) is None
    sums = make_method("ffa", {}).sums(outline(0.25, 0.75), None)
    assert sums.B.tolist() == [[0.5, 1.5]] * 2
    assert sums.A.tolist() == [[0.0, 1.0]] * 2
