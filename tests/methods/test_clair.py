"""CLAIR: shared subspace, flags, refined pairs."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from clair_problems import (
    census,
    clair,
    contaminated,
    dense_clair,
    dense_flags,
    orthonormal,
    personal,
    randn,
    stacked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import VARIANTS, Problem, distance, imbalanced, normalised, product, standard, zero_client

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError, WeightError
from fedlora_kernels.linalg import stacked_qr
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods import factors, shared_subspace
from fedlora_kernels.methods.clair import Clair, largest_gap
from fedlora_kernels.methods.contract import make_method
from fedlora_kernels.methods.low_rank_sparse import low_rank_plus_sparse
from fedlora_kernels.methods.shared_subspace import default_lam

BACKENDS = ("torch", "reference", "auto")
LAM = 1.1


def noisy(K=8, bad=2, seed=0, **fields):
    """Contaminated clients of unequal weights, scales and sizes, m != n."""
    made = contaminated(K, bad, noise=0.3, mixed=True, seed=seed, **{"m": 37, "n": 29, **fields})
    weights = normalised([1.0 + k for k in range(K)])
    return replace(made, problem=replace(made.problem, weight=weights, scale=[0.5 + k / 4 for k in range(K)]))


def mixed_ranks(seed=0, m=13, n=11) -> Problem:
    made = torch.Generator().manual_seed(seed)
    ranks, U = (2, 4, 3, 5, 3, 2, 4), orthonormal(made, m, 2)
    B = [U @ randn(made, 2, r) + 0.05 * randn(made, m, r) for r in ranks]
    B[2] = randn(made, m, ranks[2])
    A = [randn(made, r, n) for r in ranks]
    return Problem(B, A, [16 / r for r in ranks], normalised(range(2, 9)))


def small(m=14, n=11, ranks=(2, 2, 3, 3, 4)) -> Problem:
    return standard(m=m, n=n, ranks=ranks)


def imbalanced_and_bad() -> Problem:
    return imbalanced(contaminated(5, 1, noise=0.3, m=13, n=10).problem)


PROBLEMS = {
    "standard": lambda: small(m=17),
    "m_below_R": lambda: small(m=7),
    "n_below_rank": lambda: small(n=3),
    "m_is_rank": lambda: small(m=4),
    "n_is_rank": lambda: small(n=4),
    "row": lambda: small(m=1),
    "column": lambda: small(n=1),
    "one_client": lambda: small(ranks=(3,)),
    "two_clients": lambda: small(ranks=(3, 2)),
    "three_clients": lambda: small(ranks=(3, 2, 4)),
    "duplicates": lambda: Problem(*([*x, x[2]] for x in (small().B, small().A, small().scale)), normalised([2] * 6)),
    "dependent_rows": lambda: replace(mixed_ranks(), A=[torch.cat([a[:1], a[:1], a[2:]]) for a in mixed_ranks().A]),
    "one_zero_client": lambda: zero_client(small(), 2),
    "gauge_imbalanced": lambda: imbalanced(small()),
    "gauge_imbalanced_and_bad": imbalanced_and_bad,
    "contaminated": lambda: noisy(m=15, n=12, r=2).problem,
    "mixed_ranks": mixed_ranks,
}


@functools.cache
def definition(name, tol=1e-7, normalise=True):
    return dense_clair(PROBLEMS[name](), 3, LAM, tol, normalise=normalise)


def reduced_split(problem, lam, tol):
    """L, S of the core brought back to m x Kn, its steps."""
    group = problem.group()
    owners = range(len(problem.B))
    Q, X, widths = shared_subspace._core(group, list(owners), torch.ones(1, len(owners), dtype=torch.bool), "left")
    sizes = [float(block.norm()) or 1.0 for block in X[0].split(widths, 1)]
    X = torch.cat([block / size for block, size in zip(X.split(widths, 2), sizes, strict=True)], 2)
    split = low_rank_plus_sparse(X, widths, torch.tensor([lam], dtype=torch.float64), tol, 500)
    back = []
    for part in (split.low_rank[0], split.sparse[0]):
        blocks = []
        for a, block in zip(problem.A, part.split(widths, 1), strict=True):
            T = stacked_qr([a.T.double()]).R
            blocks.append(Q[0] @ block @ (a.T.double() @ torch.linalg.pinv(T)).T)
        back.append(torch.cat(blocks, 1))
    return *back, int(split.steps[0])


@pytest.mark.parametrize("tol", [1e-7, 1e-9])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_reduced_program_is_the_dense_one_step_by_step(name, tol):
    problem = PROBLEMS[name]()
    dense = definition(name, tol)
    if len(problem.B) > 2:
        L, S, steps = reduced_split(problem, LAM, tol)
        assert steps == dense.steps
        assert float((L - dense.L).norm()) < 1e-9 * float((dense.L + dense.S).norm())
        assert float((S - dense.S).norm()) < 1e-9 * float((dense.L + dense.S).norm())
    plan, _, _ = clair(problem, shared_rank=3, lam=LAM, tol=tol)
    assert plan.steps == dense.steps
    np.testing.assert_allclose(plan.scores, dense.scores, atol=1e-9)
    np.testing.assert_array_equal(plan.flags, dense.flags)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("name", PROBLEMS)
def test_refined_pairs_and_mean_are_those_of_the_definition(name, normalise):
    problem = PROBLEMS[name]()
    dense = definition(name, normalise=normalise)
    _, group, outcome = clair(problem, shared_rank=3, lam=LAM, normalise=normalise, out_rank="exact")
    basis = group.carry[0]["basis"]
    assert basis.shape == dense.basis.shape
    assert distance(basis @ basis.T, dense.basis @ dense.basis.T) < 1e-8
    assert distance(product(outcome), dense.mean) < 1e-12
    for k, expected in enumerate(dense.refined):
        assert distance(personal(outcome, k), expected) < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["standard", "m_below_R", "n_below_rank", "mixed_ranks", "contaminated", "gauge_imbalanced"]
)
def test_the_factored_pair_is_the_dense_formula_with_the_same_subspace(name, backend):
    problem = PROBLEMS[name]()
    plan, group, outcome = clair(problem, backend=backend, shared_rank=3, lam=LAM, out_rank="exact")
    basis, updates = group.carry[0]["basis"], problem.updates()
    share = np.where(plan.flags, 0.0, problem.weight)
    mean = sum(w / share.sum() * d for w, d in zip(share, updates, strict=True))
    terms = sum(w / share.sum() * d.norm() for w, d in zip(share, updates, strict=True))
    for k, d in enumerate(updates):
        expected = d if plan.flags[k] else mean + basis @ (basis.T @ (d - mean))
        assert float((personal(outcome, k) - expected).norm()) < 1e-12 * float(terms + d.norm())


def test_inside_each_keeps_its_own_outside_all_have_the_mean():
    made = noisy()
    plan, group, outcome = clair(made.problem, shared_rank=4, out_rank="exact")
    np.testing.assert_array_equal(plan.flags, made.bad)
    basis, mean = group.carry[0]["basis"], product(outcome)
    benign = np.flatnonzero(~plan.flags)
    share = np.array(made.problem.weight)[benign] / np.array(made.problem.weight)[benign].sum()
    refined = [personal(outcome, k) for k in benign]
    for k, got in zip(benign, refined, strict=True):
        assert distance(basis.T @ got, basis.T @ made.problem.updates()[k]) < 1e-12
        assert float((got - mean - basis @ (basis.T @ (got - mean))).norm()) < 1e-12 * float(got.norm())
    assert distance(sum(v * got for v, got in zip(share, refined, strict=True)), mean) < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flagged_clients_get_their_input_back_bitwise(side, dtype):
    made = noisy()
    problem = replace(made.problem, B=[b.to(dtype) for b in made.problem.B], A=[a.to(dtype) for a in made.problem.A])
    if side == "right":
        problem = transposed(problem)
    plan, _, outcome = clair(problem, side=side, shared_rank=4)
    np.testing.assert_array_equal(plan.flags, made.bad)
    for k in np.flatnonzero(plan.flags):
        pair, scale = outcome.personal[k], problem.scale[k]
        assert torch.equal(pair.B[0], (scale * problem.B[k].double()).to(dtype))
        assert torch.equal(pair.A[0], problem.A[k])
        assert int(pair.rank[0]) == problem.B[k].shape[1]
        assert float(outcome.personal_error[0, k]) == 0.0
    one = replace(problem, scale=[1.0] * 8)
    plan, _, outcome = clair(one, side=side, shared_rank=4)
    for k in np.flatnonzero(plan.flags):
        assert torch.equal(outcome.personal[k].B[0], problem.B[k])


def transposed(problem: Problem) -> Problem:
    return replace(problem, B=[a.T.contiguous() for a in problem.A], A=[b.T.contiguous() for b in problem.B])


@pytest.mark.parametrize("out_rank", ["exact", "client", 3])
@pytest.mark.parametrize("scope", ["model", "matrix"])
@pytest.mark.parametrize("name", ["contaminated", "mixed_ranks", "n_below_rank"])
def test_side_right_is_the_transpose(name, scope, out_rank):
    problem = PROBLEMS[name]()
    options = {"shared_rank": 3, "scope": scope, "out_rank": out_rank}
    plan, _, outcome = clair(problem, **options)
    other_plan, _, other = clair(transposed(problem), side="right", **options)
    if plan is not None:
        np.testing.assert_allclose(plan.scores, other_plan.scores, atol=1e-12)
    assert distance(product(other).T, product(outcome)) < 1e-10
    for k in range(len(problem.B)):
        assert distance(personal(other, k).T, personal(outcome, k)) < 1e-8


def test_permutation_equivariance():
    made = noisy()
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    plan, _, outcome = clair(made.problem)
    moved_plan, _, moved = clair(made.problem.permuted(order))
    assert plan.flags.any()
    np.testing.assert_array_equal(moved_plan.flags, plan.flags[order])
    np.testing.assert_allclose(moved_plan.scores, plan.scores[order], atol=1e-12)
    assert distance(product(moved), product(outcome)) < 1e-12
    for k, was in enumerate(order):
        assert distance(personal(moved, k), personal(outcome, was)) < 1e-9


@pytest.mark.parametrize("change", ["gauge", "imbalance"])
def test_a_gauge_change_leaves_flags_and_products(change):
    made = noisy(K=5, bad=1)
    other = made.problem.gauged() if change == "gauge" else imbalanced(made.problem)
    plan, _, outcome = clair(made.problem)
    other_plan, _, changed = clair(other)
    np.testing.assert_array_equal(plan.flags, made.bad)
    np.testing.assert_array_equal(other_plan.flags, plan.flags)
    np.testing.assert_allclose(other_plan.scores, plan.scores, atol=1e-10)
    assert distance(product(changed), product(outcome)) < 1e-10
    for k in range(5):
        assert distance(personal(changed, k), personal(outcome, k)) < 1e-9


@pytest.mark.parametrize("c", [-3.0, 1e-6, 1e6])
@pytest.mark.parametrize("normalise", [True, False])
def test_a_factor_common_to_all_scales_the_outputs(c, normalise):
    made = noisy()
    plan, _, outcome = clair(made.problem, normalise=normalise)
    other, _, scaled = clair(replace(made.problem, scale=[c * s for s in made.problem.scale]), normalise=normalise)
    np.testing.assert_array_equal(other.flags, plan.flags)
    assert distance(product(scaled) / c, product(outcome)) < 1e-12
    for k in range(8):
        assert distance(personal(scaled, k) / c, personal(outcome, k)) < 1e-9


def test_common_rotations_turn_the_outputs():
    made = noisy()
    problem, draw = made.problem, torch.Generator().manual_seed(9)
    G, H = orthonormal(draw, 37, 37), orthonormal(draw, 29, 29)
    plan, _, outcome = clair(problem)
    turned = replace(problem, B=[G @ b for b in problem.B], A=[a @ H for a in problem.A])
    other, _, changed = clair(turned)
    np.testing.assert_array_equal(other.flags, plan.flags)
    for k in range(8):
        assert distance(G.T @ personal(changed, k) @ H.T, personal(outcome, k)) < 1e-9


@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_identical_clients_are_not_flagged_and_keep_their_update(K):
    one = standard(ranks=(5,))
    problem = Problem(one.B * K, one.A * K, [2.0] * K, normalised(range(1, K + 1)))
    plan, _, outcome = clair(problem)
    assert not plan.flags.any()
    for k in range(K):
        assert distance(personal(outcome, k), problem.updates()[0]) < 1e-12
    assert distance(product(outcome), problem.updates()[0]) < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["standard", "m_below_R", "m_is_rank", "duplicates"])
def test_a_subspace_of_everything_leaves_every_client_its_update(name, side):
    problem = VARIANTS[name]()
    plan, group, outcome = clair(problem, side=side, shared_rank=10**6, lam=1e3, out_rank="exact")
    assert not plan.flags.any()
    assert group.carry[0]["basis"].shape[1] >= min(problem.B[0].shape[0], problem.A[0].shape[1], 8)
    for k, d in enumerate(problem.updates()):
        assert distance(personal(outcome, k), d) < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["standard", "m_below_R", "duplicates"])
def test_a_subspace_of_nothing_gives_every_client_the_mean(name, side):
    problem = VARIANTS[name]()
    plan, group, outcome = clair(problem, side=side, shared_rank=0, gap_min=1.0, out_rank="exact")
    assert not plan.flags.any()
    assert group.carry[0]["basis"].shape[1] == 0
    for k in range(len(problem.B)):
        assert distance(personal(outcome, k), problem.dense()) < 1e-12
    exact = problem.run("florist", rule=Energy(1.0))
    assert torch.equal(outcome.B, exact.B), "unflagged, M is the exact sum"
    assert float(outcome.error[0]) == float(exact.error[0])


def test_clients_that_share_nothing_receive_the_mean():
    made = torch.Generator().manual_seed(3)
    B = [randn(made, 80, 4) for _ in range(6)]
    A = [randn(made, 4, 60) for _ in range(6)]
    plan, group, outcome = clair(Problem(B, A, [1.0] * 6, [1 / 6] * 6), out_rank="exact")
    assert group.carry[0]["basis"].shape[1] == 0
    np.testing.assert_allclose(plan.scores, 1.0, atol=1e-6)
    assert not plan.flags.any()
    assert distance(personal(outcome, 2), product(outcome)) < 1e-12


@pytest.mark.parametrize("K", [5, 8, 12])
def test_separated_outliers_without_noise(K):
    bad = K // 3
    made = contaminated(K, bad, mixed=True, m=41, n=33, seed=K)
    plan, group, outcome = clair(made.problem, shared_rank=4, tol=1e-8)
    np.testing.assert_array_equal(plan.flags, made.bad)
    basis = group.carry[0]["basis"]
    assert float((basis @ basis.T - made.basis @ made.basis.T).norm()) < 1e-6
    updates = made.problem.updates()
    for k in range(bad, K):
        assert distance(personal(outcome, k), updates[k]) < 1e-6
    other = contaminated(K, bad, mixed=True, m=41, n=33, seed=77).problem
    swapped = replace(made.problem, B=[other.B[0], *made.problem.B[1:]], A=[other.A[0], *made.problem.A[1:]])
    plan, _, changed = clair(swapped, shared_rank=4, tol=1e-8)
    np.testing.assert_array_equal(plan.flags, made.bad)
    for k in range(bad, K):
        assert distance(personal(changed, k), personal(outcome, k)) < 1e-5


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("K", [3, 4, 8, 20])
def test_nobody_is_flagged_without_contamination(K, noise):
    problems = [contaminated(K, 0, noise=noise, mixed=True, seed=seed).problem for seed in range(3)]
    plan, _, _ = clair(stacked(problems))
    assert not plan.flags.any()


@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("zeros", ["one", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_zero_updates_are_finite(K, zeros, side):
    problem = standard(ranks=(4, 4, 8, 8, 12)[:K])
    for k in range(K) if zeros == "all" else [0]:
        problem = zero_client(problem, k)
    plan, group, outcome = clair(problem, side=side)
    assert not plan.flags[0]
    assert plan.scores[0] == 0.0
    assert int(outcome.info[0]) == 0
    if zeros == "all" or K == 1:
        assert group.carry[0]["basis"].shape[1] == 0
        assert int(outcome.notes[0]) & Note.ZERO
        for pair in (*outcome.personal, outcome):
            assert int(pair.rank[0]) == 1
            assert not pair.B.any()
            assert pair.A[0, 0].tolist() == [1.0] + [0.0] * 39
    else:
        basis, mean = group.carry[0]["basis"], product(outcome)
        outside = mean - (basis @ (basis.T @ mean) if side == "left" else mean @ basis @ basis.T)
        exact = clair(problem, side=side, out_rank="exact")[2]
        assert float((personal(exact, 0) - outside).norm()) < 1e-12 * float(mean.norm())


@pytest.mark.parametrize("K", [1, 2])
def test_up_to_two_clients_are_not_split(K):
    problem = standard(ranks=(5, 7)[:K])
    plan, group, outcome = clair(problem, out_rank="exact")
    assert plan.steps == 0
    assert plan.scores.tolist() == [0.0] * K
    X = torch.cat([d / d.norm() for d in problem.updates()], 1)
    U = torch.linalg.svd(X)[0][:, : 5 if K == 1 else 6]
    basis = group.carry[0]["basis"]
    assert distance(basis @ basis.T, U @ U.T) < 1e-12
    if K == 1:
        assert distance(personal(outcome, 0), problem.updates()[0]) < 1e-12


@pytest.mark.parametrize("bad", [5, 6])
def test_colluders_beyond_a_third_are_only_finite(bad):
    made = contaminated(12, bad, kind="colluding", noise=0.1, seed=bad)
    _, _, outcome = clair(made.problem, shared_rank=4)
    assert all(bool(torch.isfinite(pair.B).all() and torch.isfinite(pair.A).all()) for pair in outcome.personal)


def test_three_colluders_of_twelve_are_found():
    made = [contaminated(12, 3, kind="colluding", noise=0.1, seed=seed) for seed in range(4)]
    for one in made:
        np.testing.assert_array_equal(clair(one.problem, shared_rank=4)[0].flags, one.bad)


@pytest.mark.parametrize("K", [4, 8])
def test_outliers_of_rank_one_are_only_finite_while_lam_exceeds_one(K):
    made = contaminated(K, K // 4, kind="one", seed=K)
    assert default_lam(4, K) > 1.0
    _, _, outcome = clair(made.problem, shared_rank=4)
    assert all(bool(torch.isfinite(pair.B).all() and torch.isfinite(pair.A).all()) for pair in outcome.personal)


FAMILIES = {"equal": {"rank": 4}, "mixed": {"rank": 4, "mixed": True}, "wide": {"rank": 16}}


def grid(family, noise, K, fractions, seeds, **fields):
    """For each problem: the flags found where each is decided alone, the flags that are right, and its subspace's error."""
    made = [
        contaminated(K, int(K * fraction), noise=noise, seed=1000 * K + 10 * i + seed, **FAMILIES[family], **fields)
        for i, fraction in enumerate(fractions)
        for seed in seeds
    ]
    group = stacked([one.problem for one in made])
    survey = make_method("clair", {"shared_rank": 4, "tol": 1e-8}).survey(group)
    flags = largest_gap(survey.stats["scores"], 0.15)
    off = [
        float((carry["basis"] @ carry["basis"].T - one.basis @ one.basis.T).norm())
        for carry, one in zip(survey.carry, made, strict=True)
    ]
    return flags, np.array([one.bad for one in made]), off


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("K", [4, 5, 8, 12, 20])
def test_flags_are_recovered_in_every_run(family, K):
    for noise in (0.0, 0.2, 0.5):
        flags, bad, off = grid(family, noise, K, (0.0, 0.2, 0.4), (0,))
        np.testing.assert_array_equal(flags, bad)
        if noise == 0.0:
            assert max(off) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("K", [4, 5, 8, 12, 20, 40])
