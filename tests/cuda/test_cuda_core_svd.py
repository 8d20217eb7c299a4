"""core_svd of the CUDA library up to 32 x 32: values on ordinary and pathological matrices, and its promises about bits."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.testing import GALLERY, SAMPLE, check_svd, gallery, roundoff

DTYPES = (torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
# One of every kernel: a thread to a matrix, a part of a warp, a warp.
SHAPES = [(2, 2), (5, 4), (6, 3), (3, 8), (7, 7), (13, 11), (9, 16), (31, 29), (17, 32)]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def svd(cuda, *groups, **options):
    """Results on the CPU: one, or a list for several groups."""
    backend, device = cuda
    raws = backend.core_svd([C.to(device) for C in groups], **options)
    found = [type(raw)(*(field.cpu() for field in raw)) for raw in raws]
    return found[0] if len(groups) == 1 else found


def assert_svd(C, raw):
    for i, checks in enumerate(check_svd(C, raw)):
        for check in checks:
            assert check.value <= check.limit, (i, check)


def bits(raw, rows=slice(None)):
    return [field[rows].contiguous().view(torch.uint8).numpy().tobytes() for field in raw]


def mixed_batch(dtype, p, q):
    """Easy, hard, zero, huge, tiny and deficient matrices side by side."""
    C = normal(12, p, q, dtype=dtype, seed=11)
    C[3] = 0
    C[5] *= 1e30
    C[6] *= 1e-30
    C[7, :, -1] = C[7, :, 0]
    C[8] *= 10.0 ** -torch.arange(q)
    C[9, :, 1:] = 0
    C[10] = torch.eye(p, q)
    return C


@dtypes
@pytest.mark.parametrize("r", [*range(1, 18), 23, 24, 25, 31, 32])
def test_every_size(cuda, r, dtype):
    groups = [normal(2, p, q, dtype=dtype, seed=r) for p, q in ((r, r), (r, (r + 1) // 2), ((r + 2) // 3, r))]
    for C, raw in zip(groups, svd(cuda, *groups), strict=True):
        assert_svd(C, raw)


@dtypes
@pytest.mark.parametrize(("p", "q"), [(8, 6), (7, 8), (16, 13), (29, 32)])
def test_generators(cuda, p, q, dtype):
    C = torch.cat([gallery(p, q, 3, dtype, SAMPLE)[1], -gallery(p, q, 4, dtype, SAMPLE[:8])[1]])
    raw = svd(cuda, C)
    assert_svd(C, raw)
    assert torch.equal(raw.notes == Note.ZERO, (C == 0).all((1, 2)).cpu())


@pytest.mark.full
@dtypes
@pytest.mark.parametrize(("p", "q"), [(2, 3), (4, 4), (6, 5), (5, 7), (8, 8), (11, 16), (24, 17), (32, 32)])
def test_all_generators(cuda, p, q, dtype):
    C = gallery(p, q, 5, dtype, GALLERY)[1]
    assert_svd(C, svd(cuda, C))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    p=st.integers(1, 20),
    q=st.integers(1, 20),
    data=st.lists(st.integers(-3, 3), min_size=400, max_size=400),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-60, 60),
)
def test_small_integers_many_ties(simt, p, q, data, dtype, exponent):
    """Integer matrices are full of exact ties, rank deficiency and zero columns."""
    C = torch.tensor(data[: p * q], dtype=dtype).reshape(1, p, q) * 2.0**exponent
    assert_svd(C, svd((simt, C.device), C))


@dtypes
@pytest.mark.parametrize("r", [*range(2, 10), 12, 16, 23, 32])
def test_dependent_columns_end(cuda, dtype, r):
    """Where every column is a multiple of one vector, so are the rounding errors that rotations leave, sweep after sweep."""
    ramp = torch.arange(1, r + 1, dtype=dtype)
    whole = torch.randint(-9, 10, (4, r), generator=torch.Generator().manual_seed(r)).to(dtype)
    C = torch.cat(
        [ramp[:, None] * whole[:, None], (ramp[:, None] * (ramp - 2.5))[None], torch.ones(1, r, r, dtype=dtype)]
    )
    raw = svd(cuda, C, max_sweeps=12)
    assert_svd(C, raw)
    assert (raw.S[:, 1:] <= 4 * r**0.5 * roundoff(dtype) * raw.S[:, :1]).all()


@dtypes
@pytest.mark.parametrize(("p", "q"), [(2, 2), (3, 2), (3, 3), (4, 4)])
def test_short_columns_come_to_rest(cuda, p, q, dtype):
    C = normal(20_000, p, q, dtype=dtype)
    assert not svd(cuda, C).info.any()
    assert not svd(cuda, C.round()).info.any()


@pytest.mark.parametrize(("p", "q"), [(6, 5), (8, 7), (16, 11)])
@pytest.mark.parametrize("transposed", [False, True])
def test_relative_accuracy_of_every_value_under_column_scaling(cuda, p, q, transposed):
    X, d = normal(2, p, q, seed=7), torch.logspace(0, -12, q, dtype=torch.float64)
    C = X * d[torch.randperm(q, generator=torch.Generator().manual_seed(1))]
    S = svd(cuda, C.mT if transposed else C).S
    with mpmath.workdps(50):
        for i in range(len(C)):
            exact = mpmath.svd_r(mpmath.matrix(C[i].tolist()), compute_uv=False)
            worst = max(abs(mpmath.mpf(s) - e) / e for s, e in zip(S[i].tolist(), exact, strict=True))
            assert worst <= 30 * roundoff(torch.float64) * float(torch.linalg.cond(X[i]))


@dtypes
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_the_whole_range(cuda, p, q, dtype):
    limits = torch.finfo(dtype)
    least = limits.smallest_normal
    sizes = (limits.max / 64, least * 16, least / 8, least * limits.eps)
    C = torch.stack([normal(p, q).clamp(-2, 2).round(decimals=3) * size for size in sizes]).to(dtype)
    assert_svd(C, svd(cuda, C))


@dtypes
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_powers_of_two_are_exact(cuda, p, q, dtype):
    C = normal(3, p, q, dtype=dtype)
    one = svd(cuda, C)
    for j in (-60, 61):
        other = svd(cuda, C * 2.0**j)
        assert bits([other.U, other.S, other.Vh]) == bits([one.U, one.S * 2.0**j, one.Vh])


@dtypes
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_a_zero_matrix_answers_unit_vectors(cuda, p, q, dtype):
    C, k = torch.zeros(2, p, q, dtype=dtype), min(p, q)
    C[1, 0, 0] = -0.0
    raw = svd(cuda, C)
    assert bits(raw) == bits(
        [
            torch.eye(p, k, dtype=dtype).expand(2, p, k),
            torch.zeros(2, k, dtype=dtype),
            torch.eye(k, q, dtype=dtype).expand(2, k, q),
            torch.zeros(2, dtype=torch.int32),
            torch.full((2,), int(Note.ZERO), dtype=torch.int32),
        ]
    )


@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_values_that_leave_the_range_are_reported(cuda, p, q):
    C = torch.full((2, p, q), 3e38)
    C[1] = 1
    raw = svd(cuda, C)
    assert raw.info.tolist() == [Info.OVERFLOW, 0]
    assert raw.S[0, 0] == torch.inf
    assert raw.U.isfinite().all()


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_a_bad_matrix_harms_no_neighbour(cuda, p, q, bad, dtype):
    C = normal(5, p, q, dtype=dtype)
    clean = svd(cuda, C)
    C[1, -1, 0] = bad
    C[3] = bad
    raw = svd(cuda, C)
    assert raw.info.tolist() == [0, Info.NONFINITE, 0, Info.NONFINITE, 0]
    assert not raw.notes.any()
    assert bits(raw, slice(0, None, 2)) == bits(clean, slice(0, None, 2))
    assert all(field[1::2].isnan().all() for field in raw[:3])


@dtypes
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_sweep_guard(cuda, p, q, dtype):
    C = normal(5, p, q, dtype=dtype)
    C[2] = torch.eye(p, q)
    raw = svd(cuda, C, max_sweeps=1)
    assert raw.info.tolist() == [Info.NOT_CONVERGED] * 2 + [0] + [Info.NOT_CONVERGED] * 2
    assert all(field.isfinite().all() for field in raw[:3])


@dtypes
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_a_matrix_alone_and_at_any_slot(cuda, p, q, dtype):
    C = mixed_batch(dtype, p, q)
    whole = svd(cuda, C)
    assert_svd(C, whole)
    for i in range(len(C)):
        assert bits(svd(cuda, C[i : i + 1])) == bits(whole, slice(i, i + 1))
    order = torch.randperm(len(C), generator=torch.Generator().manual_seed(5))
    assert bits(svd(cuda, C[order])) == bits(whole, order)


@dtypes
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_neither_memory_nor_schedule_nor_history_matter(simt, p, q, dtype, poisoned_empty, monkeypatch):
    cuda, C = (simt, torch.device("cpu")), mixed_batch(dtype, p, q)[::2]
    poisoned = bits(svd(cuda, C))
    for schedule in ("reverse", "7"):
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        assert bits(svd(cuda, C)) == poisoned
    torch.empty = torch.zeros  # undone by the fixture
    assert bits(svd(cuda, C)) == poisoned


VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(3, 2)[::2, ::2, ::3],
    "batch last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@dtypes
@pytest.mark.parametrize(("p", "q"), [(5, 3), (3, 8), (12, 7), (17, 20)])
def test_strides(cuda, p, q, dtype):
    C = normal(5, p, q, dtype=dtype)
    before, whole = C.clone(), bits(svd(cuda, C))
    views = [view(C) for view in VIEWS.values()]
    assert all(bits(raw) == whole for raw in svd(cuda, *views))
    one = svd(cuda, C[:1].expand(5, p, q), C[:1].repeat(5, 1, 1))
    assert bits(one[0]) == bits(one[1])
    assert torch.equal(C, before)


def test_groups_of_all_sizes_in_one_call(cuda):
    shapes = [
        (3, 5, 7),
        (0, 2, 2),
        (130, 3, 3),
        (21, 8, 8),
        (1, 32, 1),
        (9, 16, 16),
        (2, 31, 32),
        (70, 1, 1),
        (2, 40, 37),
    ]
    groups = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes) for dtype in DTYPES]
    raws = svd(cuda, *groups)
    for C, raw in zip(groups, raws, strict=True):
        assert bits(raw) == bits(svd(cuda, C))
        assert_svd(C, raw)


@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 3), (4, 3, 0), (0, 0, 0)])
def test_nothing_to_do(cuda, shape):
    raw = svd(cuda, torch.empty(shape))
    N, p, q = shape
    k = min(p, q)
    assert [tuple(field.shape) for field in raw] == [(N, p, k), (N, k), (N, k, q), (N,), (N,)]
    assert not raw.info.any()


@pytest.mark.gpu
@dtypes
def test_a_large_batch_on_a_gpu(cuda, dtype):
    C = normal(200_003, 8, 8, dtype=dtype)
    raw = svd(cuda, C)
    assert not raw.info.any()
    some = slice(0, None, 997)
    assert_svd(C[some], type(raw)(*(field[some] for field in raw)))


def test_long_columns_gather(cuda):
    """Where columns depend on others, the sweeps that are left to small ones stay few."""
    C = gallery(29, 32, 3, torch.float32, ["classic: duplicate columns"])[1]
    assert not svd(cuda, C, max_sweeps=11).info.any()
