"""FedEx-LoRA: the pair of FedIT, and a residual that makes it exact, without cancellation and of small rank."""

from dataclasses import replace

import pytest
import torch
from equal_rank_problems import (
    EQUAL_RANKS,
    batch_of,
    common_factor,
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
from method_problems import Problem, distance, normalised, product, standard

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods import factors
from fedlora_kernels.methods.contract import make_method


def covariance(p: Problem) -> torch.Tensor:
    """``sum_k w_k (B_k - Bbar)(A_k - Abar)`` with scales folded into B, for weights of sum 1."""
    w = torch.tensor(p.weight, dtype=torch.float64)[:, None, None]
    s = torch.tensor(p.scale, dtype=torch.float64)[:, None, None]
    B, A = s * torch.stack(p.B).double(), torch.stack(p.A).double()
    return (w * (B - (w * B).sum(0)) @ (A - (w * A).sum(0))).sum(0)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("variant", EQUAL_RANKS)
def test_pair_and_residual_make_the_sum(variant, backend):
    """Catches unweighted means, scales left out of either part, and a transposed residual."""
    problem = EQUAL_RANKS[variant]()
    D = problem.dense()
    outcome = problem.run("fedex", backend=backend)
    terms = sum(
        abs(w) * float(torch.linalg.matrix_norm(d)) for w, d in zip(problem.weight, problem.updates(), strict=True)
    )
    gauge = 1e8 if variant == "gauge_imbalanced" else 1.0  # the factor means are that much larger than the updates
    assert float((total(outcome) - D).norm()) < 1e-13 * terms * gauge
    if variant != "gauge_imbalanced":
        assert distance(total(outcome), D) < 1e-12


@pytest.mark.parametrize("variant", EQUAL_RANKS)
def test_pair_is_that_of_fedit(variant):
    problem = EQUAL_RANKS[variant]()
    first, second = problem.run("fedex"), problem.run("fedit")
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)
    assert float(first.error[0]) == pytest.approx(float(second.error[0]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("variant", EQUAL_RANKS)
def test_residual_has_at_most_one_rank_less_than_there_are_clients(variant):
    problem = EQUAL_RANKS[variant]()
    owners = [k for k, b in enumerate(problem.B) if b.shape[1] > 0 and problem.weight[k] != 0.0]
    r = max(b.shape[1] for b in problem.B)
    whole = abs(sum(problem.weight[k] for k in owners) - 1.0) < 1e-12
    rank = int(problem.run("fedex").residual.rank[0])
    assert rank <= min((len(owners) - whole) * r, *problem.dense().shape)


def test_residual_is_the_weighted_covariance_of_the_factors():
    problem = unequal()
    outcome = problem.run("fedex")
    assert int(outcome.residual.rank[0]) == 18
    assert distance(residual(outcome), covariance(problem)) < 1e-13
    assert distance(residual(outcome), problem.dense()) > 0.1


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9])
def test_residual_of_nearly_equal_clients_does_not_drown_in_rounding(delta):
    """Catches a residual formed as the difference of two products, which is off by u64 |D| / |E|, 1e2 at the last delta."""
    base, noise = standard(m=37, n=29, ranks=(6,), scale=(2.0,)), unequal()
    problem = Problem(
        [base.B[0] + delta * b for b in noise.B], [base.A[0] + delta * a for a in noise.A], [2.0] * 4, noise.weight
    )
    outcome = problem.run("fedex")
    E = covariance(problem)
    assert distance(residual(outcome), E) < 1e-12 + 64 * 2**-53 / delta
    assert float(outcome.error[0]) == pytest.approx(float(E.norm() / problem.dense().norm()), rel=1e-6)