@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_flags_are_recovered_in_every_run_of_the_grid(family, K, noise):
    """35 runs each, 1890 together; without noise the subspace is exact to some tol."""
    flags, bad, off = grid(family, noise, K, (0.0, 0.1, 0.2, 0.3, 0.4), range(7))
    np.testing.assert_array_equal(flags, bad)
    if noise == 0.0:
        assert max(off) < 1e-6


@pytest.mark.full
def test_outliers_of_rank_one_are_found_from_twelve_clients_on():
    few, many = [], []
    for K in (4, 5, 8, 12, 20, 40):
        for family in FAMILIES:
            for noise in (0.0, 0.2, 0.5):
                flags, bad, _ = grid(family, noise, K, (0.0, 0.1, 0.2, 0.3, 0.4), range(7), kind="one")
                right = (flags == bad).all(1)
                few += right[bad.any(1)].tolist() if K <= 8 else []
                many += right.tolist() if K >= 12 else []
    assert not any(few)
    assert np.mean(many) > 0.98


def test_any_shared_rank_but_one_recovers_the_flags():
    made = [contaminated(20, 5, noise=0.2, seed=seed) for seed in range(3)]
    for shared_rank in (2, 4, 8, 16):
        for one in made:
            np.testing.assert_array_equal(clair(one.problem, shared_rank=shared_rank)[0].flags, one.bad)


