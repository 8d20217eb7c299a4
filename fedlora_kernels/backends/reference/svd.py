"""SVD of dense matrices, one at a time in float64 (docs/numerics.md, Core SVD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Info, Note, RawSVD
from fedlora_kernels.backends.reference.powers import exponent_of, times_power

__all__ = ["core_svd", "signs_of"]

TIE = 1 - 2.0**-20


def core_svd(groups: Sequence[Tensor]) -> list[RawSVD]:
    """SVD of each matrix of (N, p, q); see `Backend.core_svd`."""
    return [_group(C) for C in groups]


def _group(C: Tensor) -> RawSVD:
    dtype = torch.float32 if C.dtype in (torch.float16, torch.bfloat16) else C.dtype
    N, p, q = C.shape
    k = min(p, q)
    raw = RawSVD(
        torch.zeros(N, p, k, dtype=dtype),
        torch.zeros(N, k, dtype=dtype),
        torch.zeros(N, k, q, dtype=dtype),
        torch.zeros(N, dtype=torch.int32),
        torch.zeros(N, dtype=torch.int32),
    )
    if k:
        for i in range(N):
            here = RawSVD(*(field[i] for field in raw))
            try:
                _write(C[i].double(), here)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                here.info.fill_(Info.NOT_CONVERGED)
    return raw


def _write(C: Tensor, raw: RawSVD) -> None:
    """SVD of one matrix, its largest element scaled to about 1 on the way; ``raw`` arrives as zeros."""
    if not torch.isfinite(C).all():
        for field in (raw.U, raw.S, raw.Vh):
            field.fill_(torch.nan)
        raw.info.fill_(Info.NONFINITE)
    elif not C.any():
        raw.U.fill_diagonal_(1)
        raw.Vh.fill_diagonal_(1)
        raw.notes.fill_(Note.ZERO)
    else:
        e = exponent_of(C.abs().max())
        U, S, Vh = torch.linalg.svd(times_power(C, -e), full_matrices=False)
        signs = signs_of(U)
        raw.U.copy_(U * signs)
        raw.S.copy_(times_power(S, e))
        raw.Vh.copy_(Vh * signs[:, None])
        raw.info.fill_(Info.OVERFLOW if raw.S.isinf().any() else 0)


def signs_of(X: Tensor) -> Tensor:
    """Signs that make the first (nearly) largest element of each column of X positive (docs/numerics.md, Sign rule)."""
    signs = torch.ones(X.shape[1], dtype=X.dtype)
    for i, column in enumerate(X.mT):
        large = column[column.abs() >= TIE * column.abs().max()]
        if large[0] < 0:
            signs[i] = -1
    return signs
