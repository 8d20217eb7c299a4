"""Grams of stacked blocks in float64, straight from any dtype (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.native.library import Library, counts, table
from fedlora_kernels.backends.torch.chunks import pow2

__all__ = ["gram"]


def gram(library: Library, blocks: Sequence[Tensor], e: Tensor | None) -> Tensor:
    """``X^T X`` of the stack ``[X_1 | ... | X_K] 2^-e``, each block read once; as `backends.torch.gram.gram`."""
    N, R, device = len(blocks[0]), sum(block.shape[-1] for block in blocks), blocks[0].device
    G = torch.empty(N, R, R, dtype=torch.float64, device=device)
    scale = G.new_empty(N, 0, R) if e is None else pow2(-e).expand(N, R)[:, None]
    X, numbers, out = table(blocks), counts([len(blocks)]), table([G])
    library.run("update_gram", "fedlora_gram", (X, numbers, out, 1), (X, numbers, table([scale]), out, 1), device)
    return G
