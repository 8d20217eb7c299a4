"""A factor that all clients hold in common: whose it is, and the exact pair that it makes with the weighted sum of the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Info
from fedlora_kernels.linalg import WeightedSum, update_gram, weighted_sum
from fedlora_kernels.methods.contract import Group, Outcome, Sums
from fedlora_kernels.methods.factors import GRAM_ERROR, norms, sums_outcome, zero_outcome

__all__ = [
    "common_A",
    "flagged",
    "holders",
    "leaders",
    "summed",
    "summed_norms",
    "sums_with_common",
    "with_common_A",
    "with_common_B",
]


def with_common_A(group: Group) -> Outcome:
    """The pair ``(sum_k w_k s_k [B_k | 0], A)`` where every ``A_k = A[:r_k]``: its product is D for any weights.

    A is that of `leaders`, unchanged. ``error`` is 0; the bound holds the rounding of the sum and of the answer.
    """
    if not any(group.ranks):
        return zero_outcome(group)
    weight, leader = group.weight * group.scale, leaders(group)
    A = _chosen(group, group.A, leader, group.dtype)
    B = _sum(group, group.B, weight, A.sum.shape[1], group.dtype)

    def gap(part: Group, rows: slice, rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A = common_A(part)
        terms = _products(summed_norms(part.B, weight[rows], A.shape[1]), A.mT)
        total = summed(part, part.B, weight[rows], A.shape[1])
        return _exact(part, total, A, (len(part.B) + 2) * U64 * terms + rounding)

    outcome = flagged(sums_outcome(group, B, A, gap), group, group.A)
    return dataclasses.replace(outcome, rank=torch.tensor(group.ranks)[leader])


def with_common_B(group: Group) -> Outcome:
    """The pair ``(s B, sum_k w_k A_k)`` for clients of one rank where every ``s_k B_k`` is one s B: its product is D.

    Where clipping has shrunk some scales, s B is the largest, and ``A_k`` counts as much less as its client was shrunk.
    """
    if not any(group.ranks):
        return zero_outcome(group)
    leader = leaders(group)[:, None]
    size = _peaks(group, group.B) * group.scale.abs()
    leader = torch.where(size.amax(1, keepdim=True) > size.gather(1, leader), size.argmax(1, keepdim=True), leader)
    largest = size.gather(1, leader)
    shrunk = size / largest  # not finite where a factor is, or where all are zero
    weight = group.weight * torch.where(torch.isfinite(shrunk), shrunk, 1.0)
    scale = group.scale.gather(1, leader)
    rank = max(group.ranks)

    def pair(part: Group, rows: slice, dtype: torch.dtype) -> tuple[WeightedSum, WeightedSum]:
        B = _chosen(part, part.B, leader[rows, 0], dtype, scale[rows])
        return B, _sum(part, part.A, weight[rows], rank, dtype)

    def gap(part: Group, rows: slice, rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, A = (total.sum for total in pair(part, rows, torch.float64))
        terms = _products(summed_norms([A.mT for A in part.A], weight[rows], rank), B)
        return _exact(part, B, A, (len(part.B) + 6) * U64 * terms + rounding)

    return flagged(sums_outcome(group, *pair(group, slice(None), group.dtype), gap), group, group.B)


def sums_with_common(group: Group, factor: str) -> Sums | None:
    """The sums that the pair with ``factor`` in common is, where that factor is the same in all clients; None where it takes more.

    For "B" the scales of the clients are equal as well.
    """
    leader = leaders(group)
    if bool((torch.tensor(group.ranks)[leader] < max(group.ranks)).any()):
        return None
    one = torch.nn.functional.one_hot(leader, len(group.ranks)).to(torch.float64)
    return Sums(group.weight * group.scale, one) if factor == "A" else Sums(one * group.scale, group.weight)


def holders(group: Group) -> Tensor:
    """Whether a client takes part in a module, (N, K) bool on the host: it owns the module and its weight is not 0."""
    return (group.weight != 0.0) & (torch.tensor(group.ranks) > 0)


def leaders(group: Group) -> Tensor:
    """The client of largest rank among those that take part, the first of them, (N,) int64 on the host.

    Where nobody takes part, the owner of largest rank.
    """
    ranks = torch.tensor(group.ranks)
    return (ranks * torch.where(holders(group), ranks.max() + 1, 1)).argmax(1)


def common_A(group: Group) -> Tensor:
    """The A of `leaders`, (N, r, n) float64, zero below its own rank."""
    A: Tensor = _chosen(group, group.A, leaders(group), torch.float64).sum
    return A


def summed(group: Group, blocks: Sequence[Tensor], weight: Tensor, width: int) -> Tensor:
    """``sum_k c_k [X_k | 0]`` in float64, (N, m, width), in client order, for ``weight`` c (N, K). What has weight 0 does not enter."""
    total: Tensor = _sum(group, blocks, weight, width, torch.float64).sum
    return total


def summed_norms(blocks: Sequence[Tensor], weight: Tensor, width: int) -> Tensor:
    """``sum_k |c_k| |column j of X_k|``, (N, width) float64 on the host: what the columns of `summed` measure without cancellation."""
    total = torch.zeros(weight.shape[0], width, dtype=torch.float64)
    for k, block in enumerate(blocks):
        share = weight[:, k : k + 1].abs()
        if block.shape[2] > 0 and bool(share.any()):
            total[:, : block.shape[2]] += torch.where(share == 0.0, 0.0, share * _columns(block))
    return total


def _sum(group: Group, blocks: Sequence[Tensor], weight: Tensor, rank: int, dtype: torch.dtype) -> WeightedSum:
    """``sum_k c_k X_k`` rounded once to ``dtype``, padded to ``rank``, over the clients of no larger rank."""
    keep = [k for k, own in enumerate(group.ranks) if 0 < own <= rank]
    options: dict[str, Any] = {"dtype": dtype, "check": False, "backend": group.backend}
    total: WeightedSum = weighted_sum([blocks[k] for k in keep], weights=weight[:, keep], **options)
    return total


def _chosen(
    group: Group, blocks: Sequence[Tensor], client: Tensor, dtype: torch.dtype, scale: Tensor | float = 1.0
) -> WeightedSum:
    """The block of ``client`` (N,) for each module times ``scale`` (N, 1), padded with zeros to the largest rank of them."""
    one = torch.nn.functional.one_hot(client, len(blocks)).to(torch.float64)
    return _sum(group, blocks, one * scale, max(group.ranks[k] for k in client.tolist()), dtype)


def _peaks(group: Group, blocks: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each client's factor, (N, K) float64 on the host; 0 for clients that take no part, NaN for NaN."""
    taking = holders(group)
    size = torch.zeros(group.batch, len(blocks), dtype=torch.float64)
    for k, block in enumerate(blocks):
        if bool(taking[:, k].any()):
            flat = block.flatten(1)
            size[:, k] = torch.maximum(flat.amax(1), -flat.amin(1)).to("cpu", torch.float64)
    return torch.where(taking, size, 0.0)


