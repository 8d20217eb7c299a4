"""Weighted and mixed sums of client blocks, one matrix and one block at a time (docs/numerics.md, Weighted sums)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Blocks, Info, Mixed, Note, RawSum

__all__ = ["mixed_sum", "weighted_sum"]


def weighted_sum(groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
    """``sum_k w_k X_k`` of each group; see `Backend.weighted_sum`."""
    return [
        _filled(torch.empty(group.batch, group.p, group.q, dtype=dtype), functools.partial(_weighted, group))
        for group in groups
    ]


def mixed_sum(groups: Sequence[Mixed], dtype: torch.dtype) -> list[RawSum]:
    """``sum_k X_k M_k`` of each group; see `Backend.mixed_sum`."""
    return [_filled(group.empty(dtype), functools.partial(_mixed, group)) for group in groups]


def _filled(sums: Tensor, total_of: Callable[[int], Tensor]) -> RawSum:
    batch = len(sums)
    norm, rounding = (torch.empty(batch, dtype=torch.float64) for _ in range(2))
    info, notes = (torch.zeros(batch, dtype=torch.int32) for _ in range(2))
    for n in range(batch):
        total = total_of(n)
        sums[n] = total.to(sums.dtype)
        kept = sums[n].to(torch.float64)
        norm[n], rounding[n] = torch.linalg.matrix_norm(total), torch.linalg.matrix_norm(total - kept)
        if not torch.isfinite(total).all():
            info[n] = int(Info.NONFINITE)
        elif not torch.isfinite(kept).all():
            info[n] = int(Info.OVERFLOW)
        notes[n] = 0 if total.any() else int(Note.ZERO)
    return RawSum(sums, norm, rounding, info, notes)


def _weighted(group: Blocks, n: int) -> Tensor:
    total = torch.zeros(group.p, group.q, dtype=torch.float64)
    for block, w in zip(group.blocks, group.weights[n], strict=True):
        _, p, q = block.shape
        total[:p, :q] += w * block[n].to(torch.float64)
    return total


def _mixed(group: Mixed, n: int) -> Tensor:
    _, p, q = group.shape
    total = torch.zeros(p, q, dtype=torch.float64)
    for block, mixer in zip(group.blocks, group.mixers, strict=True):
        if mixer[n].any():
            total += block[n].to(torch.float64) @ mixer[n]
    return total
