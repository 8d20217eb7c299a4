"""FlexLoRA: the exact sum, truncated for each client to the rank that it trains (arXiv 2402.11505)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, register
from fedlora_kernels.methods.products import truncated_sum

__all__ = ["FlexLoRA"]


@register
@dataclass(frozen=True)
class FlexLoRA(Method):
    """Truncated SVD of ``D = sum_k w_k s_k B_k A_k``, singular values on B; client k receives its prefix of length r_k.

    The common pair has the rank of the largest client, or that of D if it is smaller. A client whose r_k exceeds it receives
    random rows of A and zero columns of B beyond it: our choice, so that the product stays and the new directions can learn.
    """

    name: ClassVar[str] = "flexlora"
    summary: ClassVar[str] = "exact sum of the updates, truncated to each client's rank"
    exact: ClassVar[str] = "up to rank-r_k truncation"
    broadcast: ClassVar[str] = "truncated SVD pair"
    download: ClassVar[str] = "r_k(m+n)"
    product_only: ClassVar[bool] = True
    columnwise: ClassVar[bool] = False
    sorted_pair: ClassVar[bool] = True

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group; a module whose update is zero answers p = 1, B = 0, A = e_1."""
        largest = max(group.trained, default=0)
        return truncated_sum(group, Energy(1.0).capped(max(1, largest)), "left")

    def client_rank(self, client_rank: int, rank: int) -> int:
        """A client receives its own rank."""
        return client_rank