def test_refinement_gains_what_averaging_off_the_subspace_promises():
    # 1 / (r/m + (1 - r/m) / |C|) = 7.75 for the true subspace and noise in all directions
    gains = []
    for seed in range(5):
        made = contaminated(20, 5, m=60, n=24, seed=seed)
        draw = torch.Generator().manual_seed(seed + 100)
        noise = [randn(draw, 60, 24) for _ in range(20)]
        B = [d + 0.2 * e / e.norm() for d, e in zip(made.clean, noise, strict=True)]
        problem = replace(made.problem, B=B, A=[torch.eye(24, dtype=torch.float64)] * 20)
        plan, _, outcome = clair(problem, shared_rank=4, out_rank="exact")
        np.testing.assert_array_equal(plan.flags, made.bad)
        local = sum(float((B[k] - made.clean[k]).norm()) ** 2 for k in range(5, 20))
        refined = sum(float((personal(outcome, k) - made.clean[k]).norm()) ** 2 for k in range(5, 20))
        gains.append(local / refined)
    assert all(6.0 < gain < 8.0 for gain in gains), gains


def test_unnormalised_a_large_client_looks_contaminated():
    made = contaminated(20, 0, noise=0.0, seed=2)
    large = replace(made.problem, scale=[20.0] + [1.0] * 19)
    assert clair(large, shared_rank=4, normalise=True)[0].scores.max() < 1e-5
    assert clair(large, shared_rank=4, normalise=False)[0].scores[0] > 0.5


