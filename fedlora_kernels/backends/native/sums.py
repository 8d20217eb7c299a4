"""Weighted and mixed sums of blocks in one pass over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Blocks, Mixed, RawSum
from fedlora_kernels.backends.native.library import Library, counts, rows, table

__all__ = ["mix", "mixed_sum", "room", "weighted_sum"]


def weighted_sum(library: Library, groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
    """Weighted sum of the blocks of each group; see `Backend.weighted_sum`."""
    library.functions("weighted_sum")
    if not groups:
        return []
    device = _device(block for group in groups for block in group.blocks)
    results = [room(library, (group.batch, group.p, group.q), dtype, device) for group in groups]
    blocks = table([block for group in groups for block in group.blocks])
    numbers = counts([len(group.blocks) for group in groups])
    weights = table([group.weights[None] for group in groups])
    tables = [table([rows(getattr(result, field)) for result in results]) for field in RawSum._fields]
    sizes, arguments = (numbers, tables[0], len(groups)), (blocks, numbers, weights, *tables, len(groups))
    library.run("weighted_sum", "fedlora_weighted_sum", sizes, arguments, device)
    return results


def mixed_sum(library: Library, groups: Sequence[Mixed], dtype: torch.dtype) -> list[RawSum]:
    """``sum_k X_k M_k`` of each group; see `Backend.mixed_sum`."""
    return mix(library, groups, [group.empty(dtype) for group in groups])


def mix(library: Library, groups: Sequence[Mixed], sums: Sequence[Tensor]) -> list[RawSum]:
    """The sums of these groups, written to ``sums``, which may be views."""
    library.functions("mixed_sum")
    if not groups:
        return []
    results = [_about(out) for out in sums]
    blocks = table([block for group in groups for block in group.blocks])
    mixers = table([mixer for group in groups for mixer in group.mixers])
    numbers = counts([len(group.blocks) for group in groups])
    tables = [table([rows(getattr(result, field)) for result in results]) for field in RawSum._fields]
    sizes, arguments = (mixers, numbers, tables[0], len(groups)), (blocks, mixers, numbers, *tables, len(groups))
    library.run("mixed_sum", "fedlora_mixed_sum", sizes, arguments, sums[0].device)
    return results


def room(library: Library, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> RawSum:
    """Room for sums (N, p, q) in ``dtype`` and for what is said of them."""
    return _about(library.empty(shape, dtype, device))


def _device(tensors: Iterable[Tensor]) -> torch.device:
    """Where the first of them lies; the CPU if there is none."""
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _about(sums: Tensor) -> RawSum:
    """``sums`` (N, p, q), to be filled, and room for what is said of it."""
    values = [torch.empty(len(sums), dtype=torch.float64, device=sums.device) for _ in range(2)]
    codes = [torch.empty(len(sums), dtype=torch.int32, device=sums.device) for _ in range(2)]
    return RawSum(sums, *values, *codes)
