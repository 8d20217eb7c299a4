"""Robust rules: what they choose, on whatever factors and order, against dense float64 models."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import VARIANTS, Problem, distance, imbalanced, normalised, product, standard

import fedlora_kernels as fk
from fedlora_kernels.backends.contract import Info
from fedlora_kernels.errors import InputError, NonFiniteError, WeightError
from fedlora_kernels.methods.contract import make_method, method_class
from fedlora_kernels.methods.factors import client_gram
from fedlora_kernels.methods.norm_rules import clip_factors
from fedlora_kernels.methods.robust import RobustRule, Verdict, describe_verdict
from fedlora_kernels.request import method_options

NAMES = ["krum", "multi_krum", "geometric_median", "trimmed_mean", "norm_clip"]
RULES = {
    "krum": fk.Krum(1),
    "multi_krum": fk.MultiKrum(1),
    "multi_krum_q": fk.MultiKrum(1, q=2),
    "geometric_median": fk.GeometricMedian(),
    "trimmed_mean": fk.TrimmedMean(0.2),
    "trimmed_one_sided": fk.TrimmedMean(0.4, one_sided=True),
    "norm_clip": fk.NormClip(),
    "norm_clip_number": fk.NormClip(40.0),
}
BACKENDS = ["reference", "torch", "auto"]


def verdict(problem, rule, backend="torch") -> Verdict:
    gram = client_gram(problem.group(backend=backend))[0].numpy()
    return rule.coefficients(gram, np.array(problem.weight))


def judged(problem, found) -> Problem:
    """The problem as a method sees it behind a rule."""
    scale = [float(s * x) for s, x in zip(problem.scale, found.factor, strict=True)]
    return replace(problem, weight=found.weight.tolist(), scale=scale)


def aggregate(problem, rule, backend="torch") -> torch.Tensor:
    """What the rule means as a method."""
    behind = judged(problem, verdict(problem, rule, backend))
    return product(rule.combine(behind.group(backend=backend), None, None))


def gram_of(points) -> np.ndarray:
    points = np.asarray(points, np.float64).reshape(len(points), -1)
    return points @ points.T


def uniform(K) -> np.ndarray:
    return np.full(K, 1.0 / K)


def dense_weiszfeld(points, weight) -> np.ndarray:
    """Coefficients of the geometric median, each distance taken entry by entry."""
    norms = np.linalg.norm(points, axis=1)
    nu = 1e-8 * (np.median(norms) or norms.max())
    c = weight / weight.sum()
    for _ in range(1000):
        before = c
        d = np.linalg.norm(points - c @ points, axis=1)
        c = weight / np.maximum(d, nu)
        c = c / c.sum()
        if np.abs(c - before).sum() <= 1e-12:
            break
    return c


def flat_updates(problem) -> np.ndarray:
    return torch.stack([d.flatten() for d in problem.updates()]).numpy()


def pull(points, weight, Z) -> tuple[float, float]:
    """Length of the sum of weighted unit vectors towards the points away from Z, and the weight of the points at Z."""
    gaps = points - Z
    d = np.linalg.norm(gaps, axis=1)
    away = d > 1e-6 * np.linalg.norm(points, axis=1).max()
    return float(np.linalg.norm((weight[away] / d[away]) @ gaps[away])), float(weight[~away].sum())


def nine_clients(seed=0) -> Problem:
    """One base pair with 5 % factor noise; client 3 has a 5x random A, client 6 a negated B."""
    made = torch.Generator().manual_seed(seed)
    m, n, r = 47, 31, 4

    def draw(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    B0, A0 = draw(m, r), draw(r, n)
    B = [B0 + 0.05 * draw(m, r) for _ in range(9)]
    A = [A0 + 0.05 * draw(r, n) for _ in range(9)]
    A[3], B[6] = 5.0 * draw(r, n), -B[6]
    return Problem(B, A, [2.0] * 9, [1 / 9] * 9)


# what every rule owes


@pytest.mark.parametrize("name", NAMES)
def test_rules_are_methods_that_describe_themselves(name):
    cls = method_class(name)
    assert issubclass(cls, RobustRule)
    assert all((cls.summary, cls.exact, cls.broadcast, cls.download))
    assert cls.gives == ("common",)
    assert cls.product_only
    assert not cls.needs_decision
    assert not cls.takes_rule
    assert not cls.equal_ranks


def test_rules_are_named_by_the_package():
    classes = (fk.Krum, fk.MultiKrum, fk.GeometricMedian, fk.TrimmedMean, fk.NormClip)
    assert [cls.name for cls in classes] == NAMES


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RULES)
def test_as_a_method_a_rule_means_the_exact_sum_of_its_coefficients(name, backend):
    problem = standard()
    found = verdict(problem, RULES[name], backend)
    wanted = sum(
        c * x * d for c, x, d in zip(found.weight.tolist(), found.factor.tolist(), problem.updates(), strict=True)
    )
    assert distance(aggregate(problem, RULES[name], backend), wanted) < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_as_a_method_a_rule_is_florist_at_energy_one(name):
    group = judged(standard(), verdict(standard(), RULES[name])).group()
    outcome = RULES[name].combine(group, None, None)
    florist = make_method("florist", {}, fk.Energy(1.0)).combine(group, None, None)
    assert torch.equal(outcome.B, florist.B)
    assert torch.equal(outcome.A, florist.A)
    assert torch.equal(outcome.spectrum.S, florist.spectrum.S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_narrow_factors_are_judged_and_summed_as_the_upcast_ones(name, dtype):
    problem = standard(scale=(1.0,) * 5, dtype=dtype)
    wide = replace(problem, B=[b.double() for b in problem.B], A=[a.double() for a in problem.A])
    found, upcast = verdict(problem, RULES[name]), verdict(wide, RULES[name])
    np.testing.assert_allclose(found.weight, upcast.weight, rtol=1e-9)
    behind = judged(problem, found)
    answer = RULES[name].combine(behind.group(torch.float32), None, None)
    assert distance(product(answer), behind.dense()) < 1e-6


def test_modules_of_a_batch_keep_their_own_coefficients_and_a_bad_one_harms_no_other():
    p = standard(m=29, n=21, ranks=(3, 5))
    B = tuple(torch.stack([b, 2.0 * b, b]) for b in p.B)
    A = tuple(torch.stack([a, a, a]) for a in p.A)
    B[1][2, 0, 0] = float("nan")
    weight = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    scale = torch.ones(3, 2, dtype=torch.float64)
    group = replace(p.group(), modules=("a", "b", "c"), B=B, A=A, weight=weight, scale=scale)
    outcome = fk.Krum(0).combine(group, None, None)
    first, second = (b @ a for b, a in zip(p.B, p.A, strict=True))
    for i, wanted in enumerate((first, 0.5 * first + 1.5 * second)):
        p_i = int(outcome.rank[i])
        assert distance(outcome.B[i, :, :p_i] @ outcome.A[i, :p_i], wanted) < 1e-12
    assert outcome.info.tolist()[:2] == [0, 0]
    assert int(outcome.info[2]) & int(Info.NONFINITE)


@pytest.mark.parametrize("variant", ["standard", "m_below_R", "both_below_half_R", "duplicates", "one_zero_client"])
@pytest.mark.parametrize("name", RULES)
def test_an_arbitrary_gauge_changes_neither_choice_nor_product(name, variant):
    problem = VARIANTS[variant]()
    gauged = problem.gauged()
    plain, other = verdict(problem, RULES[name]), verdict(gauged, RULES[name])
    assert np.array_equal(plain.weight == 0.0, other.weight == 0.0)
    np.testing.assert_allclose(other.weight, plain.weight, rtol=1e-8)
    np.testing.assert_allclose(other.factor, plain.factor, rtol=1e-9)
    assert distance(aggregate(gauged, RULES[name]), aggregate(problem, RULES[name])) < 1e-9


@pytest.mark.parametrize("name", RULES)
def test_imbalanced_clients_are_judged_by_their_updates(name):
    plain, other = verdict(standard(), RULES[name]), verdict(imbalanced(standard()), RULES[name])
    np.testing.assert_allclose(other.weight, plain.weight, rtol=1e-9)
    np.testing.assert_allclose(other.factor, plain.factor, rtol=1e-11)


def test_raw_factors_would_have_chosen_by_gauge():
    """Six gauge copies of nearly one update and a plain pair that is none of them: only raw factors find the latter central."""
    p = nine_clients()
    problem = Problem(p.B[:3] + p.B[4:8], p.A[:3] + p.A[4:8], p.scale[:7], [1 / 7] * 7)
    gauged = problem.gauged(seed=11)

    def raw(of):
        points = np.stack([torch.cat([b.flatten(), a.flatten()]).numpy() for b, a in zip(of.B, of.A, strict=True)])
        return fk.Krum(1).coefficients(gram_of(points), uniform(7)).weight

    assert not np.array_equal(raw(problem), raw(gauged)), "the guard has lost its point"
    assert np.array_equal(verdict(problem, fk.Krum(1)).weight, verdict(gauged, fk.Krum(1)).weight)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_clients_changes_nothing(name):
    problem, order = standard(), [3, 0, 4, 2, 1]
    plain, other = verdict(problem, RULES[name]), verdict(problem.permuted(order), RULES[name])
    np.testing.assert_allclose(other.weight, plain.weight[order], rtol=1e-10)
    np.testing.assert_allclose(other.factor, plain.factor[order], rtol=1e-12)
    np.testing.assert_allclose(other.scores, plain.scores[order], rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 8.0, 1e140])
@pytest.mark.parametrize("name", [name for name in RULES if name != "norm_clip_number"])
def test_a_common_factor_on_all_updates_changes_no_choice(name, scale):
    gram = client_gram(standard().group())[0].numpy()
    weight = np.array(standard().weight)
    plain, other = (RULES[name].coefficients(g, weight) for g in (gram, gram * scale * scale))
    np.testing.assert_allclose(other.weight, plain.weight, rtol=1e-10)
    np.testing.assert_allclose(other.factor, plain.factor, rtol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_updates_at_the_limit_of_float64_are_judged(name):
    gram = client_gram(standard().group())[0].numpy()
    gram = gram / gram.diagonal().max() * 1.7e308
    found = RULES[name].coefficients(gram, uniform(5))
    assert np.isfinite(found.weight).all()
    assert found.weight.sum() == pytest.approx(1.0)
    json.dumps(describe_verdict(found, list("abcde")), allow_nan=False)


@pytest.mark.parametrize("total", [1.0, 3.0, 1e-3])
@pytest.mark.parametrize("name", RULES)
def test_coefficients_sum_to_what_the_weights_sum_to(name, total):
    problem = standard()
    problem = replace(problem, weight=[total * w for w in problem.weight])
    assert verdict(problem, RULES[name]).weight.sum() == pytest.approx(total, rel=1e-14)


@pytest.mark.parametrize("name", RULES)
def test_a_client_of_weight_zero_counts_nowhere(name):
    gram = np.full((6, 6), np.nan)
    gram[:5, :5] = client_gram(standard().group())[0].numpy()
    found = RULES[name].coefficients(gram, np.array([*standard().weight, 0.0]))
    alone = verdict(standard(), RULES[name])
    np.testing.assert_allclose(found.weight[:5], alone.weight, rtol=1e-12)
    np.testing.assert_allclose(found.factor[:5], alone.factor, rtol=1e-12)
    assert found.weight[5] == 0.0
    assert found.factor[5] == 1.0
    assert np.isnan(found.scores[5])


@pytest.mark.parametrize("name", RULES)
def test_one_client_alone_is_the_answer(name):
    problem = standard(m=37, n=29, ranks=(5,), scale=(0.5,))
    assert distance(aggregate(problem, RULES[name]), problem.dense()) < 1e-12


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_identical_clients_give_that_update(name, gauge):
    one = standard(m=37, n=29, ranks=(5,), scale=(0.5,))
    many = Problem(one.B * 5, one.A * 5, one.scale * 5, normalised((1, 2, 3, 4, 5)))
    assert distance(aggregate(many.gauged() if gauge else many, RULES[name]), one.dense()) < 1e-12


@pytest.mark.parametrize("name", [name for name in RULES if "krum" not in name])
def test_two_clients(name):
    problem = standard(m=37, n=29, ranks=(5, 3))
    found = verdict(problem, RULES[name])
    assert found.weight.sum() == pytest.approx(1.0)
    assert (found.weight > 0.0).all()
    assert np.isfinite(found.factor).all()


@pytest.mark.parametrize("name", RULES)
def test_all_updates_zero(name):
    found = RULES[name].coefficients(np.zeros((5, 5)), normalised_weights())
    assert np.array_equal(found.factor, np.ones(5))
    if name in ("geometric_median", "norm_clip", "norm_clip_number"):
        assert np.array_equal(found.weight, normalised_weights())
    assert found.weight.sum() == pytest.approx(1.0)
    zero = standard()
    zero = replace(zero, B=[torch.zeros_like(b) for b in zero.B])
    outcome = RULES[name].combine(judged(zero, found).group(), None, None)
    assert int(outcome.rank[0]) == 1
    assert not product(outcome).any()


def normalised_weights() -> np.ndarray:
    return np.array(normalised((10, 20, 30, 40, 50)))


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.integers(5, 12), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(sorted(RULES)))
def test_verdicts_are_weights(K, dimension, seed, name):
    made = np.random.default_rng(seed)
    points = made.standard_normal((K, dimension)) * 10.0 ** made.integers(-6, 7, (K, 1))
    points[made.random(K) < 0.2] = 0.0
    weight = made.random(K) + 0.01
    found = RULES[name].coefficients(gram_of(points), weight)
    assert (found.weight >= 0.0).all()
    assert found.weight.sum() == pytest.approx(weight.sum(), rel=1e-12)
    assert ((found.factor > 0.0) & (found.factor <= 1.0)).all()
    assert found.weight.shape == found.factor.shape == found.scores.shape == (K,)
    order = made.permutation(K)
    other = RULES[name].coefficients(gram_of(points[order]), weight[order])
    np.testing.assert_allclose(np.sort(other.factor), np.sort(found.factor), rtol=1e-9)


# the example of nine clients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gauge", [False, True])
def test_nine_clients_neither_outlier_is_chosen(seed, gauge, backend):
    problem = nine_clients(seed).gauged() if gauge else nine_clients(seed)
    krum, multi = verdict(problem, fk.Krum(f=2), backend), verdict(problem, fk.MultiKrum(f=2), backend)
    assert np.count_nonzero(krum.weight) == 1
    assert np.count_nonzero(multi.weight) == 7
    for found in (krum, multi):
        assert found.weight[3] == found.weight[6] == 0.0
    median = verdict(problem, fk.GeometricMedian(), backend)
    assert 0.0 < median.weight[3] < 0.01
    assert 0.0 < median.weight[6] < 0.01
    honest = sum(d for k, d in enumerate(problem.updates()) if k not in (3, 6)) / 7
    for rule in (fk.Krum(2), fk.MultiKrum(2), fk.GeometricMedian()):
        assert distance(aggregate(problem, rule, backend), honest) < 0.12
    assert distance(problem.dense(), honest) > 0.4


def test_nine_clients_the_loud_outlier_is_trimmed_and_clipped():
    problem = nine_clients()
    assert verdict(problem, fk.TrimmedMean(0.12)).weight[3] == 0.0
    assert verdict(problem, fk.TrimmedMean(0.12, one_sided=True)).weight[3] == 0.0
    assert verdict(problem, fk.NormClip()).factor[3] < 0.5


# Krum


def naive_krum(points, f) -> np.ndarray:
    K = len(points)
    scores = np.zeros(K)
    for i in range(K):
        distances = sorted(float(((points[i] - points[j]) ** 2).sum()) for j in range(K) if j != i)
        scores[i] = sum(distances[: K - f - 2])
    return scores


@pytest.mark.parametrize(("K", "f"), [(3, 0), (5, 0), (5, 1), (9, 2), (9, 3), (12, 4)])
def test_krum_scores_are_sums_over_the_nearest_neighbours(K, f):
    problem = standard(m=17, n=23, ranks=tuple(1 + k % 3 for k in range(K)), counts=range(1, K + 1))
    wanted = naive_krum(flat_updates(problem), f)
    found = verdict(problem, fk.Krum(f))
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-12)
    assert np.flatnonzero(found.weight).tolist() == [int(wanted.argmin())]
    assert found.weight.max() == pytest.approx(1.0, rel=1e-15)
    multi = verdict(problem, fk.MultiKrum(f))
    assert set(np.flatnonzero(multi.weight)) == set(np.argsort(wanted)[: K - f])


def test_krum_is_multi_krum_of_one():
    problem = standard()
    assert np.array_equal(verdict(problem, fk.Krum(1)).weight, verdict(problem, fk.MultiKrum(1, q=1)).weight)


def test_multi_krum_keeps_the_proportions_of_the_weights():
    problem = standard()
    found = verdict(problem, fk.MultiKrum(1, q=3)).weight
    chosen = np.flatnonzero(found)
    weight = np.array(problem.weight)[chosen]
    assert len(chosen) == 3
    np.testing.assert_allclose(found[chosen], weight / weight.sum(), rtol=1e-15)


@pytest.mark.parametrize("rule", [fk.MultiKrum(1, q=5), fk.TrimmedMean(0.0), fk.NormClip(float("inf"))])
def test_rules_that_leave_nothing_out_are_the_plain_weighted_mean(rule):
    problem = standard()
    found = verdict(problem, rule)
    assert found.weight.tolist() == problem.weight
    assert (found.factor == 1.0).all()
    assert distance(aggregate(problem, rule), problem.dense()) < 1e-12


def test_krum_ties_go_to_the_lowest_index():
    # a square: all scores equal
    square = gram_of([(0, 0), (0, 1), (1, 0), (1, 1)])
    assert np.flatnonzero(fk.Krum(0).coefficients(square, uniform(4)).weight).tolist() == [0]
    assert np.flatnonzero(fk.MultiKrum(0, q=2).coefficients(square, uniform(4)).weight).tolist() == [0, 1]


def test_krum_ties_of_gauge_copies_go_to_the_lowest_index():
    p = standard(m=31, n=23, ranks=(4, 4, 4), scale=(1.0,) * 3)
    copies = Problem(
        [p.B[0], *[p.B[1]] * 3, p.B[2]], [p.A[0], *[p.A[1]] * 3, p.A[2]], [1.0] * 5, normalised((5, 1, 2, 3, 4))
    )
    for seed in range(8):
        found = verdict(copies.gauged(seed), fk.Krum(1))
        assert np.flatnonzero(found.weight).tolist() == [1]


@pytest.mark.parametrize("cls", [fk.Krum, fk.MultiKrum])
@pytest.mark.parametrize(("K", "f"), [(2, 0), (4, 1), (6, 2), (8, 3)])
def test_krum_needs_two_f_and_three_clients(cls, K, f):
    with pytest.raises(InputError, match=rf"{cls.name}: f is {f}, which needs at least {2 * f + 3} clients; {K} take"):
        cls(f).coefficients(gram_of(range(K)), uniform(K))
    assert cls(f).coefficients(gram_of(range(2 * f + 3)), uniform(2 * f + 3)).weight.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("rule", [fk.Krum(2), fk.MultiKrum(3), fk.MultiKrum(1, q=7)])
def test_krum_of_one_client_is_that_client(rule):
    found = rule.coefficients(np.array([[4.0]]), np.array([0.7]))
    assert found.weight.tolist() == [0.7]
    assert found.factor.tolist() == [1.0]


def test_multi_krum_cannot_choose_more_clients_than_there_are():
    with pytest.raises(InputError, match="multi_krum: q is 6, but 5 clients"):
        verdict(standard(), fk.MultiKrum(1, q=6))


# geometric median


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["standard", "m_below_R", "both_below_half_R", "rank_one", "one_zero_client"])
def test_geometric_median_equals_dense_weiszfeld(variant, backend):
    problem = VARIANTS[variant]()
    points, weight = flat_updates(problem), np.array(problem.weight)
    wanted = dense_weiszfeld(points, weight)
    found = verdict(problem, fk.GeometricMedian(), backend).weight
    assert np.abs(found - wanted).max() < 1e-8
    Z = torch.from_numpy(wanted @ points).reshape(problem.B[0].shape[0], -1)
    assert distance(aggregate(problem, fk.GeometricMedian(), backend), Z) < 1e-8


@pytest.mark.parametrize("seed", range(12))
def test_geometric_median_of_nearly_equal_clients_equals_dense_weiszfeld(seed):
    made = np.random.default_rng(seed)
    points = made.standard_normal(40) + 1e-4 * made.standard_normal((7, 40))
    weight = made.random(7) + 0.1
    found = fk.GeometricMedian().coefficients(gram_of(points), weight / weight.sum()).weight
    Z, wanted = found @ points, dense_weiszfeld(points, weight) @ points
    assert np.linalg.norm(Z - wanted) < 1e-8 * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
def test_geometric_median_hardly_feels_a_giant(size):
    made = np.random.default_rng(3)
    points = made.standard_normal((7, 40)) + 3.0
    points[2] *= size
    found = fk.GeometricMedian().coefficients(gram_of(points), uniform(7)).weight
    wanted = dense_weiszfeld(points, uniform(7))
    assert np.abs(found - wanted).max() < 1e-8
    assert found[2] < 1e2 / size / 7


@pytest.mark.parametrize("problem", [standard(), nine_clients()], ids=["standard", "nine_clients"])
def test_geometric_median_is_stationary(problem):
    points, weight = flat_updates(problem), np.array(problem.weight)
    found = verdict(problem, fk.GeometricMedian())
    assert (found.weight >= 0.0).all()
    assert found.weight.sum() == pytest.approx(1.0, rel=1e-14)
    Z = found.weight @ points
    force, here = pull(points, weight, Z)
    assert here == 0.0
    assert force < 1e-8
    np.testing.assert_allclose(found.scores, np.linalg.norm(points - Z, axis=1), rtol=1e-9)
    cost = (weight * np.linalg.norm(points - Z, axis=1)).sum()
    for k in range(len(points)):
        nudged = Z + 1e-3 * (points[k] - Z)
        assert (weight * np.linalg.norm(points - nudged, axis=1)).sum() > cost


@pytest.mark.parametrize("seed", range(60))
def test_geometric_median_leaves_a_client_that_sent_the_mean_of_the_others(seed):
    """The iteration starts at the mean, here the update of a client, and must not take that for the median."""
    made = np.random.default_rng(seed)
    K = int(made.integers(3, 8))
    points = made.standard_normal((K, 30))
    points[0] *= 8.0
    points = np.vstack([points, points.mean(0)])
    weight = uniform(K + 1)
    found = fk.GeometricMedian().coefficients(gram_of(points), weight).weight
    force, here = pull(points, weight, found @ points)
    assert force <= here + 1e-6


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("share", [0.52, 0.6, 0.9])
def test_geometric_median_is_the_update_on_which_more_than_half_the_weight_agrees(share, gauge):
    p = standard(m=31, n=23, ranks=(4, 3, 5, 6))
    same = [0, 0, 0, 1, 2, 3]
    weight = [share / 3] * 3 + [(1 - share) / 3] * 3
    problem = Problem([p.B[k] for k in same], [p.A[k] for k in same], [p.scale[k] for k in same], weight)
    answer = aggregate(problem.gauged() if gauge else problem, fk.GeometricMedian())
    assert distance(answer, p.updates()[0]) < 1e-5


def test_geometric_median_does_not_feel_the_split_of_a_client():
    problem = standard()
    half = problem.weight[2] / 2
    split = Problem(
        [*problem.B, problem.B[2]],
        [*problem.A, problem.A[2]],
        [*problem.scale, problem.scale[2]],
        [*problem.weight[:2], half, *problem.weight[3:], half],
    )
    assert distance(aggregate(split, fk.GeometricMedian()), aggregate(problem, fk.GeometricMedian())) < 1e-8


@pytest.mark.parametrize("ends", [(1.0,), (1.0, -1.0)])
def test_geometric_median_of_mostly_zero_updates_is_zero(ends):
    found = fk.GeometricMedian().coefficients(gram_of([0.0] * 3 + list(ends)), uniform(3 + len(ends)))
    np.testing.assert_allclose(found.weight[:3], 1 / 3, rtol=1e-6)
    assert (found.weight[3:] < 1e-6).all()
    assert found.weight.sum() == pytest.approx(1.0)


def test_geometric_median_of_two_keeps_between_them():
    found = fk.GeometricMedian().coefficients(gram_of([(1.0, 0.0), (0.0, 2.0)]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(found.weight, [0.5, 0.5], rtol=1e-12)
    heavy = fk.GeometricMedian().coefficients(gram_of([(1.0, 0.0), (0.0, 2.0)]), np.array([0.7, 0.3]))
    np.testing.assert_allclose(heavy.weight, [1.0, 0.0], atol=1e-7)


# trimmed mean


@pytest.mark.parametrize(
    ("beta", "one_sided", "kept"),
    [
        (0.1, False, range(5)),
        (0.2, False, (1, 2, 3)),
        (0.4, False, (2,)),
        (0.39, False, (1, 2, 3)),
        (0.2, True, (0, 1, 2, 3)),
        (0.8, True, (0,)),
    ],
)
def test_trimmed_mean_drops_the_ends(beta, one_sided, kept):
    sizes = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    shuffle = [2, 4, 0, 3, 1]
    weight = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    found = fk.TrimmedMean(beta, one_sided).coefficients(gram_of(sizes[shuffle]), weight[shuffle])
    wanted = np.zeros(5)
    wanted[list(kept)] = weight[list(kept)] / weight[list(kept)].sum()
    np.testing.assert_allclose(found.weight, wanted[shuffle], rtol=1e-14)
    np.testing.assert_allclose(found.scores, sizes[shuffle], rtol=1e-15)


@pytest.mark.parametrize(
    ("beta", "K", "cut"), [(0.29, 100, 29), (0.1, 30, 3), (0.3, 10, 3), (0.1, 9, 0), (0.07, 100, 7)]
)
def test_trimmed_mean_counts_as_written_and_not_as_rounded(beta, K, cut):
    found = fk.TrimmedMean(beta).coefficients(gram_of(range(1, K + 1)), uniform(K))
    assert np.flatnonzero(found.weight).tolist() == list(range(cut, K - cut))


def test_trimmed_mean_ties_count_the_lower_index_as_smaller():
    found = fk.TrimmedMean(0.25).coefficients(np.eye(4), uniform(4))
    assert np.flatnonzero(found.weight).tolist() == [1, 2]
    p = standard(m=31, n=23, ranks=(4,))
    copies = Problem(p.B * 4, p.A * 4, p.scale * 4, [0.25] * 4)
    for seed in range(8):
        assert np.flatnonzero(verdict(copies.gauged(seed), fk.TrimmedMean(0.25)).weight).tolist() == [1, 2]


@pytest.mark.parametrize(("beta", "K"), [(0.5, 2), (0.5, 4), (0.67, 3), (0.9, 10)])
def test_trimmed_mean_must_leave_someone(beta, K):
    with pytest.raises(InputError, match=rf"trimmed_mean: beta is {beta:g}, which leaves out .* {K} take part"):
        fk.TrimmedMean(beta).coefficients(gram_of(range(K)), uniform(K))
    assert fk.TrimmedMean(beta, one_sided=True).coefficients(gram_of(range(K)), uniform(K)).weight[0] > 0.0


# norm clipping


@pytest.mark.parametrize("bound", [1e-3, 30.0, 1e3, "median"])
def test_after_clipping_no_norm_is_above_the_bound(bound):
    problem = standard()
    found = verdict(problem, fk.NormClip(bound))
    norms = [float(d.norm()) for d in problem.updates()]
    limit = float(np.median(norms)) if bound == "median" else bound
    clipped = [float(d.norm()) for d in judged(problem, found).updates()]
    np.testing.assert_allclose(clipped, [min(limit, size) for size in norms], rtol=1e-13)
    assert found.weight.tolist() == problem.weight
    np.testing.assert_allclose(found.scores, norms, rtol=1e-13)


def test_clipping_the_default_bound_is_the_median():
    assert fk.NormClip().max_update_norm == "median"


def test_clip_factors_of_zero_norms_and_of_the_bound_itself_are_one():
    assert clip_factors(np.array([0.0, 1.0, 2.0, 4.0]), 2.0).tolist() == [1.0, 1.0, 1.0, 0.5]
    assert clip_factors(np.zeros(3), "median").tolist() == [1.0] * 3
    assert clip_factors(np.array([0.0, 0.0, 5.0]), "median").tolist() == [1.0, 1.0, 0.0]
    assert clip_factors(np.array([5e-324, 1e308]), 1.0).tolist() == [1.0, 1e-308]


def test_clip_factors_take_the_median_over_owners_alone():
    norms = np.array([[1.0, 2.0, 8.0, 0.0], [4.0, 1.0, 1.0, 1.0]])
    owns = np.array([[True, True, True, False], [True, True, True, True]])
    assert clip_factors(norms, None, owns).tolist() == [[1.0, 1.0, 0.25, 1.0], [0.25, 1.0, 1.0, 1.0]]
    assert clip_factors(norms, "median").tolist()[0] == [1.0, 0.75, 1.5 / 8.0, 1.0]


# options, errors, report


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("krum", {}, r"krum: f is None; the number of clients that may be hostile is needed, such as f=1"),
        ("multi_krum", {}, r"multi_krum: f is None; the number of clients"),
        ("krum", {"f": -1}, r"krum: f is -1; an integer of at least 0"),
        ("krum", {"f": 1.5}, r"krum: f is 1\.5; an integer"),
        ("krum", {"f": True}, r"krum: f is True; an integer"),
        ("krum", {"f": "2"}, r"krum: f is '2'; an integer"),
        ("krum", {"f": 1, "scope": "layer"}, r"krum: scope is 'layer'; one of model, matrix"),
        ("multi_krum", {"f": 1, "q": 0}, r"multi_krum: q is 0; an integer of at least 1"),
        ("multi_krum", {"f": 1, "q": 2.0}, r"multi_krum: q is 2\.0; an integer"),
        ("geometric_median", {"scope": None}, r"geometric_median: scope is None; one of model, matrix"),
        ("trimmed_mean", {"beta": -0.1}, r"trimmed_mean: beta is -0\.1; 0 <= beta < 1"),
        ("trimmed_mean", {"beta": 1}, r"trimmed_mean: beta is 1; 0 <= beta < 1"),
        ("trimmed_mean", {"beta": float("nan")}, r"trimmed_mean: beta is nan"),
        ("trimmed_mean", {"beta": "0.1"}, r"trimmed_mean: beta is '0\.1'"),
        ("trimmed_mean", {"beta": True}, r"trimmed_mean: beta is True"),
        ("trimmed_mean", {"one_sided": 1}, r"trimmed_mean: one_sided is 1; True or False"),
        ("norm_clip", {"max_update_norm": 0}, r"norm_clip: max_update_norm is 0; a positive number or 'median'"),
        ("norm_clip", {"max_update_norm": -2.0}, r"norm_clip: max_update_norm is -2\.0"),
        ("norm_clip", {"max_update_norm": float("nan")}, r"norm_clip: max_update_norm is nan"),
        ("norm_clip", {"max_update_norm": "mean"}, r"norm_clip: max_update_norm is 'mean'"),
        ("norm_clip", {"max_update_norm": None}, r"norm_clip: max_update_norm is None"),
        ("norm_clip", {"max_update_norm": True}, r"norm_clip: max_update_norm is True"),
        ("norm_clip", {"f": 1}, r"'norm_clip' has no option 'f'; known options: scope, max_update_norm"),
    ],
)
def test_bad_options_are_named(name, options, text):
    with pytest.raises(InputError, match=text):
        make_method(name, options)


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_of_ranks_is_refused(name):
    with pytest.raises(InputError, match="does not choose its rank"):
        make_method(name, {"f": 1} if "krum" in name else {}, fk.Energy(0.9))


@pytest.mark.parametrize(
    ("name", "texts", "options"),
    [
        ("krum", ["f=2"], {"scope": "model", "f": 2}),
        ("multi_krum", ["f=2", "q=3", "scope=matrix"], {"scope": "matrix", "f": 2, "q": 3}),
        ("multi_krum", ["f=2", "q=none"], {"scope": "model", "f": 2, "q": None}),
        ("geometric_median", [], {"scope": "model"}),
        ("trimmed_mean", ["beta=0.2", "one_sided=true"], {"scope": "model", "beta": 0.2, "one_sided": True}),
        ("norm_clip", ["max_update_norm=3"], {"scope": "model", "max_update_norm": 3.0}),
        ("norm_clip", ["max_update_norm=median"], {"scope": "model", "max_update_norm": "median"}),
        ("norm_clip", ["max_update_norm=inf"], {"scope": "model", "max_update_norm": "inf"}),
    ],
)
def test_options_as_texts_of_the_command_line(name, texts, options):
    method = make_method(name, method_options(method_class(name), texts))
    assert method.options() == options
    json.dumps(method.options(), allow_nan=False)


def test_options_of_numpy_numbers_become_plain():
    options = fk.MultiKrum(np.int64(1), q=np.int32(2)).options()
    assert json.loads(json.dumps(options)) == {"scope": "model", "f": 1, "q": 2}
    assert type(fk.TrimmedMean(np.float32(0.25)).beta) is float
    assert type(fk.NormClip(3).max_update_norm) is float


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("weight", "text"),
    [
        ((0.5, 0.5, 0.5, -0.25, -0.25), "weight 3 of 5 is -0.25; a robust rule needs weights >= 0"),
        ((0.5, float("nan"), 0.5, 0.0, 0.0), "weight 1 of 5 is nan"),
        ((0.0,) * 5, "the weights sum to 0"),
        ((1e308,) * 5, "the weights sum to inf"),
    ],
)
def test_weights_that_are_none_are_refused(name, weight, text):
    with pytest.raises(WeightError, match=text):
        RULES[name].coefficients(np.eye(5), np.array(weight))


@pytest.mark.parametrize("name", RULES)
def test_a_client_that_is_not_finite_is_named(name):
    problem = standard()
    problem.A[3][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="inner products of client 3 of 5"):
        verdict(problem, RULES[name])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"gram is \(2, 2\), weight \(3,\)"):
        fk.GeometricMedian().coefficients(np.eye(2), uniform(3))


def test_the_description_is_plain():
    rows = describe_verdict(verdict(standard(), fk.Krum(1)), list("abcde"))
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert list(rows) == list("abcde")
    assert [set(row) for row in rows.values()] == [{"weight", "factor", "score", "rejected"}] * 5
    assert sorted(row["rejected"] for row in rows.values()) == [False] + [True] * 4
    for row in rows.values():
        assert row["rejected"] == (row["weight"] == 0.0)
    blank = describe_verdict(Verdict(np.ones(1), np.ones(1), None), ["a"])
    assert blank == {"a": {"weight": 1.0, "factor": 1.0, "score": None, "rejected": False}}
