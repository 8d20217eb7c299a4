"""Exact scaling by powers of two over the whole float64 range, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exponent_of", "times_power"]


def exponent_of(x: Tensor) -> Tensor:
    """Return the int64 exponents e with ``2^(e-1) <= |x| < 2^e``; 0 for zero and for what is not finite."""
    exponent = torch.frexp(x.double()).exponent.long()
    return torch.where(torch.isfinite(x) & (x != 0), exponent, 0)


def times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """Return ``x * 2^exponent`` for float64 x and integer exponents, which broadcast; exact where the answer is a normal number."""
    # in two halves, because 2^1074, which lifts the smallest subnormal to 1, is no float64 itself
    half = exponent // 2
    return x * _power(half) * _power(exponent - half)


def _power(exponent: Tensor) -> Tensor:
    # from the bits: exp2 and pow do not promise exact powers on every device, ldexp goes through float32
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
