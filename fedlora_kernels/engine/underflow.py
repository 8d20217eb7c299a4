"""Updates that a half has no numbers small enough for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["UNDERFLOW", "underflows"]

UNDERFLOW = "UNDERFLOW"
"""Stands among the notes of a module."""
SHARE = 0.01
"""Of an update; what plain rounding to a half takes is a tenth of it."""


def underflows(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether more than 1 % of ``sum B A`` may be lost since elements lie below the normal numbers of their dtype; of (B, A).

    Such an element is half the smallest number off, and a column of B so far off meets the whole of its row of A. What is all
    zero counts as lost.
    """
    kept = lost = 0.0
    for B, A in pairs:
        b, a = (torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64) for x, dim in ((B, 0), (A, 1)))
        least = torch.finfo(B.dtype).tiny * torch.finfo(B.dtype).eps / 2.0
        kept += float((b * a).square().sum())
        lost += least**2 * float((A.shape[1] * b.square() + B.shape[0] * a.square()).sum())
    return lost > SHARE**2 * kept
