"""`product_svd` of every backend on special inputs: zeros, cancellation, nothing at all, NaN, overflow, extreme ranges."""

import subprocess
import sys

import pytest
import torch
from frames import every_backend, same_bits
from products import ALL, call, energy, factors, is_blank, matrix, product, row

from fedlora_kernels import backends as registry
from fedlora_kernels.backends.contract import Factors, Info, Note, RuleCode, RuleSpec
from fedlora_kernels.testing import LoRAProblem, assert_close, check_product, exact_svd
from fedlora_kernels.testing.factors import (
    cancelling,
    fresh,
    gaussian,
    graded_cancelling,
    identical_clients,
    random_column_gauge,
    zero_client,
)

backends = every_backend("product_svd")
OUTPUTS = ("usv", "left", "balanced")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])


@backends
@dtypes
@pytest.mark.parametrize("ranks", [(4, 4), (12, 14)], ids=("stacked", "dense"))
def test_fresh_clients_give_zero(backend, dtype, ranks):
    for output in OUTPUTS:
        result = product(backend, fresh(17, 13, ranks, 1).to(dtype), output=output)
        assert is_blank(result)
        assert result.notes & ~Note.DENSE == Note.ZERO
        assert (result.info, result.energy, result.error, result.error_bound, result.numerical_rank) == (0, 0, 0, 0, 0)


@backends
def test_negative_zeros_are_zeros(backend):
    problem = gaussian(17, 13, (4,), 1)
    result = product(backend, LoRAProblem((problem.B[0] * -0.0,), problem.A, problem.weights))
    assert is_blank(result)
    assert result.notes == Note.ZERO


@backends
@dtypes
@pytest.mark.parametrize("ranks", [(5, 5), (14, 14)], ids=("stacked", "dense"))
def test_exact_cancellation_is_zero_not_noise(backend, dtype, ranks):
    result = product(backend, cancelling(17, 13, ranks, 1).to(dtype), dtype=dtype)
    assert is_blank(result)
    assert result.notes & Note.ZERO
    assert result.info == 0


@backends
@pytest.mark.parametrize("exponent", range(1, 8))
def test_cancellation_with_weights_that_do_not_round(backend, exponent):
    """0.1 + 0.2 - 0.3 over one update is zero to working accuracy; with a delta it has the rank of the delta."""
    base = cancelling(29, 23, (4, 4), 3, delta=10.0**-exponent)
    B, A = base.B[0], base.A[0]
    weights = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    assert product(backend, LoRAProblem((B, B, B), (A, A, A), weights)).notes & Note.ZERO
    problem = LoRAProblem((B, B, B), (A, A, base.A[1]), weights)
    result, exact = product(backend, problem), exact_svd(problem)
    assert result.rank == 4
    assert not [c for c in check_product(result, exact, ALL, "usv", 12) if not c.passed]


@backends
def test_graded_blocks_in_a_cancelling_pair_keep_every_value(backend):
    """What a single re-orthogonalised Cholesky loses: values six decades down in a pair that cancels to 1e-3."""
    problem = graded_cancelling(53, 41, (6, 6), 2)
    result, exact = product(backend, problem), exact_svd(problem)
    assert result.rank == 6
    assert ((result.S[:6] - exact.s[:6]).abs() / exact.s[:6]).max() <= result.sigma_err


NEARLY_EQUAL_RULES = {
    "all": (ALL, 6),
    "rank": (RuleSpec(RuleCode.RANK, 5.0), 5),
    "cap": (energy(1.0, 4), 4),
    "ratio": (RuleSpec(RuleCode.SV_RATIO, 1e15), 6),
    "cutoff": (RuleSpec(RuleCode.ABSOLUTE, 0.0), 6),
}


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("delta", [1e-7, 1e-8, 1e-9, 1e-10])
@pytest.mark.parametrize("rule", NEARLY_EQUAL_RULES)
def test_what_nearly_equal_clients_differ_by_is_kept(backend, rule, delta, dtype):
    """Values that Grams cannot see, with nothing between them and the large ones that would tell of them."""
    base, other = gaussian(29, 23, (3, 3), 1), gaussian(29, 23, (3, 3), 2)
    problem = LoRAProblem((base.B[0], base.B[0] + delta * other.B[0]), base.A, base.weights)
    exact, (spec, rank) = exact_svd(problem), NEARLY_EQUAL_RULES[rule]
    result = product(backend, problem, spec, dtype=dtype)
    assert result.rank == rank
    assert ((result.S[:rank] - exact.s[:rank]).abs() / exact.s[:rank]).max() <= result.sigma_err


