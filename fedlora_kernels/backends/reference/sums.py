"""Weighted sums of client blocks, one matrix and one block at a time (docs/numerics.md, Weighted sums)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Blocks, Info, Note, RawSum

__all__ = ["weighted_sum"]


def weighted_sum(groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
    """``sum_k w_k X_k`` of each group; see `Backend.weighted_sum`."""
    return [_weighted_sum(group, dtype) for group in groups]


def _weighted_sum(group: Blocks, dtype: torch.dtype) -> RawSum:
    sums = torch.empty(group.batch, group.p, group.q, dtype=dtype)
    norm, rounding = (torch.empty(group.batch, dtype=torch.float64) for _ in range(2))
    info, notes = (torch.zeros(group.batch, dtype=torch.int32) for _ in range(2))
    for n in range(group.batch):
        total = _total(group, n)
        sums[n] = total.to(dtype)
        kept = sums[n].to(torch.float64)
        norm[n], rounding[n] = torch.linalg.matrix_norm(total), torch.linalg.matrix_norm(total - kept)
        if not torch.isfinite(total).all():
            info[n] = int(Info.NONFINITE)
        elif not torch.isfinite(kept).all():
            info[n] = int(Info.OVERFLOW)
        notes[n] = 0 if total.any() else int(Note.ZERO)
    return RawSum(sums, norm, rounding, info, notes)


def _total(group: Blocks, n: int) -> Tensor:
    total = torch.zeros(group.p, group.q, dtype=torch.float64)
    for block, w in zip(group.blocks, group.weights[n], strict=True):
        _, p, q = block.shape
        total[:p, :q] += w * block[n].to(torch.float64)
    return total
