"""A factor that all clients hold in common: whose it is, and the exact pair that it makes with the weighted sum of the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Info
from fedlora_kernels.linalg import update_gram
from fedlora_kernels.methods.contract import Group, Outcome
from fedlora_kernels.methods.factors import norms, pair_outcome, zero_outcome

__all__ = ["common_A", "flagged", "holders", "leaders", "summed", "summed_norms", "with_common_A", "with_common_B"]


def with_common_A(group: Group) -> Outcome:
    """The pair ``(sum_k w_k s_k [B_k | 0], A)`` where every ``A_k = A[:r_k]``: its product is D for any weights.

    A is that of `leaders`, unchanged. ``error`` is 0; the bound holds the rounding of the sum and of the answer.
    """
    if not any(group.ranks):
        return zero_outcome(group)
    A, rank = common_A(group)
    weight = group.weight * group.scale
    B = summed(group.B, weight, A.shape[1])

    def gap(rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        terms = _products(summed_norms(group.B, weight, A.shape[1]), A.mT)
        return _exact(group, B, A, (len(group.B) + 2) * U64 * terms + rounding)

    outcome = pair_outcome(group, B, A, gap)
    return dataclasses.replace(flagged(outcome, group, group.A), rank=rank)


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
    weight = group.weight * torch.where(largest == 0.0, 1.0, size / largest)
    B = _chosen(group.B, leader[:, 0]) * group.scale.gather(1, leader).to(group.device)[:, :, None]
    rights = [A.mT for A in group.A]
    A = summed(rights, weight, B.shape[2]).mT

    def gap(rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        terms = _products(summed_norms(rights, weight, B.shape[2]), B)
        return _exact(group, B, A, (len(group.B) + 6) * U64 * terms + rounding)

    return flagged(pair_outcome(group, B, A, gap), group, group.B)


def holders(group: Group) -> Tensor:
    """Whether a client takes part in a module, (N, K) bool on the host: it owns the module and its weight is not 0."""
    return (group.weight != 0.0) & (torch.tensor(group.ranks) > 0)


def leaders(group: Group) -> Tensor:
    """The client of largest rank among those that take part, the first of them, (N,) int64 on the host.

    Where nobody takes part, the owner of largest rank.
    """
    ranks = torch.tensor(group.ranks)
    return (ranks * torch.where(holders(group), ranks.max() + 1, 1)).argmax(1)


def common_A(group: Group) -> tuple[Tensor, Tensor]:
    """The A of `leaders`, (N, r, n) float64, zero below its own rank, and that rank, (N,) int64 on the host."""
    leader = leaders(group)
    return _chosen([A.mT for A in group.A], leader).mT, torch.tensor(group.ranks)[leader]


def summed(blocks: Sequence[Tensor], weight: Tensor, width: int) -> Tensor:
    """``sum_k c_k [X_k | 0]`` in float64, (N, m, width), in client order, for ``weight`` c (N, K). What has weight 0 does not enter."""
    first = blocks[0]
    total = torch.zeros(*first.shape[:2], width, dtype=torch.float64, device=first.device)
    for k, block in enumerate(blocks):
        share = weight[:, k]
        if block.shape[2] == 0 or not bool(share.any()):
            continue
        factor = share.to(total.device)[:, None, None]
        term = block.to(torch.float64) * factor
        if not bool(share.all()):
            term = torch.where(factor == 0.0, 0.0, term)
        total[:, :, : block.shape[2]] += term
    return total


def summed_norms(blocks: Sequence[Tensor], weight: Tensor, width: int) -> Tensor:
    """``sum_k |c_k| |column j of X_k|``, (N, width) float64 on the host: what the columns of `summed` measure without cancellation."""
    total = torch.zeros(weight.shape[0], width, dtype=torch.float64)
    for k, block in enumerate(blocks):
        share = weight[:, k : k + 1].abs()
        if block.shape[2] > 0 and bool(share.any()):
            total[:, : block.shape[2]] += torch.where(share == 0.0, 0.0, share * _columns(block))
    return total


def _peaks(group: Group, blocks: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each client's factor, (N, K) float64 on the host; 0 for clients that take no part, NaN for NaN."""
    taking = holders(group)
    size = torch.zeros(group.batch, len(blocks), dtype=torch.float64)
    for k, block in enumerate(blocks):
        if bool(taking[:, k].any()):
            size[:, k] = torch.linalg.vector_norm(block.flatten(1), math.inf, dim=1).to("cpu", torch.float64)
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
    bad = ~torch.isfinite(_peaks(group, blocks)).all(1)
    return dataclasses.replace(outcome, info=outcome.info | (bad * int(Info.NONFINITE)).to(outcome.info.dtype))


def _exact(group: Group, B: Tensor, A: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Error 0, its bound, and ``|D|_F^2``, of a pair whose product is D but for ``rounding`` (N,) in all; D = 0: all 0."""
    gram = update_gram([B], [A], check=False, backend=group.backend)
    energy = gram.cpu()[:, 0, 0].clamp(min=0.0)
    least = (energy - 18.0 * U64 * (norms(B) * norms(A)) ** 2).clamp(min=0.0).sqrt()
    zero = torch.zeros_like(energy)
    return zero, torch.where(energy == 0.0, zero, rounding / least), energy


def _chosen(blocks: Sequence[Tensor], client: Tensor) -> Tensor:
    """The block of ``client`` (N,) for each module, (N, m, r) float64, with zero columns up to the largest of them."""
    numbers = sorted(set(client.tolist()))
    width = max((blocks[k].shape[2] for k in numbers), default=0)
    first = blocks[0]
    chosen = torch.zeros(*first.shape[:2], width, dtype=torch.float64, device=first.device)
    for k in numbers:
        rows = (client == k).to(first.device)
        chosen[rows, :, : blocks[k].shape[2]] = blocks[k][rows].to(torch.float64)
    return chosen
