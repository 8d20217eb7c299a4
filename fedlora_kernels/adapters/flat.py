"""Pairs in flat tensors, which hold those of many experts: the rows of an expert's A lie together, the columns of its B apart.

Both ways B is sorted piece by piece, in a cache: as a whole it would go through memory twice, one number of a line at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedlora_kernels.adapters.model import ModuleSpec, TensorSource

__all__ = ["interleaved", "read_flat"]

READ = 512 << 10
"""Bytes of B at a time: what is read stays in a cache until its columns have been put in their places."""
WRITTEN = 2 << 20
"""Bytes of B at a time: more touches fresh memory, less is many small steps."""


def read_flat(source: TensorSource, specs: Sequence[ModuleSpec], B: Tensor, A: Tensor) -> None:
    """Read pairs that follow one another in one flat tensor of A and one of B, into B (N, m, r) and A (N, r, n), contiguous.

    All of B is read through, however few of its pairs are wanted.
    """
    first, count = specs[0], len(specs)
    part, parts, rank = first.form.part, first.form.parts, first.rank
    source.read_rows(first.A.key, part * rank, A.view(count * rank, first.n))
    step = max(1, min(first.m, READ // (first.B.dtype.itemsize * rank * parts)))
    piece = torch.empty(step, rank * parts, dtype=first.B.dtype)
    for top in range(0, first.m, step):
        rows = piece[: first.m - top]
        source.read_rows(first.B.key, top, rows)
        columns = rows.view(len(rows), rank, parts)[:, :, part : part + count]
        B[:, top : top + len(rows)].copy_(columns.permute(2, 0, 1))


def interleaved(Bs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The flat tensor of many B (m, r), (m, r * N) with the number of the pair fastest, in pieces of some rows."""
    m, rank = Bs[0].shape
    step = max(1, WRITTEN // max(1, Bs[0].element_size() * rank * len(Bs)))
    for top in range(0, m, step):
        # as a transpose of two dimensions, which torch does block by block
        yield torch.stack([B[top : top + step] for B in Bs]).flatten(1).t().contiguous()
