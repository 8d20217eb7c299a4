"""RoLoRA: A and B are trained and averaged in turn, the other one is frozen (arXiv 2502.01755)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora_kernels.methods.common import sums_with_common, with_common_A, with_common_B
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, Sums, register
from fedlora_kernels.methods.factors import require_equal_ranks

__all__ = ["RoLoRA"]


@register
@dataclass(frozen=True)
class RoLoRA(Method):
    """Even rounds: A frozen, ``Bbar = sum_k w_k s_k B_k``. Odd rounds: B frozen, ``Abar = sum_k w_k A_k``. The product is D in each.

    Rounds count from 0; B is trained first, because with B = 0 frozen A would have no gradient.
    """

    name: ClassVar[str] = "rolora"
    summary: ClassVar[str] = "weighted mean of B and of A in turn, the other frozen"
    exact: ClassVar[str] = "yes in each round"
    broadcast: ClassVar[str] = "mean of the trained factor"
    download: ClassVar[str] = "r m or r n"
    streams: ClassVar[bool] = True
    equal_ranks: ClassVar[bool] = True
    frozen: ClassVar[str | None] = "alternating"
    needs_round: ClassVar[bool] = True

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        work = with_common_A if self.frozen_factor(group.round) == "A" else with_common_B
        return work(group)

    def sums(self, group: Group, plan: Any) -> Sums | None:
        """The mean of the trained factor and one of the frozen ones. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        return sums_with_common(group, self.frozen_factor(group.round))

    def frozen_factor(self, round: int) -> str:  # noqa: A002
        """A in even rounds, B in odd ones."""
        return "B" if round % 2 else "A"

    def broadcast_rank(self, ranks: Sequence[int], rank: int, residual: int) -> float:
        """The trained factor alone is sent."""
        return rank / 2