def test_a_personal_pair_is_cut_to_the_rank_of_its_client():
    problem = mixed_ranks()
    plan, _, whole = clair(problem, out_rank="exact")
    _, _, outcome = clair(problem, out_rank="client")
    assert plan.flags.tolist() == [False, False, True, False, False, False, False]
    for k, b in enumerate(problem.B):
        pair = outcome.personal[k]
        assert pair.B.shape[2] == pair.A.shape[1] == int(pair.rank[0]) == b.shape[1]
        if not plan.flags[k]:
            exact = personal(whole, k)
            s = torch.linalg.svdvals(exact)
            tail = float(s[b.shape[1] :].norm() / s.norm())
            assert tail > 1e-4
            assert distance(personal(outcome, k), exact) == pytest.approx(tail, rel=1e-8)
            assert float(outcome.personal_error[0, k]) == pytest.approx(tail, rel=1e-8)
    assert whole.personal_error.nan_to_num(1.0).max() < 1e-12


@pytest.mark.parametrize("out_rank", [1, 3, 100])
def test_a_personal_pair_of_a_given_rank(out_rank):
    problem = standard()
    _, _, whole = clair(problem, gap_min=1.0, out_rank="exact")
    _, _, outcome = clair(problem, gap_min=1.0, out_rank=out_rank)
    for k in range(5):
        s = torch.linalg.svdvals(personal(whole, k))
        p = min(out_rank, int((s > 1e-12 * s[0]).sum()))
        assert int(outcome.personal[k].rank[0]) == p
        assert distance(personal(outcome, k), personal(whole, k)) <= float(s[p:].norm() / s.norm()) + 1e-12


