"""`product_svd` of every backend: what must not change when the same update is written differently."""

import dataclasses

import pytest
import torch
from frames import every_backend, orthogonal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from products import ALL, U64, call, energy, factors, matrix, product, row

from fedlora_kernels.backends.contract import Factors, Note, RuleCode, RuleSpec
from fedlora_kernels.testing import LoRAProblem, assert_close
from fedlora_kernels.testing.factors import cancelling, gaussian, identical_clients, shared_subspace

backends = every_backend("product_svd")
M, N, RANKS = 43, 31, (5, 3, 4)
LIMIT = 1e-13
RULE = energy(0.95)


def base(seed=1):
    return gaussian(M, N, RANKS, seed)


def assert_same_product(one, other, limit=LIMIT):
    """Same rank, singular values and kept part, whatever the vectors inside a cluster."""
    assert one.rank == other.rank
    assert_close(one.S[: one.rank], other.S[: one.rank], limit)
    assert_close(matrix(one), matrix(other), 10 * limit)


@backends
@pytest.mark.parametrize("j", [-7, -1, 1, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_powers_of_four_scale_exactly(backend, dtype, j):
    """An even power of two moves only exponents, so the singular vectors keep their bits."""
    problem = base().to(dtype)
    scaled = LoRAProblem(tuple(b * 4.0**j for b in problem.B), problem.A, problem.weights)
    one, other = product(backend, problem), product(backend, scaled)
    assert same_bits(one.left, other.left)
    assert same_bits(one.right, other.right)
    assert same_bits(one.S * 4.0**j, other.S)
    assert same_bits(one.energy * 16.0**j, other.energy)
    assert same_bits(one.rho, other.rho)


@backends
def test_odd_powers_of_two_scale_to_tolerance(backend):
    problem = base()
    scaled = LoRAProblem(tuple(b * 2.0 for b in problem.B), problem.A, problem.weights)
    one, other = product(backend, problem), product(backend, scaled)
    assert_close(one.S * 2, other.S, LIMIT)
    assert_close(one.left, other.left, LIMIT)


@backends
def test_weights_scale_the_update(backend):
    problem = base()
    one = product(backend, problem)
    other = product(backend, dataclasses.replace(problem, weights=problem.weights * 3))
    assert_close(one.S * 3, other.S, LIMIT)
    assert_close(one.energy * 9, other.energy, LIMIT)


@backends
def test_clients_permuted(backend):
    problem, order = base(), (2, 0, 1)
    permuted = LoRAProblem(
        tuple(problem.B[k] for k in order), tuple(problem.A[k] for k in order), problem.weights[list(order)]
    )
    assert_same_product(product(backend, problem, RULE), product(backend, permuted, RULE))


@backends
def test_a_client_split_into_two_halves(backend):
    problem = base()
    weights = torch.cat([problem.weights[:2], problem.weights[2:] / 2, problem.weights[2:] / 2])
    split = LoRAProblem((*problem.B, problem.B[2]), (*problem.A, problem.A[2]), weights)
    one, other = product(backend, problem, RULE), product(backend, split, RULE)
    assert_same_product(one, other)
    assert other.notes & Note.RANK_DEFICIENT


@backends
@pytest.mark.parametrize("zero", ["B", "A", "both"])
def test_a_zero_client_appended(backend, zero):
    problem = base()
    B, A = torch.randn(M, 6, dtype=torch.float64), torch.randn(6, N, dtype=torch.float64)
    B, A = B * (zero == "A"), A * (zero == "B")
    weights = torch.cat([problem.weights, torch.tensor([0.7], dtype=torch.float64)])
    longer = LoRAProblem((*problem.B, B), (*problem.A, A), weights)
    one, other = product(backend, problem, RULE), product(backend, longer, RULE)
    assert_same_product(one, other, 1e-14)
    assert_close(one.left[:, : one.rank], other.left[:, : one.rank], 1e-13)


@backends
def test_one_block_or_many(backend):
    """Blocks side by side are the same stack as one wide block of the same weight."""
    problem = dataclasses.replace(base(), weights=torch.full((3,), 0.5, dtype=torch.float64))
    joined = LoRAProblem((torch.cat(problem.B, 1),), (torch.cat(problem.A, 0),), problem.weights[:1])
    assert_same_product(product(backend, problem, RULE), product(backend, joined, RULE))


@backends
def test_orthogonal_and_general_gauges(backend):
    problem = base()
    one = product(backend, problem, RULE)
    B, A, B_general, A_general = [], [], [], []
    for k, (b, a) in enumerate(zip(problem.B, problem.A, strict=True)):
        Q = orthogonal(b.shape[1], seed=k)
        X = Q * torch.logspace(0, 0.5, b.shape[1], dtype=torch.float64)
        B.append(b @ Q)
        A.append(Q.mT @ a)
        B_general.append(b @ X)
        A_general.append(torch.linalg.solve(X, a))
    assert_same_product(one, product(backend, LoRAProblem(tuple(B), tuple(A), problem.weights), RULE))
    general = LoRAProblem(tuple(B_general), tuple(A_general), problem.weights)
    assert_same_product(one, product(backend, general, RULE), 1e-12)


@backends
def test_the_transposed_problem_swaps_the_sides(backend):
    problem = base()
    flipped = LoRAProblem(tuple(a.mT for a in problem.A), tuple(b.mT for b in problem.B), problem.weights)
    one, other = product(backend, problem, RULE), product(backend, flipped, RULE)
    assert one.rank == other.rank
    assert_close(one.S, other.S, LIMIT)
    assert_close(matrix(one), matrix(other).mT, 10 * LIMIT)


@backends
def test_the_aggregate_of_the_aggregate(backend):
    first = product(backend, base(), ALL, "left")
    p = int(first.rank)
    again = LoRAProblem((first.left[:, :p],), (first.right[:p],), torch.ones(1, dtype=torch.float64))
    second = product(backend, again, ALL, "left")
    assert second.rank == p
    assert_close(second.S, first.S, LIMIT)
    assert_close(second.left, first.left, 10 * LIMIT)


@backends
def test_one_client_is_itself(backend):
    problem = gaussian(M, N, (5,), 4)
    result = product(backend, problem)
    assert result.rank == 5
    assert_close(matrix(result), problem.update(), LIMIT)


@backends
def test_identical_clients_are_one(backend):
    problem = identical_clients(M, N, (5, 5, 5), 4)
    alone = LoRAProblem(problem.B[:1], problem.A[:1], torch.ones(1, dtype=torch.float64))
    one, other = product(backend, alone, RULE), product(backend, problem, RULE)
    assert one.rank == other.rank
    assert other.numerical_rank == 5
    assert other.notes & Note.RANK_DEFICIENT
    assert_close(matrix(one), matrix(other), 10 * LIMIT)


@backends
def test_rank_grows_with_the_threshold(backend):
    problem = shared_subspace(M, N, RANKS, 4, noise=1e-2)
    spectrum = product(backend, problem)
    reached = (spectrum.S**2).cumsum(0) / spectrum.energy
    ranks = []
    for tau in (1e-12, 0.3, 0.9, 0.99, 0.9999, 0.999999, 1 - 1e-12, 1.0):
        p = int(product(backend, problem, energy(tau)).rank)
        ranks.append(p)
        assert p == 1 or reached[p - 2] < tau
        assert reached[p - 1] >= tau - 2e-12
    assert ranks == sorted(ranks)
    assert ranks[0] == 1
    assert ranks[-1] == 12


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_three_outputs_are_one_matrix(backend, dtype):
    problem = base().to(dtype)
    kinds = {output: product(backend, problem, RULE, output) for output in ("usv", "left", "balanced")}
    expected = matrix(kinds["usv"])
    u = torch.finfo(dtype).eps / 2
    for output in ("left", "balanced"):
        assert_close(matrix(kinds[output], output), expected, 16 * u)
        assert same_bits(kinds[output].S, kinds["usv"].S)
    root = kinds["usv"].S.sqrt()
    assert_close(kinds["balanced"].left.double(), kinds["usv"].left.double() * root, 4 * u)
    assert_close(kinds["balanced"].right.double(), kinds["usv"].right.double() * root[:, None], 4 * u)
    assert_close(kinds["left"].right, kinds["usv"].right, 4 * u)


@backends
@pytest.mark.parametrize("rho", [1e1, 1e3])
def test_all_routes_agree_within_their_certificates(backend, rho):
    """The output dtype decides between one and two passes, padding with copies of zero weight of nothing forces the dense one."""
    problem = cancelling(19, 13, (4, 4), 5, delta=1 / rho).to(torch.float32)
    rule = RuleSpec(RuleCode.RANK, 4.0)  # all there is; a rule that asks for more would not stop after one pass
    one_pass = product(backend, problem, rule, dtype=torch.float32)
    two_pass = product(backend, problem, rule, dtype=torch.float64)
    extra = torch.zeros(19, 26)
    wide = LoRAProblem((*problem.B, extra), (*problem.A, torch.ones(26, 13)), torch.tensor([1.0, -1.0, 1.0]).double())
    dense = product(backend, wide, rule, dtype=torch.float64)
    assert dense.notes & Note.DENSE
    assert not two_pass.notes & Note.DENSE
    if backend.name != "reference":
        assert (one_pass.passes, two_pass.passes) == (1, 2)
        assert two_pass.notes & Note.TWO_PASS
    assert one_pass.rank == two_pass.rank == dense.rank == 4
    for other in (one_pass, dense):
        difference = ((other.S[:4] - two_pass.S[:4]) / two_pass.S[:4]).abs().max()
        assert difference <= other.sigma_err + two_pass.sigma_err


def batch_of(*seeds, dtype=torch.float32):
    return [base(seed).to(dtype) for seed in seeds]


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_matrix_does_not_know_its_batch(backend, dtype):
    """Bitwise where the backend promises it, else within the certificate."""
    problems = batch_of(*range(5), dtype=dtype)
    group = factors(*problems)
    whole = call(backend, [group, factors(*problems[3:], problems[0])], RULE, "left", dtype)
    for i, problem in enumerate(problems):
        alone = product(backend, problem, RULE, "left")
        for other in (row(whole[0], i), *([row(whole[1], i - 3)] if i >= 3 else [])):
            if backend.bitwise:
                assert all(same_bits(x, y) for x, y in zip(alone, other, strict=True))
            else:
                assert alone.rank == other.rank
                assert_close(alone.S, other.S, float(alone.sigma_err))


@backends
def test_twenty_runs_are_one(backend):
    if not backend.bitwise:
        pytest.skip("not promised by this backend")
    problem = base().to(torch.float32)
    first = product(backend, problem, RULE)
    for _ in range(20):
        assert all(same_bits(x, y) for x, y in zip(first, product(backend, problem, RULE), strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_number_of_threads_changes_no_bit(backend, dtype, threads):
    """Large enough for BLAS and LAPACK to split their work."""
    if not backend.bitwise:
        pytest.skip("not promised by this backend")
    problem = gaussian(307, 211, (24, 17), 1).to(dtype)
    threads(1)
    one = product(backend, problem, RULE)
    threads(2)
    two = product(backend, problem, RULE)
    assert torch.get_num_threads() == 2
    assert all(same_bits(x, y) for x, y in zip(one, two, strict=True))


@backends
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    tau=st.sampled_from((0.5, 0.9, 1.0)),
    seed=st.integers(0, 10**6),
)
def test_any_shape(backend, m, n, ranks, tau, seed):
    """The kept part is the best approximation of its rank, and it reaches the threshold."""
    problem = gaussian(m, n, ranks, seed)
    result = product(backend, problem, energy(tau))
    W = problem.update()
    s = torch.linalg.svdvals(W)
    p = int(result.rank)
    assert result.S.shape == (min(m, n, sum(ranks)),)
    assert_close(result.S[:p], s[:p], float(result.sigma_err) + 1e3 * U64)
    left_over = float((W - matrix(result)).square().sum() / W.square().sum())
    assert left_over <= 1 - tau + 1e-11
    assert abs(left_over - float(result.error) ** 2) <= 1e-11


@backends
def test_expanded_strided_and_transposed_inputs(backend):
    """Storage is not meaning: every view gives what its contiguous copy gives."""
    problems = batch_of(1, 2)
    plain = factors(*problems)
    views = Factors(
        tuple(spread(block) for block in plain.B),
        tuple(block.mT.contiguous().mT for block in plain.A),
        plain.weights,
        plain.m,
        plain.n,
        plain.p_max,
    )
    one, other = call(backend, [plain], RULE)[0], call(backend, [views], RULE)[0]
    assert torch.equal(one.rank, other.rank)
    assert_close(one.S, other.S, LIMIT)
    assert_close(one.left, other.left, 1e-6)
    shared = dataclasses.replace(
        plain, B=tuple(b[:1].expand(2, -1, -1) for b in plain.B), A=tuple(a[:1].expand(2, -1, -1) for a in plain.A)
    )
    twice = call(backend, [shared], RULE)[0]
    assert_close(twice.S[0], one.S[0], LIMIT)
    assert_close(twice.S[1], one.S[0], LIMIT)


def spread(block):
    """The same values, two elements apart and off by one element."""
    N, m, r = block.shape
    room = torch.full((N, m, 2 * r + 1), torch.nan, dtype=block.dtype)
    room[..., 1::2] = block
    return room[..., 1::2]


@backends
def test_inputs_are_not_modified(backend):
    for output in ("usv", "left", "balanced"):
        for problem in (base().to(torch.float32), cancelling(M, N, (5, 5), 2, delta=1e-6), gaussian(7, 11, (9, 8), 1)):
            group = factors(problem)
            before = [x.clone() for x in (*group.B, *group.A, group.weights)]
            call(backend, [group], RuleSpec(RuleCode.RANK, 3.0), output, problem.B[0].dtype)
            assert all(same_bits(x, y) for x, y in zip(before, (*group.B, *group.A, group.weights), strict=True))
