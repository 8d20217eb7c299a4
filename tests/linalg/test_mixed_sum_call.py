"""mixed_sum as a caller sees it."""

import numpy as np
import pytest
import torch

from fedlora_kernels.errors import BackendError, InputError, MismatchError, NonFiniteError, OutputOverflowError
from fedlora_kernels.linalg import Ragged, mixed_sum, weighted_sum

LIMIT = 32 * 2.0**-53
"""Of two float64 sums of at most 8 products, per sum of their magnitudes."""


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def problem(batch=(), dtype=torch.float32):
    """Blocks (..., 7, r_k) and mixers (..., r_k, 4)."""
    return [draw(*batch, 7, r, dtype=dtype) for r in (3, 5)], [draw(*batch, r, 4, dtype=torch.float64) for r in (3, 5)]


def product(X, M):
    return sum(x.double() @ m.double() for x, m in zip(X, M, strict=True))


def size(X, M):
    return sum(x.double().abs() @ m.double().abs() for x, m in zip(X, M, strict=True))


def turned(tensors):
    return [tensor.mT.contiguous() for tensor in tensors]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_sum_of_blocks_times_mixers(batch, side):
    X, M = problem(batch)
    arguments = (X, M) if side == "right" else (turned(X), turned(M))
    answer = mixed_sum(*arguments, side=side, dtype="float64")
    found = answer.sum if side == "right" else answer.sum.mT
    assert found.shape == (*batch, 7, 4)
    assert bool(((found - product(X, M)).abs() <= LIMIT * size(X, M)).all())
    assert answer.sum.is_contiguous()
    assert answer.norm.shape == answer.rounding.shape == answer.info.shape == answer.notes.shape == batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_answer_is_contiguous_whatever_the_blocks_are(side):
    X, M = problem((2,))
    blocks = [x.mT.contiguous().mT for x in X] if side == "right" else [x.mT for x in X]
    answer = mixed_sum(blocks, M if side == "right" else turned(M), side=side)
    assert answer.sum.is_contiguous()


def test_identities_as_mixers_are_a_weighted_sum():
    X, w = [draw(7, 4), draw(7, 4, seed=1)], [0.25, -3.0]
    mixers = [c * torch.eye(4, dtype=torch.float64) for c in w]
    wanted = weighted_sum(X, weights=w, dtype="float64").sum
    assert torch.allclose(mixed_sum(X, mixers, dtype="float64").sum, wanted, rtol=4 * 2.0**-53, atol=0)


def test_the_answer_is_rounded_once_and_says_how_much():
    X, M = problem((2,))
    answer, wide = mixed_sum(X, M), mixed_sum(X, M, dtype="float64")
    assert torch.equal(answer.sum, wide.sum.float())
    gap = (wide.sum - answer.sum.double()).flatten(1).norm(dim=1)
    assert torch.allclose(answer.rounding, gap, rtol=1e-12)
    assert torch.allclose(answer.norm, wide.sum.flatten(1).norm(dim=1), rtol=1e-14)


def test_one_array_is_one_block():
    X, M = problem()
    assert torch.equal(mixed_sum(X[0], M[0]).sum, mixed_sum(X[:1], M[:1]).sum)


def test_frameworks_ragged_and_dtypes():
    X, M = problem()
    answer = mixed_sum([x.numpy() for x in X], [m.numpy() for m in M]).sum
    assert isinstance(answer, np.ndarray)
    first, second = mixed_sum(Ragged([X, X[1]]), Ragged([M, M[1]]))
    assert torch.equal(first.sum, mixed_sum(X, M).sum)
    assert torch.equal(second.sum, mixed_sum(X[1], M[1]).sum)
    assert mixed_sum([x.bfloat16() for x in X], M).sum.dtype == torch.bfloat16
    assert mixed_sum([X[0], X[1].double()], M).sum.dtype == torch.float64
    narrow = [m.float() for m in M]
    assert torch.equal(mixed_sum(X, narrow).sum, mixed_sum(X, [m.double() for m in narrow]).sum)


def test_trouble_is_named():
    X, M = problem((2,))
    with pytest.raises(OutputOverflowError, match=r"mixed_sum: matrix \(0\)"):
        mixed_sum(X, [1e6 * m for m in M], dtype="float16")
    X[1][1, 2, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"mixed_sum: matrix \(1\)"):
        mixed_sum(X, M)
    assert mixed_sum(X, M, check=False).info.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (([], []), {}, InputError, "blocks is an empty list"),
        (([draw(7, 3)], [draw(3, 4), draw(3, 4)]), {}, MismatchError, "1 blocks and 2 mixers"),
        (([draw(7, 3)], [draw(2, 4)]), {}, MismatchError, r"mixers\[0\] has shape \(2, 4\); \(3, 4\) is needed"),
        (([draw(7, 3), draw(6, 3)], [draw(3, 4)] * 2), {}, MismatchError, r"blocks\[1\] .*\(7, 3\) is needed"),
        (([draw(7, 3)] * 2, [draw(3, 4), draw(3, 5)]), {}, MismatchError, r"mixers\[1\] .*\(3, 4\) is needed"),
        (([draw(3, 7)], [draw(4, 2)]), {"side": "left"}, MismatchError, r"\(4, 3\) is needed"),
        (([draw(2, 7, 3)], [draw(3, 4)]), {}, MismatchError, "leading dimensions"),
        (([draw(7)], [draw(3, 4)]), {}, MismatchError, "at least two dimensions"),
        (([draw(7, 3)], [draw(3, 4)]), {"side": "both"}, InputError, "side is 'both'; 'right' or 'left' is needed"),
        (([draw(7, 3)], [draw(3, 4).to("meta")]), {}, BackendError, "one device per call"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, error, match):
    with pytest.raises(error, match=f"mixed_sum: .*{match}"):
        mixed_sum(*arguments, **options)
