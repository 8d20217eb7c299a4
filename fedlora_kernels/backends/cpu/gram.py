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

__all__ = ["gram", "update_gram"]

_WIDEST = 1024
"""Columns of a stack whose Gram the library forms; that of a wider one fills the caches, and BLAS is as fast."""


def gram(library: Library, blocks: Sequence[Tensor], e: Tensor | None) -> Tensor:
    """``X^T X`` of the stack of the blocks, each read once; torch's where columns are scaled, or for wide stacks."""
    R = sum(block.shape[-1] for block in blocks)
    if e is not None or R > _WIDEST:
        return torch_gram.gram(blocks, e)
    op = "update_gram"
    G = torch.empty(len(blocks[0]), R, R, dtype=torch.float64)
    tables = table(blocks), counts([len(blocks)]), table([G])
    threads = thread_count()
    memory, *scratch = library.workspace(op, "fedlora_gram_workspace", *tables, 1, threads)
    library.call(op, "fedlora_gram", *tables, 1, *scratch, threads, None)
    del memory
    return G


def update_gram(library: Library, groups: Sequence[Factors]) -> list[Tensor]:
    """Inner products of the weighted updates; see `Backend.update_gram`."""
    return torch_gram.update_gram(groups, gram=partial(gram, library))
