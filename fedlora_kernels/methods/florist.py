"""FLoRIST: the exact weighted sum of the updates, truncated to the rank that a rule chooses (arXiv 2506.09199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import Energy, RankRule
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, register
from fedlora_kernels.methods.products import truncated_sum

__all__ = ["Florist"]

DEFAULT_RULE = Energy(0.9)
OUTPUTS = ("left", "balanced")


@register
@dataclass(frozen=True)
class Florist(Method):
    """Truncated SVD of ``D = sum_k w_k s_k B_k A_k``, never formed; one pair of rank p for all clients.

    ``rule`` chooses p. ``output`` places the singular values: "left" on B (A has orthonormal rows) or "balanced", half on each.
    The prefix of length r of the pair is the best rank-r approximation of D.
    """

    name: ClassVar[str] = "florist"
    summary: ClassVar[str] = "exact sum of the updates, truncated by a rank rule"
    exact: ClassVar[str] = "up to energy tau; yes at tau = 1"
    broadcast: ClassVar[str] = "truncated SVD pair, rank p"
    download: ClassVar[str] = "p(m+n)"
    takes_rule: ClassVar[bool] = True
    product_only: ClassVar[bool] = True
    columnwise: ClassVar[bool] = False
    sorted_pair: ClassVar[bool] = True

    rule: RankRule = DEFAULT_RULE
    output: str = "left"

    def __post_init__(self) -> None:
        if not isinstance(self.rule, RankRule):
            raise InputError(f"florist: rule is {self.rule!r}; a rank rule such as Energy(0.9) or Rank(16) is needed")
        if self.output not in OUTPUTS:
            raise InputError(f"florist: output is {self.output!r}; one of {', '.join(OUTPUTS)} is needed")

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group; a module whose update is zero answers p = 1, B = 0, A = e_1."""
        return truncated_sum(group, self.rule, self.output)

    def options(self) -> dict[str, Any]:
        """Options as plain values; the rule stands apart in a report."""
        return {"output": self.output}
