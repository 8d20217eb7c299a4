"""QR of stacked blocks by the native library: Grams where they are certified, else Householder reflections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RawQR, Stack
from fedlora_kernels.backends.native.library import Library, counts, rows, table
from fedlora_kernels.backends.torch import householder
from fedlora_kernels.backends.torch.chunks import load

__all__ = ["WIDEST", "stacked_qr", "tall_qr"]

WIDEST = 1024
"""Columns of the widest stack that the library serves."""


def stacked_qr(library: Library, groups: Sequence[Stack], want_q: bool) -> list[RawQR]:
    """Thin row-echelon QR of every stacked matrix; see `Backend.stacked_qr`.

    Raises:
        BackendError: the library is absent, or does not serve the tensors.
        InputError: FEDLORA_NUM_THREADS is no number of threads.
    """
    op = "stacked_qr"
    library.functions(op)
    if not groups:
        return []
    results = [_empty(group, want_q) for group in groups]
    ranks = [result.rank.int() for result in results]
    blocks = table([block for group in groups for block in group.blocks])
    numbers = counts([len(group.blocks) for group in groups])
    weights = table([group.weights[None] for group in groups])
    Q = table([result.Q for result in results if result.Q is not None]) if want_q else None
    small = [[result.R for result in results]]
    small += [[rows(t) for t in ts] for ts in (ranks, [r.info for r in results], [r.notes for r in results])]
    tables = [blocks, numbers, weights, Q, *map(table, small)]
    arguments = (*tables, len(groups))
    library.run(op, "fedlora_stacked_qr", arguments, arguments, results[0].R.device)
    return [result._replace(rank=rank.long()) for result, rank in zip(results, ranks, strict=True)]


def tall_qr(library: Library, blocks: Sequence[Tensor], e: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``[X_1 | ... | X_K] 2^-e diag(scale) = Q R`` as `backends.torch.householder.qr`, which serves stacks above `WIDEST`."""
    R = sum(block.shape[-1] for block in blocks)
    if R > WIDEST:
        return householder.qr(blocks, e, scale)
    N, m, _ = blocks[0].shape
    if e is not None:
        blocks = [load(blocks, slice(0, m), e)]
    Q, triangle = (
        torch.empty(N, *shape, dtype=torch.float64, device=scale.device) for shape in ((m, min(m, R)), (min(m, R), R))
    )
    tables = table(blocks), counts([len(blocks)]), table([rows(scale)]), table([Q]), table([triangle])
    library.run("product_svd", "fedlora_tall_qr", (*tables, 1), (*tables, 1), scale.device)
    return Q, triangle


def _empty(group: Stack, want_q: bool) -> RawQR:
    N, m, R = group.batch, group.m, group.width
    k = min(m, R)
    dtype = torch.float64 if any(block.dtype == torch.float64 for block in group.blocks) else torch.float32
    device = group.blocks[0].device if group.blocks else torch.device("cpu")
    return RawQR(
        Q=torch.empty(N, m, k, dtype=dtype, device=device) if want_q else None,
        R=torch.empty(N, k, R, dtype=dtype, device=device),
        rank=torch.empty(N, dtype=torch.int64, device=device),
        info=torch.empty(N, dtype=torch.int32, device=device),
        notes=torch.empty(N, dtype=torch.int32, device=device),
    )
