"""`rotate_factors` of every backend: the product is kept, the identity is a bitwise no-op."""

import pytest
import torch
from frames import DTYPES, dtype_id, every_backend, normal, orthogonal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.testing import roundoff, tolerance

backends = every_backend("rotate_factors")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def rotate(backend, B, A, Q):
    sizes = {"m": B.shape[1], "n": A.shape[2], "r": A.shape[1], "N": A.shape[0]}
    ((left, right),) = backend([B], [A], [Q], dtype=B.dtype, **sizes)
    return left, right


def make_pair(N, m, r, n, dtype=torch.float64, seed=0):
    return normal(N, m, r, seed=seed).to(dtype), normal(N, r, n, seed=seed + 1).to(dtype)


def check_product(left, right, B, A):
    lost = left.double() @ right.double() - B.double() @ A.double()
    size = torch.linalg.norm(B.double(), dim=(1, 2)) * torch.linalg.norm(A.double(), dim=(1, 2))
    limit = max(tolerance("rotated", dtype=factor.dtype) for factor in (B, A))
    assert left.dtype == B.dtype
    assert right.dtype == A.dtype
    assert (torch.linalg.norm(lost, dim=(1, 2)) <= limit * size).all()


@backends
@dtypes
@pytest.mark.parametrize(
    ("N", "m", "r", "n"), [(3, 37, 5, 23), (2, 131, 16, 61), (1, 53, 64, 97), (2, 1, 1, 3), (2, 3, 7, 2)]
)
def test_product_is_kept(backend, dtype, N, m, r, n):
    B, A = make_pair(N, m, r, n, dtype)
    Q = torch.stack([orthogonal(r, seed) for seed in range(N)])
    left, right = rotate(backend, B, A, Q)
    check_product(left, right, B, A)
    limit = 4 * roundoff(dtype)
    for ours, exact in ((left, B.double() @ Q), (right, Q.mT @ A.double())):
        assert torch.linalg.norm(ours.double() - exact) <= limit * torch.linalg.norm(exact)


@backends
def test_each_factor_keeps_its_dtype(backend):
    for first, second in (
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
    ):
        B, A = make_pair(2, 31, 5, 17)
        B, A = B.to(first), A.to(second)
        check_product(*rotate(backend, B, A, torch.stack([orthogonal(5, 1), orthogonal(5, 2)])), B, A)


@backends
@dtypes
def test_identity_keeps_every_bit(backend, dtype):
    B, A = make_pair(3, 37, 5, 23, dtype)
    B[0, 0, 0], A[0, 1, 1], B[1, :, 2], A[2] = -0.0, -0.0, -0.0, 0.0
    B[2, 3, 3] = torch.finfo(dtype).smallest_normal / 8
    A[1, 0, 0] = torch.finfo(dtype).max
    Q = torch.eye(5, dtype=torch.float64).repeat(3, 1, 1)
    Q[1] = orthogonal(5, 3)
    left, right = rotate(backend, B, A, Q)
    for i in (0, 2):
        assert same_bits(left[i], B[i])
        assert same_bits(right[i], A[i])
    assert not torch.equal(left[1], B[1])


@backends
@dtypes
def test_there_and_back(backend, dtype):
    B, A = make_pair(2, 37, 6, 29, dtype)
    Q = torch.stack([orthogonal(6, 1), orthogonal(6, 2)])
    left, right = rotate(backend, *rotate(backend, B, A, Q), Q.mT)
    assert torch.linalg.norm(left.double() - B.double()) <= 8 * roundoff(dtype) * torch.linalg.norm(B.double())
    assert torch.linalg.norm(right.double() - A.double()) <= 8 * roundoff(dtype) * torch.linalg.norm(A.double())


@backends
@pytest.mark.parametrize(("N", "m", "r", "n"), [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0), (0, 0, 0, 0)])
def test_empty(backend, N, m, r, n):
    left, right = rotate(backend, torch.zeros(N, m, r), torch.zeros(N, r, n), torch.zeros(N, r, r, dtype=torch.float64))
    assert left.shape == (N, m, r)
    assert right.shape == (N, r, n)


@backends
def test_ragged_groups(backend):
    assert backend([], [], []) == []
    pairs = [make_pair(2, 31, 5, 17), make_pair(1, 7, 3, 11)]
    Q = [torch.stack([orthogonal(5, 1), orthogonal(5, 2)]), orthogonal(3, 1)[None]]
    out = backend([B for B, _ in pairs], [A for _, A in pairs], Q, m=31, n=17, r=5, N=2)
    for (left, right), (B, A) in zip(out, pairs, strict=True):
        check_product(left, right, B, A)


@backends
@pytest.mark.parametrize(("N", "m", "r", "n"), [(1, 70001, 13, 5), (300, 131, 7, 61)])
def test_more_than_one_tile(backend, N, m, r, n):
    B, A = make_pair(N, m, r, n, torch.float32)
    Q = torch.stack([orthogonal(r, i % 5) for i in range(N)])
    check_product(*rotate(backend, B, A, Q), B, A)


@backends
@dtypes
@pytest.mark.parametrize("view", ["transposed", "strided", "offset", "expanded"])
def test_any_strides_and_inputs_untouched(backend, dtype, view):
    base = normal(3, 62, 10).to(dtype)
    B = {
        "transposed": base.mT.contiguous().mT[:, :31, :5],
        "strided": base[:, ::2, ::2],
        "offset": base.flatten()[1 : 1 + 3 * 31 * 5].view(3, 31, 5),
        "expanded": base[:1, :31, :5].expand(3, 31, 5),
    }[view]
    A, Q = B.mT, torch.stack([orthogonal(5, seed) for seed in range(3)])
    before = base.clone()
    left, right = rotate(backend, B, A, Q)
    dense = rotate(backend, B.contiguous(), A.contiguous(), Q)
    assert same_bits(base, before)
    for ours, theirs in zip((left, right), dense, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=4 * roundoff(dtype), atol=4 * roundoff(dtype))


@backends
def test_writes_every_element(backend, poisoned_empty):
    B, A = make_pair(3, 31, 5, 17, torch.float32)
    left, right = rotate(backend, B, A, torch.stack([orthogonal(5, seed) for seed in range(3)]))
    assert left.isfinite().all()
    assert right.isfinite().all()


@backends
def test_non_finite_matrix_harms_no_neighbour(backend):
    B, A = make_pair(3, 31, 5, 17)
    Q = torch.stack([orthogonal(5, seed) for seed in range(3)])
    clean = rotate(backend, B, A, Q)
    B[1, 3, 3], Q[1, 0, 0] = torch.nan, torch.nan
    for ours, theirs in zip(rotate(backend, B, A, Q), clean, strict=True):
        torch.testing.assert_close(ours[[0, 2]], theirs[[0, 2]], rtol=0, atol=1e-13)
        assert ours[1].isnan().any()


@backends
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 13), st.integers(0, 9), st.integers(0, 11)),
    seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1.0, 1e-3, 100.0]),
)  # fmt: skip
def test_any_pair(backend, shape, seed, dtype, scale):
    N, m, r, n = shape
    B, A = (factor * scale for factor in make_pair(N, m, r, n, dtype, seed))
    Q = torch.stack([orthogonal(r, seed + i) for i in range(N)]) if N else torch.zeros(0, r, r, dtype=torch.float64)
    check_product(*rotate(backend, B, A, Q), B, A)
