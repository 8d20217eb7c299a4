"""FlexLoRA: the exact sum to the largest client's rank, and each client's own prefix of it."""

from dataclasses import replace

import pytest
import torch
from equal_rank_problems import split, without_client
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import VARIANTS, Problem, distance, imbalanced, normalised, product, standard

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import Energy, Rank
from fedlora_kernels.methods.contract import make_method

METHOD = make_method("flexlora", {})


def best(D, r):
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def low_rank(r_max=12) -> Problem:
    """Clients of mixed ranks whose sum has rank 7, less than the largest of them."""
    problem = standard(m=37, n=29, ranks=(4, 8, 12), scale=(1.0, 2.0, 0.5))
    basis = standard(m=37, n=29, ranks=(7,), seed=3)
    made = torch.Generator().manual_seed(8)
    mixes = [torch.randn(7, r, generator=made, dtype=torch.float64) for r in (4, 8, r_max)]
    B = [basis.B[0] @ mix for mix in mixes]
    return replace(problem, B=B)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pair_is_the_best_approximation_of_the_largest_rank(variant, backend):
    problem = VARIANTS[variant]()
    D = problem.dense()
    outcome = problem.run("flexlora", backend=backend)
    r = max(b.shape[1] for b in problem.B)
    assert distance(product(outcome), best(D, r)) < 1e-11
    left_out = torch.linalg.svdvals(D)[r:].norm() / D.norm()
    assert abs(float(outcome.error[0]) - float(left_out)) < 1e-12
    assert float(outcome.error[0]) <= float(outcome.error_bound[0]) < float(left_out) + 1e-6


def test_every_client_has_its_own_prefix():
    """Catches one object handed to all clients, who then all hold the last rank."""
    problem = standard()
    outcome = problem.run("flexlora")
    p = int(outcome.rank[0])
    shapes = []
    for b in problem.B:
        rank = METHOD.client_rank(b.shape[1], p)
        B, A = outcome.B[0, :, :rank], outcome.A[0, :rank]
        shapes.append((tuple(B.shape), tuple(A.shape)))
        assert distance(B @ A, best(problem.dense(), b.shape[1])) < 1e-11
    assert shapes == [((48, r), (r, 40)) for r in (4, 4, 8, 8, 12)]


def test_prefix_is_florist_truncated_to_that_rank():
    problem = standard()
    full, outcome = problem.run(rule=Energy(1.0)), problem.run("flexlora")
    for r in (1, 4, 8, 12):
        prefix = outcome.B[0, :, :r] @ outcome.A[0, :r]
        assert distance(prefix, full.B[0, :, :r] @ full.A[0, :r]) < 1e-11
        assert distance(prefix, product(problem.run(rule=Rank(r)))) < 1e-11


