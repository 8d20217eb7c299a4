"""FLoRA: the stack of all factors, exact and of rank R (arXiv 2409.05976)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedlora_kernels.backends.contract import Note
from fedlora_kernels.linalg import update_gram
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, register
from fedlora_kernels.methods.factors import chunked, owned, rounded, rounding_of, zero_outcome

__all__ = ["FLoRA"]


@register
@dataclass(frozen=True)
class FLoRA(Method):
    """``B = [s_1 B_1 | ... | s_K B_K]`` and ``A = [w_1 A_1 ; ... ; w_K A_K]``: the product is D, the rank the sum of all ranks."""

    name: ClassVar[str] = "flora"
    summary: ClassVar[str] = "stack of all factors"
    exact: ClassVar[str] = "yes"
    broadcast: ClassVar[str] = "the stack"
    download: ClassVar[str] = "R(m+n)"
    streams: ClassVar[bool] = True
    product_only: ClassVar[bool] = True
    columnwise: ClassVar[bool] = False

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Stack one group. ``error``, if measured, is 0: only the rounding to the output dtype stands in the bound."""
        return chunked(group, self._stack)

    def _stack(self, group: Group) -> Outcome:
        B, A, folded = owned(group)
        if not B:
            return zero_outcome(group)
        keep = [k for k, rank in enumerate(group.ranks) if rank > 0]
        device = B[0].device
        R = sum(block.shape[-1] for block in B)
        left = torch.empty(group.batch, group.m, R, dtype=group.dtype, device=device)
        right = torch.empty(group.batch, R, group.n, dtype=group.dtype, device=device)
        size = torch.zeros(group.batch, dtype=torch.float64)
        rounding = torch.zeros_like(size)
        info = torch.zeros(group.batch, dtype=torch.int32)
        start = 0
        for position, k in enumerate(keep):
            stop = start + B[position].shape[-1]
            b = rounded(group, B[position], group.scale[:, k : k + 1])
            a = rounded(group, A[position], group.weight[:, k : k + 1])
            left[:, :, start:stop], right[:, start:stop] = b.sum, a.sum
            size += (b.norm * a.norm).cpu()
            rounding += rounding_of(b, a)
            info |= (b.info | a.info).cpu()
            start = stop
        error = bound = torch.full((group.batch,), math.nan, dtype=torch.float64)
        energy = None
        if group.measure:
            gram = update_gram(B, A, weights=folded, check=False, backend=group.backend).cpu()
            energy = gram.sum((1, 2)).clamp(min=0.0)
            error = torch.zeros_like(energy)
            bound = torch.where(size == 0.0, 0.0, rounding / energy.sqrt())
        return Outcome(
            B=left,
            A=right,
            rank=torch.full((group.batch,), R, dtype=torch.int64),
            error=error,
            error_bound=bound,
            notes=((size == 0.0) * int(Note.ZERO)).to(torch.int32),
            info=info,
            energy=energy,
        )
