"""SVD of many dense matrices through torch.linalg.svd (docs/numerics.md, Core SVD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Info, Note, RawSVD
from fedlora_kernels.backends.torch.chunks import exponent, scale_pow2, slices

__all__ = ["column_signs", "core_svd", "svd"]

_TIE = 1 - 2.0**-20


def core_svd(groups: Sequence[Tensor]) -> list[RawSVD]:
    """SVD of each matrix of (N, p, q); see `Backend.core_svd`."""
    return [_core_svd(C) for C in groups]


def _core_svd(C: Tensor) -> RawSVD:
    N, p, q = C.shape
    k = min(p, q)
    dtype = torch.float32 if C.dtype in (torch.float16, torch.bfloat16) else C.dtype
    codes = torch.zeros(N, dtype=torch.int32, device=C.device)
    raw = RawSVD(
        torch.zeros(N, p, k, dtype=dtype, device=C.device),
        torch.zeros(N, k, dtype=dtype, device=C.device),
        torch.zeros(N, k, q, dtype=dtype, device=C.device),
        codes,
        codes.clone(),
    )
    if k:
        for part in slices(N, 8 * (2 * p * q + 2 * k * (p + q))):
            # A float32 driver misses 4 sqrt(R) u32; in float64 only the rounding of the answer is left.
            _write(C[part].double(), RawSVD(*(field[part] for field in raw)))
    return raw


def _write(C: Tensor, raw: RawSVD) -> None:
    """SVD of float64 matrices, the largest element of each scaled to about 1 on the way."""
    largest = C.abs().amax((-2, -1))
    bad, zero = ~torch.isfinite(largest), largest == 0
    e = exponent(largest)
    U, S, Vh, info = svd(scale_pow2(C, -e).masked_fill_((bad | zero)[:, None, None], 0.0))
    signs = column_signs(U)
    raw.U.copy_(U * signs[:, None, :])
    raw.S.copy_(scale_pow2(S, e))
    raw.Vh.copy_(Vh * signs[:, :, None])
    for field in (raw.U, raw.Vh):
        field.copy_(
            torch.where(zero[:, None, None], torch.eye(*field.shape[1:], dtype=field.dtype, device=C.device), field)
        )
        field.masked_fill_(bad[:, None, None], torch.nan)
    raw.S.masked_fill_(bad[:, None], torch.nan)
    raw.info.copy_(info | Info.NONFINITE * bad | Info.OVERFLOW * torch.isinf(raw.S).any(-1))
    raw.notes.copy_(Note.ZERO * zero)


def svd(C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U, S, Vh, info`` of finite matrices (N, p, q); one that LAPACK gives up on is zero and NOT_CONVERGED."""
    info = torch.zeros(C.shape[0], dtype=torch.int32, device=C.device)
    try:
        return *torch.linalg.svd(C, full_matrices=False), info
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if C.shape[0] == 1:
            p, q, k = *C.shape[1:], min(C.shape[1:])
            return C.new_zeros(1, p, k), C.new_zeros(1, k), C.new_zeros(1, k, q), info + Info.NOT_CONVERGED
    parts = [svd(C[i : i + 1]) for i in range(C.shape[0])]
    U, S, Vh, info = (torch.cat(part) for part in zip(*parts, strict=True))
    return U, S, Vh, info


def column_signs(X: Tensor) -> Tensor:
    """Signs (N, p) that make the first (nearly) largest element of each column of X (N, m, p) positive."""
    # The window lets backends agree on near ties (docs/numerics.md, Sign rule).
    size = X.abs()
    first = (size >= _TIE * size.amax(-2, keepdim=True)).to(torch.uint8).argmax(-2, keepdim=True)
    return torch.where(X.gather(-2, first).squeeze(-2) < 0, -1.0, 1.0).to(X.dtype)
