"""Rank segments: how the weights of the clients that own a range of rank indices are brought to the sum of all weights."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.errors import InputError, MismatchError, WeightError
from fedlora_kernels.methods.contract import Group, Previous

__all__ = ["Segments", "checked_levels", "ranked_parts", "segments"]

COUNTS = 1 << 22
"""Sample counts up to which weights are recognised as ratios of counts."""


@dataclass(frozen=True)
class Segments:
    """The rank indices ``bounds[s]`` to ``bounds[s + 1]`` of M segments, for N modules and K clients.

    ``weight`` (N, K, M) float64 on the host: the weight of client k in segment s, 0 where it has no part in it. ``owned`` (N, M)
    bool: whether any client has.
    """

    bounds: tuple[int, ...]
    weight: Tensor
    owned: Tensor

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First index and end of each segment."""
        return list(itertools.pairwise(self.bounds))

    def columns(self) -> tuple[Tensor, Tensor]:
        """``weight`` and ``owned`` of each rank index, (N, K, r_max) and (N, r_max)."""
        widths = torch.tensor([stop - start for start, stop in self.spans], dtype=torch.int64)
        return self.weight.repeat_interleave(widths, dim=2), self.owned.repeat_interleave(widths, dim=1)


def segments(group: Group, top: int, method: str) -> Segments:
    """The segments of a group up to rank ``top``, cut at the ranks of its clients.

    A client of rank r_k takes part up to index r_k. In a segment its weight is ``w_k W / N_s``, with N_s the sum over the
    clients that take part and W the sum of all, 1 where weights are normalised; w_k itself, to the bit, where all take part.
    A client that lacks the modules and keeps its weight (missing="zero") counts in every N_s: its update is zero, not absent.
    Levels between the ranks of clients would cut a segment in two of the same weights, so they are not needed here.
    Raises WeightError for weights below 0 where ranks differ: a mean over some of the clients is then not defined.
    """
    bounds = tuple(sorted({0, *group.ranks, top}))
    rows, place = torch.unique(group.weight, dim=0, return_inverse=True)
    for row, weights in enumerate(rows.tolist()):
        live = [rank for rank, weight in zip(group.ranks, weights, strict=True) if weight != 0.0 and rank > 0]
        if min(weights) < 0.0 and len(set(live)) > 1:
            i = place.tolist().index(row)
            k = weights.index(min(weights))
            raise WeightError(
                f"module {group.modules[i]!r}: client {group.clients[k]} (counted from 0) has weight {weights[k]:g}; method "
                f"{method!r} averages each segment of ranks over the clients that have it and needs weights >= 0 where ranks "
                "differ. Use florist or flora, which take weights of any sign"
            )
    tables = torch.tensor(
        [_table(tuple(weights), group.ranks, bounds) for weights in rows.tolist()], dtype=torch.float64
    )
    weight = tables.reshape(len(rows), len(group.ranks), len(bounds) - 1)[place]
    return Segments(bounds, weight, (weight != 0.0).any(1))


def checked_levels(levels: Any, method: str) -> tuple[int, ...] | None:
    """``levels`` as a tuple; InputError unless they are ascending positive integers, or None."""
    if levels is None:
        return None
    values = tuple(levels) if isinstance(levels, Sequence) and not isinstance(levels, str) else ()
    whole = all(isinstance(level, numbers.Integral) and not isinstance(level, bool) for level in values)
    if not values or not whole or values[0] < 1 or any(b <= a for a, b in itertools.pairwise(values)):
        raise InputError(f"{method}: levels is {levels!r}; ascending ranks >= 1 are needed, such as (4, 8, 16)")
    return tuple(int(level) for level in values)


def ranked_parts(
    group: Group, previous: Previous | None, levels: Sequence[int] | None, method: str
) -> Iterator[tuple[Group, tuple[Tensor, Tensor] | None, int]]:
    """Runs of modules of one r_max: the part of the group, its previous pair (B, A) if there is one, and r_max.

    r_max is the largest of the clients' ranks, of ``levels``, and of the previous pair's own rank: padding with zeros to the
    width of a batch does not count, so the answer does not depend on the neighbours of a module. MismatchError where one of these
    reaches beyond what clients trained that have their start beside it: indices from there on are the start's.
    """
    _check_reach(group, max(levels or (), default=0), "levels", method)
    top = max([*group.ranks, *(levels or ())], default=0)
    if previous is None or previous.B is None or previous.A is None:
        yield group, None, top
        return
    B, A = previous.B.to(group.device), previous.A.to(group.device)
    used = (B != 0).any(1) | (A != 0).any(2)
    width = (used * torch.arange(1, used.shape[1] + 1, device=used.device)).amax(1) if used.shape[1] else used.sum(1)
    _check_reach(group, max(width.tolist(), default=0), "the previous pair", method)
    start = 0
    for rank, run in itertools.groupby(max(top, own) for own in width.tolist()):
        stop = start + len(list(run))
        yield group.part(start, stop), (B[start:stop, :, :rank], A[start:stop, :rank]), rank
        start = stop


def _check_reach(group: Group, rank: int, what: str, method: str) -> None:
    trained = max(group.trained, default=0)
    if any(group.starts) and rank > trained:
        raise MismatchError(
            f"module {group.modules[0]!r}: {what} of rank {rank}, but clients trained {trained} and have what they started from in the "
            f"columns beyond; method {method!r} needs ranks that mean the same in all. Leave {what} out, or use florist or flexlora"
        )


@lru_cache(maxsize=256)
def _table(weights: tuple[float, ...], ranks: tuple[int, ...], bounds: tuple[int, ...]) -> list[list[float]]:
    """Weight of each client (rows) in each segment (columns)."""
    total = math.fsum(weights)
    whole = 1.0 if abs(total - 1.0) <= 4 * len(weights) * U64 else total
    columns = []
    for stop in bounds[1:]:
        owned = any(w != 0.0 and rank >= stop for w, rank in zip(weights, ranks, strict=True))
        part = [w != 0.0 and (rank >= stop or rank == 0) for w, rank in zip(weights, ranks, strict=True)]
        share = list(weights)
        if owned and sum(part) < sum(w != 0.0 for w in weights):
            sum_s = math.fsum(w for w, member in zip(weights, part, strict=True) if member)
            share = [whole * _ratio(w / sum_s) if member else 0.0 for w, member in zip(weights, part, strict=True)]
        columns.append([p if rank >= stop else 0.0 for p, rank in zip(share, ranks, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def _ratio(x: float) -> float:
    """The ratio of sample counts that ``x`` is to within rounding, else ``x``.

    Normalised weights are rounded, and w_k / N_s with them, differently for every set of other clients. Ratios of counts lie
    2^-44 apart or more, so the nearest one is the same for all, and what a segment becomes does not depend on who else is there.
    """
    near = float(Fraction(x).limit_denominator(COUNTS))
    return near if abs(near - x) <= 16 * U64 * x else x
