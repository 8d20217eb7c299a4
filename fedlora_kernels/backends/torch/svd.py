"""SVD of many dense matrices through torch.linalg.svd (docs/numerics.md, Core SVD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Info, Note, RawSVD
from fedlora_kernels.backends.torch.chunks import exponent, scale_pow2

__all__ = ["column_signs", "core_svd", "svd"]

_TIE = 1 - 2.0**-20


def core_svd(groups: Sequence[Tensor]) -> list[RawSVD]:
    """SVD of each matrix of (N, p, q); see `Backend.core_svd`."""
    return [_core_svd(C) for C in groups]


def _core_svd(C: Tensor) -> RawSVD:
    C = C.float() if C.dtype in (torch.float16, torch.bfloat16) else C
    N, p, q = C.shape
    if not C.numel():
        return _nothing(C)
    largest = torch.linalg.vector_norm(C, float("inf"), dim=(-2, -1))
    bad, zero = ~torch.isfinite(largest), largest == 0
    e = exponent(largest)
    scaled = scale_pow2(C, -e).masked_fill_((bad | zero)[:, None, None], 0.0)
    U, S, Vh, info = svd(scaled)
    signs = column_signs(U)
    U, Vh = U * signs[:, None, :], Vh * signs[:, :, None]
    k = min(p, q)
    U[zero], Vh[zero] = torch.eye(p, k, dtype=U.dtype, device=U.device), torch.eye(k, q, dtype=U.dtype, device=U.device)
    S = scale_pow2(S, e)
    for part in (U, S, Vh):
        part.masked_fill_(bad.reshape(N, *[1] * (part.ndim - 1)), torch.nan)
    info |= Info.NONFINITE * bad | Info.OVERFLOW * torch.isinf(S).any(-1)
    return RawSVD(U, S, Vh, info, (Note.ZERO * zero).int())


def _nothing(C: Tensor) -> RawSVD:
    N, p, q = C.shape
    k = min(p, q)
    codes = torch.zeros(N, dtype=torch.int32, device=C.device)
    return RawSVD(C.new_zeros(N, p, k), C.new_zeros(N, k), C.new_zeros(N, k, q), codes, codes.clone())


def svd(C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U, S, Vh, info`` of finite matrices (N, p, q); one that LAPACK gives up on is zero and NOT_CONVERGED."""
    info = torch.zeros(C.shape[0], dtype=torch.int32, device=C.device)
    try:
        return *torch.linalg.svd(C, full_matrices=False), info
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if C.shape[0] == 1:
            raw = _nothing(C)
            return raw.U, raw.S, raw.Vh, info + Info.NOT_CONVERGED
    parts = [svd(C[i : i + 1]) for i in range(C.shape[0])]
    U, S, Vh, info = (torch.cat(part) for part in zip(*parts, strict=True))
    return U, S, Vh, info


def column_signs(X: Tensor) -> Tensor:
    """Signs (N, p) that make the first (nearly) largest element of each column of X (N, m, p) positive."""
    # The window lets backends agree on near ties (docs/numerics.md, Sign and order).
    largest = torch.maximum(X.amax(-2), -X.amin(-2))
    first = (X.abs() >= _TIE * largest[:, None, :]).to(torch.uint8).argmax(-2, keepdim=True)
    return torch.where(X.gather(-2, first).squeeze(-2) < 0, -1.0, 1.0).to(X.dtype)