def test_error_is_the_norm_of_the_residual():
    problem = unequal()
    outcome = problem.run("fedex")
    error, bound = float(outcome.error[0]), float(outcome.error_bound[0])
    assert error == pytest.approx(float(residual(outcome).norm() / problem.dense().norm()), rel=1e-12)
    assert error == pytest.approx(distance(product(outcome), problem.dense()), rel=1e-12)
    assert error <= bound < error * (1 + 1e-5)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_common_factor_leaves_no_residual(factor):
    problem = common_factor(factor)
    outcome = problem.run("fedex")
    assert int(outcome.residual.rank[0]) == 0
    assert float(outcome.error[0]) == 0.0
    assert distance(product(outcome), problem.dense()) < 1e-13


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_one_client_and_identical_clients_return_that_update(copies):
    outcome = identical(copies).run("fedex")
    assert int(outcome.residual.rank[0]) == 0
    assert distance(product(outcome), identical(1).dense()) < 1e-14


def test_a_single_client_of_weight_below_one_is_completed():
    """w B A against (w B)(w A): the residual holds w (1 - w) B A."""
    problem = replace(identical(1), weight=[0.25])
    outcome = problem.run("fedex")
    assert int(outcome.residual.rank[0]) == 6
    assert distance(residual(outcome), 0.25 * 0.75 * 3.0 * problem.B[0] @ problem.A[0]) < 1e-14
    assert distance(total(outcome), problem.dense()) < 1e-14


@pytest.mark.parametrize("k", range(4))
def test_a_missing_client_that_counts_as_zero_leaves_rank_k_r(k):
    """Weights of the owners sum to v < 1, so the residual has a term (1 - v) Bbar A more."""
    problem = without_client(unequal(), k)
    outcome = problem.run("fedex")
    assert distance(total(outcome), problem.dense()) < 1e-13
    assert int(outcome.residual.rank[0]) == 18  # of three owners


@pytest.mark.parametrize("k", range(4))
def test_a_missing_client_that_renormalises_is_not_there(k):
    weight = [0.0 if i == k else w for i, w in enumerate(unequal().weight)]
    problem = replace(without_client(unequal(), k), weight=[w / sum(weight) for w in weight])
    others = problem.permuted([i for i in range(4) if i != k])
    first, second = problem.run("fedex"), others.run("fedex")
    assert int(first.residual.rank[0]) == 12
    assert distance(total(first), problem.dense()) < 1e-13
    assert torch.equal(first.residual.B, second.residual.B)
    assert torch.equal(first.residual.A, second.residual.A)


@pytest.mark.parametrize("weight", [[0.7, -0.2, 1.1, 0.4], [2.0, 1.0, 1.0, 3.0], [0.5, -0.5, 0.25, -0.25]])
def test_unnormalised_weights(weight):
    problem = replace(unequal(), weight=weight)
    outcome = problem.run("fedex")
    assert distance(total(outcome), problem.dense()) < 1e-13
    assert int(outcome.residual.rank[0]) == 24
    assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), problem.dense()), rel=1e-12)


def test_clients_of_weight_zero_leave_no_block():
    problem = replace(unequal(), weight=[0.5, 0.0, 0.5, 0.0])
    outcome = problem.run("fedex")
    assert int(outcome.residual.rank[0]) == 6
    assert distance(total(outcome), problem.dense()) < 1e-13


def test_a_client_that_shares_the_last_ones_a_leaves_no_block():
    problem = unequal()
    problem.A[1] = problem.A[3]
    outcome = problem.run("fedex")
    assert int(outcome.residual.rank[0]) == 12
    assert distance(total(outcome), problem.dense()) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize(("m", "n"), [(13, 11), (11, 13), (17, 40), (40, 17)])
def test_a_stack_wider_than_the_matrix_is_compressed(m, n, backend):
    problem = unequal(m=m, n=n)
    outcome = problem.run("fedex", backend=backend)
    assert int(outcome.residual.rank[0]) == int(torch.linalg.matrix_rank(covariance(problem))) <= min(m, n)
    assert distance(residual(outcome), covariance(problem)) < 1e-12
    assert outcome.residual.B.shape[-1] <= min(m, n)


