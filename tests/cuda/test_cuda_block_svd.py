"""core_svd of the CUDA library beyond 32 rows or columns: values, promises about bits, wherever a matrix is kept meanwhile."""

import mpmath
import pytest
import torch
from guards import SCHEDULES, Guards, dtype_id, home, offset, same_answer, strided, turned

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.testing import GALLERY, SAMPLE, check_svd, gallery, roundoff

DTYPES = (torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
ROOMS = {
    "half": {torch.float64: 232448, torch.float32: 232448},
    "all": {torch.float64: 20000, torch.float32: 10000},
    "whole": {torch.float64: 12500, torch.float32: 6800},
    "panels": {torch.float64: 7000, torch.float32: 4200},
}
"""Bytes of shared memory that keep 40 x 33 in half of it, in all of it, its square alone, and panels of that."""
rooms = pytest.mark.parametrize("room", ROOMS)
# Both dtypes in every room, by turns: all combinations are in the long form.
rooms_by_turns = pytest.mark.parametrize(
    ("room", "dtype"),
    [
        pytest.param(room, dtype, id=f"{room}-{dtype_id(dtype)}", marks=[] if (r + d) % 2 else [pytest.mark.full])
        for r, room in enumerate(ROOMS)
        for d, dtype in enumerate(DTYPES)
    ],
)
SHAPES = [(33, 33), (40, 33), (35, 41), (70, 33), (33, 90), (34, 3), (2, 40)]


@pytest.fixture
def shared_bytes(monkeypatch):
    """Sets the shared memory of the simulated device for what is to be kept there of a matrix of this dtype."""
    return lambda room, dtype: monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", str(ROOMS[room][dtype]))


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def svd(cuda, *groups, **options):
    """Results on the CPU: one, or a list for several groups."""
    backend, device = cuda
    found = [home(raw) for raw in backend.core_svd([C.to(device) for C in groups], **options)]
    return found[0] if len(groups) == 1 else found


def some(raw, rows):
    return type(raw)(*(field[rows] for field in raw))


def assert_svd(C, raw):
    for i, checks in enumerate(check_svd(C, raw)):
        for check in checks:
            assert check.value <= check.limit, (i, check)


def mixed_batch(dtype, p, q):
    """Easy, hard, zero, huge, tiny and deficient matrices side by side."""
    C = normal(8, p, q, dtype=dtype, seed=11)
    C[1] = 0
    C[2] *= 1e30
    C[3] *= 1e-30
    C[4, :, -1] = C[4, :, 0]
    C[5] *= 10.0 ** -(torch.arange(q) % 13)
    C[6, :, q // 2 :] = 0
    C[7] = torch.eye(p, q)
    return C


@dtypes
@pytest.mark.parametrize(("p", "q"), [*SHAPES, (64, 61)])
def test_random(cuda, p, q, dtype):
    C = normal(2, p, q, dtype=dtype, seed=p)
    assert_svd(C, svd(cuda, C))


@pytest.mark.full
@dtypes
@pytest.mark.parametrize(
    ("p", "q"), [(65, 65), (97, 97), (128, 128), (120, 131), (170, 160), (512, 33), (40, 400), (200, 190)]
)
def test_random_larger(cuda, p, q, dtype):
    C = normal(2, p, q, dtype=dtype, seed=p)
    assert_svd(C, svd(cuda, C))


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize(("p", "q"), [(256, 256), (300, 310), (500, 400), (512, 512)])
def test_random_largest(cuda, p, q, dtype):
    C = normal(3, p, q, dtype=dtype, seed=p)
    assert_svd(C, svd(cuda, C))


@rooms_by_turns
def test_every_room(simt, room, dtype, shared_bytes):
    shared_bytes(room, dtype)
    C = mixed_batch(dtype, 40, 33)[[0, 1, 3, 4, 5, 6]]
    raw = svd((simt, C.device), C)
    assert_svd(C, raw)
    assert raw.notes.tolist() == [0, Note.ZERO, 0, 0, 0, 0]


@dtypes
def test_only_panels_pair_columns_otherwise(simt, dtype, shared_bytes):
    C, found = normal(1, 40, 33, dtype=dtype), {}
    for room in ROOMS:
        shared_bytes(room, dtype)
        found[room] = svd((simt, C.device), C)
    assert same_answer(found["half"], found["all"])
    assert same_answer(found["half"], found["whole"])
    assert not same_answer(found["half"], found["panels"])


@pytest.mark.parametrize(
    ("p", "q", "dtype", "room", "names"),
    [(37, 34, DTYPES[0], "half", SAMPLE), (33, 34, DTYPES[1], "panels", SAMPLE[::4])],
)
def test_generators(simt, p, q, dtype, room, names, shared_bytes):
    shared_bytes(room, dtype)
    C = gallery(p, q, 3, dtype, names)[1]
    assert_svd(C, svd((simt, C.device), C))


@pytest.mark.full
@dtypes
@rooms
@pytest.mark.parametrize(("p", "q"), [(40, 37), (33, 45), (70, 33)])
def test_all_generators(simt, p, q, room, dtype, shared_bytes):
    shared_bytes(room, dtype)
    C = gallery(p, q, 5, dtype, GALLERY)[1]
    assert_svd(C, svd((simt, C.device), C))


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize(("p", "q"), [(40, 37), (33, 45), (70, 33), (128, 128), (97, 210), (260, 250)])
def test_all_generators_on_a_gpu(cuda, p, q, dtype):
    C = gallery(p, q, 5, dtype, GALLERY)[1]
    assert_svd(C, svd(cuda, C))


@pytest.mark.parametrize(("dtype", "room"), [(DTYPES[0], "half"), (DTYPES[1], "panels")])
def test_dependent_columns_end(simt, room, dtype, shared_bytes):
    """Where every column is a multiple of one vector, so are the rounding errors that rotations leave, sweep after sweep."""
    shared_bytes(room, dtype)
    ramp = torch.arange(1, 35, dtype=dtype)
    whole = torch.randint(-9, 10, (2, 34), generator=torch.Generator().manual_seed(3)).to(dtype)
    C = torch.cat([ramp[:, None] * whole[:, None], (ramp[:, None] * (ramp - 2.5))[None], torch.ones(1, 34, 34)])
    raw = svd((simt, C.device), C, max_sweeps=9)
    assert_svd(C, raw)
    assert (raw.S[:, 1:] <= 4 * 34**0.5 * roundoff(dtype) * raw.S[:, :1]).all()


@dtypes
def test_pivoting_keeps_sweeps_few(cuda, dtype):
    """Rising columns take fifteen sweeps and more as they stand."""
    C = normal(1, 34, 34) * torch.logspace(-6, 0, 34, dtype=torch.float64)
    raw = svd(cuda, C.to(dtype), max_sweeps=8)
    assert not raw.info.any()


@dtypes
def test_what_products_would_lose_is_flushed(cuda, dtype):
    C = normal(1, 35, 34)
    C[:, :, 20:] *= 2.0 ** (-62 if dtype == torch.float32 else -500)
    raw = svd(cuda, C.to(dtype))
    assert_svd(C.to(dtype), raw)
    assert (raw.S[:, :20] > 0).all()
    assert not raw.S[:, 20:].any()


@pytest.mark.parametrize("room", ["half", "panels"])
@pytest.mark.parametrize("transposed", [False, True])
def test_relative_accuracy_of_every_value_under_column_scaling(simt, room, transposed, shared_bytes):
    shared_bytes(room, torch.float64)
    X, d = normal(40, 33, seed=7), torch.logspace(0, -12, 33, dtype=torch.float64)
    C = X * d[torch.randperm(33, generator=torch.Generator().manual_seed(1))]
    S = svd((simt, C.device), (C.mT if transposed else C)[None]).S[0]
    with mpmath.workdps(40):
        exact = mpmath.svd_r(mpmath.matrix(C.tolist()), compute_uv=False)
        worst = max(abs(mpmath.mpf(s) - e) / e for s, e in zip(S.tolist(), exact, strict=True))
    assert worst <= 30 * roundoff(torch.float64) * float(torch.linalg.cond(X))


@dtypes
@pytest.mark.parametrize(("p", "q"), [(40, 33), (33, 45)])
def test_the_whole_range(cuda, p, q, dtype):
    limits = torch.finfo(dtype)
    least = limits.smallest_normal
    sizes = (limits.max / 256, least * 16, least / 8, least * limits.eps)
    C = torch.stack([normal(p, q).clamp(-2, 2).round(decimals=3) * size for size in sizes]).to(dtype)
    assert_svd(C, svd(cuda, C))


@dtypes
@pytest.mark.parametrize(("p", "q"), [(40, 33), (33, 45)])
def test_powers_of_two_are_exact(cuda, p, q, dtype):
    C = normal(1, p, q, dtype=dtype)
    one = svd(cuda, C)
    for j in (-60, 61):
        other = svd(cuda, C * 2.0**j)
        assert same_answer(other, one._replace(S=one.S * 2.0**j))


@dtypes
@pytest.mark.parametrize(("p", "q"), [(40, 33), (33, 45)])
def test_a_zero_matrix_answers_unit_vectors(cuda, p, q, dtype):
    raw = svd(cuda, torch.zeros(1, p, q, dtype=dtype))
    k = min(p, q)
    assert torch.equal(raw.U[0], torch.eye(p, k, dtype=dtype))
    assert torch.equal(raw.Vh[0], torch.eye(k, q, dtype=dtype))
    assert not raw.S.any()
    assert raw.notes.tolist() == [Note.ZERO]
    assert raw.info.tolist() == [0]


def test_values_that_leave_the_range_are_reported(cuda):
    C = torch.full((2, 40, 33), 3e38)
    C[1] = 1
    raw = svd(cuda, C)
    assert raw.info.tolist() == [Info.OVERFLOW, 0]
    assert raw.S[0, 0] == torch.inf
    assert raw.U.isfinite().all()


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("p", "q"), [(40, 33), (33, 45)])
def test_a_bad_matrix_harms_no_neighbour(cuda, p, q, bad, dtype):
    C = normal(4, p, q, dtype=dtype)
    clean = svd(cuda, C)
    C[1, -1, 0] = bad
    C[3] = bad
    raw = svd(cuda, C)
    assert raw.info.tolist() == [0, Info.NONFINITE, 0, Info.NONFINITE]
    assert not raw.notes.any()
    assert same_answer(some(raw, slice(0, None, 2)), some(clean, slice(0, None, 2)))
    assert all(field[1::2].isnan().all() for field in raw[:3])


@pytest.mark.parametrize(("dtype", "room"), [(DTYPES[0], "half"), (DTYPES[1], "panels")])
def test_sweep_guard(simt, room, dtype, shared_bytes):
    shared_bytes(room, dtype)
    C = normal(3, 40, 33, dtype=dtype)
    C[1] = torch.eye(40, 33)
    raw = svd((simt, C.device), C, max_sweeps=1)
    assert raw.info.tolist() == [Info.NOT_CONVERGED, 0, Info.NOT_CONVERGED]
    assert all(field.isfinite().all() for field in raw[:3])


@pytest.mark.parametrize(("dtype", "room"), [(DTYPES[1], "half"), (DTYPES[0], "panels")])
def test_a_matrix_alone_and_at_any_slot(simt, room, dtype, shared_bytes):
    shared_bytes(room, dtype)
    C = mixed_batch(dtype, 40, 33)[[0, 1, 4, 5]]
    whole = svd((simt, C.device), C)
    order = torch.randperm(len(C), generator=torch.Generator().manual_seed(5))
    assert same_answer(svd((simt, C.device), C[order]), some(whole, order))
    for i in range(len(C)):
        assert same_answer(svd((simt, C.device), C[i : i + 1]), some(whole, slice(i, i + 1)))


def test_larger_neighbours_change_nothing(cuda):
    """Nor does whoever shares the launch, and so decides how many threads a block has."""
    groups = [normal(1, *shape, seed=shape[0]) for shape in ((33, 34), (64, 63), (3, 33), (5, 4), (35, 5))]
    for C, raw in zip(groups, svd(cuda, *groups), strict=True):
        assert same_answer(raw, svd(cuda, C))


@pytest.mark.gpu
@dtypes
def test_many_of_many_sizes_on_a_gpu(cuda, dtype):
    groups = [normal(300, *shape, dtype=dtype, seed=shape[0]) for shape in ((40, 33), (64, 64), (128, 128), (200, 190))]
    for C, raw in zip(groups, svd(cuda, *groups), strict=True):
        assert not raw.info.any()
        picked = slice(0, None, 97)
        assert_svd(C[picked], some(raw, picked))
        assert same_answer(some(raw, slice(7, 8)), svd(cuda, C[7:8]))


@rooms_by_turns
def test_neither_memory_nor_schedule_matter(simt, room, dtype, shared_bytes, poisoned_empty, monkeypatch):
    shared_bytes(room, dtype)
    cuda, C = (simt, torch.device("cpu")), mixed_batch(dtype, 40, 33)[[4, 6]]
    poisoned = svd(cuda, C)
    for schedule in SCHEDULES[1:3]:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        assert same_answer(svd(cuda, C), poisoned)
    torch.empty = torch.zeros  # undone by the fixture
    assert same_answer(svd(cuda, C), poisoned)


@dtypes
@pytest.mark.parametrize(("p", "q"), [(40, 33), (33, 45)])
def test_strides(cuda, p, q, dtype):
    C = normal(2, p, q, dtype=dtype)
    before, whole = C.clone(), svd(cuda, C)
    for view in (
        offset(C),
        strided(C),
        turned(C),
        turned(strided(C)),
        C.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    ):
        assert same_answer(svd(cuda, view), whole)
    assert torch.equal(C, before)


@pytest.mark.parametrize("room", ["half", "panels"])
def test_nothing_is_written_beside_the_answers(simt, room, shared_bytes, monkeypatch):
    shared_bytes(room, torch.float64)
    guards = Guards(monkeypatch, simt.library)
    C = mixed_batch(torch.float64, 33, 36)[[0, 1, 6]]
    assert_svd(C, svd((simt, C.device), C))
    assert guards.hold()