def test_full_rank_is_the_sum_with_the_singular_values_on_b():
    """Catches sqrt(S) on B with nothing on A."""
    problem = standard(m=19, n=17, ranks=(17, 4))
    outcome = problem.run("flexlora")
    assert distance(product(outcome), problem.dense()) < 1e-12
    p = int(outcome.rank[0])
    eye = torch.eye(p, dtype=torch.float64)
    torch.testing.assert_close(outcome.A[0, :p] @ outcome.A[0, :p].T, eye, rtol=0, atol=1e-12)
    S = torch.linalg.svdvals(problem.dense())
    torch.testing.assert_close(outcome.B[0, :, :p].norm(dim=0), S[:p], rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_rank_is_the_sum_for_stored_dtypes(dtype):
    problem = standard(m=19, n=17, ranks=(17, 4), dtype=dtype)
    assert distance(product(problem.run("flexlora", dtype=torch.float32)), problem.dense()) < 1e-6


def test_clients_of_several_dtypes_are_summed_exactly():
    problem = standard(m=19, n=17, ranks=(17, 4, 8, 3))
    kinds = (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    mixed = replace(
        problem,
        B=[b.to(kind) for b, kind in zip(problem.B, kinds, strict=True)],
        A=[a.to(kind) for a, kind in zip(problem.A, kinds, strict=True)],
    )
    assert distance(product(mixed.run("flexlora", dtype=torch.float64)), mixed.dense()) < 1e-12


def test_a_sum_of_lower_rank_gives_a_shorter_pair_and_the_client_still_receives_its_rank():
    problem = low_rank()
    outcome = problem.run("flexlora")
    assert int(outcome.rank[0]) == 7
    assert distance(product(outcome), problem.dense()) < 1e-12
    assert [METHOD.client_rank(r, 7) for r in (4, 8, 12)] == [4, 8, 12]


def test_unequal_scales_and_weights_are_in_the_sum():
    """Recovers the coefficient of every client by least squares."""
    problem = standard(m=19, n=17, ranks=(17, 4, 3), scale=(0.5, 4.0, 3.0))
    bare = torch.stack([(b @ a).flatten() for b, a in zip(problem.B, problem.A, strict=True)], 1)
    got = torch.linalg.lstsq(bare, product(problem.run("flexlora")).flatten()[:, None]).solution[:, 0]
    wanted = torch.tensor([w * s for w, s in zip(problem.weight, problem.scale, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    "change",
    [Problem.gauged, imbalanced, lambda p: p.permuted([3, 0, 4, 2, 1]), lambda p: split(p, 3)],
    ids=["gauge", "imbalanced gauge", "order", "split client"],
)
def test_what_leaves_the_sum_leaves_the_product(change):
    problem = standard()
    assert distance(product(change(problem).run("flexlora")), product(problem.run("flexlora"))) < 1e-11


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    m=st.integers(2, 23),
    n=st.integers(2, 23),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    c=st.sampled_from([-3.0, 0.125, 7.3]),
)
def test_product_scales_with_the_updates(m, n, ranks, c):
    problem = standard(m=m, n=n if n != m else n + 1, ranks=ranks)
    D = problem.dense()
    S = torch.linalg.svdvals(D)
    r = max(ranks)
    outcome = replace(problem, scale=[c * s for s in problem.scale]).run("flexlora")
    left_out = float(S[r:].norm())
    assert distance(product(outcome), c * D) == pytest.approx(left_out / float(D.norm()), abs=1e-11)
    assert int(outcome.rank[0]) <= min(m, n if n != m else n + 1, r)


def test_two_levels_equal_one_where_nothing_is_cut():
    problem = standard(m=19, n=17, ranks=(17, 4, 17, 3))
    halves = []
    for chosen in ([0, 1], [2, 3]):
        mass = sum(problem.weight[k] for k in chosen)
        part = problem.permuted(chosen)
        halves.append((mass, replace(part, weight=[w / mass for w in part.weight]).run("flexlora")))
    B, A = [h.B[0] for _, h in halves], [h.A[0] for _, h in halves]
    top = Problem(B, A, [1.0, 1.0], [mass for mass, _ in halves])
    assert distance(product(top.run("flexlora")), problem.dense()) < 1e-12


@pytest.mark.parametrize("copies", [1, 3])
def test_one_client_and_identical_clients_return_that_update(copies):
    one = standard(m=37, n=29, ranks=(6,), scale=(2.0,))
    many = Problem(one.B * copies, one.A * copies, one.scale * copies, normalised([1, 2, 4][:copies]))
    outcome = many.run("flexlora")
    assert int(outcome.rank[0]) == 6
    assert distance(product(outcome), one.dense()) < 1e-12


def test_a_client_without_the_module_contributes_nothing_and_asks_for_no_rank():
    problem = standard()
    absent = without_client(problem, 4)
    outcome = absent.run("flexlora")
    assert int(outcome.rank[0]) == 8
    assert distance(product(outcome), best(absent.dense(), 8)) < 1e-11


def test_zero_update_is_rank_one_with_a_unit_row():
    problem = standard()
    for outcome in (
        replace(problem, B=[torch.zeros_like(b) for b in problem.B]).run("flexlora"),
        replace(problem, B=[b[:, :0] for b in problem.B], A=[a[:0] for a in problem.A]).run("flexlora"),
    ):
        assert int(outcome.rank[0]) == 1
        assert not outcome.B.any()
        assert outcome.A[0, 0].tolist() == [1.0] + [0.0] * 39
        assert int(outcome.notes[0]) & Note.ZERO


def test_trouble_is_reported_in_info():
    assert int(standard(scale=(1e6,) * 5).run("flexlora", dtype=torch.float16).info[0]) & Info.OVERFLOW
    problem = standard()
    problem.B[1][3, 2] = float("nan")
    assert int(problem.run("flexlora").info[0]) & Info.NONFINITE


def test_a_rule_is_refused():
    with pytest.raises(InputError, match="rule"):
        make_method("flexlora", {}, Energy(0.9))


def test_what_is_sent_is_the_mean_of_the_prefixes():
    assert METHOD.broadcast_rank([16, 16, 0, 16], 16, 0) == 16
    assert METHOD.broadcast_rank([4, 8, 16], 12, 0) == 8
    assert METHOD.product_only