def test_scope_matrix_decides_each_module_alone_in_one_pass():
    made = [contaminated(8, bad, noise=0.2, m=37, n=29, seed=bad) for bad in (2, 0, 3)]
    group = stacked([one.problem for one in made])
    method = make_method("clair", {"scope": "matrix", "out_rank": "exact"})
    assert not method.surveys(None)
    assert method.survey(group) is None
    assert method.decide({}, census(group)) is None
    assert method.describe(None, ["a"] * 8) == {}
    outcome = method.combine(group, None, None)
    for i, one in enumerate(made):
        plan, _, alone = clair(one.problem, out_rank="exact")
        np.testing.assert_array_equal(plan.flags, one.bad)
        for k in range(8):
            assert distance(personal(outcome, k, i), personal(alone, k)) < 1e-12
            if one.bad[k]:
                r = int(outcome.personal[k].rank[i])
                assert r == 4
                assert torch.equal(outcome.personal[k].B[i, :, :r], one.problem.B[k])
                assert torch.equal(outcome.personal[k].A[i, :r], one.problem.A[k])


def test_scope_model_averages_the_scores_over_the_modules():
    made = [contaminated(8, 2, noise=0.2, m=37, n=29, seed=seed) for seed in range(3)]
    # one module alone would flag client 5 too, if its score there counted for the model
    made[1].problem.B[5] = randn(torch.Generator().manual_seed(99), 37, 4)
    group = stacked([one.problem for one in made])
    method = make_method("clair", {})
    survey = method.survey(group)
    plan = method.decide(survey.stats, census(group))
    assert largest_gap(survey.stats["scores"], 0.15)[1, 5]
    np.testing.assert_allclose(plan.scores, survey.stats["scores"].mean(0), rtol=1e-15)
    assert plan.flags.tolist() == [True, True] + [False] * 6
    outcome = method.combine(replace(group, carry=survey.carry), plan, None)
    for i, one in enumerate(made):
        assert torch.equal(outcome.personal[0].B[i], one.problem.B[0])
    told = method.describe(plan, [f"c{k}" for k in range(8)])
    assert told["flags"] == {f"c{k}": k < 2 for k in range(8)}
    assert told["scores"]["c5"] == plan.scores[5]
    assert told["steps"] == int(survey.stats["steps"].max())
    assert told["unconverged"] == 0
    assert method.decide(make_method("clair", {"max_iter": 2}).survey(group).stats, census(group)).unconverged == 3


