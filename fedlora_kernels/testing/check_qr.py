"""What a stacked QR must meet (docs/numerics.md, Stacked QR), judged column by column in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.testing.check import Check
from fedlora_kernels.testing.check_svd import shifted
from fedlora_kernels.testing.exact import exact_residual, exact_skew
from fedlora_kernels.testing.tolerances import U64, tolerance

__all__ = ["check_qr"]


def check_qr(X: Tensor, result: Any, *, rank: int | None = None) -> list[Check]:
    """Checks of one QR of the stacked matrix X (m, R) float64, weights applied; ``result`` holds Q or None, R, rank, info.

    Without Q the backward error is judged by the Gram, ``R^T R`` against ``X^T X``, relative to the columns.
    """
    R = result.R.double()
    dtype = result.R.dtype
    limit = tolerance("qr", dtype=dtype)
    # Columns of any size, brought to [1/2, 1): the factorisation is one of columns.
    exponent = torch.frexp(X.abs().amax(0) if len(X) else torch.zeros(X.shape[1], dtype=torch.float64)).exponent
    X, R = shifted(X, -exponent), shifted(R, -exponent)
    # what a column of R loses where it is subnormal in its type
    lost = shifted(torch.full((X.shape[1],), _smallest(dtype), dtype=torch.float64), -exponent) * max(len(R), 1) ** 0.5
    norms = _norms(X)
    least = torch.where(norms > 0, norms, 1.0)
    # A dependent column keeps no more than what is left of it at the threshold of dependence.
    dropped = 32 * X.shape[1] * U64 * _skipped(R, int(result.rank)) + lost / least
    checks = [
        _worst("norms", (_norms(R) - norms).abs() / least, limit + dropped),
        Check("structure", float(_structure(result, rank)), 0.0),
    ]
    if result.Q is None:
        G, gap = X.mT @ X, R.mT @ R
        errors = ((gap - G) / (least[:, None] * least)).abs()
        allowed = limit + dropped[:, None] + limit + dropped
        return [_worst("backward", errors.flatten(), allowed.flatten()), *checks]
    Q = result.Q.double()
    kept = (torch.arange(Q.shape[1]) < int(result.rank)).double()
    skew = float((_gram(Q) - torch.diag(kept)).abs().max()) if Q.shape[1] else 0.0
    backward = _worst("backward", _norms(X - Q @ R) / least, limit + dropped)
    # where float64 comes near its own limit, so does what judges it
    if skew > limit / 4:
        skew = exact_skew(Q, int(result.rank))
    if backward.value > backward.limit / 4:
        backward = _worst("backward", _norms(exact_residual(X, Q, R)) / least, limit + dropped)
    return [backward, Check("orthogonality", skew, limit), *checks]


def _smallest(dtype: torch.dtype) -> float:
    finfo = torch.finfo(dtype)
    return finfo.smallest_normal * finfo.eps


def _worst(name: str, errors: Tensor, limits: Tensor) -> Check:
    """The entry that is worst in units of its limit; NaN is worst of all."""
    if not errors.numel():
        return Check(name, 0.0, float("inf"))
    ratio = errors / limits
    at = int(torch.where(ratio.isnan(), torch.inf, ratio).argmax())
    return Check(name, float(errors[at]), float(limits[at]))


def _norms(X: Tensor) -> Tensor:
    # along contiguous memory: over strided columns torch sums one by one and is itself 50 units off at 20000 rows
    return X.mT.contiguous().square().sum(-1).sqrt()


def _gram(Q: Tensor) -> Tensor:
    # in chunks of rows: one accumulation of 20000 rows is itself 50 units off
    return torch.stack([rows.mT @ rows for rows in torch.split(Q, 256)]).sum(0) if len(Q) else Q.mT @ Q


def _skipped(R: Tensor, rank: int) -> Tensor:
    """Which columns (R,) were found dependent on those before them, as 1.0."""
    pivot = torch.zeros(R.shape[1], dtype=torch.bool)
    if R.numel():
        pivot[(R[:rank] != 0).int().argmax(dim=1)] = True
    return (~pivot & (pivot.cumsum(0) < len(R))).double()


def _structure(result: Any, rank: int | None) -> int:
    """Violations: info, finite, echelon form with positive leading entries, +0, zero padding, known rank."""
    R, r = result.R, int(result.rank)
    wrong = int(int(result.info) != 0) + int(rank is not None and r != rank)
    if not torch.isfinite(R).all() or (result.Q is not None and not torch.isfinite(result.Q).all()):
        return wrong + 1
    wrong += int(bool(torch.signbit(R[R == 0]).any()))
    wrong += int(bool(R[r:].any())) + int(result.Q is not None and bool(result.Q[:, r:].any()))
    if r and R.shape[1]:
        filled = R[:r] != 0
        lead = filled.int().argmax(1)
        wrong += int(not bool(filled.any(1).all())) + int(bool((lead.diff() <= 0).any()))
        wrong += int(bool((R[:r].gather(1, lead[:, None]) <= 0).any()))
    return wrong
