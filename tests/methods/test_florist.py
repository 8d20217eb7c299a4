"""FLoRIST: exact at tau = 1, optimal below, indifferent to gauge, order and splitting."""

from dataclasses import replace

import pytest
import torch
from method_problems import (
    COUNTS,
    VARIANTS,
    Problem,
    distance,
    imbalanced,
    normalised,
    product,
    standard,
    with_spectrum,
)

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import Budget, Energy, Rank
from fedlora_kernels.methods.contract import make_method

ALL = Energy(1.0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_energy_one_is_the_weighted_sum(variant, backend):
    problem = VARIANTS[variant]()
    D = problem.dense()
    outcome = problem.run(rule=ALL, backend=backend)
    assert distance(product(outcome), D) < 1e-12
    S = torch.linalg.svdvals(D)
    p = int(outcome.rank[0])
    assert p <= min(D.shape)
    torch.testing.assert_close(outcome.spectrum.S[0, :p], S[:p], rtol=1e-11, atol=1e-13 * float(S[0]))
    assert float(outcome.spectrum.energy[0]) == pytest.approx(float((D * D).sum()), rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_energy_one_in_narrow_dtypes_equals_the_sum_of_the_upcast_inputs(dtype):
    problem = standard(dtype=dtype)
    outcome = problem.run(rule=ALL, dtype=torch.float32, backend="torch")
    assert outcome.B.dtype == outcome.A.dtype == torch.float32
    assert distance(product(outcome), problem.dense()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_answer_has_the_dtype_of_the_group(dtype):
    outcome = standard(m=11, n=7, ranks=(2, 3), scale=(0.01, 0.01), dtype=torch.float32).run(rule=ALL, dtype=dtype)
    assert outcome.B.dtype == outcome.A.dtype == dtype


@pytest.mark.parametrize("tau", [1e-12, 0.3, 0.8, 0.9, 0.99, 0.999999])
def test_truncation_error_is_the_discarded_energy(tau):
    problem = standard()
    D = problem.dense()
    S2 = torch.linalg.svdvals(D) ** 2
    outcome = problem.run(rule=Energy(tau))
    p = int(outcome.rank[0])
    lost = float(S2[p:].sum() / S2.sum())
    assert distance(product(outcome), D) ** 2 == pytest.approx(lost, rel=1e-9, abs=1e-13)
    assert lost <= 1 - tau + 1e-12
    assert float(outcome.error[0]) == pytest.approx(lost**0.5, rel=1e-9, abs=1e-13)
    assert float(outcome.error_bound[0]) >= float(outcome.error[0])
    assert p == 1 or float(S2[: p - 1].sum()) < tau * float(S2.sum())


def test_rank_is_non_decreasing_in_tau():
    problem = standard()
    ranks = [int(problem.run(rule=Energy(t)).rank[0]) for t in (1e-9, 0.2, 0.5, 0.8, 0.9, 0.95, 0.999, 1.0)]
    assert ranks == sorted(ranks)
    assert ranks[0] == 1
    assert ranks[-1] == 36


@pytest.mark.parametrize("scale", [1.0, 3.7, 1e-3])
def test_ten_equal_values_with_tau_nine_tenths_give_nine(scale):
    assert int(with_spectrum([scale] * 10).run(rule=Energy(0.9)).rank[0]) == 9


def test_tau_one_keeps_small_directions():
    outcome = with_spectrum([1.0] * 4 + [1e-4] * 8).run(rule=ALL, dtype=torch.float32)
    assert int(outcome.rank[0]) == 12


@pytest.mark.parametrize("output", ["left", "balanced"])
def test_factor_forms(output):
    problem = standard()
    D = problem.dense()
    outcome = problem.run(rule=Energy(0.95), output=output)
    p = int(outcome.rank[0])
    B, A, S = outcome.B[0, :, :p], outcome.A[0, :p], outcome.spectrum.S[0, :p]
    eye = torch.eye(p, dtype=torch.float64)
    on_B, on_A = (S**2, torch.ones_like(S)) if output == "left" else (S, S)
    torch.testing.assert_close(A @ A.T, on_A * eye, rtol=0, atol=1e-12 * float(on_A.max()))
    torch.testing.assert_close(B.T @ B, on_B * eye, rtol=0, atol=1e-12 * float(on_B.max()))
    if output == "left":
        torch.testing.assert_close(B, D @ A.T, rtol=0, atol=1e-12 * float(S[0]))


def test_every_prefix_is_the_best_approximation_of_its_rank():
    problem = standard()
    D = problem.dense()
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    outcome = problem.run(rule=ALL)
    for r in (1, 2, 7, 20, 36):
        best = U[:, :r] * S[:r] @ Vh[:r]
        assert distance(outcome.B[0, :, :r] @ outcome.A[0, :r], best) < 1e-11


def same(first, second, limit=1e-11):
    assert int(first.rank[0]) == int(second.rank[0])
    assert distance(product(first), product(second)) < limit


def test_gauge_change_of_any_client_changes_nothing():
    problem = standard()
    same(problem.run(), problem.gauged().run())


def test_client_order_changes_nothing():
    problem = standard()
    same(problem.run(), problem.permuted([3, 0, 4, 2, 1]).run())


def test_splitting_a_client_changes_nothing():
    problem = standard()
    halves = Problem(
        [*problem.B, problem.B[3]],
        [*problem.A, problem.A[3]],
        [*problem.scale, problem.scale[3]],
        [*problem.weight[:3], problem.weight[3] / 2, problem.weight[4], problem.weight[3] / 2],
    )
    same(problem.run(), halves.run())


@pytest.mark.parametrize("c", [-1.0, 0.125, 7.3])
def test_scaling_all_updates_scales_the_product(c):
    problem = standard()
    scaled = replace(problem, scale=[c * s for s in problem.scale])
    first, second = problem.run(), scaled.run()
    assert int(first.rank[0]) == int(second.rank[0])
    assert distance(product(second), c * product(first)) < 1e-11


def test_identical_clients_give_that_update():
    one = standard(ranks=(6,), scale=(2.0,))
    three = Problem(one.B * 3, one.A * 3, one.scale * 3, normalised([1, 2, 4]))
    outcome = three.run(rule=ALL)
    assert int(outcome.rank[0]) == 6
    assert distance(product(outcome), one.dense()) < 1e-12


def test_gauge_imbalanced_clients_agree_on_every_backend():
    problem = standard()
    for backend in ("reference", "torch"):
        same(problem.run(), imbalanced(problem).run(backend=backend))


def test_two_levels_equal_one():
    problem = standard()
    w = problem.weight
    halves = []
    for part in ([0, 1], [2, 3, 4]):
        mass = sum(w[k] for k in part)
        chosen = problem.permuted(part)
        halves.append((mass, replace(chosen, weight=[v / mass for v in chosen.weight]).run(rule=ALL)))
    top = Problem([h.B[0] for _, h in halves], [h.A[0] for _, h in halves], [1.0, 1.0], [mass for mass, _ in halves])
    same(problem.run(rule=ALL), top.run(rule=ALL))


def test_zero_update_is_rank_one_with_a_unit_row():
    problem = standard()
    problem = replace(problem, B=[torch.zeros_like(b) for b in problem.B])
    unit_row(problem.run())


def test_exact_cancellation_is_a_zero_update():
    problem = standard(ranks=(6, 6), counts=(1, 1))
    opposite = Problem([problem.B[0], -problem.B[0]], [problem.A[0]] * 2, [2.0, 2.0], [0.5, 0.5])
    unit_row(opposite.run())


def test_scale_zero_everywhere_is_a_zero_update():
    unit_row(replace(standard(), scale=[0.0] * 5).run())


def unit_row(outcome):
    assert int(outcome.rank[0]) == 1
    assert not outcome.B.any()
    assert outcome.A[0, 0].tolist() == [1.0] + [0.0] * (outcome.A.shape[-1] - 1)
    assert int(outcome.notes[0]) & Note.ZERO
    assert (
        float(outcome.error[0]) == 0.0 or float(outcome.spectrum.energy[0]) > 0.0
    )  # rounding noise of a cancelled sum


def test_a_client_without_the_module_contributes_nothing():
    problem = standard()
    absent = replace(
        problem,
        B=[*problem.B, torch.zeros(48, 0, dtype=torch.float64)],
        A=[*problem.A, torch.zeros(0, 40, dtype=torch.float64)],
        scale=[*problem.scale, 0.0],
        weight=[*problem.weight, 0.0],
    )
    same(problem.run(), absent.run(), limit=1e-14)


def test_coefficients_are_the_weights_times_the_scales():
    """Catches a client that is stacked twice and a scale that is dropped: least squares recovers each coefficient."""
    problem = standard(scale=(0.5, 4.0, 1.0, 2.0, 3.0))
    bare = [(b @ a).flatten() for b, a in zip(problem.B, problem.A, strict=True)]
    got = torch.linalg.lstsq(torch.stack(bare, 1), product(problem.run(rule=ALL)).flatten()[:, None]).solution[:, 0]
    wanted = torch.tensor([w * s for w, s in zip(problem.weight, problem.scale, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=0)
    assert sum(COUNTS) * problem.weight[0] == pytest.approx(10)


def test_one_client_is_its_own_truncated_update():
    problem = standard(ranks=(9,))
    U, S, Vh = torch.linalg.svd(problem.dense(), full_matrices=False)
    assert distance(product(problem.run(rule=Rank(4))), U[:, :4] * S[:4] @ Vh[:4]) < 1e-11


def test_a_batch_answers_each_module_by_itself():
    problems = [standard(seed=seed) for seed in range(3)]
    group = replace(
        problems[0].group(),
        modules=("a", "b", "c"),
        B=tuple(torch.stack([p.B[k] for p in problems]) for k in range(5)),
        A=tuple(torch.stack([p.A[k] for p in problems]) for k in range(5)),
        scale=problems[0].group().scale.expand(3, -1),
        weight=problems[0].group().weight.expand(3, -1),
    )
    outcome = make_method("florist", {}).combine(group, None, None)
    for i, problem in enumerate(problems):
        p = int(outcome.rank[i])
        assert distance(outcome.B[i, :, :p] @ outcome.A[i, :p], product(problem.run())) < 1e-13


def test_trouble_is_reported_in_info():
    problem = standard()
    problem.B[1][3, 2] = float("nan")
    assert int(problem.run().info[0]) & Info.NONFINITE
    large = standard(scale=(1e6,) * 5, dtype=torch.float32)
    assert int(large.run(dtype=torch.float16).info[0]) & Info.OVERFLOW


@pytest.mark.parametrize(
    ("options", "text"),
    [({"rule": 0.9}, "rank rule"), ({"output": "right"}, "left, balanced")],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(InputError, match=text):
        make_method("florist", options)


def test_a_budget_is_for_the_engine_to_share():
    with pytest.raises(InputError, match="spectra of all modules, which only aggregate and resize have"):
        standard().run(rule=Budget("1MB"))


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.5, float("nan")])
def test_tau_outside_its_range_is_refused(tau):
    with pytest.raises(ValueError, match="Energy"):
        Energy(tau)


@pytest.mark.parametrize("output", ["left", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 1e-7])
@pytest.mark.parametrize("rule", [ALL, Rank(3)])
def test_the_rounding_of_the_answer_is_within_the_bound(output, dtype, scale, rule):
    p = standard(scale=(scale,) * 5, ranks=(4, 4, 8, 8, 12) if rule is ALL else (3,) * 5)
    outcome = p.run(rule=rule, output=output, dtype=dtype)
    assert outcome.B.dtype == dtype
    found, bound = distance(product(outcome), p.dense()), float(outcome.error_bound[0])
    assert 0.0 < found <= bound
    if scale == 0.3:
        assert bound < float(outcome.error[0]) + 4 * torch.finfo(dtype).eps
