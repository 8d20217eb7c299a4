"""core_svd of the cpu library: values on ordinary and pathological matrices, and its promises about bits."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.backends import cpu
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.testing import SPECTRA, prescribed, spectrum

BACKEND = cpu.BACKEND
pytestmark = pytest.mark.skipif(not BACKEND.available()[0], reason=BACKEND.available()[1])

DTYPES = (torch.float32, torch.float64)
SHAPES = (
    (1, 1),
    (1, 5),
    (5, 1),
    (2, 3),
    (4, 4),
    (7, 5),
    (5, 7),
    (13, 11),
    (16, 17),
    (31, 29),
    (32, 3),
    (3, 32),
    (32, 32),
    (33, 33),
    (33, 2),
    (3, 41),
    (64, 64),
    (47, 97),
    (97, 40),
    (130, 129),
)


def svd(C, **options):
    return BACKEND.core_svd([C], **options)[0]


def roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_svd(C, result, info=0):
    """Residual and orthogonality within 4 sqrt(R) u, everything in float64 and at a scale where squares are finite."""
    p, q = C.shape[-2:]
    k, limit = min(p, q), 4 * max(p, q) ** 0.5 * roundoff(result.S.dtype)
    assert result.U.shape == (*C.shape[:-1], k)
    assert result.S.shape == (C.shape[0], k)
    assert result.Vh.shape == (C.shape[0], k, q)
    assert result.U.dtype == result.S.dtype == result.Vh.dtype
    U, S, Vh = (t.double() for t in (result.U, result.S, result.Vh))
    assert torch.equal(result.info, torch.full_like(result.info, int(info)))
    assert (S >= 0).all()
    assert (S.diff(dim=1) <= 0).all()
    identity = torch.eye(k, dtype=torch.float64)
    assert (U.mT @ U - identity).abs().max() <= limit
    assert (Vh @ Vh.mT - identity).abs().max() <= limit
    top = C.double().abs().amax(dim=(1, 2), keepdim=True)
    scale = torch.where(top > 0, top, torch.ones_like(top))
    # A subnormal singular value is rounded to a multiple of the smallest number.
    grain = torch.finfo(result.S.dtype).smallest_normal * torch.finfo(result.S.dtype).eps
    C1, S1 = C.double() / scale, S[:, None] / scale
    residual = (C1 - (U * S1) @ Vh).flatten(1).norm(dim=1)
    assert (residual <= limit * C1.flatten(1).norm(dim=1) + k * (grain / scale).flatten()).all()


def bits(result):
    return [t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in result]


def same_bits(a, b):
    return bits(a) == bits(b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_random(p, q, dtype):
    C = normal(37, p, q, dtype=dtype)
    result = svd(C)
    assert_svd(C, result)
    expected = torch.linalg.svdvals(C.double())
    assert ((result.S - expected).abs() <= 4 * max(p, q) ** 0.5 * roundoff(dtype) * expected[:, :1]).all()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(1, 32),
    st.integers(1, 32),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.integers(-30, 30),
    st.integers(0, 12),
    st.integers(0, 2**31),
)
def test_any_shape_and_grading(p, q, batch, dtype, exponent, decades, seed):
    C = normal(batch, p, q, seed=seed) * torch.logspace(0, -decades, q, dtype=torch.float64) * 2.0**exponent
    assert_svd(C.to(dtype), svd(C.to(dtype)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(33, 140),
    st.integers(1, 140),
    st.sampled_from(DTYPES),
    st.integers(-30, 30),
    st.integers(0, 12),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_larger_shape_and_grading(p, q, dtype, exponent, decades, transposed, seed):
    C = (normal(2, p, q, seed=seed) * torch.logspace(0, -decades, q, dtype=torch.float64) * 2.0**exponent).to(dtype)
    C = C.mT if transposed else C
    assert_svd(C, svd(C))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest(dtype):
    C = normal(1, 512, 512, dtype=dtype)
    assert_svd(C, svd(C))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("p", "q"), [(33, 33), (64, 47), (97, 97), (37, 128)])
def test_larger_prescribed_spectra(name, p, q, dtype):
    C = torch.stack([prescribed(p, q, spectrum(name, min(p, q), cond), 5, dtype) for cond in (10, 1e6, 1e14)])
    result = svd(C)
    assert_svd(C, result)
    exact = torch.linalg.svdvals(C.double())
    assert ((result.S - exact).abs() <= 4 * max(p, q) ** 0.5 * roundoff(dtype) * exact[:, :1]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_answer_in_float32(dtype):
    C = normal(5, 9, 6, dtype=dtype)
    result = svd(C)
    assert result.S.dtype == torch.float32
    assert_svd(C, result)


def kahan(n, theta=1.2):
    K = np.triu(-np.cos(theta) * np.ones((n, n)), 1) + np.eye(n)
    return np.sin(theta) ** np.arange(n)[:, None] * K


def hadamard(n):
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H


def pathological(dtype):
    """Name -> matrix (numpy float64), exactly representable or rounded to ``dtype``."""
    rng, tiny = np.random.default_rng(3), torch.finfo(dtype).smallest_normal
    huge = 1e38 if dtype == torch.float32 else 1e307
    A = rng.standard_normal((13, 11))
    i, j = np.indices((17, 15))
    x = np.linspace(-1, 1, 19)
    return {
        "zero": np.zeros((7, 5)),
        "minus zero": np.full((5, 7), -0.0),
        "identity": np.eye(9, 7),
        "ones": np.ones((16, 13)),
        "jordan": np.eye(11) + np.eye(11, k=1),
        "hadamard": hadamard(32),
        "kahan": kahan(29),
        "hilbert": 1 / (i + j + 1.0),
        "vandermonde": np.vander(x, 12),
        "laeuchli": np.vstack([np.ones(10), 1e-4 * np.eye(10)]),
        "laeuchli below roundoff": np.vstack([np.ones(10), 1e-9 * np.eye(10)]),
        "identical columns": np.repeat(A[:, :1], 9, axis=1),
        "negated columns": np.hstack([A, -A]),
        "a zero column": A * (np.arange(11) != 4),
        "a zero row": A * (np.arange(13) != 6)[:, None],
        "half rank": rng.standard_normal((32, 16)) @ rng.standard_normal((16, 31)),
        "rank one": np.outer(A[:, 0], A[0]),
        "fourfold values": np.linalg.qr(A)[0] @ np.diag(np.repeat([4.0, 2, 1], 4)[:11]) @ np.linalg.qr(A.T @ A)[0].T,
        "values 1 and 1 + 10u": np.diag(1 + 10 * roundoff(dtype) * np.arange(8)),
        "orthogonal": np.linalg.qr(rng.standard_normal((23, 23)))[0],
        "graded columns": A * 10.0 ** -np.linspace(0, 12, 11),
        "graded rows": A * 10.0 ** -np.linspace(0, 12, 13)[:, None],
        "columns 1e+-30": A * np.where(np.arange(11) % 2, 1e30, 1e-30),
        "huge": A / abs(A).max() * huge * 0.1,
        "near underflow": A * tiny * 4,
        "subnormal": A * tiny * 0.01,
        "one subnormal": np.eye(3, 4) * tiny * torch.finfo(dtype).eps,
        "one element": np.array([[-3.0]]),
        "column": A[:, :1],
        "row": A[:1],
        "2x2 rotation": np.array([[0.6, -0.8], [0.8, 0.6]]),
        "2x2 nearly parallel": np.array([[1.0, 1.0], [0.0, 1e-7]]),
        "largest half": np.full((3, 2), 65504.0),
    } | larger_pathological(rng, tiny, huge)


def larger_pathological(rng, tiny, huge):
    A = rng.standard_normal((61, 53))
    return {
        "larger identity": np.eye(70, 50),
        "larger ones": np.ones((64, 50)),
        "larger jordan": np.eye(67) + np.eye(67, k=1),
        "larger hadamard": hadamard(64),
        "larger kahan": kahan(90),
        "larger laeuchli": np.vstack([np.ones(60), 1e-9 * np.eye(60)]),
        "larger identical columns": np.repeat(A[:, :1], 40, axis=1),
        "larger negated columns": np.hstack([A, -A]),
        "larger missing columns": A * (np.arange(53) % 3 == 0),
        "larger missing rows": A * (np.arange(61) % 5 == 0)[:, None],
        "larger half rank": rng.standard_normal((96, 40)) @ rng.standard_normal((40, 80)),
        "larger rank one": np.outer(A[:, 0], A[0]),
        "larger graded columns": A * 10.0 ** -np.linspace(0, 12, 53),
        "larger graded rows": A * 10.0 ** -np.linspace(0, 12, 61)[:, None],
        "larger columns 1e+-30": A * np.where(np.arange(53) % 2, 1e30, 1e-30),
        "larger huge": A / abs(A).max() * huge * 0.05,
        "larger near underflow": A * tiny * 4,
        "larger subnormal": A * tiny * 0.01,
        "one column of many": A[:, :1],
        "one element of many": np.eye(61, 53) * (np.arange(61) == 7)[:, None],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", pathological(torch.float64))
def test_pathological(name, dtype):
    C = torch.from_numpy(pathological(dtype)[name]).to(dtype)
    batch = torch.stack([C, normal(*C.shape, dtype=dtype), C])
    for matrices in (batch, batch.mT):
        result = svd(matrices)
        assert_svd(matrices, result)
        assert bool(result.notes[0] & Note.ZERO) == (not C.any())
        assert not result.notes[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(7, 5), (70, 50), (50, 70)])
def test_a_zero_matrix_answers_unit_vectors(p, q, dtype):
    result = svd(torch.zeros(3, p, q, dtype=dtype))
    k = min(p, q)
    assert torch.equal(result.U, torch.eye(p, k, dtype=dtype).expand(3, p, k))
    assert torch.equal(result.Vh, torch.eye(k, q, dtype=dtype).expand(3, k, q))
    assert (result.notes == Note.ZERO).all()


def test_values_that_leave_the_range_are_reported():
    check_overflow(torch.full((2, 32, 31), 3e38))
    check_overflow(torch.full((2, 40, 47), 3e38))


def check_overflow(C):
    C[1] = 1
    result = svd(C)
    assert result.info.tolist() == [Info.OVERFLOW, 0]
    assert result.S[0, 0] == torch.inf
    assert result.U.isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("batch", "p", "q"), [(4, 12, 9), (1, 40, 33)])
def test_relative_accuracy_of_every_value_under_column_scaling(batch, p, q, transposed):
    X, d = normal(batch, p, q, seed=7), torch.logspace(0, -12, q, dtype=torch.float64)
    C = X * d[torch.randperm(q, generator=torch.Generator().manual_seed(1))]
    S = svd(C.mT if transposed else C).S
    with mpmath.workdps(50):
        for i in range(batch):
            exact = mpmath.svd_r(mpmath.matrix(C[i].tolist()), compute_uv=False)
            kappa = float(torch.linalg.cond(X[i]))
            worst = max(abs(mpmath.mpf(s) - e) / e for s, e in zip(S[i].tolist(), exact, strict=True))
            assert worst <= 30 * roundoff(torch.float64) * kappa


@pytest.mark.parametrize(("p", "q"), [(16, 11), (64, 48)])
def test_relative_accuracy_in_float32(p, q):
    X = normal(32, p, q, dtype=torch.float32)
    C = X * 2.0 ** -(torch.arange(q) * 22 // q)
    exact = torch.linalg.svdvals(C.double())
    kappa = torch.linalg.cond(X.double())[:, None]
    assert ((svd(C).S.double() - exact).abs() / exact <= 30 * roundoff(torch.float32) * kappa).all()


@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_sizes(batch, dtype):
    C = normal(batch, 6, 4, dtype=dtype)
    assert_svd(C, svd(C))


def test_a_large_batch():
    C = normal(65537, 3, 2, dtype=torch.float32)
    assert_svd(C, svd(C))


def test_outputs_on_huge_pages():
    C = normal(5000, 16, 12)
    whole = svd(C)
    assert same_bits(whole, [torch.cat(parts) for parts in zip(*(svd(part) for part in C.split(1000)), strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(2, 2), (3, 2), (3, 3), (4, 4)])
def test_short_columns_come_to_rest(p, q, dtype):
    C = normal(100_000, p, q, dtype=dtype)
    assert not svd(C).info.any()
    assert not svd(C.round()).info.any()


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(2, 2), (2, 5), (3, 3), (6, 5)])
def test_millions_come_to_rest(p, q, dtype):
    for seed in range(5):
        C = normal(400_000, p, q, dtype=dtype, seed=seed)
        assert not svd(C).info.any()
        assert not svd((C * 2).round()).info.any()


@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 3), (4, 3, 0), (0, 0, 0), (2, 0, 0)])
def test_nothing_to_do(shape):
    result = svd(torch.empty(shape))
    N, p, q = shape
    k = min(p, q)
    assert [tuple(t.shape) for t in result] == [(N, p, k), (N, k), (N, k, q), (N,), (N,)]
    assert not result.info.any()


def test_several_groups_at_once():
    groups = [
        normal(3, 5, 7),
        normal(0, 2, 2),
        normal(21, 8, 8, dtype=torch.float32),
        normal(1, 32, 1),
        normal(2, 40, 51),
    ]
    results = BACKEND.core_svd(groups)
    assert all(same_bits(result, svd(C)) for C, result in zip(groups, results, strict=True))
    assert BACKEND.core_svd([]) == []


VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(3, 2)[::2, ::2, ::3],
    "batch last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "a copy from numpy": lambda t: torch.from_numpy(t.numpy().copy()),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "p", "q"), [(19, 7, 5), (3, 37, 50)])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, batch, p, q, dtype):
    C = normal(batch, p, q, dtype=dtype)
    assert same_bits(svd(VIEWS[view](C)), svd(C))


def test_expanded():
    one, row = normal(1, 7, 5), normal(6, 1, 5)
    assert same_bits(svd(one.expand(6, 7, 5)), svd(one.repeat(6, 1, 1)))
    assert same_bits(svd(row.expand(6, 7, 5)), svd(row.repeat(1, 7, 1)))


def test_inputs_are_not_modified():
    C = normal(5, 7, 5)
    before = C.clone()
    svd(C)
    assert torch.equal(C, before)


def mixed_batch(dtype, p=9, q=7):
    """Easy, hard, zero, huge, tiny and deficient matrices side by side."""
    C = normal(40, p, q, dtype=dtype, seed=11)
    C[3] = 0
    C[5] *= 1e30
    C[6] *= 1e-30
    C[7, :, 1] = C[7, :, 0]
    C[8] *= 10.0 ** -torch.arange(q)
    C[9, :, 2:] = 0
    C[10] = torch.eye(p, q)
    C[11, 2, 3] = -0.0
    return C


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(9, 7), (7, 9), (20, 19), (39, 34), (34, 47)])
def test_a_matrix_alone_and_at_any_slot(p, q, dtype):
    C = mixed_batch(dtype, p, q)
    whole = svd(C)
    for i in range(len(C)):
        assert same_bits(svd(C[i : i + 1]), [t[i : i + 1] for t in whole])
    order = torch.randperm(len(C), generator=torch.Generator().manual_seed(5))
    assert same_bits(svd(C[order]), [t[order] for t in whole])


def test_determinism():
    C = mixed_batch(torch.float32)
    assert all(same_bits(svd(C), svd(C)) for _ in range(20))


@pytest.mark.parametrize(("p", "q", "copies"), [(9, 7, 5), (41, 38, 1)])
def test_threads_do_not_matter(p, q, copies, monkeypatch):
    C = torch.cat([mixed_batch(torch.float64, p, q)] * copies)
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
        results.append(svd(C))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize(("p", "q"), [(9, 7), (41, 38)])
def test_call_history_does_not_matter(p, q):
    C = mixed_batch(torch.float32, p, q)
    fresh = svd(C)
    for shape in ((3, 32, 32), (70, 2, 5), (1, 1, 1), (17, 16, 16), (1, 64, 90)):
        svd(normal(*shape) * 1e20)
    assert same_bits(svd(C), fresh)


@pytest.mark.parametrize(("p", "q"), [(9, 7), (41, 38), (35, 66)])
def test_poisoned_memory(p, q, poisoned_empty):
    C = mixed_batch(torch.float64, p, q)
    poisoned = svd(C)
    torch.empty = torch.zeros  # undone by the fixture
    assert same_bits(svd(C), poisoned)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(6, 5), (35, 34)])
def test_a_bad_matrix_harms_only_itself(p, q, bad, dtype):
    C = normal(21, p, q, dtype=dtype)
    clean = svd(C)
    C[4, 2, 3] = bad
    C[20] = bad
    result = svd(C)
    assert [i for i in range(21) if result.info[i] == Info.NONFINITE] == [4, 20]
    for t in (result.U, result.S, result.Vh):
        assert t[[4, 20]].isnan().all()
    good = [i for i in range(21) if i not in (4, 20)]
    assert same_bits([t[good] for t in result], [t[good] for t in clean])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(8, 7), (50, 41)])
def test_sweep_guard(p, q, dtype):
    C = normal(9, p, q, dtype=dtype) * torch.logspace(
        0, -2, q, dtype=dtype
    )  # graded, so that larger ones are swept too
    C[2] = torch.eye(p, q)
    result = svd(C, max_sweeps=1)
    assert (result.info == torch.where(torch.arange(9) == 2, 0, int(Info.NOT_CONVERGED))).all()
    assert all(t.isfinite().all() for t in (result.U, result.S, result.Vh))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "p", "q"), [(400, 33, 33), (200, 64, 64), (50, 47, 90), (20, 128, 128), (1, 300, 257)]
)
def test_matrices_of_even_columns_need_no_sweeps(batch, p, q, dtype):
    C = normal(batch, p, q, dtype=dtype, seed=3)
    assert not svd(C, max_sweeps=1).info.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_uneven_columns_are_swept(dtype):
    C = normal(3, 50, 41, dtype=dtype) * torch.logspace(0, -2, 41, dtype=dtype)
    assert (svd(C, max_sweeps=1).info == Info.NOT_CONVERGED).all()
    assert (svd(C.mT, max_sweeps=1).info == Info.NOT_CONVERGED).all()


def test_clustered_values_are_swept():
    values = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64).repeat_interleave(11)[:41]
    C = prescribed(50, 41, values, 2, torch.float64)[None]
    assert (svd(C, max_sweeps=1).info == Info.NOT_CONVERGED).all()
    assert_svd(C, svd(C))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", range(2, 34))
def test_dependent_columns_end(dtype, r):
    """Where every column is a multiple of one vector, so are the rounding errors that rotations leave, sweep after sweep."""
    ramp = torch.arange(1, r + 1, dtype=dtype)
    whole = torch.randint(-9, 10, (24, r), generator=torch.Generator().manual_seed(r)).to(dtype)
    C = torch.cat(
        [ramp[:, None] * whole[:, None], (ramp[:, None] * (ramp - 2.5))[None], torch.ones(1, r, r, dtype=dtype)]
    )
    result = svd(C, max_sweeps=12)
    assert_svd(C, result)
    assert (result.S[:, 1:] <= 4 * r**0.5 * roundoff(dtype) * result.S[:, :1]).all()
