"""What update Grams, weighted and mixed sums, and ranks must meet, judged by their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RuleCode, RuleSpec
from fedlora_kernels.testing.check import Check
from fedlora_kernels.testing.factors import LoRAProblem
from fedlora_kernels.testing.tolerances import U64, roundoff, tolerance

__all__ = ["check_gram", "check_mixed_sum", "check_rank", "check_weighted_sum", "rank_of"]

SLACK = Fraction(1, 10**12)


def check_gram(problem: LoRAProblem, G: Tensor) -> list[Check]:
    """Inner products (K, K) against those of the dense updates, each in units of the norms of its factors."""
    updates = [w * (B.double() @ A.double()) for w, B, A in zip(problem.weights, problem.B, problem.A, strict=True)]
    D = torch.stack(updates).flatten(1)
    sizes = torch.stack(
        [
            abs(w) * (B.double().norm(dim=0) * A.double().norm(dim=1)).sum()
            for w, B, A in zip(problem.weights, problem.B, problem.A, strict=True)
        ]
    )
    scale = sizes[:, None] * sizes
    errors = (G - D @ D.mT).abs() / torch.where(scale > 0, scale, 1.0)
    wrong = int(G.dtype != torch.float64) + int(not torch.equal(G, G.mT))
    return [Check("error", _worst(errors), tolerance("gram")), Check("structure", float(wrong), 0.0)]


def check_weighted_sum(blocks: Sequence[Tensor], weights: Tensor, result: Any) -> list[Check]:
    """``sum_k w_k X_k`` of blocks (p_k, q_k): the bits of the definition, and the two norms."""
    p, q = (max(block.shape[axis] for block in blocks) for axis in (0, 1))
    total = torch.zeros(p, q, dtype=torch.float64)
    for w, block in zip(weights, blocks, strict=True):
        if w != 0:
            total[: block.shape[0], : block.shape[1]] += w * block.double()
    return _check_sum(total, result, bits=True)


def check_mixed_sum(blocks: Sequence[Tensor], mixers: Sequence[Tensor], result: Any) -> list[Check]:
    """``sum_k X_k M_k`` of blocks (p, r_k), mixers (r_k, q) float64, in extended precision; element by element."""
    wide = [(_wide(X), _wide(M)) for X, M in zip(blocks, mixers, strict=True)]
    total, size = sum(X @ M for X, M in wide), sum(np.abs(X) @ np.abs(M) for X, M in wide)
    found = result.sum
    u = 0.0 if found.dtype == torch.float64 else roundoff(found.dtype)
    # halves are rounded by way of float32
    u += roundoff(torch.float32) if u > roundoff(torch.float32) else 0.0
    terms = sum(X.shape[1] for X, _ in wide) + 1
    finfo = torch.finfo(found.dtype)
    allowed = terms * U64 * size + u * np.abs(total) * (1 + 2 * u) + finfo.smallest_normal * finfo.eps
    errors = np.abs(_wide(found) - total) / allowed
    checks = _check_sum(torch.from_numpy(np.asarray(total, dtype=np.float64)), result, bits=False)
    return [Check("error", float(np.max(errors, initial=0.0)), 1.0), *checks]


def _check_sum(total: Tensor, result: Any, *, bits: bool) -> list[Check]:
    found = result.sum.double()
    wrong = int(result.info != 0)
    expected = total.float().to(result.sum.dtype) if result.sum.dtype.itemsize == 2 else total.to(result.sum.dtype)
    if bits:
        wrong += int((result.sum != expected).sum()) if result.sum.shape == total.shape else 1
    norm = float(total.norm())
    lost = float((total - found).norm())
    return [
        Check("norm", abs(float(result.norm) - norm) / norm if norm else float(result.norm), 64 * U64),
        Check("rounding", abs(float(result.rounding) - lost), 64 * U64 * norm + 1e-3 * lost),
        Check("structure", float(wrong), 0.0),
    ]


def rank_of(S: Sequence[float], rule: RuleSpec, floor: float) -> int | None:
    """Rank that the definition gives in rational arithmetic; None where the decision hangs on rounding.

    ``S`` is descending; the total energy is the sum of its squares.
    """
    s = [Fraction(x) for x in S]
    above = sum(x > Fraction(floor) for x in s)
    value = Fraction(rule.value)
    wanted: int | None = above
    if rule.code in (RuleCode.ENERGY, RuleCode.SV_SUM) and rule.value < 1:
        terms = [x * x for x in s] if rule.code == RuleCode.ENERGY else s
        wanted = _reaching(terms, value - SLACK)
    elif rule.code == RuleCode.RANK:
        wanted = int(rule.value)
    elif rule.code == RuleCode.SV_RATIO:
        wanted = max(sum(x * value > s[0] for x in s), int(bool(s) and s[0] > 0)) if s else 0
    elif rule.code == RuleCode.ABSOLUTE:
        wanted = sum(x > value for x in s)
    return None if wanted is None else min(wanted, above, rule.cap or above)


def _reaching(terms: Sequence[Fraction], share: Fraction) -> int | None:
    """How many leading terms reach that share of the sum; None if a partial sum is within rounding of it."""
    total, partial = sum(terms), Fraction(0)
    if not total:
        return 0
    near = Fraction(len(terms) * 4) * Fraction(U64)
    for count, term in enumerate(terms, 1):
        partial += term
        if abs(partial / total - share) <= near:
            return None
        if partial >= share * total:
            return count
    return len(terms)


def check_rank(S: Sequence[float], rule: RuleSpec, floor: float, found: int) -> list[Check]:
    """Difference from `rank_of`, where that is defined."""
    wanted = rank_of(S, rule, floor)
    return [] if wanted is None else [Check("rank", abs(found - wanted), 0.0)]


def _wide(X: Tensor) -> Any:
    return X.double().numpy().astype(np.longdouble)


def _worst(errors: Tensor) -> float:
    if not errors.numel():
        return 0.0
    return math.inf if bool(errors.isnan().any()) else float(errors.max())
