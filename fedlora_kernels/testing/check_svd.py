"""What a small dense SVD must meet (docs/numerics.md, Core SVD), judged in float64 and wider, by none of our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.testing.check import Check
from fedlora_kernels.testing.exact import exact_residual, exact_skew, exact_values
from fedlora_kernels.testing.tolerances import roundoff, tolerance

__all__ = ["check_svd", "unit_scaled"]

EXACT_SIZE = 64
"""Up to this the relative accuracy of graded matrices is judged, by a Jacobi method in extended precision."""
WIDEST = 1e17
"""Up to this ratio of its columns, the extended precision itself resolves them."""
FLUSHED = {torch.float64: 2.0**-478, torch.float32: 2.0**-46}
"""Values below this, relative to the largest, may be flushed to zero."""
GRADED = 1e3
"""A matrix counts as graded where scaling its columns to length 1 improves its condition by more than this."""


def unit_scaled(X: Tensor) -> tuple[Tensor, Tensor]:
    """``(X 2^-e, e)`` in float64 with the largest element of each matrix (..., p, q) in [1/2, 1); e (...) int32."""
    X = X.double()
    largest = X.abs().amax((-2, -1)) if X.numel() else torch.zeros(X.shape[:-2], dtype=torch.float64)
    exponent = torch.frexp(largest).exponent
    return shifted(X, -exponent[..., None, None]), exponent


def shifted(X: Tensor, exponent: Tensor) -> Tensor:
    """``X 2^exponent``, rounded at most once: both halves of the power are in range where the whole is not."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(X, half), exponent - half)


def check_svd(C: Tensor, result: Any, *, lapack: bool = False) -> list[list[Check]]:
    """Checks of each matrix of C (N, p, q), finite; ``result`` holds U, S, Vh, info with the same leading dimension.

    ``lapack``: the answer is that of a library in the type in which it computes, which is held to less.
    """
    dtype = result.S.dtype
    limit = tolerance("lapack" if lapack and dtype == torch.float64 else "core", dtype=dtype, size=max(*C.shape[1:], 1))
    X, exponent = unit_scaled(C)
    U, S, Vh = result.U.double(), result.S.double(), result.Vh.double()
    wrong = _structure(U, S, Vh, result.info, 8 * roundoff(dtype))
    S = shifted(S, -exponent[:, None])
    # S itself may be subnormal in its type: what it then loses, on the scale of X.
    finfo = torch.finfo(dtype)
    lost = shifted(torch.full_like(exponent, finfo.smallest_normal * finfo.eps, dtype=torch.float64), -exponent)
    size = X.flatten(1).norm(dim=1)
    least = torch.where(size > 0, size, 1.0)
    eye = torch.eye(U.shape[2], dtype=torch.float64)
    residual = (X - (U * S[:, None, :]) @ Vh).flatten(1).norm(dim=1)
    skew = torch.maximum(_largest(U.mT @ U - eye), _largest(Vh @ Vh.mT - eye))
    # where float64 comes near its own limit, so does what judges it
    for i in (skew > limit / 4).nonzero()[:, 0].tolist():
        skew[i] = max(exact_skew(U[i]), exact_skew(Vh[i].mT))
    for i in (residual > limit / 4 * size).nonzero()[:, 0].tolist():
        residual[i] = exact_residual(X[i], U[i] * S[i], Vh[i]).norm()
    exact = torch.linalg.svdvals(X) if X.numel() else S
    values = (S - exact).abs().amax(1) if S.numel() else size
    first = torch.where(size > 0, exact[:, 0], 1.0) if S.numel() else least
    # LAPACK's values may be further off than ours: small matrices are judged again, larger ones within its own limit
    beside = torch.zeros(len(C), dtype=torch.float64)
    for i in (values > limit / 4 * first).nonzero()[:, 0].tolist():
        if max(X.shape[1:]) <= EXACT_SIZE:
            values[i] = (S[i] - exact_values(X[i] if X.shape[1] >= X.shape[2] else X[i].mT)).abs().max()
        else:
            beside[i] = tolerance("lapack", size=max(X.shape[1:]))
    count = max(U.shape[2], 1)
    checks = []
    for i in range(len(C)):
        slack = float(lost[i]) * count
        here = [
            Check("residual", float(residual[i] / least[i]), limit + slack / float(least[i])),
            Check("orthogonality", float(skew[i]), limit),
            Check("values", float(values[i] / first[i]), limit + float(beside[i]) + slack / float(first[i])),
            Check("structure", float(wrong[i]), 0.0),
        ]
        if not lapack and not wrong[i]:
            here += _relative(X[i], S[i], exact[i], float(lost[i]), dtype)
        checks.append(here)
    return checks


def _largest(X: Tensor) -> Tensor:
    worst = X.abs().flatten(1)
    return worst.amax(1) if worst.shape[1] else worst.sum(1)


def _structure(U: Tensor, S: Tensor, Vh: Tensor, info: Tensor, rounding: float) -> Tensor:
    """Violations of each matrix: not finite, negative, out of order, sign rule, info.

    A column follows the sign rule if it does for a window that is wider or narrower by the rounding of its elements.
    """
    finite = torch.isfinite(U).flatten(1).all(1) & torch.isfinite(S).all(1) & torch.isfinite(Vh).flatten(1).all(1)
    wrong = (~finite).double() + (info != 0).double()
    wrong += (S < 0).any(1).double() + (S[:, 1:] > S[:, :-1]).any(1).double()
    if U.numel():
        negative = torch.ones(len(U), U.shape[2], dtype=torch.bool)
        for window in (2.0**-20 - rounding, 2.0**-20, 2.0**-20 + rounding):
            large = U.abs() >= (1 - window) * U.abs().amax(1, keepdim=True)
            negative &= torch.gather(U, 1, large.to(torch.uint8).argmax(1, keepdim=True))[:, 0] < 0
        wrong += negative.any(1).double()
    return wrong


def _relative(X: Tensor, S: Tensor, values: Tensor, lost: float, dtype: torch.dtype) -> list[Check]:
    """Every value relative to itself where columns of very different length are all that makes X ill-conditioned."""
    tall = X if X.shape[0] >= X.shape[1] else X.mT
    norms = tall.norm(dim=0)
    if max(tall.shape) > EXACT_SIZE or not norms.numel() or float(norms.min()) * WIDEST <= float(norms.max()):
        return []
    inner = torch.linalg.svdvals(tall / norms)
    if not float(inner[-1]) or float(values[-1]) * GRADED * float(inner[0]) > float(values[0]) * float(inner[-1]):
        return []
    limit = tolerance("scaled", dtype=dtype, rho=float(inner[0] / inner[-1]))
    exact = exact_values(tall)
    # the input itself has no relative accuracy below the normal range of its type, nor has the answer
    above = exact > FLUSHED[dtype] * exact[0]
    errors = ((S - exact).abs() - lost).clamp_min(0)[above] / exact[above]
    return [Check("relative", float(errors.max()), limit)] if limit < 1 else []
