"""Zero-padding: FedIT after padding every pair with zeros to the largest rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, Sums, register
from fedlora_kernels.methods.factors import mean_outcome, mean_sums

__all__ = ["ZeroPad"]


@register
@dataclass(frozen=True)
class ZeroPad(Method):
    """Factor means of pairs padded to the largest rank: zero rows under A_k, zero columns beside B_k.

    A column owned by clients of total weight v comes out as v times the mean over its owners, in each factor.
    """

    name: ClassVar[str] = "zero_pad"
    summary: ClassVar[str] = "weighted mean of the zero-padded factors"
    exact: ClassVar[str] = "no"
    broadcast: ClassVar[str] = "padded mean pair"
    download: ClassVar[str] = "r_max(m+n)"
    streams: ClassVar[bool] = True

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group."""
        return mean_outcome(group)

    def sums(self, group: Group, plan: Any) -> Sums:
        """The padded means."""
        return mean_sums(group)
