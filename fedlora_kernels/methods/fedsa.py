"""FedSA-LoRA: A is averaged, B and the task heads stay on their client (arXiv 2410.01463)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.methods.common import summed
from fedlora_kernels.methods.contract import Group, Method, Outcome, Pair, Previous, register
from fedlora_kernels.methods.factors import cast, chunked, require_equal_ranks

__all__ = ["FedSALoRA"]


@register
@dataclass(frozen=True)
class FedSALoRA(Method):
    """Client k gets its own pair ``(s_k B_k, Abar)`` with ``Abar = sum_k w_k A_k``; there is no common one.

    Weights of another sum than 1, and those of clients that lack a module, are used as they are: Abar shrinks with their sum.
    """

    name: ClassVar[str] = "fedsa"
    summary: ClassVar[str] = "weighted mean of A, every client keeps its B"
    exact: ClassVar[str] = "not applicable (personal B)"
    broadcast: ClassVar[str] = "mean A"
    download: ClassVar[str] = "r n"
    equal_ranks: ClassVar[bool] = True
    own_extras: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("personal",)

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        return chunked(group, self._pairs)

    def broadcast_rank(self, ranks: Sequence[int], rank: int, residual: int) -> float:
        """A alone is sent."""
        return rank / 2

    def _pairs(self, group: Group) -> Outcome:
        r = max(group.ranks)
        mean_A = summed([A.mT for A in group.A], group.weight, r).mT
        right, overflow, _ = cast(mean_A, group.dtype)
        finite = _finite(mean_A)
        empty = (mean_A == 0).flatten(1).all(1).cpu()
        zero = torch.ones_like(empty)
        rank = torch.full((group.batch,), r, dtype=torch.int64)
        personal: list[Pair | None] = []
        for k, own in enumerate(group.ranks):
            if own == 0:
                personal.append(None)
                continue
            B = group.B[k].to(torch.float64) * group.scale[:, k].to(group.device)[:, None, None]
            left, lost, _ = cast(B, group.dtype)
            personal.append(Pair(left, right, rank))
            overflow |= lost
            finite &= _finite(B)
            zero &= (B == 0).flatten(1).all(1).cpu()
        info = (~finite) * int(Info.NONFINITE) + overflow * int(Info.OVERFLOW)
        unknown = torch.full((group.batch,), math.nan, dtype=torch.float64)
        return Outcome(
            B=None,
            A=None,
            rank=None,
            error=unknown,
            error_bound=unknown,
            notes=((zero | empty) * int(Note.ZERO)).to(torch.int32),
            info=info.to(torch.int32),
            personal=tuple(personal),
        )


def _finite(x: Tensor) -> Tensor:
    return torch.isfinite(x).flatten(1).all(1).cpu()
