"""`product_svd` of every backend against the exact SVD in extended precision: P1 to P8 over all families of LoRA factors."""

import functools
import itertools

import pytest
import torch
from frames import DTYPES, Served, dtype_id, every_backend
from products import ALL, U64, energy, product

from fedlora_kernels import backends as registry
from fedlora_kernels.backends.contract import RuleCode, RuleSpec
from fedlora_kernels.testing import FAMILIES, check_product, exact_svd, tolerance
from fedlora_kernels.testing.factors import cancelling, full_gauge, gaussian, ill_conditioned

backends = every_backend("product_svd")
ORACLE = Served(registry.get("reference"), "product_svd")
OUTPUTS = ("usv", "left", "balanced")
RULES = {
    "all": ALL,
    "energy": energy(0.9),
    "tight": energy(0.999),
    "rank": RuleSpec(RuleCode.RANK, 3.0),
    "cap": energy(1.0, 4),
}
SHAPES = {
    "tall": (53, 37, (5, 3, 8)),
    "wide": (29, 61, (7, 7)),
    "stack_over_q": (13, 47, (9, 8)),
    "dense": (11, 31, (12, 13)),
    "rank_one": (17, 19, (1,)),
    "vector": (1, 23, (1, 1)),
    "one_client": (31, 43, (6,)),
}
SAMPLED = ("tall", "wide", "stack_over_q", "dense")
METRICS = [f"P{i}" for i in range(1, 9)]


def ranks_for(family, ranks):
    """Families of twins need equal ranks, pairs an even number of clients."""
    if "cancelling" in family:
        return (ranks[0],) * (2 * max(1, len(ranks) // 2))
    return (ranks[0],) * len(ranks) if "identical" in family else ranks


def problem_of(family, shape, dtype, seed=1):
    m, n, ranks = SHAPES[shape]
    problem = FAMILIES[family](m, n, ranks_for(family, ranks), seed).to(dtype)
    if not all(torch.isfinite(block).all() for block in problem.B + problem.A):
        pytest.skip(f"{family} leaves the range of {dtype}")
    return problem


def assert_within(checks, told):
    failed = [check for check in checks if not check.passed]
    assert not failed, f"{failed} for {told}"


@functools.cache
def solved(family, shape, dtype):
    problem = problem_of(family, shape, dtype)
    return problem, exact_svd(problem)


@functools.cache
def checks_of(backend, family, dtype, shapes, rules, outputs):
    """Every check of every result, with what it was made of; shared by the eight tests below."""
    found = []
    for shape in shapes:
        problem, exact = solved(family, shape, dtype)
        for rule, output in itertools.product(rules, outputs):
            result = product(backend, problem, RULES[rule], output)
            checks = check_product(result, exact, RULES[rule], output, sum(problem.ranks))
            found += [(check, (shape, rule, output)) for check in checks]
    return found


def assert_metric(metric, found):
    failed = [(check, where) for check, where in found if check.name == metric and not check.passed]
    assert not failed, failed


@pytest.mark.parametrize("metric", METRICS)
@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("family", FAMILIES)
def test_metric(backend, family, dtype, metric):
    number = list(FAMILIES).index(family) + DTYPES.index(dtype)
    shapes = (SAMPLED[number % 4], SAMPLED[(number + 2) % 4])
    assert_metric(metric, checks_of(backend, family, dtype, shapes, ("all", "energy"), (OUTPUTS[number % 3],)))


@pytest.mark.full
@pytest.mark.parametrize("metric", METRICS)
@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("family", FAMILIES)
def test_metric_full(backend, family, dtype, metric):
    assert_metric(metric, checks_of(backend, family, dtype, tuple(SHAPES), tuple(RULES), tuple(OUTPUTS)))


def spoilt(result, metric):
    """The result with one error that only its own metric (and perhaps others) can see."""
    left, S, right = result.left.clone(), result.S.clone(), result.right.clone()
    if metric == "P1":
        S[1] *= 1 + 1e-9
    if metric == "P2":
        left[:, 1] += 1e-5 * left[:, 0]
    if metric == "P3":
        left[:, 0] *= 1 + 1e-4
    if metric == "P4":
        right[0] *= 1 + 1e-4
    if metric == "P6":
        left[:, -1] += 1e-3
    if metric == "P7":
        return result._replace(energy=result.energy * (1 + 1e-11))
    if metric == "P8":
        left[:, 0] *= -1
    if metric == "P5":
        return result._replace(rank=result.rank - 1, left=left[:, :-1], S=S[:-1], right=right[:-1])
    return result._replace(left=left, S=S, right=right)


@pytest.mark.parametrize("metric", METRICS)
@every_backend("product_svd")
def test_each_metric_can_fail(backend, metric):
    """A metric that nothing can break would prove nothing."""
    problem = gaussian(53, 37, (5, 3, 8), 1).to(torch.float32)
    exact = exact_svd(problem)
    result = product(backend, problem, RuleSpec(RuleCode.RANK, 5.0, 0))
    result = result._replace(left=result.left[:, :5], S=result.S[:5], right=result.right[:5])
    rule = RuleSpec(RuleCode.RANK, 5.0)
    good = {check.name: check for check in check_product(result, exact, rule, "usv", 16)}
    assert set(good) == set(METRICS)
    assert all(check.passed for check in good.values())
    bad = {check.name: check for check in check_product(spoilt(result, metric), exact, rule, "usv", 16)}
    assert not bad[metric].passed


@backends
@pytest.mark.parametrize("shape", SAMPLED)
def test_an_update_lost_altogether_is_seen(backend, shape):
    problem, exact = solved("gaussian", shape, torch.float32)
    nothing = product(backend, problem, RuleSpec(RuleCode.ABSOLUTE, 1e30))
    assert nothing.rank == 0
    failed = [check.name for check in check_product(nothing, exact, ALL, "usv", sum(problem.ranks)) if not check.passed]
    assert failed == ["P5"]


@backends
@pytest.mark.parametrize("exponent", range(1, 8))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_cancellation_is_certified(backend, dtype, exponent):
    """Pairs that cancel down to 1e-7: the second pass keeps every value within its certificate."""
    problem = cancelling(47, 31, (6, 6), 3, delta=10.0**-exponent).to(dtype)
    exact = exact_svd(problem)
    result = product(backend, problem)
    rho_1 = float(result.rho) * float(result.S[result.rank - 1]) / float(exact.s[0])
    assert 10.0**exponent / 30 < rho_1 < 10.0**exponent * 30
    assert result.passes == (2 if result.rho > (16 if dtype == torch.float64 else 1e4) else result.passes)
    assert result.rank == 6
    errors = (result.S[:6] - exact.s[:6]).abs() / exact.s[:6]
    assert errors.max() <= result.sigma_err
    assert_within(check_product(result, exact, ALL, "usv", 12), result)


@backends
@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6, 1e10, 1e14])
def test_ill_conditioned_factors(backend, kappa):
    """Only the kept values matter: no inverse of a factor amplifies its condition."""
    problem = ill_conditioned(61, 43, (9, 5), 7, kappa)
    exact = exact_svd(problem)
    for rule in (energy(0.999), ALL):
        result = product(backend, problem, rule)
        assert_within(check_product(result, exact, rule, "usv", 14), (kappa, rule, result))


