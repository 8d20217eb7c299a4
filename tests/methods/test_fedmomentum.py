"""FedMomentum: the first r components of the exact sum in the adapter, those up to energy 0.9999 in the residual."""

from dataclasses import replace

import pytest
import torch
from equal_rank_problems import (
    EQUAL_RANKS,
    batch_of,
    identical,
    residual,
    split,
    total,
    unequal,
    with_gauges,
    without_client,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import Problem, distance, product, standard, with_spectrum

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import make_method


def best(D, r):
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def graded(values, r=3, clients=4) -> Problem:
    """Clients of rank r whose sum has these singular values: each client holds r of them."""
    whole = with_spectrum(values)
    B = [whole.B[0][:, i : i + r] * clients for i in range(0, r * clients, r)]
    A = [whole.A[0][i : i + r] for i in range(0, r * clients, r)]
    return Problem(B, A, [1.0] * clients, [1.0 / clients] * clients)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("variant", EQUAL_RANKS)
def test_adapter_is_the_best_approximation_and_both_make_the_sum(variant, backend):
    problem = EQUAL_RANKS[variant]()
    D = problem.dense()
    r = max(b.shape[1] for b in problem.B)
    outcome = problem.run("fedmomentum", backend=backend, energy=1.0)
    assert distance(product(outcome), best(D, r)) < 1e-11
    assert distance(total(outcome), D) < 1e-11
    S = torch.linalg.svdvals(D)
    assert int(outcome.rank[0]) + int(outcome.residual.rank[0]) == int((S > 1e-10 * S[0]).sum())


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999, 1.0])
def test_residual_reaches_to_the_smallest_rank_of_that_energy(energy):
    values = [2.0 ** (-i) for i in range(12)]
    problem = graded(values)
    S = torch.tensor(values, dtype=torch.float64)
    kept = (S**2).cumsum(0) / (S**2).sum()
    p = int((kept < energy - 1e-12).sum()) + 1 if energy < 1.0 else 12
    outcome = problem.run("fedmomentum", energy=energy)
    assert int(outcome.rank[0]) == 3
    assert int(outcome.residual.rank[0]) == max(0, p - 3)
    missed = float((S[max(p, 3) :] ** 2).sum() / (S**2).sum()) ** 0.5
    assert distance(total(outcome), problem.dense()) == pytest.approx(missed, abs=1e-12)
    assert missed**2 <= 1.0 - energy + 1e-12


def test_default_energy_is_that_of_the_paper():
    assert make_method("fedmomentum", {}).options() == {"energy": 0.9999}
    values = [1.0] * 6 + [0.02, 0.01, 0.009, 1e-3, 1e-4, 1e-5]
    outcome = graded(values).run("fedmomentum")
    assert int(outcome.rank[0]) + int(outcome.residual.rank[0]) == 6
    assert distance(total(outcome), graded(values).dense()) <= 0.01


def test_both_pairs_are_balanced():
    outcome = unequal().run("fedmomentum")
    S = outcome.spectrum.S[0]
    r, p = int(outcome.rank[0]), int(outcome.rank[0]) + int(outcome.residual.rank[0])
    assert p > r
    for B, A, values in (
        (outcome.B[0], outcome.A[0], S[:r]),
        (outcome.residual.B[0], outcome.residual.A[0], S[r:p]),
    ):
        torch.testing.assert_close(B.T @ B, values.diag(), rtol=0, atol=1e-12 * float(S[0]))
        torch.testing.assert_close(A @ A.T, values.diag(), rtol=0, atol=1e-12 * float(S[0]))


def test_error_is_that_of_the_adapter_alone():
    problem = unequal()
    outcome = problem.run("fedmomentum")
    error, bound = float(outcome.error[0]), float(outcome.error_bound[0])
    assert error == pytest.approx(distance(product(outcome), problem.dense()), rel=1e-11)
    assert error > 0.1
    assert error <= bound < error * (1 + 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 1e-7])
def test_the_bound_holds_the_rounding_of_the_adapter(dtype, scale):
    base = standard(m=37, n=29, ranks=(3,) * 4, scale=(scale,) * 4)
    outcome = base.run("fedmomentum", dtype=dtype)
    assert outcome.B.dtype == outcome.residual.A.dtype == dtype
    assert 0.0 < distance(product(outcome), base.dense()) <= float(outcome.error_bound[0])


def test_product_of_the_adapter_is_flexlora():
    problem = unequal()
    assert distance(product(problem.run("fedmomentum")), product(problem.run("flexlora"))) < 1e-12


def test_batch_answers_each_module_by_itself():
    low = Problem(
        [unequal().B[0] @ torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64))] * 4,
        [unequal().A[0]] * 4,
        [1.0] * 4,
        unequal().weight,
    )
    uneven = replace(unequal(seed=4), weight=[0.01, 0.04, 0.15, 0.8])
    problems = [unequal(), low, uneven, identical(4)]
    outcome = make_method("fedmomentum", {"energy": 0.99}).combine(batch_of(problems), None, None)
    ranks = []
    for i, problem in enumerate(problems):
        alone = problem.run("fedmomentum", energy=0.99)
        p, q = int(outcome.rank[i]), int(outcome.residual.rank[i])
        ranks.append((p, q > 0))
        assert (p, q) == (int(alone.rank[0]), int(alone.residual.rank[0]))
        assert distance(outcome.B[i, :, :p] @ outcome.A[i, :p], product(alone)) < 1e-12
        assert distance(residual(outcome, i), residual(alone)) < 1e-11
        assert not outcome.residual.B[i, :, q:].any()
        assert not outcome.residual.A[i, q:].any()
    assert ranks == [(6, True), (2, False), (6, True), (6, False)]
    assert int(outcome.residual.rank[0]) != int(outcome.residual.rank[2])