def test_what_no_rule_asks_for_needs_no_second_pass():
    problem = identical_clients(29, 23, (3, 3), 1).to(torch.float32)
    backend = registry.get("torch")
    for rule, passes in ((ALL, 2), (energy(0.9), 1), (energy(1.0, 3), 1), (RuleSpec(RuleCode.RANK, 3.0), 1)):
        (raw,) = backend.product_svd([factors(problem)], rule, "usv", torch.float32)
        assert (raw.passes, raw.rank) == (passes, min(3, int(raw.rank)))


@backends
def test_rank_is_found_where_clients_repeat_or_have_not_trained(backend):
    twins, partly = identical_clients(29, 23, (4, 4, 4), 1), zero_client(29, 23, (4, 3), 1)
    for problem, rank in ((twins, 4), (partly, 3)):
        result = product(backend, problem)
        assert (result.rank, result.numerical_rank) == (rank, rank)
        assert result.notes & Note.RANK_DEFICIENT
        assert not result.notes & Note.ZERO


@backends
def test_full_rank_has_no_notes(backend):
    assert product(backend, gaussian(29, 23, (4, 3), 1).to(torch.float32)).notes == 0


@backends
@pytest.mark.parametrize("cap", [1, 3, 7, 9])
def test_caps(backend, cap):
    problem = gaussian(29, 23, (4, 3), 1)
    result = product(backend, problem, energy(1.0, cap))
    assert result.S.shape == (min(cap, 7),)
    assert result.rank == min(cap, 7)
    assert bool(result.notes & Note.CAPPED) == (cap < 7)
    assert result.numerical_rank == 7
    assert result.left.shape == (29, min(cap, 7))


@backends
@pytest.mark.parametrize("rank", [1, 7, 50])
def test_rank_rule_is_bounded_by_the_numerical_rank(backend, rank):
    assert product(backend, gaussian(29, 23, (4, 3), 1), RuleSpec(RuleCode.RANK, float(rank))).rank == min(rank, 7)


@backends
def test_a_cutoff_above_everything_keeps_nothing(backend):
    result = product(backend, gaussian(29, 23, (4, 3), 1), RuleSpec(RuleCode.ABSOLUTE, 1e9))
    assert is_blank(result)
    assert result.numerical_rank == 7
    assert not result.notes & Note.ZERO
    assert float(result.error) == pytest.approx(1)


@backends
@pytest.mark.parametrize("ranks", [(4, 3), (12, 14)], ids=("stacked", "dense"))
def test_a_cutoff_below_values_beyond_float64_keeps_them(backend, ranks):
    base = gaussian(17, 13, ranks, 1)
    huge = LoRAProblem(tuple(b * 1e200 for b in base.B), tuple(a * 1e200 for a in base.A), base.weights)
    result = product(backend, huge, RuleSpec(RuleCode.ABSOLUTE, 1.0))
    assert result.rank == min(13, sum(ranks))
    assert result.info == Info.OVERFLOW
    assert torch.isinf(result.S[: result.rank]).all()
    assert torch.isinf(result.energy)


@backends
def test_a_cutoff_is_of_the_true_scale(backend):
    """Weights and blocks far from 1 are scaled inside; the cutoff must not be."""
    for dtype, factor in ((torch.float64, 1e200), (torch.float64, 1e-200), (torch.float32, 1e15)):
        problem = gaussian(29, 23, (4, 3), 1)
        problem = LoRAProblem(tuple(b * factor for b in problem.B), problem.A, problem.weights).to(dtype)
        S = product(backend, problem).S
        rule = RuleSpec(RuleCode.ABSOLUTE, float(S[3]) * (1 + 1e-9))
        assert product(backend, problem, rule).rank == 3