def test_carried_bases_may_differ_in_rank_and_come_from_the_host():
    low = contaminated(8, 0, r=2, m=37, n=29, seed=1)
    high = contaminated(8, 0, r=4, m=37, n=29, seed=2)
    group = stacked([low.problem, high.problem])
    method = make_method("clair", {"out_rank": "exact"})
    survey = method.survey(group)
    assert [carry["basis"].shape for carry in survey.carry] == [(37, 2), (37, 4)]
    plan = method.decide(survey.stats, census(group))
    outcome = method.combine(replace(group, carry=survey.carry), plan, None)
    assert distance(personal(outcome, 3, 0), low.problem.updates()[3]) < 1e-6
    nothing = tuple({"basis": carry["basis"][:, :0]} for carry in survey.carry)
    averaged = method.combine(replace(group, carry=nothing), plan, None)
    assert distance(personal(averaged, 3, 1), high.problem.dense()) < 1e-12, "what is carried is used"
    fresh = method.combine(group, plan, None)
    for k in range(8):
        assert distance(personal(fresh, k, 1), personal(outcome, k, 1)) < 1e-12


def test_the_common_pair_is_the_mean_of_the_benign_and_says_how_far_it_is_from_all():
    made = noisy()
    problem = made.problem
    plan, _, outcome = clair(problem)
    benign = ~plan.flags
    share = np.where(benign, problem.weight, 0.0)
    mean = sum(v / share.sum() * d for v, d in zip(share, problem.updates(), strict=True))
    assert distance(product(outcome), mean) < 1e-12
    assert float(outcome.error[0]) == pytest.approx(distance(mean, problem.dense()), rel=1e-10)
    assert float(outcome.error[0]) <= float(outcome.error_bound[0]) < 1.001 * float(outcome.error[0])
    assert float(outcome.energy[0]) == pytest.approx(float(problem.dense().norm()) ** 2, rel=1e-12)
    unmeasured = make_method("clair", {}).combine(problem.group(measure=False), plan, None)
    assert torch.equal(unmeasured.B, outcome.B)
    assert bool(torch.isnan(unmeasured.error[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    made = noisy()
    problem = replace(made.problem, B=[b.to(dtype) for b in made.problem.B], A=[a.to(dtype) for a in made.problem.A])
    plan, _, outcome = clair(problem, dtype=torch.float32, out_rank="exact")
    wide = replace(problem, B=[b.double() for b in problem.B], A=[a.double() for a in problem.A])
    wide_plan, _, exact = clair(wide, out_rank="exact")
    np.testing.assert_array_equal(plan.flags, made.bad)
    np.testing.assert_allclose(plan.scores, wide_plan.scores, atol=1e-12)
    assert outcome.B.dtype == outcome.personal[3].B.dtype == torch.float32
    for k in range(8):
        assert distance(personal(outcome, k), personal(exact, k)) < 1e-6
    assert distance(product(outcome), product(exact)) < 1e-6
    assert distance(product(outcome), problem.dense()) <= float(outcome.error_bound[0])


def test_overflow_and_bad_numbers_are_told_and_harm_no_neighbour():
    made = [contaminated(5, 1, noise=0.2, m=37, n=29, seed=seed).problem for seed in range(3)]
    alone = clair(made[2], scope="matrix")[2]
    made[0].A[3][1, 1] = float("nan")
    made[1] = replace(made[1], scale=[1e6] * 5)
    outcome = clair(stacked(made, dtype=torch.float16), scope="matrix")[2]
    assert [int(code) for code in outcome.info] == [Info.NONFINITE, Info.OVERFLOW, 0]
    outcome = clair(stacked(made), scope="matrix")[2]
    assert [int(code) for code in outcome.info] == [Info.NONFINITE, 0, 0]
    for k in range(5):
        assert distance(personal(outcome, k, 2), personal(alone, k)) < 1e-12
    stats = make_method("clair", {}).survey(stacked(made)).stats
    assert np.isnan(stats["scores"][0]).all()
    assert np.isfinite(stats["scores"][1:]).all()


def test_a_flagged_client_that_overflows_is_told():
    problem = noisy().problem
    assert clair(problem, dtype=torch.float16)[2].info.tolist() == [0]
    large = replace(problem, scale=[1e6, *problem.scale[1:]])
    plan, _, outcome = clair(large, dtype=torch.float16)
    assert plan.flags[0]
    assert bool(torch.isfinite(outcome.B).all())
    assert outcome.info.tolist() == [Info.OVERFLOW]


def with_absent(problem, k, weight=0.0):
    """Client ``k`` lacks the module."""
    B, A, scale = list(problem.B), list(problem.A), list(problem.scale)
    B[k], A[k], scale[k] = B[k][:, :0], A[k][:0], 0.0
    left = [w if i != k else weight for i, w in enumerate(problem.weight)]
    return Problem(B, A, scale, left if weight else normalised(left))


@pytest.mark.parametrize("scope", ["model", "matrix"])
def test_a_client_without_the_module_is_no_part_of_it(scope):
    problem = noisy().problem
    there = Problem(
        *([x for i, x in enumerate(field) if i != 3] for field in (problem.B, problem.A, problem.scale)),
        normalised([w for i, w in enumerate(problem.weight) if i != 3]),
    )
    plan, _, outcome = clair(with_absent(problem, 3), scope=scope)
    expected_plan, _, expected = clair(there, scope=scope)
    assert outcome.personal[3] is None
    assert bool(torch.isnan(outcome.personal_error[0, 3]))
    if plan is not None:
        assert not plan.flags[3]
        assert plan.scores[3] == 0.0
        np.testing.assert_array_equal(np.delete(plan.flags, 3), expected_plan.flags)
    assert torch.equal(outcome.B, expected.B)
    rest = [pair for pair in outcome.personal if pair is not None]
    assert all(torch.equal(pair.B, other.B) for pair, other in zip(rest, expected.personal, strict=True))


def test_a_missing_update_that_counts_as_zero_keeps_its_weight_in_the_mean():
    problem = noisy().problem
    absent = with_absent(problem, 3, weight=problem.weight[3])
    plan, _, outcome = clair(absent)
    share = np.where(plan.flags, 0.0, problem.weight)
    mean = sum(v * d for k, (v, d) in enumerate(zip(share / share.sum(), problem.updates(), strict=True)) if k != 3)
    assert distance(product(outcome), mean) < 1e-12


def test_a_client_of_weight_zero_is_not_read():
    problem = noisy().problem
    weight = normalised([w if k != 3 else 0.0 for k, w in enumerate(problem.weight)])
    problem.B[3][2, 1] = float("nan")
    plan, _, outcome = clair(replace(problem, weight=weight))
    assert outcome.personal[3] is None
    assert not plan.flags[3]
    assert int(outcome.info[0]) == 0
    assert float(outcome.error[0]) <= float(outcome.error_bound[0])
    assert torch.equal(outcome.B, clair(with_absent(problem, 3))[2].B)


def test_modules_nobody_or_two_own():
    problem = standard()
    nobody = Problem([b[:, :0] for b in problem.B], [a[:0] for a in problem.A], [0.0] * 5, [0.0] * 5)
    plan, _, outcome = clair(nobody)
    assert not plan.flags.any()
    assert outcome.personal == (None,) * 5
    assert int(outcome.notes[0]) & Note.ZERO
    two = problem
    for k in (0, 1, 4):
        two = with_absent(two, k)
    method = make_method("clair", {})
    stats = method.survey(two.group()).stats
    assert np.isnan(stats["scores"]).all(), "no score must not count as a good one"
    stats = {name: np.concatenate([values, values]) for name, values in stats.items()}
    stats["scores"][1] = [0.1, 0.2, 0.9, 0.1, 0.1]
    plan = method.decide(stats, census(two.group()))
    assert plan.flags.tolist() == [False, False, True, False, False]
    assert plan.scores.tolist() == [0.1, 0.2, 0.9, 0.1, 0.1]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0, 1.0], [2.0, -0.5, 1.0, 1.0, 3.0]])