def test_batch_answers_each_module_by_itself():
    """Other weights next door change neither rank nor residual; the weights of one matrix may single out one client."""
    problems = [
        unequal(m=19, n=13),
        replace(unequal(m=19, n=13, seed=3), weight=[0.0, 1.0, 0.0, 0.0]),
        replace(unequal(m=19, n=13, seed=4), weight=[0.5, 0.0, 0.5, 0.0]),
        replace(unequal(m=19, n=13, seed=5), weight=[0.25, 0.0, 0.5, 0.0]),
    ]
    outcome = make_method("fedex", {}).combine(batch_of(problems), None, None)
    assert outcome.residual.rank.tolist() == [13, 0, 6, 12]
    for i, problem in enumerate(problems):
        alone = problem.run("fedex")
        rank = int(alone.residual.rank[0])
        assert int(outcome.residual.rank[i]) == rank
        assert distance(residual(outcome, i), residual(alone)) < 1e-14
        for x, y in zip(outcome.residual[:2], alone.residual[:2], strict=True):  # the same factors, not a like product
            cut = (slice(None), slice(rank)) if x is outcome.residual.B else (slice(rank),)
            torch.testing.assert_close(x[i][cut], y[0][cut], rtol=0, atol=1e-10)
        assert not outcome.residual.B[i, :, rank:].any()
        assert not outcome.residual.A[i, rank:].any()
        assert distance(outcome.B[i] @ outcome.A[i] + residual(outcome, i), problem.dense()) < 1e-13


def test_chunks_change_nothing(monkeypatch):
    problems = [unequal(seed=seed) for seed in range(3)] + [common_factor("A")]
    whole = make_method("fedex", {}).combine(batch_of(problems), None, None)
    monkeypatch.setattr(factors, "CHUNK", 1)
    parts = make_method("fedex", {}).combine(batch_of(problems), None, None)
    assert parts.residual.rank.tolist() == whole.residual.rank.tolist() == [18, 18, 18, 0]
    for first, second in zip(
        (whole.B, whole.A, *whole.residual[:2]), (parts.B, parts.A, *parts.residual[:2]), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-13)


def test_a_gauge_changes_the_pair_and_not_the_sum():
    problem = unequal()
    first = problem.run("fedex")
    for changed in (problem.gauged(), with_gauges(problem, (30.0, 1.0, 0.1, 5.0))):
        second = changed.run("fedex")
        assert distance(total(first), total(second)) < 1e-12
        assert distance(product(first), product(second)) > 0.05


def test_rotated_copies_are_mended_by_the_residual():
    one = identical(1)
    made = torch.Generator().manual_seed(2)
    turns = [torch.linalg.qr(torch.randn(6, 6, generator=made, dtype=torch.float64))[0] for _ in range(4)]
    B, A = [one.B[0] @ q for q in turns], [q.T @ one.A[0] for q in turns]
    outcome = Problem(B, A, [3.0] * 4, normalised([1, 2, 3, 4])).run("fedex")
    assert distance(product(outcome), one.dense()) > 0.3
    assert distance(total(outcome), one.dense()) < 1e-13


@pytest.mark.parametrize("change", [lambda p: p.permuted([3, 0, 2, 1]), lambda p: split(p, 3)], ids=["order", "split"])
def test_order_and_splitting_change_neither_part(change):
    first, second = unequal().run("fedex"), change(unequal()).run("fedex")
    assert distance(product(first), product(second)) < 1e-13
    assert distance(residual(first), residual(second)) < 1e-13
    assert int(second.residual.rank[0]) == 18  # two halves of the last client share its block


@pytest.mark.parametrize("c", [-1.0, 0.125, 7.3])
def test_scaling_all_updates_scales_both_products(c):
    first = unequal().run("fedex")
    second = replace(unequal(), scale=[c * s for s in unequal().scale]).run("fedex")
    assert distance(product(second), c * product(first)) < 1e-13
    assert distance(residual(second), c * residual(first)) < 1e-13


