"""What methods of exact sums share: the truncated SVD of a group's weighted sum, as an outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Note
from fedlora_kernels.linalg import product_svd
from fedlora_kernels.linalg.rules import RankRule
from fedlora_kernels.methods.contract import Group, Outcome, Spectrum
from fedlora_kernels.methods.factors import owned, zero_outcome

__all__ = ["stack_svd", "svd_outcome", "svd_rounding", "truncated_sum"]


def truncated_sum(group: Group, rule: RankRule, output: str) -> Outcome:
    """Truncated SVD of ``D = sum_k w_k s_k B_k A_k``; a module whose update is zero answers p = 1, B = 0, A = e_1."""
    B, A, weight = owned(group)
    return zero_outcome(group) if not B else svd_outcome(group, stack_svd(group, B, A, weight, rule, output), output)


def stack_svd(
    group: Group, B: Sequence[Tensor], A: Sequence[Tensor], weight: Tensor, rule: RankRule, output: str
) -> Any:
    """`product_svd` of ``sum_i weight_i B_i A_i`` in the dtype and on the backend of the group; trouble stands in ``info``."""
    options: dict[str, Any] = {"rule": rule, "output": output, "dtype": group.dtype, "backend": group.backend}
    return product_svd(list(B), list(A), weights=weight, check=False, **options)


def svd_outcome(group: Group, svd: Any, output: str) -> Outcome:
    """The outcome of a `ProductSVD` with ``output`` "left" or "balanced".

    A sum that is zero, or of which the rule keeps nothing, answers p = 1, B = 0, A = e_1.
    """
    info, rank, certificate = svd.info.cpu(), svd.rank.cpu(), svd.certificate
    numerical = certificate.numerical_rank.cpu()
    empty = (rank == 0) & (info == 0)
    zero = empty & (numerical == 0)
    right = svd.right
    if bool(empty.any()):
        right = right.clone()
        right[empty.to(right.device), 0, 0] = 1.0
    # what cancels down to the noise floor is zero, and so is all that is said of it: relative to noise nothing means anything
    S, energy = svd.S.cpu(), svd.energy.cpu().where(~zero, 0.0)
    rounding = svd_rounding(S, group.m, group.n, group.dtype, output)
    bound = svd.error_bound.cpu() + rounding / energy.sqrt()
    return Outcome(
        B=svd.left,
        A=right,
        rank=torch.where(empty, torch.ones_like(rank), rank),
        error=svd.error.cpu().where(~zero, 0.0),
        error_bound=bound.where(~zero, 0.0),
        notes=svd.notes.cpu() | (zero * int(Note.ZERO)).to(svd.notes.dtype),
        info=info,
        spectrum=Spectrum(
            S=S,
            energy=energy,
            numerical_rank=numerical,
            rho=certificate.rho.cpu(),
            sigma_err=certificate.sigma_err.cpu(),
            passes=certificate.passes.cpu(),
        ),
    )


def svd_rounding(S: Tensor, m: int, n: int, dtype: torch.dtype, output: str) -> Tensor:
    """What rounding the pair of a truncated SVD to ``dtype`` can add to ``|D - B A|_F``, (N,) float64.

    ``S`` (N, P) are the singular values kept, then zeros, in float64. B and A have orthogonal columns and rows, so the changes of
    B meet orthogonal rows and add up as squares, and likewise those of A; only the product of both changes adds up as it is.
    A number below the normal range loses up to half the smallest one, whatever its size.
    """
    info = torch.finfo(dtype)
    unit, least = info.eps / 2, info.smallest_normal * info.eps / 2
    kept = (S > 0.0).to(torch.float64)
    on_B, on_A = (S, kept) if output == "left" else (S.sqrt(), S.sqrt())
    cut_B = unit * on_B + math.sqrt(m) * least * kept
    cut_A = unit * on_A + math.sqrt(n) * least * kept
    rounding: Tensor = (cut_B * on_A).norm(dim=1) + (on_B * cut_A).norm(dim=1) + (cut_B * cut_A).sum(1)
    return rounding
