"""core_svd as a caller sees it."""

import numpy as np
import pytest
import torch
from call_problems import assert_near

from fedlora_kernels.errors import InputError, MismatchError, NonFiniteError
from fedlora_kernels.linalg import Info, Ragged, core_svd


def matrices(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 5, 3), (2, 3, 3, 7), (0, 5, 3), (2, 0, 3), (2, 3, 0), (37, 41)])
def test_factors_every_matrix(shape):
    C = matrices(*shape)
    result = core_svd(C)
    *batch, p, q = shape
    k = min(p, q)
    assert result.U.shape == (*batch, p, k)
    assert result.S.shape == (*batch, k)
    assert result.Vh.shape == (*batch, k, q)
    assert result.info.shape == result.notes.shape == tuple(batch)
    assert_near((result.U * result.S[..., None, :]) @ result.Vh, C)


@pytest.mark.parametrize(
    ("dtype", "answer"),
    [("float64", "float64"), ("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32")],
)
def test_dtypes(dtype, answer):
    result = core_svd(matrices(2, 5, 3, dtype=getattr(torch, dtype)))
    assert result.U.dtype == result.S.dtype == result.Vh.dtype == getattr(torch, answer)


def test_numpy_and_ragged():
    C = matrices(2, 5, 3)
    result = core_svd(C.numpy()[:, ::-1])
    assert isinstance(result.S, np.ndarray)
    assert_near(result.S, core_svd(C).S)
    first, second = core_svd(Ragged([C, C[0].T.float()]))
    assert_near(first.S, result.S)
    assert second.S.dtype == torch.float32
    assert_near(second.S, result.S[0], 1e-6)


def test_trouble_and_bad_arguments():
    C = matrices(2, 3, 5, 4)
    C[1, 2, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"core_svd: matrix \(1, 2\)"):
        core_svd(C)
    assert core_svd(C, check=False).info.flatten().tolist() == [0] * 5 + [Info.NONFINITE]
    with pytest.raises(TypeError, match="core_svd: C is a list of 2; an array is needed"):
        core_svd([C, C])
    with pytest.raises(MismatchError, match="at least two dimensions"):
        core_svd(torch.ones(3))
    with pytest.raises(InputError, match=r"C has dtype torch.int64"):
        core_svd(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="core_svd"):
        core_svd(matrices(3, 2).requires_grad_()).S.sum().backward()
