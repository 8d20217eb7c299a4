"""Weighted and mixed sums of blocks in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Blocks, Mixed, RawSum
from fedlora_kernels.backends.cpu.answers import ANSWERS
from fedlora_kernels.backends.cpu.library import Library, counts, rows, table
from fedlora_kernels.backends.cpu.threads import thread_count

__all__ = ["mix", "mixed_sum", "room", "weighted_sum"]


def weighted_sum(library: Library, groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
    """Weighted sum of the blocks of each group; see `Backend.weighted_sum`."""
    op = "weighted_sum"
    library.functions(op)
    results = [room((group.batch, group.p, group.q), dtype) for group in groups]
    blocks = table([block for group in groups for block in group.blocks])
    numbers = counts([len(group.blocks) for group in groups])
    weights = table([group.weights[None] for group in groups])
    tables = [table([rows(getattr(result, field)) for result in results]) for field in RawSum._fields]
    memory, *scratch = library.workspace(op, "fedlora_weighted_sum_workspace", tables[0], len(groups))
    library.call(
        op, "fedlora_weighted_sum", blocks, numbers, weights, *tables, len(groups), *scratch, thread_count(), None
    )
    del memory
    return results


def mixed_sum(library: Library, groups: Sequence[Mixed], dtype: torch.dtype) -> list[RawSum]:
    """``sum_k X_k M_k`` of each group; see `Backend.mixed_sum`."""
    return mix(library, groups, [group.empty(dtype) for group in groups])


def mix(library: Library, groups: Sequence[Mixed], sums: Sequence[Tensor]) -> list[RawSum]:
    """The sums of these groups, written to ``sums``, which may be views."""
    op = "mixed_sum"
    library.functions(op)
    results = [_about(out) for out in sums]
    blocks = table([block for group in groups for block in group.blocks])
    mixers = table([mixer for group in groups for mixer in group.mixers])
    numbers = counts([len(group.blocks) for group in groups])
    tables = [table([rows(getattr(result, field)) for result in results]) for field in RawSum._fields]
    threads = thread_count()
    memory, *scratch = library.workspace(
        op, "fedlora_mixed_sum_workspace", mixers, numbers, tables[0], len(groups), threads
    )
    library.call(op, "fedlora_mixed_sum", blocks, mixers, numbers, *tables, len(groups), *scratch, threads, None)
    del memory
    return results


def room(shape: tuple[int, int, int], dtype: torch.dtype) -> RawSum:
    """Room for sums (N, p, q) in ``dtype`` and for what is said of them."""
    return _about(ANSWERS.empty(shape, dtype))


def _about(sums: Tensor) -> RawSum:
    """``sums`` (N, p, q), to be filled, and room for what is said of it."""
    N = len(sums)
    return RawSum(
        sum=sums,
        norm=torch.empty(N, dtype=torch.float64),
        rounding=torch.empty(N, dtype=torch.float64),
        info=torch.empty(N, dtype=torch.int32),
        notes=torch.empty(N, dtype=torch.int32),
    )
