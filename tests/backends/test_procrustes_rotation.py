"""`procrustes_rotation` of every backend: optimality, special cases, blend, uniqueness, metamorphic laws."""

import itertools
import math

import pytest
import scipy.linalg
import torch
from frames import (
    DTYPES,
    LargestTensor,
    Served,
    dtype_id,
    every_backend,
    normal,
    orthogonal,
    rotation2,
    same_bits,
    with_kappa,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels import backends as registry
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.testing import U64, orthonormal, roundoff, tolerance

backends = every_backend("procrustes_rotation")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
groups = pytest.mark.parametrize("special", [False, True], ids=["O", "SO"])


def rotate(backend, X, Y, special=False, blend=1.0):
    X, Y = (Z if Z.ndim == 3 else Z[None] for Z in (X, Y))
    (raw,) = backend([X], [Y], special, blend, dtype=X.dtype, m=X.shape[1], r=X.shape[2], N=X.shape[0])
    return raw


def with_correlation(M, rows=None):
    """X, Y with ``X^T Y = M`` exactly: X is the identity."""
    rows = rows or M.shape[0] + 3
    X, Y = torch.zeros(2, rows, M.shape[0], dtype=torch.float64)
    X[: M.shape[0]], Y[: M.shape[0]] = torch.eye(M.shape[0]), M
    return X, Y


def spectrum(*values, seed=0, det=None):
    """Correlation with these singular values, and with this sign of its determinant if any."""
    r = len(values)
    U, V = orthogonal(r, seed, det=1), orthogonal(r, seed + 1, det=det)
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T


def check_rotation(raw, X, Y, special):
    """The limits of docs/numerics.md, Procrustes, for finite pairs (N, rows, r)."""
    X, Y = X.double(), Y.double()
    M = X.mT @ Y
    Q, r = raw.Q, X.shape[-1]
    one = torch.eye(r, dtype=torch.float64)
    assert Q.dtype == raw.singular_values.dtype == raw.condition.dtype == torch.float64
    assert raw.unique.dtype == torch.bool
    assert raw.info.dtype == raw.notes.dtype == torch.int32
    assert (raw.info == 0).all()
    assert (Q.mT @ Q - one).abs().max() <= tolerance("rotation"), "orthogonality"
    det = torch.linalg.det(Q)
    if special:
        assert (det > 0).all()
    H = Q.mT @ M
    size = torch.linalg.norm(M, dim=(-2, -1))
    data = torch.linalg.norm(X, dim=(-2, -1)) * torch.linalg.norm(Y, dim=(-2, -1))
    s = raw.singular_values
    # what the forming of M costs; where singular values count as zero, what they may have been
    threshold = 8 * r * U64 * data
    noise = torch.where(s[:, -1] > threshold, 4 * U64 * data, threshold)
    assert (torch.linalg.norm(H - H.mT, dim=(-2, -1)) <= 64 * U64 * size + 2 * noise).all(), "symmetry"
    assert (s[:, :-1] >= s[:, 1:]).all()
    assert torch.allclose(s, torch.linalg.svdvals(M), rtol=0, atol=float(64 * U64 * data.max()))
    best = s.sum(-1)
    reflected = torch.linalg.det(M) < 0 if special else torch.zeros(len(s), dtype=torch.bool)
    best = best - torch.where(reflected, 2 * s[:, -1], 0.0)
    assert ((best - H.diagonal(dim1=-2, dim2=-1).sum(-1)) <= 1e-12 * s.sum(-1) + r * noise).all(), "optimality"
    lowest = torch.linalg.eigvalsh((H + H.mT) / 2)[:, 0]
    assert (lowest >= -torch.where(reflected, s[:, -1], 0.0) - 64 * U64 * size - noise).all(), "positive semidefinite"


SHAPES = [(37, 1), (37, 2), (41, 5), (127, 16), (67, 33), (131, 64), (3, 7)]


@backends
@groups
@dtypes
@pytest.mark.parametrize(("rows", "r"), SHAPES)
def test_meets_the_limits(backend, rows, r, dtype, special):
    X = normal(3, rows, r).to(dtype)
    Y = (X.double() @ orthogonal(r, 3) + 0.3 * normal(3, rows, r, seed=1)).to(dtype)
    check_rotation(rotate(backend, X, Y, special), X, Y, special)


@backends
@groups
@pytest.mark.parametrize("kappa", [1e0, 1e2, 1e4, 1e6, 1e9, 1e12, 1e14])
@pytest.mark.parametrize("det", [1, -1])
def test_every_condition(backend, kappa, det, special):
    values = torch.logspace(0, -math.log10(kappa), 9).tolist()
    M = spectrum(*values, seed=5, det=det)
    X, Y = with_correlation(M)
    raw = rotate(backend, X, Y, special)
    check_rotation(raw, X[None], Y[None], special)


@backends
@groups
@pytest.mark.parametrize("r", [3, 10, 33])
def test_graded_frames_meet_the_limits(backend, r, special):
    X = torch.stack([with_kappa(58, r, 10.0 ** (seed % 13), seed=seed) for seed in range(60)])
    turned = torch.stack([x @ orthogonal(r, seed) for seed, x in enumerate(X)])
    other = torch.stack([with_kappa(58, r, 1e3, seed=seed + 100) for seed in range(60)])
    for Y in (turned, other):
        check_rotation(rotate(backend, X, Y, special), X, Y, special)


@backends
@pytest.mark.parametrize("kappa", [1e1, 1e4, 1e8])
def test_is_the_polar_factor(backend, kappa):
    U, V = orthogonal(8, 1), orthogonal(8, 2)
    s = torch.logspace(0, -math.log10(kappa), 8, dtype=torch.float64)
    M = U * s @ V.T
    raw = rotate(backend, *with_correlation(M))
    # M itself is rounded: its own forward error enters with the condition of the polar factor
    limit = 64 * U64 * torch.linalg.norm(M) / (s[-2] + s[-1])
    assert torch.linalg.norm(raw.Q[0] - U @ V.T) <= limit


@backends
@pytest.mark.parametrize(("rows", "r"), [(37, 5), (101, 12), (67, 31)])
def test_agrees_with_scipy(backend, rows, r):
    X, Y = normal(rows, r), normal(rows, r, seed=1)
    expected, total = scipy.linalg.orthogonal_procrustes(X.numpy(), Y.numpy())
    raw = rotate(backend, X, Y)
    assert raw.unique.all()
    s = raw.singular_values[0]
    assert torch.linalg.norm(raw.Q[0] - torch.from_numpy(expected)) <= 64 * U64 * s.norm() * 4 / (s[-2] + s[-1])
    assert s.sum().item() == pytest.approx(total, rel=1e-13)


@backends
@groups
def test_no_random_rotation_is_better(backend, special):
    X, Y = normal(29, 4), normal(29, 4, seed=1)
    for rotated in (Y, Y * torch.tensor([1, 1, 1, -1.0])):
        Q = rotate(backend, X, rotated, special).Q[0]
        distance = torch.linalg.norm(X @ Q - rotated)
        turns = [orthogonal(4, seed, det=1 if special else None) for seed in range(300)]
        near = [Q @ torch.linalg.matrix_exp(1e-3 * (K - K.T)) for K in (normal(4, 4, seed=s) for s in range(100))]
        assert all(torch.linalg.norm(X @ turn - rotated) >= distance - 1e-13 for turn in turns + near)


@backends
@groups
@dtypes
def test_planted_rotation_is_found(backend, dtype, special):
    G = orthogonal(6, 7, det=1)
    Y = normal(43, 6)
    X = (Y @ G.T).to(dtype)
    Y = Y.to(dtype)
    raw = rotate(backend, X, Y, special)
    assert torch.linalg.norm(raw.Q[0] - G) <= 64 * roundoff(dtype)
    assert raw.unique.all()
    assert raw.notes.tolist() == [0]


@backends
def test_reflection_is_kept_in_o_and_refused_in_so(backend):
    G = orthogonal(5, 3, det=-1)
    Y = normal(31, 5)
    X = Y @ G.T
    assert torch.linalg.norm(rotate(backend, X, Y).Q[0] - G) <= 1e-13
    Q = rotate(backend, X, Y, special=True).Q[0]
    assert torch.linalg.det(Q).item() == pytest.approx(1)
    # the sign goes on the smallest singular direction of M = G Y^T Y: the weakest direction of the target
    weakest = torch.linalg.eigh(Y.T @ Y)[1][:, 0]
    assert torch.linalg.norm(Q - G @ (torch.eye(5) - 2 * torch.outer(weakest, weakest))) <= 1e-12


@backends
@groups
def test_source_and_target_swapped(backend, special):
    X, Y = normal(2, 37, 6), normal(2, 37, 6, seed=1)
    there, back = rotate(backend, X, Y, special), rotate(backend, Y, X, special)
    assert (there.Q - back.Q.mT).abs().max() <= 1e-13
    assert torch.equal(there.unique, back.unique)
    assert torch.allclose(there.condition, back.condition)


@backends
@groups
def test_turned_source_turns_the_answer(backend, special):
    X, Y, P = normal(37, 6), normal(37, 6, seed=1), orthogonal(6, 9, det=1)
    plain, turned = rotate(backend, X, Y, special), rotate(backend, X @ P.T, Y, special)
    assert (turned.Q[0] - P @ plain.Q[0]).abs().max() <= 1e-12


@backends
@groups
def test_aligning_twice_gives_the_identity(backend, special):
    X, Y = normal(2, 37, 6), normal(2, 37, 6, seed=1)
    Q = rotate(backend, X, Y, special).Q
    assert (rotate(backend, X @ Q, Y, special).Q - torch.eye(6)).abs().max() <= 1e-12


@backends
@groups
@dtypes
@pytest.mark.parametrize("blend", [0.3, 1.0])
def test_powers_of_two_keep_every_bit(backend, dtype, special, blend):
    X, Y = normal(2, 37, 6).to(dtype), normal(2, 37, 6, seed=1).to(dtype)
    Y[1, :, 2] = 0
    plain = rotate(backend, X, Y, special, blend)
    for a, b in ((4, 1), (1, 8), (2**6, 2**5)):
        scaled = rotate(backend, X * a, Y * b, special, blend)
        assert same_bits(scaled.Q, plain.Q)
        assert same_bits(scaled.singular_values, plain.singular_values * (a * b))
        assert same_bits(scaled.condition, plain.condition)
        assert torch.equal(scaled.notes, plain.notes)


@backends
@groups
def test_float64_over_its_whole_range(backend, special):
    X, Y = normal(37, 4), normal(37, 4, seed=1)
    plain = rotate(backend, X, Y, special)
    for a, b in ((2.0**1000, 2.0**-990), (2.0**-900, 2.0**-900), (2.0**-900, 2.0**800)):
        scaled = rotate(backend, X * a, Y * b, special)
        assert same_bits(scaled.Q, plain.Q)
        assert scaled.info.tolist() == [0]
    assert rotate(backend, X * 2.0**1000, Y * 2.0**1000, special).info.tolist() == [Info.OVERFLOW]


# singular values, sign of det M, unique in O, unique in SO
UNIQUENESS = [
    ((3, 2, 1), 1, True, True),
    ((3, 2, 1), -1, True, True),
    ((3, 2, 2), -1, True, False),
    ((3, 2, 2), 1, True, True),
    ((3, 3, 1), -1, True, True),
    ((3, 2, 0), None, False, True),
    ((3, 0, 0), None, False, False),
    ((0, 0, 0), None, False, False),
    ((3, 2, 1e-18), None, False, True),
]


@backends
@pytest.mark.parametrize(("values", "det", "in_o", "in_so"), UNIQUENESS)
def test_uniqueness(backend, values, det, in_o, in_so):
    X, Y = with_correlation(spectrum(*values, seed=2, det=det))
    assert rotate(backend, X, Y).unique.tolist() == [in_o]
    assert rotate(backend, X, Y, special=True).unique.tolist() == [in_so]


@backends
def test_condition_and_its_note(backend):
    X, Y = with_correlation(spectrum(3, 2, 0.5, det=1))
    data = (torch.linalg.norm(X) * torch.linalg.norm(Y)).item()
    assert rotate(backend, X, Y).condition.item() == pytest.approx(2 * data / 2.5, rel=1e-12)
    assert rotate(backend, X, Y, special=True).condition.item() == pytest.approx(2 * data / 2.5, rel=1e-12)
    X, Y = with_correlation(spectrum(3, 2, 0.5, det=-1))
    assert rotate(backend, X, Y).condition.item() == pytest.approx(2 * data / 2.5, rel=1e-12)
    assert rotate(backend, X, Y, special=True).condition.item() == pytest.approx(2 * data / 1.5, rel=1e-12)
    assert rotate(backend, torch.zeros(5, 3), torch.ones(5, 3)).condition.tolist() == [math.inf]


@backends
@dtypes
def test_ill_conditioned_is_judged_by_the_rounding_of_the_inputs(backend, dtype):
    unit = roundoff(dtype)
    for factor, noted in ((4, True), (64, False)):
        weak = 2.0 ** round(math.log2(factor * unit))
        X, Y = (Z.to(dtype) for Z in with_correlation(torch.diag(torch.tensor([1.0, weak, weak], dtype=torch.float64))))
        # |X| |Y| is sqrt(3), the sum of the two weak values 2 * weak
        raw = rotate(backend, X, Y)
        assert bool(raw.notes.item() & Note.ILL_CONDITIONED) == noted
        assert raw.info.item() == 0


@backends
def test_condition_bounds_the_perturbation(backend):
    U, V = orthogonal(5, 1), orthogonal(5, 2)
    M = U * torch.tensor([1, 0.5, 0.2, 1e-3, 5e-4], dtype=torch.float64) @ V.T
    E = 1e-9 * U[:, 3:] @ torch.tensor([[0, 1.0], [-1, 0]], dtype=torch.float64) @ V[:, 3:].T
    before, after = (rotate(backend, *with_correlation(Z)).Q[0] for Z in (M, M + E))
    moved, bound = torch.linalg.norm(after - before), 2 / 1.5e-3 * torch.linalg.norm(E)
    assert 0.99 * bound <= moved <= 1.01 * bound


@backends
@groups
def test_zero_correlation_gives_exactly_the_identity(backend, special):
    one = torch.eye(4, dtype=torch.float64)
    X = orthonormal(37, 8, 3)
    zero = torch.zeros(37, 4, dtype=torch.float64)
    for source, target in ((X[:, :4], zero), (zero, zero), (zero, X[:, :4]), (X[:, :4], X[:, 4:])):
        raw = rotate(backend, source, target, special)
        assert same_bits(raw.Q[0], one)
        assert raw.unique.tolist() == [False]
        assert raw.notes.tolist() == [Note.ILL_CONDITIONED]
        assert raw.info.tolist() == [0]


@backends
@groups
@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("seed", range(4))
def test_deficient_correlation_gives_the_smallest_rotation(backend, rank, seed, special):
    U, V = orthogonal(6, seed), orthogonal(6, seed + 10)
    M = U[:, :rank] * torch.linspace(2, 1, rank) @ V[:, :rank].T
    X, Y = with_correlation(M)
    raw = rotate(backend, X, Y, special)
    check_rotation(raw, X[None], Y[None], special)
    Q = raw.Q[0]
    U2, V2 = U[:, rank:], V[:, rank:]
    assert torch.linalg.norm(Q @ V[:, :rank] - U[:, :rank]) <= 1e-13
    for other in range(60):
        Z = orthogonal(6 - rank, other)
        candidate = U[:, :rank] @ V[:, :rank].T + U2 @ Z @ V2.T
        if not special or torch.linalg.det(candidate) > 0:
            assert candidate.trace() <= Q.trace() + 1e-12
    # another basis of the null spaces, another order of the data: the same answer
    turned = rotate(backend, orthogonal(9, 77) @ X, orthogonal(9, 77) @ Y, special)
    assert (turned.Q[0] - Q).abs().max() <= 1e-12


@backends
def test_scalar(backend):
    X = normal(7, 1)
    for sign in (1.0, -1.0):
        plain, special = rotate(backend, X, sign * X), rotate(backend, X, sign * X, special=True)
        assert plain.Q.flatten().tolist() == [sign]
        assert special.Q.flatten().tolist() == [1.0]
        assert special.unique.tolist() == plain.unique.tolist() == [True]
        assert special.condition.tolist() == [0.0]
        assert special.notes.tolist() == plain.notes.tolist() == [0]
    zero = rotate(backend, X, 0 * X)
    assert zero.Q.flatten().tolist() == [1.0]
    assert zero.unique.tolist() == [False]


@backends
@groups
@dtypes
def test_blend_zero_is_exactly_the_identity(backend, dtype, special):
    raw = rotate(backend, normal(2, 31, 5).to(dtype), normal(2, 31, 5, seed=1).to(dtype), special, blend=0.0)
    assert same_bits(raw.Q, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    assert (raw.singular_values > 0).all()


@backends
@pytest.mark.parametrize("blend", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("angle", [0.0, 0.4, 1.5, 3.0, -2.0])
def test_blend_maps_every_angle(backend, blend, angle):
    turn = orthogonal(5, 4)
    G = turn @ torch.block_diag(rotation2(angle), rotation2(0.7), torch.eye(1)) @ turn.T
    expected = turn @ torch.block_diag(
        *(rotation2(math.atan2(blend * math.sin(a), 1 - blend + blend * math.cos(a))) for a in (angle, 0.7)), torch.eye(1)
    ) @ turn.T  # fmt: skip
    X, Y = with_correlation(G)
    for special in (False, True):
        Q = rotate(backend, X, Y, special, blend).Q[0]
        assert (Q - expected).abs().max() <= 1e-13
        one = torch.eye(5)
        full = torch.linalg.norm(G - one)
        assert torch.linalg.norm(Q - one) <= min(full, 2 * blend * full) + 1e-13


@backends
def test_blend_half_of_a_half_turn_leaves_that_plane(backend):
    G = torch.block_diag(-torch.eye(2), rotation2(0.7)).double()
    X, Y = with_correlation(G)
    expected = {0.49: rotation2(0.0), 0.5: rotation2(0.0), 0.51: rotation2(math.pi)}
    for blend, plane in expected.items():
        Q = rotate(backend, X, Y, True, blend).Q[0]
        assert (Q[:2, :2] - plane).abs().max() <= 1e-13
        assert torch.linalg.det(Q).item() == pytest.approx(1)
    half = rotate(backend, X, Y, True, 0.5).Q[0]
    assert (half - torch.block_diag(torch.eye(2), rotation2(0.35))).abs().max() <= 1e-13


@backends
@pytest.mark.parametrize("blend", [0.3, 0.5, 0.7])
def test_blend_of_a_half_turn_is_finite_and_orthogonal(backend, blend):
    turn = orthogonal(6, 8)
    for special in (False, True):
        X, Y = with_correlation(turn @ torch.diag(torch.tensor([-1, -1, -1, -1, 1, 1.0])).double() @ turn.T)
        Q = rotate(backend, X, Y, special, blend).Q[0]
        assert (Q.T @ Q - torch.eye(6)).abs().max() <= tolerance("rotation")
        assert torch.linalg.det(Q).item() == pytest.approx(1)


@backends
@pytest.mark.parametrize("blend", [0.5 + 5e-7, 0.5 - 5e-7])
@pytest.mark.parametrize("seed", range(6))
def test_blend_at_the_threshold_stays_a_rotation(backend, blend, seed):
    """Six equal singular values of 1e-6, the threshold, where rounding counts some of them as zero and others not."""
    turn = orthogonal(7, seed)
    X, Y = with_correlation(turn @ torch.diag(torch.tensor([-1, -1, -1, -1, -1, -1, 1.0])).double() @ turn.T)
    Q = rotate(backend, X, Y, True, blend).Q[0]
    assert (Q.T @ Q - torch.eye(7)).abs().max() <= tolerance("rotation")
    assert torch.linalg.det(Q).item() == pytest.approx(1)


@backends
def test_blend_of_a_reflection_jumps(backend):
    X, Y = with_correlation(torch.diag(torch.tensor([1, 1, -1.0])).double())
    for blend, sign in ((0.49, 1.0), (0.5, 1.0), (0.51, -1.0)):
        assert rotate(backend, X, Y, False, blend).Q[0].diagonal().tolist() == pytest.approx([1, 1, sign])


@backends
def test_distance_never_grows_with_blend(backend):
    X, Y = normal(41, 5), normal(41, 5, seed=2)
    distances = [torch.linalg.norm(X @ rotate(backend, X, Y, True, b / 10).Q[0] - Y).item() for b in range(11)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(distances))


@backends
@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_non_finite_pair_is_marked_and_alone(backend, dtype, bad, blend):
    X, Y = normal(5, 31, 4).to(dtype), normal(5, 31, 4, seed=1).to(dtype)
    Y[4] = 0
    clean = rotate(backend, X, Y, True, blend)
    poisoned_X, poisoned_Y = X.clone(), Y.clone()
    poisoned_X[1, 30, 3] = bad
    poisoned_Y[3, 0, 0] = bad
    raw = rotate(backend, poisoned_X, poisoned_Y, True, blend)
    assert raw.info.tolist() == [0, Info.NONFINITE, 0, Info.NONFINITE, 0]
    for field in (raw.Q, raw.singular_values, raw.condition):
        assert field[[1, 3]].isnan().all()
    assert raw.unique[[1, 3]].tolist() == [False, False]
    assert raw.notes[[1, 3]].tolist() == [0, 0]
    others = [0, 2, 4]
    atol = 0 if backend.bitwise else 1e-13
    torch.testing.assert_close(raw.Q[others], clean.Q[others], rtol=0, atol=atol)
    assert torch.equal(raw.notes[others], clean.notes[others])


@backends
@groups
@pytest.mark.parametrize(("N", "rows", "r"), [(0, 7, 3), (2, 0, 3), (2, 7, 0), (0, 0, 0)])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_empty(backend, N, rows, r, special, blend):
    raw = rotate(backend, torch.zeros(N, rows, r), torch.zeros(N, rows, r), special, blend)
    assert same_bits(raw.Q, torch.eye(r, dtype=torch.float64).expand(N, r, r))
    assert raw.singular_values.tolist() == [[0.0] * r] * N
    assert raw.info.tolist() == [0] * N
    assert raw.unique.tolist() == [r == 0] * N


@backends
def test_ragged_groups(backend):
    assert backend([], [], False, 1.0) == []
    X = [normal(2, 31, 5), normal(1, 17, 3), normal(3, 7, 1)]
    Y = [normal(2, 31, 5, seed=1), normal(1, 17, 3, seed=1), normal(3, 7, 1, seed=1)]
    for raw, x, y in zip(backend(X, Y, True, 1.0, m=31, r=5, N=3), X, Y, strict=True):
        check_rotation(raw, x, y, True)


@backends
@pytest.mark.parametrize(("N", "rows", "r"), [(1, 70001, 13), (300, 131, 7)])
def test_more_than_one_tile(backend, N, rows, r):
    X, Y = normal(N, rows, r).float(), normal(N, rows, r, seed=1).float()
    check_rotation(rotate(backend, X, Y), X, Y, False)


@pytest.mark.parametrize(("N", "rows", "r"), [(1, 800_011, 8), (401, 2003, 8)])
def test_takes_bounded_memory(N, rows, r):
    X = torch.rand(1, rows, r).expand(N, rows, r)
    X = X.clone() if N == 1 else X
    with LargestTensor() as largest:
        rotate(Served(registry.get("torch"), "procrustes_rotation"), X, X)
    assert X.numel() * X.element_size() > 24 << 20
    assert largest.bytes <= 2 << 20


@backends
@groups
@pytest.mark.parametrize("blend", [0.5, 1.0])
def test_repeats_and_does_not_see_the_batch(backend, special, blend):
    X, Y = normal(7, 53, 6), normal(7, 53, 6, seed=1)
    Y[2, :, 3:] = 0
    Y[3] = 0
    whole, again = rotate(backend, X, Y, special, blend), rotate(backend, X, Y, special, blend)
    assert same_bits(whole.Q, again.Q)
    for i in range(7):
        alone = rotate(backend, X[i], Y[i], special, blend)
        if backend.bitwise:
            assert same_bits(alone.Q[0], whole.Q[i])
        else:
            assert (alone.Q[0] - whole.Q[i]).abs().max() <= 1e-13


@backends
@dtypes
@pytest.mark.parametrize("view", ["transposed", "strided", "offset", "expanded"])
def test_any_strides_and_inputs_untouched(backend, dtype, view):
    base = normal(3, 62, 10).to(dtype)
    X = {
        "transposed": base.mT.contiguous().mT[:, :31, :5],
        "strided": base[:, ::2, ::2],
        "offset": base.flatten()[1 : 1 + 3 * 31 * 5].view(3, 31, 5),
        "expanded": base[:1, :31, :5].expand(3, 31, 5),
    }[view]
    Y = normal(3, 31, 5, seed=4).to(dtype)
    before = base.clone()
    raw, dense = rotate(backend, X, Y), rotate(backend, X.contiguous(), Y)
    assert same_bits(base, before)
    assert (raw.Q - dense.Q).abs().max() <= 1e-12


@backends
@groups
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_writes_every_element(backend, poisoned_empty, special, blend):
    Y = normal(3, 31, 5, seed=4)
    Y[1, :, 3:] = 0
    Y[2] = 0
    raw = rotate(backend, normal(3, 31, 5), Y, special, blend)
    assert raw.Q.isfinite().all()
    assert raw.singular_values.isfinite().all()
    assert (raw.info == 0).all()


@backends
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    r=st.integers(1, 9), rows=st.integers(1, 23), seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
    special=st.booleans(), cut=st.integers(0, 9), blend=st.sampled_from([0.2, 0.5, 1.0]),
)  # fmt: skip
def test_any_pair(backend, r, rows, seed, dtype, special, cut, blend):
    X, Y = normal(2, rows, r, seed=seed), normal(2, rows, r, seed=seed + 1)
    Y[:, :, :cut] = 0
    X, Y = X.to(dtype), Y.to(dtype)
    check_rotation(rotate(backend, X, Y, special), X, Y, special)
    mixed = rotate(backend, X, Y, special, blend)
    assert (mixed.Q.mT @ mixed.Q - torch.eye(r)).abs().max() <= tolerance("rotation")
    if special:
        assert (torch.linalg.det(mixed.Q) > 0).all()


def batch_of_groups(dtype, rows=70):
    """Groups of several ranks and heights; the first three have one target, one of them by columns in memory; the fourth
    has another of its shape."""
    target = normal(4, rows, 5, seed=9).to(dtype)
    sources = [(target.double() @ orthogonal(5, k) + 0.3 * normal(4, rows, 5, seed=k)).to(dtype) for k in range(3)]
    sources[1] = sources[1].mT.contiguous().mT
    others = [(normal(4, rows, 5, seed=20).to(dtype), normal(4, rows, 5, seed=21).to(dtype))]
    others += [(normal(2, 33, 4).to(dtype), normal(2, 33, 4, seed=1).to(dtype)), (normal(3, 9, 5).to(dtype),) * 2]
    return [*sources, *(X for X, _ in others)], [target] * 3 + [Y for _, Y in others]


@backends
@groups
@dtypes
def test_groups_of_one_call(backend, dtype, special):
    sources, targets = batch_of_groups(dtype)
    raws = backend(sources, targets, special, 1.0, dtype=dtype, m=70, r=5, N=4)
    for raw, X, Y in zip(raws, sources, targets, strict=True):
        check_rotation(raw, X, Y, special)
        alone = rotate(backend, X, Y, special)
        assert torch.allclose(raw.Q, alone.Q, rtol=0, atol=1e-11)
        assert torch.allclose(raw.singular_values, alone.singular_values, rtol=1e-12)
        assert torch.equal(raw.notes, alone.notes)


@backends
def test_dtypes_may_differ_between_groups(backend):
    sources, targets = batch_of_groups(torch.float64)
    sources[0], sources[4], targets[4] = sources[0].float(), sources[4].bfloat16(), targets[4].half()
    raws = backend(sources, targets, True, 1.0, dtype=torch.float64, m=70, r=5, N=4)
    for raw, X, Y in zip(raws, sources, targets, strict=True):
        check_rotation(raw, X, Y, True)
        assert torch.equal(raw.notes, rotate(backend, X, Y, True).notes)


@backends
@dtypes
def test_trouble_of_one_group_stays_there(backend, dtype):
    sources, targets = batch_of_groups(dtype)
    sources[1][2, 4, 1] = math.nan
    sources[0][3, 69, 0] = math.inf
    raws = backend(sources, targets, True, 0.5, dtype=dtype, m=70, r=5, N=4)
    assert [raw.info.tolist() for raw in raws] == [[0, 0, 0, 1], [0, 0, 1, 0], [0] * 4, [0] * 4, [0] * 2, [0] * 3]
    assert raws[1].Q[2].isnan().all()
    targets[0][1, 0, 0] = math.nan
    raws = backend(sources, targets, True, 0.5, dtype=dtype, m=70, r=5, N=4)
    assert [raw.info.tolist() for raw in raws[:3]] == [[0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0]]


@backends
@pytest.mark.parametrize("by_columns", [False, True])
def test_long_factors_lose_no_digits(backend, by_columns):
    """A sum of 9001 positive products: one chain of additions is wrong by 50 units. Libraries promise no better; our kernel does."""
    X = normal(1, 9001, 1).abs().float()
    X = X.mT.contiguous().mT if by_columns else X
    exact = math.fsum(x * x for x in X.double().flatten().tolist())
    raw = rotate(backend, X, X.clone())
    assert abs(float(raw.singular_values) - exact) <= (4 if backend.name == "cpu" else X.numel()) * U64 * exact


@backends
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30, 3e38])
def test_float32_at_the_ends_of_its_range(backend, size):
    X = (normal(2, 37, 3).clamp(-1, 1) * size).float()
    raw = rotate(backend, X, X)
    assert (raw.info == 0).all()
    assert torch.allclose(raw.Q, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
