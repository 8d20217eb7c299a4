"""`core_svd` of every backend: prescribed spectra, classics, extreme ranges, nothing, NaN."""

import numpy as np
import pytest
import torch
from frames import DTYPES, dtype_id, every_backend, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels import backends as registry
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.testing import CLASSICS, SPECTRA, assert_close, prescribed, roundoff, spectrum, tolerance

backends = every_backend("core_svd")
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (5, 5), (13, 11), (17, 31), (32, 29), (67, 53)]
WORKING = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def svd(backend, *groups):
    p, q = (max(group.shape[i] for group in groups) for i in (-2, -1))
    return backend(list(groups), dtype=groups[0].dtype, p=p, q=q, N=max(group.shape[0] for group in groups))


def limit_of(backend, dtype, size):
    """4 sqrt(R) u; LAPACK's divide and conquer stops at about 90 u in the type that it computes in."""
    lapack = backend.name in ("torch", "reference") and dtype == torch.float64
    return tolerance("lapack" if lapack else "core", dtype=dtype, size=size)


def assert_svd(backend, C, raw):
    """Residual, orthogonality, order and info of a group; judged in float64 at a scale where squares are finite."""
    dtype = WORKING.get(C.dtype, C.dtype)
    N, p, q = C.shape
    k = min(p, q)
    limit = limit_of(backend, dtype, max(p, q, 1))
    assert (raw.U.shape, raw.S.shape, raw.Vh.shape) == ((N, p, k), (N, k), (N, k, q))
    assert raw.U.dtype == raw.S.dtype == raw.Vh.dtype == dtype
    assert (raw.info.dtype, raw.notes.dtype) == (torch.int32, torch.int32)
    assert not raw.info.any()
    assert (raw.S >= 0).all()
    assert (raw.S.diff(dim=-1) <= 0).all()
    U, S, Vh, C = raw.U.double(), raw.S.double(), raw.Vh.double(), C.double()
    eye = torch.eye(k, dtype=torch.float64)
    assert (U.mT @ U - eye).abs().max() <= limit
    assert (Vh @ Vh.mT - eye).abs().max() <= limit
    size = C.abs().amax((-2, -1)).clamp_min(torch.finfo(torch.float64).smallest_normal)
    S, C = S / size[:, None], C / size[:, None, None]
    residual = torch.linalg.matrix_norm(C - U * S[:, None, :] @ Vh)
    lost = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / size  # S itself may be subnormal
    assert (residual <= limit * torch.linalg.matrix_norm(C) + lost * k).all()


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectra(backend, name, dtype):
    p, q = 29, 23
    for cond in (1e2, 1e6, 1e12):
        values = spectrum(name, 23, cond)
        C = torch.stack([prescribed(p, q, values, seed, dtype) for seed in (1, 2)])
        raw = svd(backend, C)[0]
        assert_svd(backend, C, raw)
        exact = torch.linalg.svdvals(C.double())
        assert_close(raw.S, exact, limit_of(backend, WORKING.get(dtype, dtype), 29))


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("shape", [(13, 11), (16, 16), (19, 32)])
@pytest.mark.parametrize("name", CLASSICS)
def test_classics(backend, name, shape, dtype):
    for C in (CLASSICS[name](*shape), -CLASSICS[name](*shape)):
        assert_svd(backend, C.to(dtype)[None], svd(backend, C.to(dtype)[None])[0])


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, dtype):
    C = prescribed(*shape, spectrum("geometric", min(shape)), 3, dtype)[None]
    assert_svd(backend, C, svd(backend, C)[0])


@pytest.mark.full
@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", SPECTRA)
def test_all_shapes_and_spectra(backend, name, dtype):
    for p in (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 127):
        for q in (1, 2, 5, 8, 17, 32, 61):
            C = torch.stack([prescribed(p, q, spectrum(name, min(p, q), cond), 5, dtype) for cond in (10, 1e8)])
            assert_svd(backend, C, svd(backend, C)[0])


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("where", ["huge", "tiny", "subnormal"])
def test_the_whole_range(backend, where, dtype):
    limits = torch.finfo(dtype)
    factor = {"huge": limits.max / 16, "tiny": limits.smallest_normal * 16, "subnormal": limits.smallest_normal / 8}[
        where
    ]
    C = (prescribed(13, 11, spectrum("rand", 11), 1) * factor).to(dtype)[None]
    assert_svd(backend, C, svd(backend, C)[0])


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_powers_of_two_are_exact(backend, dtype):
    C = prescribed(13, 11, spectrum("geometric", 11), 1, dtype)[None]
    one = svd(backend, C)[0]
    for j in (-60, 60):
        other = svd(backend, C * 2.0**j)[0]
        assert same_bits(one.U, other.U)
        assert same_bits(one.S * 2.0**j, other.S)
        assert same_bits(one.Vh, other.Vh)


@backends
def test_a_zero_matrix_has_identity_columns(backend):
    for p, q in ((5, 3), (3, 5)):
        C = torch.zeros(2, p, q)
        C[1, 0, 0] = -0.0
        raw = svd(backend, C)[0]
        assert not raw.S.any()
        assert torch.equal(raw.U, torch.eye(p, 3).expand(2, p, 3))
        assert torch.equal(raw.Vh, torch.eye(3, q).expand(2, 3, q))
        assert (raw.notes & Note.ZERO).all()