def test_weights_that_are_not_normalised_are_in_the_mean(weights):
    problem = replace(standard(), weight=weights)
    _, _, outcome = clair(problem, gap_min=1.0)
    mean = problem.dense() / sum(weights)
    assert distance(product(outcome), mean) < 1e-12
    assert float(outcome.error[0]) == pytest.approx(distance(mean, problem.dense()), rel=1e-10)


def test_a_client_split_into_two_halves_leaves_the_mean_where_nobody_is_flagged():
    problem = standard()
    halves = Problem(
        *([*field, field[4]] for field in (problem.B, problem.A, problem.scale)),
        [*problem.weight[:4], problem.weight[4] / 2, problem.weight[4] / 2],
    )
    assert distance(product(clair(halves, gap_min=1.0)[2]), product(clair(problem, gap_min=1.0)[2])) < 1e-12


def test_weights_of_sum_zero_have_no_mean():
    problem = replace(standard(), weight=[1.0, -1.0, 1.0, -1.0, 0.0])
    with pytest.raises(WeightError, match=r"layers.0.q_proj.*clair.*sum to 0"):
        clair(problem, gap_min=1.0)


def test_small_chunks_change_nothing(monkeypatch):
    made = [contaminated(8, bad, noise=0.2, m=37, n=29, seed=bad) for bad in (2, 0, 3)]
    group = stacked([one.problem for one in made])
    for scope in ("model", "matrix"):
        monkeypatch.setattr(factors, "CHUNK", 64 << 20)
        _, _, whole = clair(group, scope=scope)
        monkeypatch.setattr(factors, "CHUNK", 1)
        _, _, parts = clair(group, scope=scope)
        assert distance(parts.B[:, :, : whole.B.shape[2]], whole.B) < 1e-12
        for k in range(8):
            assert torch.equal(parts.personal[k].rank, whole.personal[k].rank)
            for i in range(3):
                assert distance(personal(parts, k, i), personal(whole, k, i)) < 1e-12
        torch.testing.assert_close(parts.personal_error, whole.personal_error, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("shared_rank", "clients", "lam"),
    [
        (4, 4, 1.4),
        (4, 8, 1.5 * 0.5**0.5),
        (4, 12, 0.9),
        (4, 20, 2 * 0.2**0.5),
        (4, 40, 2 * 0.1**0.5),
        (16, 8, 1.5 * 2**0.5),
    ],
)
def test_default_lam(shared_rank, clients, lam):
    assert default_lam(shared_rank, clients) == pytest.approx(lam, rel=1e-12)


