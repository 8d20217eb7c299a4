"""Grams of stacked blocks in float64, straight from any dtype (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors
from fedlora_kernels.backends.cpu.library import Library, counts, table
from fedlora_kernels.backends.cpu.threads import thread_count
from fedlora_kernels.backends.torch import gram as torch_gram
from fedlora_kernels.backends.torch.chunks import pow2

__all__ = ["gram", "update_gram"]


def gram(library: Library, blocks: Sequence[Tensor], e: Tensor | None) -> Tensor:
    """``X^T X`` of the stack ``[X_1 | ... | X_K] 2^-e``, each block read once; as `backends.torch.gram.gram`."""
    op, N, R = "update_gram", len(blocks[0]), sum(block.shape[-1] for block in blocks)
    G = torch.empty(N, R, R, dtype=torch.float64)
    scale = torch.empty(N, 0, R, dtype=torch.float64) if e is None else pow2(-e).expand(N, R)[:, None]
    X, numbers, out = table(blocks), counts([len(blocks)]), table([G])
    threads = thread_count()
    memory, *scratch = library.workspace(op, "fedlora_gram_workspace", X, numbers, out, 1, threads)
    library.call(op, "fedlora_gram", X, numbers, table([scale]), out, 1, *scratch, threads, None)
    del memory
    return G


def update_gram(library: Library, groups: Sequence[Factors]) -> list[Tensor]:
    """Inner products of the weighted updates; see `Backend.update_gram`."""
    return torch_gram.update_gram(groups, gram=partial(gram, library))
