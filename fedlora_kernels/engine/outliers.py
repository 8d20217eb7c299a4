"""Whose norm stands out from those of the others: one rule for inspections and for every run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["outlier_scores", "outliers"]

FEWEST = 4
"""Norms of which one can stand out: of three, two that happen to be alike would make an outlier of the third."""
SIGMA = 1.4826
"""From the median distance of a normal distribution to its standard deviation."""
SCORE = 3.5
FACTOR = 2.0


def outlier_scores(norms: Sequence[float | None]) -> list[float | None]:
    """Modified z-scores of the log-norms, ``log(norm / median) / (1.4826 median |log(norm / median)|)``.

    None for a norm that is zero, infinite or unknown, for fewer than four of the others, and where the others do not differ at all.
    """
    distances = _distances(norms)
    spread = _spread(distances)
    return [None if distance is None or spread == 0.0 else distance / spread for distance in distances]


def outliers(norms: Sequence[float | None]) -> dict[int, str]:
    """What is said of the norms, by their position, that are more than 3.5 robust deviations and a factor of 2 from the median."""
    distances = _distances(norms)
    bound = max(SCORE * _spread(distances), math.log(FACTOR))
    return {
        k: f"the norm of its update is {_times(distance)} times the median of all"
        for k, distance in enumerate(distances)
        if distance is not None and abs(distance) > bound
    }


def _distances(norms: Sequence[float | None]) -> list[float | None]:
    """Logarithms less their median; None for all where too few are known."""
    logs = [math.log(norm) if norm and math.isfinite(norm) else None for norm in norms]
    known = [value for value in logs if value is not None]
    if len(known) < FEWEST:
        return [None] * len(norms)
    middle = statistics.median(known)
    return [None if value is None else value - middle for value in logs]


def _spread(distances: Sequence[float | None]) -> float:
    known = [abs(distance) for distance in distances if distance is not None]
    return SIGMA * statistics.median(known) if known else 0.0


def _times(distance: float) -> str:
    """``exp(distance)`` in three digits, also where that leaves float64."""
    if abs(distance) < 700.0:
        return f"{math.exp(distance):.3g}"
    return f"1e{distance / math.log(10.0):+.0f}"
