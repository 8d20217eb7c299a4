"""FedIT: the weighted mean of each factor (arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, Sums, register
from fedlora_kernels.methods.factors import mean_outcome, mean_sums, require_equal_ranks

__all__ = ["FedIT"]


@register
@dataclass(frozen=True)
class FedIT(Method):
    """``Bbar = sum_k w_k s_k B_k`` and ``Abar = sum_k w_k A_k``, for clients of one rank.

    The product is not D unless all A (or all B) agree; ``error`` reports the distance exactly.
    """

    name: ClassVar[str] = "fedit"
    summary: ClassVar[str] = "weighted mean of each factor"
    exact: ClassVar[str] = "no, unless all A (or all B) are equal"
    broadcast: ClassVar[str] = "mean pair"
    download: ClassVar[str] = "r(m+n)"
    streams: ClassVar[bool] = True
    equal_ranks: ClassVar[bool] = True

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        return mean_outcome(group)

    def sums(self, group: Group, plan: Any) -> Sums:
        """The factor means. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        return mean_sums(group)