EMPTY = {
    "no_clients": (17, 13, ()),
    "no_columns": (17, 13, (0, 0)),
    "no_rows": (0, 13, (3,)),
    "no_width": (17, 0, (3,)),
}


@backends
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("case", EMPTY)
def test_nothing_to_do(backend, case, size, output):
    m, n, ranks = EMPTY[case]
    group = Factors(
        tuple(torch.ones(size, m, r) for r in ranks),
        tuple(torch.ones(size, r, n) for r in ranks),
        torch.ones(size, len(ranks), dtype=torch.float64),
        m,
        n,
        min(m, n, sum(ranks)),
    )
    raw = call(backend, [group], ALL, output)[0]
    assert raw.left.shape == (size, m, 0)
    assert raw.right.shape == (size, 0, n)
    assert raw.S.shape == (size, 0)
    assert (raw.left.dtype, raw.S.dtype, raw.rank.dtype) == (torch.float32, torch.float64, torch.int64)
    assert (raw.notes == Note.ZERO).all()
    assert not (raw.rank.any())
    assert not (raw.info.any())
    assert not (raw.energy.any())


@backends
@pytest.mark.parametrize("ranks", [(4, 3), (17, 14)], ids=("stacked", "dense"))
def test_batch_of_none(backend, ranks):
    group = factors(gaussian(17, 13, ranks, 1))
    none = Factors(
        tuple(b[:0] for b in group.B), tuple(a[:0] for a in group.A), group.weights[:0], group.m, group.n, group.p_max
    )
    raw = call(backend, [none], ALL, "left", torch.float64)[0]
    assert raw.left.shape == (0, 17, group.p_max)
    assert all(field.shape[0] == 0 for field in raw)


@backends
def test_blocks_of_width_zero_among_others(backend):
    problem = gaussian(17, 13, (4, 0, 3), 1)
    full = gaussian(17, 13, (4, 0, 3), 1)
    without = LoRAProblem(full.B[::2], full.A[::2], full.weights[::2])
    assert_close(product(backend, problem).S, product(backend, without).S, 1e-14)


