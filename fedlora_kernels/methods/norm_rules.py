"""Robust rules by the norm of an update: trimmed mean and clipping (arXiv 1803.01498, 1911.07963)."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora_kernels.errors import InputError
from fedlora_kernels.methods.contract import register
from fedlora_kernels.methods.robust import NOISE, RobustRule, Verdict, ascending, kept

__all__ = ["NormClip", "TrimmedMean", "clip_factors"]


@register
@dataclass(frozen=True)
class TrimmedMean(RobustRule):
    """Weighted mean without the ``floor(beta K)`` largest and as many smallest updates by Frobenius norm.

    Whole updates are left out, not entries (our reading for low-rank updates); ``one_sided`` leaves out the largest only. Norms that
    rounding hides apart count as ties, the lower index as smaller. ``2 floor(beta K) < K`` is needed. Scores are the norms.
    """

    name: ClassVar[str] = "trimmed_mean"
    summary: ClassVar[str] = "mean of the updates without the largest and smallest norms"

    beta: float = 0.1
    one_sided: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_number(self.beta) or not 0.0 <= self.beta < 1.0:
            raise InputError(f"{self.name}: beta is {self.beta!r}; 0 <= beta < 1 is needed")
        if not isinstance(self.one_sided, bool):
            raise InputError(f"{self.name}: one_sided is {self.one_sided!r}; True or False is needed")
        object.__setattr__(self, "beta", float(self.beta))

    def judge(self, gram: np.ndarray, weight: np.ndarray) -> Verdict:
        """The weights of the clients in between."""
        K, squares = len(weight), gram.diagonal()
        # 0.29 * 100 is just below 29
        cut = math.floor(self.beta * K * (1.0 + 1e-15))
        if not self.one_sided and 2 * cut >= K:
            raise InputError(
                f"{self.name}: beta is {self.beta:g}, which leaves out {cut} clients at each end; {K} take part. "
                "Lower beta or add clients"
            )
        keep = np.sort(ascending(squares, NOISE * squares)[0 if self.one_sided else cut : K - cut])
        return Verdict(kept(weight, keep), np.ones(K), _norms(gram))


@register
@dataclass(frozen=True)
class NormClip(RobustRule):
    """Updates of norm above ``max_update_norm`` are scaled down to it, a factor on s_k; weights stay as they are.

    ``max_update_norm`` is a number, infinity included, or "median" of the clients' norms (our choice). Scores are the norms.
    """

    name: ClassVar[str] = "norm_clip"
    summary: ClassVar[str] = "mean of the updates, large norms scaled down to a bound"

    max_update_norm: float | str = "median"

    def __post_init__(self) -> None:
        super().__post_init__()
        bound = self.max_update_norm
        if bound == "median":
            return
        if not _is_number(bound) or not float(bound) > 0.0:
            raise InputError(f"{self.name}: max_update_norm is {bound!r}; a positive number or 'median' is needed")
        object.__setattr__(self, "max_update_norm", float(bound))

    def judge(self, gram: np.ndarray, weight: np.ndarray) -> Verdict:
        """The weights as they are, and a factor at most 1 for each scale."""
        norms = _norms(gram)
        return Verdict(weight, clip_factors(norms, self.max_update_norm), norms)

    def options(self) -> dict[str, Any]:
        """Options as plain values; JSON knows no infinity, so it stands as text."""
        unbounded = self.max_update_norm == math.inf
        return {**super().options(), **({"max_update_norm": "inf"} if unbounded else {})}


def clip_factors(norms: np.ndarray, bound: float | str | None, owns: np.ndarray | None = None) -> np.ndarray:
    """``min(1, bound / norm)``, 1 where the norm is 0, of ``norms`` (..., K) float64.

    ``bound`` is a number, or "median" (None means it too) of the norms along the last axis, of those marked by ``owns`` if given.
    """
    if bound is None or bound == "median":
        counted = norms if owns is None else np.where(owns, norms, np.nan)
        limit = np.broadcast_to(np.nanmedian(counted, axis=-1, keepdims=True), norms.shape)
    else:
        limit = np.full(norms.shape, float(bound))
    factors: np.ndarray = np.divide(limit, norms, out=np.ones(norms.shape), where=norms > limit)
    return factors


def _norms(gram: np.ndarray) -> np.ndarray:
    norms: np.ndarray = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    return norms


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
