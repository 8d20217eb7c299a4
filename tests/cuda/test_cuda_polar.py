"""fedlora_polar of the CUDA library: rotations from correlations, of every rank, blended or not, and its promises about bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.backends.contract import Info, Note, RawRotation
from fedlora_kernels.backends.native.library import numbers, rows, table
from fedlora_kernels.testing import U64, check_rotation, orthonormal, prescribed, spectrum

groups = pytest.mark.parametrize("special", [False, True], ids=["O", "SO"])
# One of every kernel.
SIZES = [1, 2, 3, 6, 11, *(pytest.param(r, marks=pytest.mark.full) for r in (8, 16, 19, 32, 35))]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(r, seed, det=None):
    Q = orthonormal(r, r, seed)
    if det is not None and torch.linalg.det(Q) * det < 0:
        Q[:, 0] = -Q[:, 0]
    return Q


def polar(cuda, *correlations, size=None, exponent=0, special=False, blend=1.0, unit=U64):
    """Rotations of correlations (N, r, r), of data of these sizes (N,) or of their own norm; one, or a list for several groups."""
    backend, device = cuda
    fields, answers = [], []
    for M in correlations:
        N, r = M.shape[:2]
        norms = torch.linalg.matrix_norm(M) if size is None else size
        exponents = torch.full((N,), exponent, dtype=torch.int32)
        fields.append([M.to(device), norms.double().to(device), exponents.to(device)])
        empty = [torch.empty(shape, dtype=torch.float64, device=device) for shape in ((N, r, r), (N, r), (N,))]
        flags = [torch.empty(N, dtype=dtype, device=device) for dtype in (torch.bool, torch.int32, torch.int32)]
        answers.append(RawRotation(empty[0], empty[1], flags[0], empty[2], flags[1], flags[2]))
    tables = [table([rows(field) for field in column]) for column in zip(*fields, strict=True)]
    written = table([rows(field) for answer in answers for field in answer])
    arguments = (*tables, numbers([unit] * len(fields)), written, len(fields), int(special), blend)
    backend.library.run("procrustes_rotation", "fedlora_polar", (tables[0], len(fields)), arguments, device)
    found = [RawRotation(*(field.cpu() for field in answer)) for answer in answers]
    return found[0] if len(correlations) == 1 else found


def assert_rotation(M, raw, special, blend=1.0):
    for i in range(len(M)):
        row = RawRotation(*(field[i] for field in raw))
        eye = torch.eye(M.shape[-1], dtype=torch.float64)
        for check in check_rotation(eye, M[i], row, special=special, blend=blend):
            assert check.value <= check.limit, (i, check)


def bits(raw, chosen=slice(None)):
    return [field[chosen].contiguous().view(torch.uint8).numpy().tobytes() for field in raw]


def correlation(values, seed=0, det=None):
    """One with these singular values, and with this sign of its determinant if any."""
    r = len(values)
    return (
        orthogonal(r, seed, det=1)
        @ torch.diag(torch.tensor(values, dtype=torch.float64))
        @ orthogonal(r, seed + 1, det).T
    )


def mixed_batch(r):
    """Full rank, deficient, zero, graded, reflected, the identity: what goes every way through the kernels."""
    M = normal(9, r, r, seed=5)
    M[1] = 0
    M[2, :, : r // 2] = 0
    M[3] *= torch.logspace(0, -9, r, dtype=torch.float64)
    M[4] = torch.eye(r)
    M[5] = -torch.eye(r)
    M[6] = M[6, :, :1] * M[6, :1]
    M[7] = M[7] @ M[7].mT
    return M


@groups
@pytest.mark.parametrize("r", [*range(1, 18), 23, 29, 32, 33, 45])
def test_every_size(cuda, r, special):
    M = normal(2, r, r, seed=r)
    M[1] = prescribed(r, r, spectrum("geometric", r, 1e5), r)
    assert_rotation(M, polar(cuda, M, special=special), special)


@groups
@pytest.mark.parametrize("r", [5, 9])
@pytest.mark.parametrize("det", [1, -1])
def test_every_condition(cuda, r, det, special):
    M = torch.stack([correlation(torch.logspace(0, -k, r).tolist(), seed=k, det=det) for k in range(15)])
    assert_rotation(M, polar(cuda, M, special=special), special)


@groups
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("r", [2, 6, 13, 24, 34])
def test_deficient_correlations_give_the_smallest_rotation(cuda, r, apart, special):
    """Of null bases that are anywhere, or the same beside a reflection of what counts."""
    ranks = sorted({1, r // 2, r - 1})
    U = orthogonal(r, 3)
    V = orthogonal(r, 4) if apart else U * torch.where(torch.arange(r) == 0, -1.0, 1.0)
    M = torch.stack([U[:, :k] * torch.linspace(2, 1, k, dtype=torch.float64) @ V[:, :k].T for k in ranks])
    raw = polar(cuda, M, special=special)
    assert_rotation(M, raw, special)
    for Q, unique, k in zip(raw.Q, raw.unique, ranks, strict=True):
        assert unique == (special and k == r - 1)
        assert (Q @ V[:, :k] - U[:, :k]).abs().max() <= 1e-13
        rest = torch.linalg.svdvals(U[:, k:].T @ V[:, k:])
        flipped = (
            special
            and torch.linalg.det(U[:, :k] @ V[:, :k].T + U[:, k:] @ _polar(U[:, k:].T @ V[:, k:]) @ V[:, k:].T) < 0
        )
        best = (U[:, :k] * V[:, :k]).sum() + rest.sum() - 2 * rest[-1] * flipped
        assert abs(Q.trace() - best) <= 1e-12


def _polar(M):
    U, _, Vh = torch.linalg.svd(M)
    return U @ Vh


@groups
@pytest.mark.parametrize("r", SIZES)
def test_zero_gives_exactly_the_identity(cuda, r, special):
    raw = polar(cuda, torch.zeros(2, r, r, dtype=torch.float64), special=special)
    alone = special and r == 1
    assert torch.equal(raw.Q, torch.eye(r, dtype=torch.float64).expand(2, r, r))
    assert raw.unique.tolist() == [alone] * 2
    assert raw.condition.tolist() == [0.0 if alone else math.inf] * 2
    assert raw.notes.tolist() == [0 if alone else Note.ILL_CONDITIONED] * 2
    assert not raw.info.any()


# singular values, sign of det M, unique in O, unique in SO
UNIQUENESS = [
    ((3, 2, 1), 1, True, True),
    ((3, 2, 1), -1, True, True),
    ((3, 2, 2), -1, True, False),
    ((3, 2, 2), 1, True, True),
    ((3, 3, 1), -1, True, True),
    ((3, 2, 0), None, False, True),
    ((3, 0, 0), None, False, False),
    ((3, 2, 1e-18), None, False, True),
]


@pytest.mark.parametrize(("values", "det", "in_o", "in_so"), UNIQUENESS)
def test_uniqueness(cuda, values, det, in_o, in_so):
    M = correlation(values, seed=2, det=det)[None]
    for blend in (1.0, 0.5, 0.0):
        assert polar(cuda, M, blend=blend).unique.tolist() == [in_o]
        assert polar(cuda, M, special=True, blend=blend).unique.tolist() == [in_so]


def test_condition_and_its_note(cuda):
    M = torch.stack([correlation((3, 2, 0.5), seed=2, det=det) for det in (1, -1)])
    size = torch.tensor([8.0, 8.0])
    assert polar(cuda, M, size=size).condition.tolist() == pytest.approx([6.4, 6.4])
    assert polar(cuda, M, size=size, special=True).condition.tolist() == pytest.approx([6.4, 16 / 1.5])
    for weak, noted in ((2.0**-9, True), (2.0**-6, False)):
        raw = polar(cuda, torch.diag(torch.tensor([1.0, weak, weak], dtype=torch.float64))[None], unit=2.0**-12)
        assert raw.notes.tolist() == [Note.ILL_CONDITIONED if noted else 0]


@groups
@pytest.mark.parametrize(
    "r", [2, 7, 21, pytest.param(16, marks=pytest.mark.full), pytest.param(33, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.8])
def test_blends(cuda, r, t, special):
    """An angle th of Q becomes atan2(t sin th, 1 - t + t cos th)."""
    M = torch.cat([mixed_batch(r), orthogonal(r, 9, det=1)[None]])
    Q, raw = polar(cuda, M, special=special).Q, polar(cuda, M, special=special, blend=t)
    assert_rotation(M, raw, special, blend=t)
    if t == 0:
        assert torch.equal(raw.Q, torch.eye(r, dtype=torch.float64).expand_as(Q))
    angles = torch.linalg.eigvals(Q[-1]).angle()
    mixed = torch.atan2(t * angles.sin(), 1 - t + t * angles.cos())
    if not special and t == 0.5:  # an eigenvalue -1 is met halfway
        return
    assert torch.allclose(
        torch.linalg.eigvals(raw.Q[-1]).angle().sort().values, mixed.sort().values, rtol=0, atol=1e-12
    )


def test_half_a_reflection_gives_the_identity_there(cuda):
    raw = polar(cuda, torch.diag(torch.tensor([1.0, 1, -1], dtype=torch.float64))[None], blend=0.5)
    assert (raw.Q[0] - torch.eye(3)).abs().max() <= 1e-15
    assert raw.info.tolist() == [0]


@groups
@pytest.mark.parametrize("blend", [0.3, 1.0])
@pytest.mark.parametrize("r", SIZES)
def test_powers_of_two_keep_every_bit(cuda, r, special, blend):
    M = mixed_batch(r)[[0, 2, 6]]
    size = torch.linalg.matrix_norm(M)
    plain = polar(cuda, M, size=size, special=special, blend=blend)
    for e in (-900, 60):
        scaled = polar(cuda, M * 2.0**e, size=size * 2.0**e, exponent=-e, special=special, blend=blend)
        assert bits(scaled) == bits(plain)


def test_values_that_leave_the_range_are_reported(cuda):
    M = torch.ones(2, 5, 5, dtype=torch.float64)
    raw = polar(cuda, M, exponent=1023)
    assert raw.info.tolist() == [Info.OVERFLOW] * 2
    assert raw.singular_values[0, 0] == math.inf
    assert raw.Q.isfinite().all()


@groups
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("r", SIZES)
def test_a_bad_matrix_harms_no_neighbour(cuda, r, special, blend):
    M, size = mixed_batch(r), torch.linalg.matrix_norm(mixed_batch(r))
    clean = polar(cuda, M, size=size, special=special, blend=blend)
    M[2, -1, 0], M[7], size[8] = math.nan, math.inf, math.inf
    raw = polar(cuda, M, size=size, special=special, blend=blend)
    bad = torch.isin(torch.arange(9), torch.tensor([2, 7, 8]))
    assert torch.equal(raw.info, torch.where(bad, int(Info.NONFINITE), 0).to(torch.int32))
    assert bits(raw, ~bad) == bits(clean, ~bad)
    assert all(field[bad].isnan().all() for field in (raw.Q, raw.singular_values, raw.condition))
    assert not raw.unique[bad].any()


@groups
@pytest.mark.parametrize("blend", [0.4, 1.0])
@pytest.mark.parametrize("r", SIZES)
def test_neither_place_nor_memory_nor_schedule_matter(simt, r, special, blend, poisoned_empty, monkeypatch):
    cuda, M = (simt, torch.device("cpu")), mixed_batch(r)
    whole = polar(cuda, M, special=special, blend=blend)
    for i in (1, 2, 5):
        assert bits(polar(cuda, M[i : i + 1], special=special, blend=blend)) == bits(whole, slice(i, i + 1))
    for schedule in ("reverse", "11"):
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        assert bits(polar(cuda, M, special=special, blend=blend)) == bits(whole)
    torch.empty = torch.zeros  # undone by the fixture
    assert bits(polar(cuda, M, special=special, blend=blend)) == bits(whole)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    r=st.integers(1, 12),
    data=st.lists(st.integers(-2, 2), min_size=144, max_size=144),
    special=st.booleans(),
    blend=st.sampled_from((1.0, 0.7)),
)
def test_small_integers_many_ties(simt, r, data, special, blend):
    """Integer matrices are full of exact ties, rank deficiency and zero columns."""
    M = torch.tensor(data[: r * r], dtype=torch.float64).reshape(1, r, r)
    assert_rotation(M, polar((simt, M.device), M, special=special, blend=blend), special, blend)


def test_groups_views_and_nothing(cuda):
    M = [
        normal(5, 3, 3),
        normal(0, 4, 4),
        normal(2, 0, 0),
        normal(70, 7, 7),
        normal(3, 32, 32),
        normal(4, 6, 6).mT,
        normal(2, 47, 47).mT,
        normal(1, 34, 34),
    ]
    whole = polar(cuda, *M)
    for one, raw in zip(M, whole, strict=True):
        assert bits(polar(cuda, one.contiguous())) == bits(raw)
        assert_rotation(one, raw, special=False)
    assert whole[2].unique.all()
    assert not whole[2].condition.any()