@backends
@pytest.mark.parametrize("ranks", [(4, 3), (14, 15)], ids=("stacked", "dense"))
@pytest.mark.parametrize("where", ["B", "A"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_matrix_harms_no_neighbour(backend, value, where, ranks):
    problems = [gaussian(17, 13, ranks, seed).to(torch.float32) for seed in range(4)]
    group = factors(*problems)
    clean = call(backend, [group], energy(0.9), "left")[0]
    getattr(group, where)[1][2, 1, 2] = value
    raw = call(backend, [group], energy(0.9), "left")[0]
    bad = row(raw, 2)
    assert (bad.info, bad.rank, bad.numerical_rank, bad.notes) == (Info.NONFINITE, 0, 0, 0)
    for field in (bad.left, bad.S, bad.right, bad.energy, bad.error, bad.rho, bad.sigma_err):
        assert field.isnan().all()
    for i in (0, 1, 3):
        for before, after in zip(row(clean, i), row(raw, i), strict=True):
            if backend.bitwise:
                assert same_bits(before, after)
            else:
                assert_close(after, before, 1e-6)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_output_that_overflows_is_named(backend, dtype):
    """Inf is written and info says so; the balanced output of the same update fits."""
    factor = torch.finfo(dtype).max ** 0.5
    problem = gaussian(29, 23, (3, 2), 1)
    problem = LoRAProblem(
        tuple(b * factor for b in problem.B), tuple(a * factor / 4 for a in problem.A), problem.weights
    )
    problem = problem.to(dtype)
    overflown = product(backend, problem, output="left")
    assert overflown.info == Info.OVERFLOW
    assert overflown.left.isinf().any()
    assert torch.isfinite(overflown.S).all()
    balanced = product(backend, problem, output="balanced")
    assert balanced.info == 0
    assert_close(matrix(balanced, "balanced"), problem.update(), 4 * torch.finfo(dtype).eps)


@backends
@pytest.mark.parametrize(("big", "small"), [(1e200, 1e-190), (1e-200, 1e-100), (1e250, 1e-300), (1e150, 1e150)])
def test_float64_that_overflows_when_squared(backend, big, small):
    base = gaussian(29, 23, (4, 3), 1)
    problem = LoRAProblem(tuple(b * big for b in base.B), tuple(a * small for a in base.A), base.weights)
    for output in OUTPUTS:
        one, other = product(backend, base, output=output), product(backend, problem, output=output)
        assert (other.rank, other.info) == (7, 0)
        assert_close(other.S / big / small, one.S, 1e-13)
        scale = {"usv": 1.0, "left": big * small, "balanced": (big * small) ** 0.5}[output]
        assert_close(other.left / scale, one.left, 1e-13)
        assert float(other.error_bound) == pytest.approx(float(one.error_bound), rel=0.5)


@backends
@pytest.mark.parametrize("ranks", [(4, 4), (12, 14)], ids=("stacked", "dense"))
@pytest.mark.parametrize("exponent", [300, 900])
def test_clients_in_opposite_gauges_at_the_ends_of_float64(backend, ranks, exponent):
    """Powers of two that cancel, between the factors of a client or between factor and weight, leave no trace."""
    t, base = 2.0**exponent, gaussian(17, 13, ranks, 1)
    (B_0, B_1), (A_0, A_1), (w_0, w_1) = base.B, base.A, base.weights.tolist()
    gauges = LoRAProblem((B_0 * t, B_1 / t), (A_0 / t, A_1 * t), base.weights)
    weights = LoRAProblem((B_0, B_1 * t), (A_0 / t, A_1), torch.tensor([w_0 * t, w_1 / t], dtype=torch.float64))
    expected = product(backend, base)
    assert expected.rank == min(13, sum(ranks))
    for other in (gauges, weights):
        for one, found in zip(expected, product(backend, other), strict=True):
            assert same_bits(one, found)


@backends
@pytest.mark.parametrize("ranks", [(4, 4, 3), (12, 14, 3)], ids=("stacked", "dense"))
def test_a_zero_client_at_the_end_of_float64_hides_no_other(backend, ranks):
    base = gaussian(17, 13, ranks, 1)
    scale = (1e-140, 1e-140, 1e300)
    A = tuple(a * x for a, x in zip(base.A, scale, strict=True))
    result = product(backend, LoRAProblem((*base.B[:2], base.B[2] * 0), A, base.weights))
    expected = product(backend, LoRAProblem(base.B[:2], base.A[:2], base.weights[:2]))
    assert result.rank == expected.rank == min(13, sum(ranks[:2]))
    assert_close(result.S[:8] / 1e-140, expected.S[:8], 1e-13)


@backends
@pytest.mark.parametrize("ranks", [(4, 4, 3), (12, 14, 3)], ids=("stacked", "dense"))
def test_a_zero_client_of_great_weight_hides_no_other(backend, ranks):
    base = gaussian(17, 13, ranks, 1).to(torch.float32)
    weights = torch.tensor([1e-200, 1e-201, 1e100], dtype=torch.float64)
    result = product(backend, LoRAProblem((*base.B[:2], base.B[2] * 0), base.A, weights))
    expected = product(backend, LoRAProblem(base.B[:2], base.A[:2], weights[:2] * 1e200))
    assert result.rank == expected.rank == min(13, sum(ranks[:2]))
    assert_close(result.S[:8] / 1e-200, expected.S[:8], 1e-13)


@backends
@pytest.mark.parametrize("weight", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_weights(backend, weight):
    base = gaussian(29, 23, (4, 3), 1).to(torch.float32)
    heavy = LoRAProblem(base.B, base.A, base.weights * weight)
    one, other = product(backend, base, energy(0.9)), product(backend, heavy, energy(0.9))
    assert one.rank == other.rank
    assert_close(other.S / weight, one.S, 1e-13)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-38, 1e-44, 1e30])
def test_subnormal_and_huge_narrow_inputs(backend, dtype, factor):
    base = gaussian(29, 23, (4, 3), 1)
    problem = LoRAProblem(tuple(b * factor for b in base.B), base.A, base.weights).to(dtype)
    result, exact = product(backend, problem), exact_svd(problem)
    assert not [c for c in check_product(result, exact, ALL, "usv", 7) if not c.passed]


@backends
def test_clients_of_many_dtypes(backend):
    base = gaussian(29, 23, (4, 3, 2, 2), 1)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    problem = LoRAProblem(
        tuple(b.to(kind) for b, kind in zip(base.B, kinds, strict=True)),
        tuple(a.to(kind) for a, kind in zip(base.A, reversed(kinds), strict=True)),
        base.weights,
    )
    result = product(backend, problem, dtype=torch.float64)
    assert not [c for c in check_product(result, exact_svd(problem), ALL, "usv", 11) if not c.passed]


@backends
def test_wild_column_gauges_lose_no_rank(backend):
    """Unbalanced, a pivoted Cholesky takes columns 1e30 apart for rank deficiency."""
    for seed in range(3):
        problem = random_column_gauge(37, 29, (6, 5), seed)
        assert product(backend, problem).rank == 11


@backends
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_element_is_written(backend, output, poisoned_empty):
    one_pass, two_pass = gaussian(29, 23, (4, 3), 1), cancelling(29, 23, (5, 5), 1, delta=1e-6)
    dense = gaussian(11, 7, (9, 8), 1)
    for problem in (p.to(torch.float32) for p in (one_pass, two_pass, dense)):
        result = product(backend, problem, energy(0.9), output)
        assert all(torch.isfinite(field).all() for field in result)
        assert_close(matrix(result, output), matrix(product(backend, problem, energy(0.9)), "usv"), 1e-5)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("ranks", [(4, 3), (14, 15)], ids=["stacked", "dense"])
def test_an_svd_that_does_not_converge_is_named(monkeypatch, name, ranks):
    """Finite, flagged, and not called zero."""

    def stubborn(C, full_matrices=True):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    group = factors(gaussian(17, 13, ranks, 1), gaussian(17, 13, ranks, 2))
    raw = registry.get(name).product_svd([group], ALL, "left", torch.float32)[0]
    assert raw.info.tolist() == [Info.NOT_CONVERGED] * 2
    assert not (raw.notes & Note.ZERO).any()
    assert is_blank(row(raw))


MEMORY = """
import re, sys, torch
from fedlora_kernels import backends
from fedlora_kernels import backends as registry
from fedlora_kernels.backends.contract import Factors, RuleCode, RuleSpec
def peak():
    # not ru_maxrss: a process begins with that of the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
m = n = 100_000
make = torch.Generator().manual_seed(1)
B = tuple(torch.randn(1, m, 16, generator=make) for _ in range(4))
A = tuple(torch.randn(1, 16, n, generator=make) for _ in range(4))
group = Factors(B, A, torch.full((1, 4), 0.25, dtype=torch.float64), m, n, 64)
small = Factors(tuple(b[:, :99] for b in B), tuple(a[..., :98] for a in A), group.weights, 99, 98, 64)
backends.get(sys.argv[1]).product_svd([small], RuleSpec(RuleCode.ENERGY, 1.0), "left", torch.float32)
before = peak()
raw = backends.get(sys.argv[1]).product_svd([group], RuleSpec(RuleCode.ENERGY, 1.0), "left", torch.float32)[0]
after = peak()
assert raw.rank.item() == 64 and raw.passes.item() == 1
U = raw.left[0].double() / raw.S[0]
assert (U.mT @ U - torch.eye(64)).abs().max() < 2.4e-7
print(before, after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux")
@backends
def test_a_huge_module_in_little_memory(backend):
    """m = n = 100 000: 10^10 elements dense; a warm process needs the outputs and 48 MiB."""
    if backend.name == "reference":
        pytest.skip("the oracle copies the stacks to float64")
    run = subprocess.run([sys.executable, "-c", MEMORY, backend.name], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, after = (int(number) for number in run.stdout.split())
    assert after < 1_000_000
    outputs_kib, allowed_kib = 2 * 100_000 * 64 * 4 // 1024, 48 * 1024
    assert after - before < outputs_kib + allowed_kib
