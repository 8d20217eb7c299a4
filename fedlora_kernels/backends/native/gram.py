"""Grams of stacked blocks in float64, straight from any dtype (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors
from fedlora_kernels.backends.native.library import Library, counts, table
from fedlora_kernels.backends.torch.chunks import pow2

__all__ = ["gram", "update_gram"]


def gram(library: Library, blocks: Sequence[Tensor], e: Tensor | None) -> Tensor:
    """``X^T X`` of the stack ``[X_1 | ... | X_K] 2^-e``, each block read once; as `backends.torch.gram.gram`."""
    N, R, device = len(blocks[0]), sum(block.shape[-1] for block in blocks), blocks[0].device
    G = torch.empty(N, R, R, dtype=torch.float64, device=device)
    scale = G.new_empty(N, 0, R) if e is None else pow2(-e).expand(N, R)[:, None]
    X, numbers, out = table(blocks), counts([len(blocks)]), table([G])
    library.run("update_gram", "fedlora_gram", (X, numbers, out, 1), (X, numbers, table([scale]), out, 1), device)
    return G


def update_gram(library: Library, groups: Sequence[Factors]) -> list[Tensor]:
    """Inner products of the weighted updates; see `Backend.update_gram`."""
    op = "update_gram"
    library.functions(op)
    out = [_room(group) for group in groups]
    given = [(group, inner) for group, inner in zip(groups, out, strict=True) if inner.numel()]
    if not given:
        return out
    B, A = (table([block for group, _ in given for block in getattr(group, side)]) for side in ("B", "A"))
    numbers, inner = counts([len(group.B) for group, _ in given]), table([inner for _, inner in given])
    weights = table([group.weights[None] for group, _ in given])
    sizes, arguments = (B, A, numbers, inner, len(given)), (B, A, numbers, weights, inner, len(given))
    library.run(op, "fedlora_update_gram", sizes, arguments, given[0][1].device)
    return out


def _room(group: Factors) -> Tensor:
    """Room for the inner products of a group."""
    N, K = group.weights.shape
    return torch.empty(N, K, K, dtype=torch.float64, device=group.B[0].device if K else torch.device("cpu"))
