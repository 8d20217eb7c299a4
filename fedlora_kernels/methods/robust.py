"""Robust rules: coefficients of the clients from the inner products of their updates, never from raw factors."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.errors import InputError, NonFiniteError, WeightError
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous
from fedlora_kernels.methods.products import truncated_sum

__all__ = [
    "NOISE",
    "RobustRule",
    "Verdict",
    "ascending",
    "count",
    "describe_verdict",
    "kept",
    "near_twins",
    "scaled",
    "squared_distances",
]

EXACT = Energy(1.0)
NOISE = 1e3 * U64
"""Share of ``|D_i|^2 + |D_j|^2`` below which a squared distance taken from inner products is rounding."""
SCOPES = ("model", "matrix")


class Verdict(NamedTuple):
    """What a rule decides of K clients, float64 on the host.

    ``weight`` (K,) replaces w_k, 0 rejects a client; its sum is that of the weights given. ``factor`` (K,) multiplies s_k, 1 except
    for clipping. ``scores`` (K,) are what the rule judged by, NaN for an absent client; None where it judged by nothing.
    """

    weight: np.ndarray
    factor: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True)
class RobustRule(Method):
    """Base of the robust rules. In front of a method a rule replaces weights or scales; as a method it means their exact sum.

    ``scope``: "model" takes one decision per client on the Gram summed over all modules, "matrix" one per module among its owners.
    Gauge and scale of a client's factors change no decision, as only ``D_k = s_k B_k A_k`` is looked at. No Byzantine guarantee is
    claimed for clients that are not i.i.d. Subclasses give `judge`.
    """

    exact: ClassVar[str] = "yes, of the coefficients it chooses"
    broadcast: ClassVar[str] = "truncated SVD pair, rank p"
    download: ClassVar[str] = "p(m+n)"
    product_only: ClassVar[bool] = True
    columnwise: ClassVar[bool] = False
    sorted_pair: ClassVar[bool] = True

    scope: str = field(default="model", kw_only=True)

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InputError(f"{self.name}: scope is {self.scope!r}; one of {', '.join(SCOPES)} is needed")

    def coefficients(self, gram: np.ndarray, weight: np.ndarray) -> Verdict:
        """Judge K clients by ``gram`` (K, K) float64, <D_i, D_j> without weights, and their weights ``weight`` (K,).

        A client of weight 0 is absent: it counts nowhere, its inner products are not read and its score is NaN.

        Raises:
            WeightError: a negative or non-finite weight, or none above 0.
            NonFiniteError: an inner product that is not finite.
            InputError: too few clients for the rule.
        """
        gram, weight = np.asarray(gram, np.float64), np.asarray(weight, np.float64)
        if weight.ndim != 1 or gram.shape != 2 * weight.shape:
            raise InputError(f"{self.name}: gram is {gram.shape}, weight {weight.shape}; (K, K) and (K,) are needed")
        self._check_weights(weight)
        there = np.flatnonzero(weight)
        gram, scores = gram[np.ix_(there, there)], np.full(len(weight), math.nan)
        if not np.isfinite(gram).all():
            k = there[(~np.isfinite(gram)).sum(1).argmax()]
            raise NonFiniteError(f"{self.name}: inner products of client {k} of {len(weight)} are not finite")
        verdict = self.judge(gram, weight[there])
        coefficients, factor = np.zeros(len(weight)), np.ones(len(weight))
        coefficients[there], factor[there] = verdict.weight, verdict.factor
        if verdict.scores is not None:
            scores[there] = verdict.scores
        return Verdict(coefficients, factor, None if verdict.scores is None else scores)

    def judge(self, gram: np.ndarray, weight: np.ndarray) -> Verdict:
        """As `coefficients`, of finite inner products and weights above 0."""
        raise NotImplementedError

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """The exact sum of the updates with the weights and scales of ``group``, which the engine took from the verdict."""
        return truncated_sum(group, EXACT, "left")

    def _check_weights(self, weight: np.ndarray) -> None:
        bad = ~(np.isfinite(weight) & (weight >= 0.0))
        if bad.any():
            k = int(bad.argmax())
            raise WeightError(
                f"{self.name}: weight {k} of {len(weight)} is {weight[k]:g}; a robust rule needs weights >= 0. "
                "Leave out the rule or the negative weights"
            )
        with np.errstate(over="ignore"):
            total = weight.sum()
        if not 0.0 < total < math.inf:
            raise WeightError(f"{self.name}: the weights sum to {total:g}; a positive finite sum is needed")


def kept(weight: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """``weight`` (K,) of the clients ``keep`` (indices), 0 of the others, brought to the sum of all."""
    if len(keep) == len(weight):
        return weight
    share: np.ndarray = np.zeros_like(weight)
    # divided first: a client kept alone gets the sum itself
    share[keep] = weight[keep] / math.fsum(weight[keep]) * math.fsum(weight)
    return share


def squared_distances(gram: np.ndarray) -> np.ndarray:
    """``|D_i - D_j|_F^2`` (K, K) from inner products, clamped at 0; below `NOISE` ``(G_ii + G_jj)`` it is rounding."""
    distances: np.ndarray = np.maximum(_sums(gram) - 2.0 * gram, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def near_twins(gram: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of clients, i < j, whose updates are so near each other that rounding hides their distance; two zeros are none."""
    unit = scaled(gram)[0]
    pairs = np.argwhere(np.triu(squared_distances(unit) < NOISE * _sums(unit), 1))
    return [(int(i), int(j)) for i, j in pairs]


def scaled(gram: np.ndarray) -> tuple[np.ndarray, float]:
    """``gram / unit^2``, its largest norm near 1, so that nothing made of it leaves float64; and ``unit``, a power of two."""
    unit = math.ldexp(1.0, math.frexp(float(gram.diagonal().max()))[1] // 2)
    return gram / unit / unit, unit


def ascending(value: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Order (K,) from the smallest ``value`` to the largest; of those that rounding ``noise`` (K,) hides apart, the lowest index first."""
    order: list[int] = []
    left = np.arange(len(value))
    while len(left):
        low = left[value[left].argmin()]
        tied = value[left] - value[low] <= noise[left] + noise[low]
        order.append(int(left[tied.argmax()]))
        left = left[left != order[-1]]
    return np.array(order, np.int64)


def count(method: str, option: str, value: object, least: int) -> int:
    """``value`` as an int of at least ``least``; InputError names method and option."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
        raise InputError(f"{method}: {option} is {value!r}; an integer of at least {least} is needed")
    return int(value)


def describe_verdict(verdict: Verdict, clients: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Plain values for each client: ``weight``, ``factor``, ``score`` (None where there is no finite one) and ``rejected``."""
    scores = np.full(len(clients), math.nan) if verdict.scores is None else verdict.scores
    rows = zip(clients, verdict.weight.tolist(), verdict.factor.tolist(), scores.tolist(), strict=True)
    return {
        name: {
            "weight": weight,
            "factor": factor,
            "score": score if math.isfinite(score) else None,
            "rejected": weight == 0.0,
        }
        for name, weight, factor, score in rows
    }


def _sums(gram: np.ndarray) -> np.ndarray:
    squares = gram.diagonal()
    sums: np.ndarray = squares[:, None] + squares
    return sums
