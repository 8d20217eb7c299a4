"""Krum and multi-Krum: the clients nearest to their nearest neighbours (arXiv 1703.02757)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora_kernels.errors import InputError
from fedlora_kernels.methods.contract import register
from fedlora_kernels.methods.robust import (
    NOISE,
    RobustRule,
    Verdict,
    ascending,
    count,
    kept,
    scaled,
    squared_distances,
)

__all__ = ["Krum", "MultiKrum"]


@register
@dataclass(frozen=True)
class Krum(RobustRule):
    """The one client with the lowest sum of squared distances to its ``K - f - 2`` nearest neighbours; ties: the lowest index.

    ``f`` is the number of clients that may be hostile; ``K >= 2 f + 3`` is needed, except that a client alone is chosen. Scores that
    rounding hides apart count as ties (our reading). Scores are these sums.
    """

    name: ClassVar[str] = "krum"
    summary: ClassVar[str] = "the one update that is nearest to its neighbours"

    f: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f is None:
            raise InputError(
                f"{self.name}: f is None; the number of clients that may be hostile is needed, "
                "such as f=1 (at least 2 f + 3 clients)"
            )
        object.__setattr__(self, "f", count(self.name, "f", self.f, 0))

    def judge(self, gram: np.ndarray, weight: np.ndarray) -> Verdict:
        """The client of lowest score alone."""
        return self._nearest(gram, weight, 1)

    def _nearest(self, gram: np.ndarray, weight: np.ndarray, q: int) -> Verdict:
        K, f = len(weight), self.f or 0
        if K == 1:
            return Verdict(weight, np.ones(1), np.zeros(1))
        if 2 * f + 3 > K:
            raise InputError(
                f"{self.name}: f is {f}, which needs at least {2 * f + 3} clients; {K} take part. Lower f, add clients or use "
                "geometric_median"
            )
        gram, unit = scaled(gram)
        scores, noise = _scores(gram, K - f - 2)
        keep = np.sort(ascending(scores, noise)[:q])
        with np.errstate(over="ignore"):
            scores = scores * unit * unit
        return Verdict(kept(weight, keep), np.ones(K), scores)


@register
@dataclass(frozen=True)
class MultiKrum(Krum):
    """The ``q`` clients with the lowest scores of `Krum`, with their own weights brought to the whole sum.

    ``q`` is ``K - f`` by default (our choice); q = 1 is Krum, q = K the plain weighted mean.
    """

    name: ClassVar[str] = "multi_krum"
    summary: ClassVar[str] = "mean of the q updates that are nearest to their neighbours"

    q: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q is not None:
            object.__setattr__(self, "q", count(self.name, "q", self.q, 1))

    def judge(self, gram: np.ndarray, weight: np.ndarray) -> Verdict:
        """The q clients of lowest score."""
        K = len(weight)
        q = K - (self.f or 0) if self.q is None else self.q
        if q > K > 1:
            raise InputError(f"{self.name}: q is {q}, but {K} clients take part; at most {K} is needed")
        return self._nearest(gram, weight, q)


def _scores(gram: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the smallest squared distances to others, and what rounding may make of each; (K,)."""
    distances = squared_distances(gram)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argsort(1, kind="stable")[:, :neighbours]
    squares = gram.diagonal()
    noise = NOISE * (squares[:, None] + squares[nearest]).sum(1)
    return np.take_along_axis(distances, nearest, 1).sum(1), noise
