"""FFA-LoRA: A is frozen and common, B is averaged (arXiv 2403.12313)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora_kernels.methods.common import sums_with_common, with_common_A
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, Sums, register

__all__ = ["FFALoRA"]


@register
@dataclass(frozen=True)
class FFALoRA(Method):
    """``Bbar = sum_k w_k s_k [B_k | 0]`` with the frozen A of the client of largest rank; the product is D.

    Ranks may differ if the frozen factors are nested, ``A_k = A[:r_k]``. A client receives its own rank.
    """

    name: ClassVar[str] = "ffa"
    summary: ClassVar[str] = "weighted mean of B, A frozen"
    exact: ClassVar[str] = "yes (A common and frozen)"
    broadcast: ClassVar[str] = "mean B"
    download: ClassVar[str] = "r m"
    streams: ClassVar[bool] = True
    frozen: ClassVar[str | None] = "A"

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group."""
        return with_common_A(group)

    def sums(self, group: Group, plan: Any) -> Sums | None:
        """The mean of B and one A."""
        return sums_with_common(group, "A")

    def client_rank(self, client_rank: int, rank: int) -> int:
        """A client receives its own rank."""
        return min(client_rank, rank)

    def broadcast_rank(self, ranks: Sequence[int], rank: int, residual: int) -> float:
        """B alone is sent."""
        return super().broadcast_rank(ranks, rank, residual) / 2