def test_two_levels_equal_one():
    problem = unequal()
    whole = torch.zeros_like(problem.dense())
    for chosen in ([0, 2], [1, 3]):
        mass = sum(problem.weight[k] for k in chosen)
        part = problem.permuted(chosen)
        whole += mass * total(replace(part, weight=[w / mass for w in part.weight]).run("fedex"))
    assert distance(whole, problem.dense()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes(dtype):
    problem = unequal(dtype=dtype)
    outcome = problem.run("fedex", dtype=torch.float32)
    assert outcome.residual.B.dtype == outcome.B.dtype == torch.float32
    assert distance(total(outcome), problem.dense()) < 1e-6
    assert distance(product(outcome), problem.dense()) <= float(outcome.error_bound[0])


def test_clients_of_several_dtypes_are_summed_exactly():
    problem = unequal()
    kinds = (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    mixed = replace(
        problem,
        B=[b.to(kind) for b, kind in zip(problem.B, kinds, strict=True)],
        A=[a.to(kind) for a, kind in zip(problem.A, kinds, strict=True)],
    )
    assert distance(total(mixed.run("fedex", dtype=torch.float64)), mixed.dense()) < 1e-13
    assert distance(total(mixed.run("fedex", dtype=torch.float32)), mixed.dense()) < 1e-6


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    m=st.integers(1, 19),
    n=st.integers(1, 19),
    r=st.integers(1, 5),
    weight=st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.3]), min_size=1, max_size=5),
    normalise=st.booleans(),
    seed=st.integers(0, 9),
)
def test_pair_and_residual_make_the_sum_for_any_weights(m, n, r, weight, normalise, seed):
    if normalise and sum(weight) > 0.0:
        weight = normalised(weight)
    clients = len(weight)
    scale = [(-1.0) ** k * (k + 0.5) for k in range(clients)]
    problem = standard(m=m, n=n + (n == m), ranks=(r,) * clients, counts=[1] * clients, scale=scale, seed=seed)
    problem = replace(problem, weight=weight)
    outcome = problem.run("fedex")
    size = sum(abs(w) * float(d.norm()) for w, d in zip(weight, problem.updates(), strict=True))
    assert float((total(outcome) - problem.dense()).norm()) <= 1e-12 * size * (1.0 + sum(map(abs, weight)))
    assert int(outcome.residual.rank[0]) <= min(m, n + (n == m), clients * r)


def test_zero_update_has_a_note_and_no_residual():
    problem = unequal()
    outcome = replace(problem, B=[torch.zeros_like(b) for b in problem.B]).run("fedex")
    assert int(outcome.notes[0]) & Note.ZERO
    assert int(outcome.residual.rank[0]) == 0
    assert float(outcome.error[0]) == float(outcome.error_bound[0]) == 0.0


def test_trouble_is_reported_in_info_and_spares_the_neighbours():
    assert int(replace(unequal(), scale=[1e6] * 4).run("fedex", dtype=torch.float16).info[0]) == Info.OVERFLOW
    broken = unequal(seed=7)
    broken.A[1][2, 3] = float("inf")
    outcome = make_method("fedex", {}).combine(batch_of([unequal(), broken]), None, None)
    assert int(outcome.info[0]) == 0
    assert int(outcome.info[1]) & Info.NONFINITE
    assert distance(residual(outcome), residual(unequal().run("fedex"))) < 1e-14


@pytest.mark.parametrize("m", [37, 5])
def test_a_residual_that_overflows_alone_is_reported(m):
    """The factors cancel in the mean, which fits; their differences do not."""
    problem = unequal(m=m, n=29)
    pairs = {"B": [1e6 * problem.B[0], -1e6 * problem.B[0]], "A": problem.A[:2]}
    outcome = Problem(**pairs, scale=[1.0, 1.0], weight=[0.5, 0.5]).run("fedex", dtype=torch.float16)
    assert torch.isfinite(outcome.B).all()
    assert int(outcome.info[0]) == (Info.OVERFLOW if m == 37 else 0)  # compressed, sqrt(S) on either side fits


def test_mixed_ranks_and_rules_are_refused():
    with pytest.raises(MismatchError, match="4, 8, 12"):
        standard().run("fedex")
    with pytest.raises(InputError, match="rule"):
        make_method("fedex", {}, Energy(0.9))


def test_nothing_is_measured_unless_asked():
    outcome = make_method("fedex", {}).combine(unequal().group(measure=False), None, None)
    assert torch.isnan(outcome.error).all()
    assert distance(total(outcome), unequal().dense()) < 1e-13


def test_what_is_sent_counts_the_residual():
    assert make_method("fedex", {}).broadcast_rank([6] * 4, 6, 18) == 24