def test_a_sum_of_low_rank_has_no_residual_and_the_client_still_receives_r():
    outcome = with_spectrum([3.0, 1.0, 0.0, 0.0, 0.0]).run("fedmomentum")
    assert int(outcome.rank[0]) == 2
    assert int(outcome.residual.rank[0]) == 0
    assert make_method("fedmomentum", {}).client_rank(5, 2) == 5


@pytest.mark.parametrize("copies", [1, 3])
def test_one_client_and_identical_clients_return_that_update(copies):
    outcome = identical(copies).run("fedmomentum")
    assert distance(product(outcome), identical(1).dense()) < 1e-12
    assert int(outcome.residual.rank[0]) == 0


@pytest.mark.parametrize(
    "change",
    [
        Problem.gauged,
        lambda p: with_gauges(p, (1e4, 1.0, 1e-4, 1e4)),
        lambda p: p.permuted([3, 0, 2, 1]),
        lambda p: split(p, 3),
    ],
    ids=["gauge", "imbalanced gauge", "order", "split client"],
)
def test_what_leaves_the_sum_leaves_both_products(change):
    first, second = unequal().run("fedmomentum"), change(unequal()).run("fedmomentum")
    assert distance(product(first), product(second)) < 1e-11
    assert distance(residual(first), residual(second)) < 1e-11


@pytest.mark.parametrize("c", [-1.0, 0.125, 7.3])
def test_scaling_all_updates_scales_both_products(c):
    first = unequal().run("fedmomentum")
    second = replace(unequal(), scale=[c * s for s in unequal().scale]).run("fedmomentum")
    assert distance(product(second), c * product(first)) < 1e-11
    assert distance(residual(second), c * residual(first)) < 1e-11


def test_two_levels_equal_one():
    problem = unequal()
    halves = []
    for chosen in ([0, 2], [1, 3]):
        mass = sum(problem.weight[k] for k in chosen)
        part = problem.permuted(chosen)
        outcome = replace(part, weight=[w / mass for w in part.weight]).run("fedmomentum", energy=1.0)
        halves.append((mass, total(outcome)))
    assert distance(sum(mass * D for mass, D in halves), problem.dense()) < 1e-12


def test_clients_of_several_dtypes_are_summed_exactly():
    problem = unequal()
    kinds = (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    mixed = replace(
        problem,
        B=[b.to(kind) for b, kind in zip(problem.B, kinds, strict=True)],
        A=[a.to(kind) for a, kind in zip(problem.A, kinds, strict=True)],
    )
    assert distance(total(mixed.run("fedmomentum", dtype=torch.float64, energy=1.0)), mixed.dense()) < 1e-12
    assert distance(total(mixed.run("fedmomentum", dtype=torch.float32, energy=1.0)), mixed.dense()) < 1e-6


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    m=st.integers(1, 19),
    n=st.integers(1, 19),
    r=st.integers(1, 6),
    clients=st.integers(1, 4),
    energy=st.floats(0.01, 1.0),
)
def test_what_both_miss_is_what_the_energy_allows(m, n, r, clients, energy):
    problem = standard(m=m, n=n if n != m else n + 1, ranks=(r,) * clients)
    D = problem.dense()
    outcome = problem.run("fedmomentum", energy=energy)
    assert distance(total(outcome), D) ** 2 <= 1.0 - energy + 1e-11
    assert distance(product(outcome), D) == pytest.approx(float(outcome.error[0]), abs=1e-11)


def test_zero_update_is_rank_one_with_a_unit_row_and_no_residual():
    problem = unequal()
    nobody = problem
    for k in range(4):
        nobody = without_client(nobody, k)
    for outcome in (
        replace(problem, B=[torch.zeros_like(b) for b in problem.B]).run("fedmomentum"),
        nobody.run("fedmomentum"),
    ):
        assert int(outcome.rank[0]) == 1
        assert not outcome.B.any()
        assert outcome.A[0, 0].tolist() == [1.0] + [0.0] * 28
        assert int(outcome.notes[0]) & Note.ZERO
        assert int(outcome.residual.rank[0]) == 0
        assert float(outcome.error[0]) == 0.0
        assert float(outcome.error_bound[0]) == 0.0


def test_trouble_is_reported_in_info_and_spares_the_neighbours():
    large = replace(unequal(), scale=[1e11] * 4)
    assert int(large.run("fedmomentum", dtype=torch.float16).info[0]) & Info.OVERFLOW
    broken = unequal(seed=7)
    broken.B[1][3, 2] = float("nan")
    outcome = make_method("fedmomentum", {}).combine(batch_of([unequal(), broken]), None, None)
    assert int(outcome.info[0]) == 0
    assert int(outcome.info[1]) & Info.NONFINITE
    assert distance(outcome.B[0, :, :6] @ outcome.A[0, :6], product(unequal().run("fedmomentum"))) < 1e-13


def test_mixed_ranks_and_rules_are_refused():
    with pytest.raises(MismatchError, match="4, 8, 12"):
        standard().run("fedmomentum")
    with pytest.raises(InputError, match="rule"):
        make_method("fedmomentum", {}, Energy(0.9))


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.5, float("nan"), "0.9", True, None])
def test_energy_outside_its_range_is_refused(energy):
    with pytest.raises(InputError, match=r"^fedmomentum: energy is .*; a number with 0 < energy <= 1 is needed$"):
        make_method("fedmomentum", {"energy": energy})


def test_what_is_sent_counts_the_residual():
    assert make_method("fedmomentum", {}).broadcast_rank([6] * 4, 6, 11) == 17
