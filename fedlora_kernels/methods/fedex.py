"""FedEx-LoRA: the factor means, and what their product misses is added to the base weight (arXiv 2410.09432)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_kernels.backends.contract import Info
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Group, Method, Outcome, Pair, Previous, register
from fedlora_kernels.methods.factors import cast, chunked, padded_mean, pair_outcome, require_equal_ranks, stack_error
from fedlora_kernels.methods.gap import Gap, mean_gap
from fedlora_kernels.methods.products import stack_svd

__all__ = ["FedEx"]


@register
@dataclass(frozen=True)
class FedEx(Method):
    """The pair of FedIT and the residual ``E = D - Bbar Abar``, so that pair + residual = D.

    E is a stack of at most (K-1) r columns, formed without cancellation (`mean_gap`); a stack that would be wider than
    min(m, n) is compressed to its numerical rank, exactly. A module without a gap has a residual of rank 0. ``error`` is
    that of the pair alone.
    """

    name: ClassVar[str] = "fedex"
    summary: ClassVar[str] = "weighted mean of each factor, and what it misses merged into the base"
    exact: ClassVar[str] = "yes"
    broadcast: ClassVar[str] = "mean pair + residual"
    download: ClassVar[str] = "r(m+n) + min((K-1) r (m+n), m n)"
    equal_ranks: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("common", "residual")

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        return chunked(group, _mean_and_residual)

    def broadcast_rank(self, ranks: Sequence[int], rank: int, residual: int) -> float:
        """The pair and the residual."""
        return rank + residual


def _mean_and_residual(group: Group) -> Outcome:
    mean_B, mean_A = padded_mean(group, group.weight)
    gap = mean_gap(group, mean_B)
    ones = torch.ones(gap.live.shape, dtype=torch.float64)
    outcome = pair_outcome(
        group, mean_B, mean_A, lambda rounding: stack_error(group, gap.lefts(), gap.rights(), ones, rounding)
    )
    residual, info = _residual(group, gap)
    return dataclasses.replace(outcome, residual=residual, info=outcome.info | info)  # type: ignore[operator]


def _residual(group: Group, gap: Gap) -> tuple[Pair, Tensor]:
    """The live blocks side by side in the dtype of the group, compressed where they are wider than the matrix; and ``info``."""
    live = gap.live.sum(1)
    order = (~gap.live).to(torch.int8).argsort(dim=1, stable=True)[:, : max(live.tolist(), default=0)]
    order = order.to(group.device)[:, :, None, None]
    left = gap.L.take_along_dim(order, 1).transpose(1, 2).flatten(2)
    right = gap.R.take_along_dim(order, 1).flatten(1, 2)
    rank = live * gap.L.shape[-1]
    info = torch.zeros(group.batch, dtype=torch.int32)
    wide = rank > min(group.m, group.n)
    if bool(wide.any()):
        chosen = wide.to(group.device)
        one = torch.ones(int(wide.sum()), 1, dtype=torch.float64)
        svd = stack_svd(group, [left[chosen]], [right[chosen]], one, Energy(1.0), "balanced")
        beyond = left.shape[-1] - svd.left.shape[-1]
        left[chosen] = pad(svd.left.to(torch.float64), (0, beyond))
        right[chosen] = pad(svd.right.to(torch.float64), (0, 0, 0, beyond))
        rank[wide] = svd.rank.cpu()
        info[wide] = svd.info.cpu()
    width = max(rank.tolist(), default=0)
    B, lost_B, _ = cast(left[:, :, :width], group.dtype)
    A, lost_A, _ = cast(right[:, :width], group.dtype)
    return Pair(B, A, rank), info | ((lost_B | lost_A) * int(Info.OVERFLOW)).to(torch.int32)