def test_default_shared_rank_is_the_median_rounded_down():
    for ranks, median in (((2, 3, 9), 3), ((2, 3, 4, 9), 3), ((3, 4, 6, 9), 5)):
        problem = standard(ranks=ranks, counts=(1,) * len(ranks))
        one, _, _ = clair(problem)
        other, _, _ = clair(problem, shared_rank=median)
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("scores", "flags"),
    [
        ([0.1, 0.1, 0.1, 0.9, 0.9], [0, 0, 0, 1, 1]),
        ([0.1, 0.1, 0.9, 0.9, 0.9], [0, 0, 0, 0, 0]),  # the gap leaves half or fewer below
        ([0.1, 0.9], [0, 0]),
        ([0.9], [0]),
        ([0.1, 0.2, 0.9], [0, 0, 1]),
        ([0.1, 0.1, 0.1, 0.24], [0, 0, 0, 0]),  # below gap_min
        ([0.0, 0.0, 0.0, 0.15], [0, 0, 0, 1]),  # at gap_min
        ([0.0, 0.0, 0.0, 0.0, 0.5, 1.0], [0, 0, 0, 0, 1, 1]),  # equal gaps: the lower
        ([0.9, 0.1, 0.1, 0.1, float("nan")], [1, 0, 0, 0, 0]),
        ([0.9, 0.1, float("nan"), float("nan"), float("nan")], [0, 0, 0, 0, 0]),
        ([float("nan")] * 4, [0, 0, 0, 0]),
        ([0.6, 0.6, 0.6, 0.6], [0, 0, 0, 0]),
    ],
)
def test_largest_gap(scores, flags):
    assert largest_gap(np.array(scores), 0.15).tolist() == [bool(flag) for flag in flags]
    both = largest_gap(np.array([scores, scores[::-1]]), 0.15)
    assert both.tolist() == [[bool(f) for f in flags], [bool(f) for f in flags[::-1]]]


@given(scores=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9), gap_min=st.floats(0.01, 0.9))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_largest_gap_is_that_of_the_definition(scores, gap_min):
    flags = largest_gap(np.array(scores), gap_min)
    np.testing.assert_array_equal(flags, dense_flags(np.array(scores), gap_min))
    assert flags.sum() < len(scores) / 2


@pytest.mark.parametrize(
    "options",
    [
        {"shared_rank": -1},
        {"shared_rank": 2.5},
        {"shared_rank": True},
        {"lam": 0.0},
        {"lam": float("nan")},
        {"lam": "x"},
        {"normalise": 1},
        {"gap_min": -0.1},
        {"gap_min": None},
        {"tol": float("inf")},
        {"max_iter": 0},
        {"max_iter": 2.0},
        {"side": "both"},
        {"scope": "layer"},
        {"out_rank": 0},
        {"out_rank": "all"},
        {"out_rank": True},
    ],
)
def test_options_are_checked(options):
    (name,) = options
    with pytest.raises(InputError, match=rf"clair: {name} is .*needed"):
        Clair(**options)


def test_what_it_declares():
    method = make_method("clair", {})
    assert method.gives == ("common", "personal")
    assert not method.equal_ranks
    assert method.surveys(None)
    with pytest.raises(InputError, match="rule"):
        make_method("clair", {}, Energy(0.9))
    assert method.broadcast_rank([4, 8], 12, 0) == 6.0
    assert make_method("clair", {"out_rank": 3}).broadcast_rank([4, 8], 12, 0) == 3.0
    assert make_method("clair", {"out_rank": "exact"}).broadcast_rank([4, 8], 12, 0) == 12.0
