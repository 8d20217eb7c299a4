"""PreLort: each rank index averaged over the clients that have it (arXiv 2606.15963)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, register
from fedlora_kernels.methods.factors import (
    chunks,
    far_or,
    joined,
    measured_dtype,
    pair_outcome,
    stack_error,
    zero_outcome,
)
from fedlora_kernels.methods.segments import checked_levels, ranked_parts, segments
from fedlora_kernels.rows import random_rows

__all__ = ["PreLort"]


@register
@dataclass(frozen=True)
class PreLort(Method):
    """Row j of A and column j of B are means over the clients with ``r_k >= j``, by their sample counts.

    ``levels`` are the ranks of the whole federation, those of absent clients included (None: the ranks that are there); they
    and the previous pair make the rank of the answer. Indices that nobody present has keep the previous values; without any, A
    gets random rows and B zero columns. A client receives the first r_k rows and columns.

    The abstract gives means over the clients that own a segment of ranks; weights by sample count and what becomes of segments
    without an owner are our reading.
    """

    name: ClassVar[str] = "prelort"
    summary: ClassVar[str] = "means of each rank segment over the clients that have it"
    exact: ClassVar[str] = "no"
    broadcast: ClassVar[str] = "prefix of the segment means"
    download: ClassVar[str] = "r_k(m+n)"
    streams: ClassVar[bool] = True
    reads_previous: ClassVar[str | None] = "pair"

    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", checked_levels(self.levels, self.name))

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. WeightError for negative weights where ranks differ."""
        made: list[Outcome] = []
        for start, stop in chunks(group):
            runs = ranked_parts(group.part(start, stop), _rows(previous, start, stop), self.levels, self.name)
            made += [_means(*run, self.name) for run in runs]
        return joined(made)

    def client_rank(self, client_rank: int, rank: int) -> int:
        """A client receives its own rank."""
        return min(client_rank, rank)


def _rows(previous: Previous | None, start: int, stop: int) -> Previous | None:
    """What is left of modules ``start`` to ``stop``."""
    if previous is None:
        return None
    B, A = (None if x is None else x[start:stop] for x in (previous.B, previous.A))
    return dataclasses.replace(previous, B=B, A=A)


def _means(group: Group, left: tuple[Tensor, Tensor] | None, top: int, method: str) -> Outcome:
    """The outcome of modules of one r_max ``top``; ``left`` is their previous pair."""
    if top == 0:
        return zero_outcome(group)
    weight, owned = segments(group, top, method).columns()
    B, A = _owned_means(group, weight)
    _fill(group, B, A, owned, left)

    def near(part: Group, rows: slice, rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _drift(part, weight[rows], owned[rows], B[rows], A[rows], rounding)

    def pair(part: Group, rows: slice) -> tuple[Tensor, Tensor]:
        dtype = measured_dtype(part)
        return B[rows].to(dtype), A[rows].to(dtype)

    gap = far_or(near, pair)
    return pair_outcome(group, B, A, lambda rounding: gap(group, slice(0, group.batch), rounding))


def _live(group: Group) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Number, rank, B and A of the clients that take part, in float64; what has weight 0 does not enter."""
    for k, rank in enumerate(group.ranks):
        absent = group.weight[:, k] == 0.0
        if rank == 0 or bool(absent.all()):
            continue
        B, A = group.B[k].to(torch.float64), group.A[k].to(torch.float64)
        if bool(absent.any()):
            mask = absent.to(group.device)[:, None, None]
            B, A = B.masked_fill(mask, 0.0), A.masked_fill(mask, 0.0)
        yield k, rank, B, A


def _owned_means(group: Group, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_k p_kj s_k B_k[:, j]`` and ``sum_k p_kj A_k[j]`` in float64, p = ``weight`` (N, K, r_max), in client order."""
    top = weight.shape[2]
    B = torch.zeros(group.batch, group.m, top, dtype=torch.float64, device=group.device)
    A = torch.zeros(group.batch, top, group.n, dtype=torch.float64, device=group.device)
    on_A = weight.to(group.device)
    on_B = (weight * group.scale[:, :, None]).to(group.device)
    for k, r, own_B, own_A in _live(group):
        B[:, :, :r] += own_B * on_B[:, k, None, :r]
        A[:, :r] += own_A * on_A[:, k, :r, None]
    return B, A


def _fill(group: Group, B: Tensor, A: Tensor, owned: Tensor, left: tuple[Tensor, Tensor] | None) -> None:
    """Put previous values, or random rows of A, where no client has a rank index. B and A are changed in place."""
    if bool(owned.all()):
        return
    top = B.shape[2]
    empty = (~owned).to(B.device)
    dead = empty
    if left is not None:
        old_B, old_A = left[0].to(torch.float64), left[1].to(torch.float64)
        old_B, old_A = pad(old_B, (0, top - old_B.shape[2])), pad(old_A, (0, 0, 0, top - old_A.shape[1]))
        torch.where(empty[:, None, :], old_B, B, out=B)
        torch.where(empty[:, :, None], old_A, A, out=A)
        # zeros in both factors are padding, and would never get a gradient
        dead = empty & (old_B == 0).all(1) & (old_A == 0).all(2)
    for i, rows in enumerate(dead.cpu()):
        if bool(rows.any()):
            drawn = random_rows(group.seed, group.round, group.modules[i], rows.nonzero()[:, 0].tolist(), group.n)
            A[i, rows.to(A.device)] = drawn.to(A.device)


def _drift(
    group: Group, weight: Tensor, owned: Tensor, B: Tensor, A: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Relative distance of the pair from D, an upper bound of it, and ``|D|_F^2``; without cancellation, with centred columns.

    For each rank index, with its weights p of sum P over the clients that have it,
    ``D_j - B_j A_j = sum p_k (B_kj - B_j)(A_kj - A_j) + sum (w_k - p_k) B_kj A_kj + (1 - P) B_j A_j``; an index that nobody has
    adds ``-B_j A_j``.
    """
    if not any(group.ranks):  # D = 0
        size = (B.norm(dim=1) * A.norm(dim=2)).sum(1).cpu()
        error = torch.where(size == 0.0, 0.0, math.inf).to(torch.float64)
        return error, error, torch.zeros_like(error)
    lefts, rights = [], []
    for k, r, own_B, own_A in _live(group):
        folded = own_B * group.scale[:, k, None, None].to(B.device)
        lefts.append((folded - B[:, :, :r]) * weight[:, k, None, :r].to(B.device))
        rights.append(own_A - A[:, :r])
        change = group.weight[:, k, None] - weight[:, k, :r]
        if bool((change != 0.0).any()):
            lefts.append(folded * change[:, None].to(B.device))
            rights.append(own_A)
    rest = torch.where(owned, 1.0 - weight.sum(1), -1.0)
    if bool((rest.abs() > len(group.ranks) * U64).any()):  # less is the rounding of normalised weights
        lefts.append(B * rest[:, None].to(B.device))
        rights.append(A)
    ones = torch.ones(group.batch, len(lefts), dtype=torch.float64)
    return stack_error(group, lefts, rights, ones, rounding)
