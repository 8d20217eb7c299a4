"""HetLoRA: zero-padding with weights by the norm of each client's whole update (arXiv 2401.06432)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedlora_kernels.methods.contract import Census, Group, Method, Outcome, Previous, Sums, register
from fedlora_kernels.methods.factors import mean_outcome, mean_sums

__all__ = ["HetLoRA"]


@register
@dataclass(frozen=True)
class HetLoRA(Method):
    """Factor means with ``p_k = |D_k| / sum_j |D_j|``, norms over all modules together; all norms zero: the sample weights.

    A client receives the first r_k rows and columns.
    """

    name: ClassVar[str] = "hetlora"
    summary: ClassVar[str] = "zero-padded factor means weighted by update norms"
    exact: ClassVar[str] = "no"
    broadcast: ClassVar[str] = "prefix of the weighted padded mean"
    download: ClassVar[str] = "r_k(m+n)"
    streams: ClassVar[bool] = True
    uses_weights: ClassVar[bool] = False
    needs_decision: ClassVar[bool] = True

    def decide(self, stats: Mapping[str, np.ndarray], census: Census) -> np.ndarray:
        """Weight p_k of each client, (K,)."""
        assert census.squares is not None
        norms = np.sqrt(np.maximum(census.squares.sum(0), 0.0))
        total = norms.sum()
        share: np.ndarray = norms / total if total > 0.0 else census.weight
        return share

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group with the weights of ``plan``, over the owners where missing modules renormalise."""
        return mean_outcome(group, torch.from_numpy(plan))

    def sums(self, group: Group, plan: Any) -> Sums:
        """The padded means with the weights of ``plan``."""
        return mean_sums(group, torch.from_numpy(plan))

    def describe(self, plan: np.ndarray, clients: Sequence[str]) -> dict[str, Any]:
        """Weight of each client."""
        return {"weights": dict(zip(clients, plan.tolist(), strict=True))}

    def client_rank(self, client_rank: int, rank: int) -> int:
        """A client receives its own rank."""
        return min(client_rank, rank)