def _columns(block: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
    return norm.cpu()


def _products(columns: Tensor, other: Tensor) -> Tensor:
    """``sum_j c_j |column j of X|`` (N,), which bounds what an error of that size in each column adds to the product."""
    return (columns * _columns(other)).sum(1)


def flagged(outcome: Outcome, group: Group, blocks: Sequence[Tensor]) -> Outcome:
    """``outcome``, its info marking what is not finite in the common factor of any client, not only in that which is answered."""
    assert outcome.info is not None
    taking = holders(group)
    bad = torch.zeros(group.batch, dtype=torch.bool)
    for k, block in enumerate(blocks):
        if bool(taking[:, k].any()):
            bad |= taking[:, k] & ~_finite(block)
    return dataclasses.replace(outcome, info=outcome.info | (bad * int(Info.NONFINITE)).to(outcome.info.dtype))


def _finite(block: Tensor) -> Tensor:
    """Whether all numbers of each matrix are finite, (N,) bool on the host."""
    flat = block.flatten(1)
    # a sum takes a fraction of the time and is finite only if its terms are; where it is not, it may have overflowed
    finite = torch.isfinite(flat.sum(1, dtype=torch.promote_types(block.dtype, torch.float32)))
    if not bool(finite.all()):
        finite = torch.isfinite(flat).all(1)
    return finite.cpu()


def _exact(group: Group, B: Tensor, A: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Error 0, its bound, and ``|D|_F^2``, of a pair whose product is D but for ``rounding`` (N,) in all; D = 0: all 0."""
    gram = update_gram([B], [A], check=False, backend=group.backend)
    energy = gram.cpu()[:, 0, 0].clamp(min=0.0)
    least = (energy - GRAM_ERROR * (norms(B) * norms(A)) ** 2).clamp(min=0.0).sqrt()
    zero = torch.zeros_like(energy)
    return zero, torch.where(energy == 0.0, zero, rounding / least), energy
