"""Bounded temporaries and exact powers of two: what every op of this backend shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["WORKSPACE", "column_exponents", "exponent", "finite", "load", "pow2", "scale_pow2", "slices"]

WORKSPACE = 48 << 20
"""Bytes of temporaries an op may hold beyond inputs, outputs, a few R x R matrices of one problem, and the copies of its stack that
Householder works on."""


_EXPONENT_OF_ZERO = -10000


def slices(total: int, bytes_each: int, limit: int = WORKSPACE // 8) -> Iterator[slice]:
    """Consecutive slices of ``range(total)``, each as long as ``limit`` bytes allow and at least one."""
    step = max(1, limit // max(1, bytes_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def exponent(x: Tensor) -> Tensor:
    """Int64 exponent e with ``2^e <= |x| < 2^(e+1)``; 0 where x is zero or not finite."""
    usable = torch.isfinite(x) & (x != 0)
    return torch.frexp(torch.where(usable, x, 1.0)).exponent.to(torch.int64) - 1


def pow2(e: Tensor) -> Tensor:
    """Exactly ``2^e`` as float64 for integer e, clamped to the normal range."""
    # torch.ldexp goes through a float32 power and overflows at 2^128; the bit pattern does not.
    return ((e.to(torch.int64).clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def scale_pow2(x: Tensor, e: Tensor) -> Tensor:
    """``x * 2^e`` in two steps, so that 2^e itself may leave the range of x; ``e`` broadcasts over leading dimensions."""
    e = e.reshape(e.shape + (1,) * (x.ndim - e.ndim))
    half = torch.div(e, 2, rounding_mode="floor")
    return x * pow2(half).to(x.dtype) * pow2(e - half).to(x.dtype)


def finite(block: Tensor) -> Tensor:
    """Whether each of the N matrices holds only finite numbers, without a temporary of its size."""
    if not block.numel():
        return torch.ones(block.shape[0], dtype=torch.bool, device=block.device)
    low, high = block.amin((-2, -1)), block.amax((-2, -1))
    return torch.isfinite(low) & torch.isfinite(high)


def column_exponents(blocks: Sequence[Tensor], always: bool = False) -> Tensor | None:
    """Exponents (N, R) of the largest element of every column if some block is float64; None for narrower types, which square safely.

    ``always`` answers for those too. A column of zeros gets one below all others, so that it never decides the scale of a matrix.
    """
    narrow = not always and all(block.dtype != torch.float64 for block in blocks)
    if narrow or not blocks[0].shape[1]:
        return None
    largest = torch.cat([torch.maximum(block.amax(-2), -block.amin(-2)).double() for block in blocks], -1)
    return torch.where(largest == 0, _EXPONENT_OF_ZERO, exponent(largest).clamp(-1022, 1022))


def load(blocks: Sequence[Tensor], rows: slice, e: Tensor | None) -> Tensor:
    """Rows of the stack ``[X_1 | ... | X_K] 2^-e``, e (N, R) or (N, 1), as float64 (N, rows, R), laid out as the blocks are."""
    N, R, count = blocks[0].shape[0], sum(block.shape[-1] for block in blocks), rows.stop - rows.start
    options: dict[str, Any] = {"dtype": torch.float64, "device": blocks[0].device}
    by_columns = blocks[0].stride(-1) > blocks[0].stride(-2)
    stack = torch.empty(N, R, count, **options).mT if by_columns else torch.empty(N, count, R, **options)
    start = 0
    for block in blocks:
        stack[..., start : start + block.shape[-1]] = block[:, rows]
        start += block.shape[-1]
    return stack if e is None else stack.mul_(pow2(-e)[:, None, :])
