"""weighted_sum as a caller sees it."""

import numpy as np
import pytest
import torch

from fedlora_kernels.errors import InputError, MismatchError, NonFiniteError, OutputOverflowError
from fedlora_kernels.linalg import Ragged, weighted_sum


def blocks(*shapes, dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=made).to(dtype) for shape in shapes]


def padded(X, weights):
    p, q = (max(x.shape[axis] for x in X) for axis in (-2, -1))
    total = torch.zeros(*X[0].shape[:-2], p, q, dtype=torch.float64)
    for k, x in enumerate(X):
        total[..., : x.shape[-2], : x.shape[-1]] += (
            x.double() * torch.as_tensor(weights, dtype=torch.float64)[..., k, None, None]
        )
    return total


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_the_sum_of_padded_blocks(batch):
    X = blocks((*batch, 7, 3), (*batch, 7, 5), (*batch, 2, 4))
    answer = weighted_sum(X, weights=[0.5, -2.0, 1.0], dtype="float64")
    assert torch.equal(answer.sum, padded(X, [0.5, -2.0, 1.0]))
    assert answer.norm.shape == answer.rounding.shape == answer.info.shape == answer.notes.shape == batch


def test_the_answer_is_rounded_once_and_says_how_much():
    X = blocks((4, 3), (4, 3))
    answer, exact = weighted_sum(X, weights=[0.3, 0.7]), padded(X, [0.3, 0.7])
    assert torch.equal(answer.sum, exact.float())
    assert float(answer.rounding) == pytest.approx(float((exact - exact.float().double()).norm()), rel=1e-12)
    assert float(answer.norm) == pytest.approx(float(exact.norm()), rel=1e-14)


def test_a_block_of_weight_zero_is_never_read():
    X = blocks((4, 5, 3), (4, 5, 3))
    weights = torch.tensor([[1, 2], [0, 1], [0, 0], [3, 0]], dtype=torch.float64)
    X[0][1], X[1][3] = float("nan"), float("inf")
    X[0][2] = X[1][2] = float("nan")
    answer = weighted_sum(X, weights=weights)
    assert torch.equal(answer.sum[1], X[1][1])
    assert torch.equal(answer.sum[3], 3 * X[0][3])
    assert not answer.sum[2].any()


def test_frameworks_ragged_and_dtypes():
    X = blocks((4, 3), (2, 3))
    assert isinstance(weighted_sum([x.numpy() for x in X]).sum, np.ndarray)
    first, second = weighted_sum(Ragged([X, X[1]]), weights=Ragged([[1.0, 2.0], [4.0]]))
    assert torch.equal(first.sum, padded(X, [1.0, 2.0]).float())
    assert torch.equal(second.sum, 4 * X[1])
    assert weighted_sum(blocks((2, 3), dtype=torch.bfloat16)).sum.dtype == torch.bfloat16
    assert weighted_sum([X[0], X[1].double()]).sum.dtype == torch.float64


def test_trouble_is_named():
    X = blocks((2, 4, 3), (2, 4, 3))
    with pytest.raises(OutputOverflowError, match=r"weighted_sum: matrix \(0\)"):
        weighted_sum(X, weights=[1e6, 1.0], dtype="float16")
    X[1][1, 2, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"weighted_sum: matrix \(1\)"):
        weighted_sum(X)
    assert weighted_sum(X, check=False).info.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([],), InputError),
        (([torch.zeros(3)],), MismatchError),
        (([torch.zeros(2, 3, 4), torch.zeros(3, 3, 4)],), MismatchError),
    ],
)
def test_wrong_arguments_are_refused(arguments, error):
    with pytest.raises(error, match="weighted_sum"):
        weighted_sum(*arguments)
