"""The pairs that a client trains, and their prefixes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["Pairs", "prefix", "top_rank"]

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""(B, A) of each module by name: B ``(m, r, ...)``, A ``(r, n, ...)``, matrices or the kernels of convolutions."""


def prefix(pairs: Pairs, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The first ``rank`` columns of every B and rows of every A, as views that gradients pass; a smaller pair stays whole."""
    return {name: (B[:, :rank], A[:rank]) for name, (B, A) in pairs.items()}


def top_rank(pairs: Pairs) -> int:
    """The largest rank of the pairs, which is the client's; 0 where there are none."""
    return max((A.shape[0] for _, A in pairs.values()), default=0)
