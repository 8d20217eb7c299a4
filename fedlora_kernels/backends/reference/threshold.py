"""Rank rules, one spectrum at a time (docs/numerics.md, Rank rules)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RuleCode, RuleSpec

__all__ = ["rank_of", "select_rank"]

SLACK = 1e-12


def select_rank(S: Tensor, rule: RuleSpec, total_energy: Tensor, floor: Tensor) -> Tensor:
    """Rank (N,) int64 that ``rule`` chooses; see `Backend.select_rank`."""
    rows = zip(S.tolist(), total_energy.tolist(), floor.tolist(), strict=True)
    ranks = [rank_of(s, rule, energy, bound) for s, energy, bound in rows]
    return torch.tensor(ranks, dtype=torch.int64)


def rank_of(s: Sequence[float], rule: RuleSpec, energy: float, floor: float) -> int:
    """Rank that ``rule`` chooses for the descending values ``s``; 0 if a number is not finite."""
    if not all(math.isfinite(x) for x in (*s, energy, floor)):
        return 0
    numerical = sum(x > floor for x in s)
    rank = min(_wanted(s, rule, energy, numerical), numerical)
    return min(rank, rule.cap) if rule.cap else rank


def _wanted(s: Sequence[float], rule: RuleSpec, energy: float, numerical: int) -> int:
    if rule.code == RuleCode.RANK:
        return int(rule.value)
    if rule.code == RuleCode.SV_RATIO:
        return max(1, sum(x > s[0] / rule.value for x in s))
    if rule.code == RuleCode.ABSOLUTE:
        return sum(x > rule.value for x in s)
    if rule.value >= 1:
        return numerical
    if rule.code == RuleCode.ENERGY:
        return _first_reaching((x * x for x in s), (rule.value - SLACK) * energy)
    return _first_reaching(s, (rule.value - SLACK) * sum(s))


def _first_reaching(terms: Iterable[float], goal: float) -> int:
    """Smallest count of terms whose sum reaches the goal; all of them and one more if none does."""
    total, count = 0.0, 0
    for count, term in enumerate(terms, start=1):
        total += term
        if total >= goal:
            return count
    return count + 1