@backends
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_nothing(backend, shape):
    N, p, q = shape
    raw = svd(backend, torch.ones(shape))[0]
    assert (raw.U.shape, raw.S.shape, raw.Vh.shape) == ((N, p, min(p, q)), (N, min(p, q)), (N, min(p, q), q))
    assert raw.info.tolist() == [0] * N


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_matrix_harms_no_neighbour(backend, value, dtype):
    C = torch.stack([prescribed(13, 11, spectrum("rand", 11, seed=i), i, dtype) for i in range(4)])
    clean = svd(backend, C)[0]
    C[1, 4, 5] = value
    C[3] = value
    raw = svd(backend, C)[0]
    assert raw.info.tolist() == [0, Info.NONFINITE, 0, Info.NONFINITE]
    for before, after in zip(clean, raw, strict=True):
        assert same_bits(before[::2], after[::2])
    assert all(field[1::2].isnan().all() for field in (raw.U, raw.S, raw.Vh))


@backends
def test_singular_values_that_overflow_are_named(backend):
    C = torch.full((2, 13, 11), torch.finfo(torch.float32).max)
    C[1] = 1
    raw = svd(backend, C)[0]
    assert raw.info.tolist() == [Info.OVERFLOW, 0]
    assert raw.S[0, 0].isinf()
    assert torch.isfinite(raw.U).all()


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_batches_groups_and_views(backend, dtype):
    C = torch.stack([prescribed(13, 11, spectrum("geometric", 11, 1e3, i), i, dtype) for i in range(5)])
    D = prescribed(7, 9, spectrum("even", 7), 1, dtype)[None]
    before = C.clone()
    raw, other = svd(backend, C, D)
    assert_svd(backend, C, raw)
    assert_svd(backend, D, other)
    assert same_bits(C, before)
    room = torch.full((5, 13, 23), torch.nan, dtype=dtype)
    room[..., 1::2] = C
    views = [room[..., 1::2], C.mT.contiguous().mT, C.flip(0).contiguous().flip(0), C[:1].expand(5, -1, -1)]
    for view in views:
        again = svd(backend, view)[0]
        assert_svd(backend, view.contiguous(), again)
        assert_close(again.S, raw.S if view is not views[3] else raw.S[:1].expand(5, -1), 64 * roundoff(dtype))
    if backend.bitwise:
        for i in range(5):
            assert all(same_bits(x[0], y[i]) for x, y in zip(svd(backend, C[i : i + 1])[0], raw, strict=True))


@backends
def test_every_element_is_written(backend, poisoned_empty):
    C = torch.stack([prescribed(13, 11, spectrum("rand", 11), 1), torch.zeros(13, 11, dtype=torch.float64)])
    assert_svd(backend, C, svd(backend, C)[0])


@backends
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    p=st.integers(1, 20),
    q=st.integers(1, 20),
    data=st.lists(st.integers(-3, 3), min_size=400, max_size=400),
    scale=st.sampled_from((1e-20, 1.0, 1e20)),
)
def test_small_integers_many_ties(backend, p, q, data, scale):
    """Integer matrices are full of exact ties, rank deficiency and zero columns."""
    C = torch.tensor(data[: p * q], dtype=torch.float64).reshape(1, p, q) * scale
    raw = svd(backend, C)[0]
    assert_svd(backend, C, raw)
    assert_close(
        raw.S, torch.from_numpy(np.linalg.svd(C.numpy(), compute_uv=False)), limit_of(backend, torch.float64, 20)
    )


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_matrix_that_lapack_gives_up_on_is_named(monkeypatch, name):
    """It is isolated: finite and flagged, and its neighbours are solved."""
    library = torch.linalg.svd

    def stubborn(C, full_matrices=True):
        if (C.amax((-2, -1)) == C.amin((-2, -1))).any():
            raise torch.linalg.LinAlgError("did not converge")
        return library(C, full_matrices=full_matrices)

    C = torch.stack([prescribed(5, 4, spectrum("rand", 4), 1), torch.ones(5, 4, dtype=torch.float64)])
    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    raw = registry.get(name).core_svd([C])[0]
    assert raw.info.tolist() == [0, Info.NOT_CONVERGED]
    assert all(torch.isfinite(field).all() for field in raw)
    assert raw.S[0].all()


def followed_signs(U):
    """Whether the first entry of nearly largest magnitude of each column is positive (docs/numerics.md, Sign rule)."""
    large = U.abs() >= (1 - 2.0**-20) * U.abs().amax(-2, keepdim=True)
    return torch.gather(U, -2, large.to(torch.uint8).argmax(-2, keepdim=True)) > 0


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_signs_follow_the_rule(backend, p, q, dtype):
    C = torch.randn(37, p, q, generator=torch.Generator().manual_seed(p * q), dtype=dtype)
    lower = C[:, :, : q // 2] @ torch.randn(37, q // 2, q, generator=torch.Generator().manual_seed(3), dtype=dtype)
    even = torch.kron(torch.tensor([[1.0, 1], [-1, 1]]), torch.eye((p + 1) // 2, (q + 1) // 2))[:p, :q]  # ties of |u|
    short = torch.nn.functional.pad(C[..., : (q + 1) // 2], (0, q // 2))  # columns of zeros: U is completed
    for group in (
        C,
        lower,
        even.to(dtype).expand(2, p, q),
        -even.to(dtype).expand(2, p, q),
        short,
        torch.zeros_like(C),
    ):
        (raw,) = svd(backend, group)
        assert followed_signs(raw.U).all()
        assert_svd(backend, group, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(("p", "q"), [(13, 11), (11, 13), (7, 7), (1, 5), (5, 1)])
def test_backends_agree_on_signs(p, q, dtype):
    C = torch.stack([prescribed(p, q, spectrum("geometric", min(p, q), 1e2), seed, dtype) for seed in range(5)])
    answers = {name: registry.get(name).core_svd([C])[0] for name in registry.NAMES if registry.status()[name][0]}
    wanted = answers.pop("reference")
    for raw in answers.values():
        for found, needed in ((raw.U, wanted.U), (raw.Vh, wanted.Vh)):
            assert (found - needed).abs().max() < 1e4 * roundoff(dtype)
