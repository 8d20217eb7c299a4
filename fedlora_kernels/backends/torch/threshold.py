"""Rank rules over a batch of spectra (docs/numerics.md, Rank rules)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RuleCode, RuleSpec

__all__ = ["select_rank"]

SLACK = 1e-12
"""Relative slack of the cumulative rules: ten equal values at 0.9 give 9, whatever the rounding."""


def select_rank(S: Tensor, rule: RuleSpec, total_energy: Tensor, floor: Tensor) -> Tensor:
    """Rank (N,) int64 that ``rule`` chooses; see `Backend.select_rank`."""
    N, k = S.shape
    if not k:
        return torch.zeros(N, dtype=torch.int64, device=S.device)
    numerical = (S > floor[:, None]).sum(-1)
    rank = torch.minimum(_wanted(S, rule, total_energy, numerical), numerical)
    if rule.cap:
        rank = rank.clamp_max(rule.cap)
    finite = torch.isfinite(S).all(-1) & torch.isfinite(total_energy) & torch.isfinite(floor)
    return torch.where(finite, rank, 0)


def _wanted(S: Tensor, rule: RuleSpec, total_energy: Tensor, numerical: Tensor) -> Tensor:
    if rule.code == RuleCode.RANK:
        return torch.full_like(numerical, min(int(rule.value), S.shape[-1]))
    if rule.code == RuleCode.SV_RATIO:
        return (S > S[:, :1] / rule.value).sum(-1).clamp_min(1)
    if rule.code == RuleCode.ABSOLUTE:
        return (S > rule.value).sum(-1)
    if rule.value >= 1:
        return numerical
    if rule.code == RuleCode.ENERGY:
        return _first_reaching((S * S).cumsum(-1), (rule.value - SLACK) * total_energy)
    sums = S.cumsum(-1)
    return _first_reaching(sums, (rule.value - SLACK) * sums[:, -1])


def _first_reaching(sums: Tensor, goal: Tensor) -> Tensor:
    """Smallest count whose sum reaches the goal; all of them and one more if none does."""
    return (sums < goal[:, None]).sum(-1) + 1
