"""Weighted sums of client blocks in float64, a few matrices at a time (docs/numerics.md, Weighted sums)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Blocks, Info, Note, RawSum
from fedlora_kernels.backends.torch.chunks import slices

__all__ = ["weighted_sum"]


def weighted_sum(groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
    """``sum_k w_k X_k`` of each group; see `Backend.weighted_sum`."""
    return [_weighted_sum(group, dtype) for group in groups]


def _weighted_sum(group: Blocks, dtype: torch.dtype) -> RawSum:
    N, device = group.batch, group.blocks[0].device
    fields = [torch.empty(N, group.p, group.q, dtype=dtype, device=device)]
    fields += [
        torch.empty(N, dtype=kind, device=device) for kind in (torch.float64, torch.float64, torch.int32, torch.int32)
    ]
    for part in slices(N, 3 * 8 * group.p * group.q):
        for whole, piece in zip(fields, _piece(group, part, dtype), strict=True):
            whole[part] = piece
    return RawSum(*fields)


def _piece(group: Blocks, part: slice, dtype: torch.dtype) -> tuple[Tensor, ...]:
    weights = group.weights[part].to(group.blocks[0].device)
    total = weights.new_zeros(len(weights), group.p, group.q)
    for k, block in enumerate(group.blocks):
        _, p, q = block.shape
        total[:, :p, :q] += block[part].to(torch.float64) * weights[:, k, None, None]
    rounded = total.to(dtype)
    kept = rounded.to(torch.float64)
    finite = torch.isfinite(total).flatten(1).all(1)
    held = torch.isfinite(kept).flatten(1).all(1)
    info = (~finite) * int(Info.NONFINITE) + (finite & ~held) * int(Info.OVERFLOW)
    notes = ~(total != 0).flatten(1).any(1) * int(Note.ZERO)
    norm, rounding = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (total, total - kept))
    return rounded, norm, rounding, info.to(torch.int32), notes.to(torch.int32)
