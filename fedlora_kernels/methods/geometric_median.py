"""Geometric median of the updates by Weiszfeld's iteration on their coefficients (arXiv 1912.13445)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora_kernels.methods.contract import register
from fedlora_kernels.methods.robust import RobustRule, Verdict, scaled

__all__ = ["GeometricMedian"]

FLOOR = 1e-8
STEPS = 1000
STOP = 1e-12


@register
@dataclass(frozen=True)
class GeometricMedian(RobustRule):
    """``argmin_Z sum_k w_k |D_k - Z|_F``, which is a mean ``Z = sum_k c_k D_k`` whose coefficients are found from inner products.

    ``c <- (w_k / max(d_k, nu)) / sum_j (w_j / max(d_j, nu))`` from c = w, with ``d_k = |D_k - Z|_F`` and nu = 1e-8 of the root of the
    median of |D_k|^2 (of the largest, if that is 0), until c changes by 1e-12 or for 1000 steps. Free of coordinates, unlike an
    entry-wise median of factors. All updates zero: c = w. Scores are the distances from the median.
    """

    name: ClassVar[str] = "geometric_median"
    summary: ClassVar[str] = "geometric median of the updates"

    def judge(self, gram: np.ndarray, weight: np.ndarray) -> Verdict:
        """Coefficients of the median; they sum to the sum of the weights."""
        K, squares = len(weight), gram.diagonal()
        if not squares.any():
            return Verdict(weight, np.ones(K), np.zeros(K))
        gram, unit = scaled(gram)
        total = math.fsum(weight)
        c = _weiszfeld(gram, weight / total)
        return Verdict(c * total, np.ones(K), _distances(gram, c) * unit)


def _weiszfeld(gram: np.ndarray, share: np.ndarray) -> np.ndarray:
    squares = gram.diagonal()
    nu = FLOOR * math.sqrt(np.median(squares) or squares.max())
    c = share
    for _ in range(STEPS):
        before = c
        c = share / np.maximum(_distances(gram, c), nu)
        c = c / math.fsum(c)
        if np.abs(c - before).sum() <= STOP:
            break
    return c


def _distances(gram: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``d_k = |D_k - sum_j c_j D_j|_F`` (K,) for coefficients that sum to 1."""
    squares = gram.diagonal() - 2.0 * (gram @ c) + c @ gram @ c
    # near one client's update the terms of its own square cancel, the distance would come out as 0, and the iteration would stay
    # there even if that is no median; with 1 - c_k as the sum of the others nothing cancels
    k = int(c.argmax())
    gap = -c
    gap[k] = math.fsum(np.delete(c, k))
    squares[k] = gap @ gram @ gap
    distances: np.ndarray = np.sqrt(np.maximum(squares, 0.0))
    return distances
