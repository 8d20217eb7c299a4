"""FedMomentum: the leading directions of the exact sum go to the adapter, the next ones to the base (arXiv 2603.08014)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg import select_rank
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Group, Method, Outcome, Pair, Previous, register
from fedlora_kernels.methods.factors import owned, require_equal_ranks, zero_outcome
from fedlora_kernels.methods.products import stack_svd, svd_outcome, svd_rounding

__all__ = ["FedMomentum"]


@register
@dataclass(frozen=True)
class FedMomentum(Method):
    """SVD of ``D = sum_k w_k s_k B_k A_k``: components 1 to r make the adapter, r + 1 to p_e are merged into the base weight.

    p_e is the smallest rank that keeps ``energy`` of ``|D|_F^2``. Both pairs carry sqrt(S) on either factor. ``error`` is the
    distance of the adapter alone from D; with the residual it is at most ``sqrt(1 - energy)``. The exact SVD stands in the
    place of the paper's randomised one (our choice). A D of rank below r gives a shorter pair, which every client receives
    padded to r with random rows of A and zero columns of B (our choice).
    """

    name: ClassVar[str] = "fedmomentum"
    summary: ClassVar[str] = "leading directions of the exact sum, the next ones merged into the base"
    exact: ClassVar[str] = "to energy 0.9999"
    broadcast: ClassVar[str] = "SVD pair + residual"
    download: ClassVar[str] = "max(r, p_e)(m+n)"
    equal_ranks: ClassVar[bool] = True
    product_only: ClassVar[bool] = True
    columnwise: ClassVar[bool] = False
    sorted_pair: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("common", "residual")

    energy: float = 0.9999

    def __post_init__(self) -> None:
        real = isinstance(self.energy, (int, float)) and not isinstance(self.energy, bool)
        if not real or not 0.0 < self.energy <= 1.0:
            raise InputError(f"fedmomentum: energy is {self.energy!r}; a number with 0 < energy <= 1 is needed")

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group: one SVD, split after component r. A zero update answers p = 1, B = 0, A = e_1, no residual."""
        require_equal_ranks(group, self.name)
        B, A, weight = owned(group)
        if not B:
            nothing = zero_outcome(group)
            empty = torch.zeros_like(nothing.rank)  # type: ignore[arg-type]
            return dataclasses.replace(nothing, residual=Pair(nothing.B[:, :, :0], nothing.A[:, :0], empty))  # type: ignore[index]
        svd = stack_svd(group, B, A, weight, Energy(1.0), "balanced")
        return _split(group, svd, max(group.trained), Energy(self.energy))

    def client_rank(self, client_rank: int, rank: int) -> int:
        """A client receives its own rank, so that a D of low rank does not shrink the adapter for good."""
        return client_rank

    def broadcast_rank(self, ranks: Sequence[int], rank: int, residual: int) -> float:
        """The pair and the residual."""
        return rank + residual


def _split(group: Group, svd: Any, r: int, rule: Energy) -> Outcome:
    """The components of a full ``svd`` up to ``r`` as the pair, from there to the rank that ``rule`` chooses as the residual."""
    whole = svd_outcome(group, svd, "balanced")
    assert whole.B is not None
    assert whole.A is not None
    assert whole.rank is not None
    S = svd.S.cpu()
    kept = select_rank(S, rule, total_energy=svd.energy.cpu(), floor=0.0, check=False)
    beyond = (kept - r).clamp(min=0)
    end = r + int(beyond.max()) if group.batch else r
    unused = torch.arange(end - r) >= beyond[:, None]
    unused = unused.to(group.device)
    error, bound = _distance(group, svd, S, r)
    return dataclasses.replace(
        whole,
        B=whole.B[:, :, :r].contiguous(),
        A=whole.A[:, :r].contiguous(),
        rank=whole.rank.clamp(max=r),
        error=error,
        error_bound=bound,
        residual=Pair(
            whole.B[:, :, r:end].masked_fill(unused[:, None, :], 0.0),
            whole.A[:, r:end].masked_fill(unused[:, :, None], 0.0),
            beyond,
        ),
    )


def _distance(group: Group, svd: Any, S: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``|D - B A|_F / |D|_F`` of the first ``r`` components, (N,), and a bound: the allowance of the full SVD, and the rounding."""
    largest = S[:, :1].clamp(min=torch.finfo(torch.float64).tiny)  # squares of S may leave the range of float64
    size, tail = (S / largest).norm(dim=1), (S[:, r:] / largest).norm(dim=1)
    lost, allowed = svd.error.cpu(), svd.error_bound.cpu()
    error = torch.hypot(lost, torch.where(tail == 0.0, 0.0, tail / size))
    rounding = svd_rounding(S[:, :r], group.m, group.n, group.dtype, "balanced")
    rounding = torch.where(size == 0.0, 0.0, rounding / (size * largest[:, 0]))
    return error, torch.sqrt(error**2 + (allowed**2 - lost**2).clamp(min=0.0)) + rounding
