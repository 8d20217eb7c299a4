"""Weighted and mixed sums of client blocks in float64, a few matrices at a time (docs/numerics.md, Weighted sums)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Blocks, Info, Mixed, Note, RawSum
from fedlora_kernels.backends.torch.chunks import slices

__all__ = ["mixed_sum", "weighted_sum"]


def weighted_sum(groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
    """``sum_k w_k X_k`` of each group; see `Backend.weighted_sum`."""
    return [_weighted_sum(group, dtype) for group in groups]


def mixed_sum(groups: Sequence[Mixed], dtype: torch.dtype) -> list[RawSum]:
    """``sum_k X_k M_k`` of each group; see `Backend.mixed_sum`."""
    return [_filled(group.empty(dtype), functools.partial(_mixed, group)) for group in groups]


def _weighted_sum(group: Blocks, dtype: torch.dtype) -> RawSum:
    out = torch.empty(group.batch, group.p, group.q, dtype=dtype, device=group.blocks[0].device)
    return _filled(out, functools.partial(_weighted, group))


def _filled(out: Tensor, total: Callable[[slice], Tensor]) -> RawSum:
    """``out`` (N, p, q) filled with the float64 sums that ``total`` answers, a few matrices at a time, and what to say of it."""
    N, p, q = out.shape
    kinds = (torch.float64, torch.float64, torch.int32, torch.int32)
    fields = [out, *(torch.empty(N, dtype=kind, device=out.device) for kind in kinds)]
    for part in slices(N, 3 * 8 * p * q):
        for whole, piece in zip(fields, _rounded(total(part), out.dtype), strict=True):
            whole[part] = piece
    return RawSum(*fields)


def _weighted(group: Blocks, part: slice) -> Tensor:
    weights = group.weights[part].to(group.blocks[0].device)
    total = weights.new_zeros(len(weights), group.p, group.q)
    for k, block in enumerate(group.blocks):
        _, p, q = block.shape
        total[:, :p, :q] += block[part].to(torch.float64) * weights[:, k, None, None]
    return total


def _mixed(group: Mixed, part: slice) -> Tensor:
    N, p, q = group.shape
    total = torch.zeros(len(range(N)[part]), p, q, dtype=torch.float64, device=group.blocks[0].device)
    for block, mixer in zip(group.blocks, group.mixers, strict=True):
        M = mixer[part]
        unused = (M == 0).flatten(1).all(1)[:, None, None]
        # zeros for what is not to be seen: NaN times 0 is NaN
        total.baddbmm_(block[part].to(torch.float64).masked_fill(unused, 0.0), M)
    return total


def _rounded(total: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rounded = total.to(dtype)
    kept = rounded.to(torch.float64)
    finite = torch.isfinite(total).flatten(1).all(1)
    held = torch.isfinite(kept).flatten(1).all(1)
    info = (~finite) * int(Info.NONFINITE) + (finite & ~held) * int(Info.OVERFLOW)
    notes = ~(total != 0).flatten(1).any(1) * int(Note.ZERO)
    norm, rounding = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (total, total - kept))
    return rounded, norm, rounding, info.to(torch.int32), notes.to(torch.int32)