@backends
@pytest.mark.parametrize("kappa", [1e3, 1e6])
def test_full_gauge_shows_in_rho_only(backend, kappa):
    problem = full_gauge(37, 53, (5, 8), 5, kappa)
    result = product(backend, problem)
    assert result.rho > kappa / 30
    assert_within(check_product(result, exact_svd(problem), ALL, "usv", 13), result)


@backends
@pytest.mark.parametrize("tau", [1e-12, 0.9, 0.999, 0.999999, 1 - 1e-12, 1.0])
def test_error_and_bound_of_the_truncation(backend, tau):
    problem = gaussian(41, 59, (7, 6), 11)
    exact = exact_svd(problem)
    result = product(backend, problem, energy(tau))
    p = int(result.rank)
    true = float((exact.s[p:] ** 2).sum() / exact.energy) ** 0.5
    assert abs(float(result.error) - true) <= 1e-13
    assert true <= result.error_bound <= true + 1e-6
    assert result.energy_abs >= result.energy * (1 - 1e-14)


@backends
def test_rho_and_sigma_err_are_those_of_the_formulas(backend):
    problem = gaussian(41, 59, (7, 6), 11).to(torch.float32)
    result = product(backend, problem)
    rho = float(result.rho)
    assert float(result.sigma_err) == pytest.approx(tolerance("P1", rho=rho, passes=int(result.passes)), rel=1e-12)
    B, A = torch.cat(problem.B, 1).double(), torch.cat(problem.A, 0).double()
    om = torch.cat([w.expand(r) for w, r in zip(problem.weights, problem.ranks, strict=True)])
    true = torch.linalg.matrix_norm(B, 2) * torch.linalg.matrix_norm(om[:, None] * A, 2) / result.S[result.rank - 1]
    assert true / 4 < rho < 4 * true
    assert float(result.sigma_err) >= 128 * U64


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("family", ["gaussian", "shared_subspace", "column_gauge"])
def test_the_size_of_a_model(backend, family, dtype):
    """Hundreds of columns and thousands of rows, against the oracle; the limits know no size."""
    m, n, ranks = 2003, 1201, (32, 16, 29)
    problem = FAMILIES[family](m, n, ranks, 1).to(dtype)
    result, oracle = product(backend, problem, energy(0.99), "left"), product(ORACLE, problem, energy(0.99))
    p = int(result.rank)
    assert p == oracle.rank
    assert ((result.S[:p] - oracle.S[:p]).abs() / oracle.S[:p]).max() <= result.sigma_err + oracle.sigma_err
    U, V = result.left[:, :p].double() / result.S[:p], result.right[:p].double().mT
    eye = torch.eye(p, dtype=torch.float64)
    for X in (U, V):
        assert (X.mT @ X - eye).abs().max() <= tolerance("P2", dtype=dtype, rho=float(result.rho))
    pairs = list(zip(problem.weights, problem.B, problem.A, strict=True))
    WV = sum(w * (B.double() @ (A.double() @ V)) for w, B, A in pairs)
    WtU = sum(w * (A.double().mT @ (B.double().mT @ U)) for w, B, A in pairs)
    limit = tolerance("P3", dtype=dtype) * float(result.energy) ** 0.5
    assert (WV - U * result.S[:p]).norm() <= limit
    assert (WtU - V * result.S[:p]).norm() <= limit
