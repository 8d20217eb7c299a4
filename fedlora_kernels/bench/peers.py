"""What users call today, in torch, NumPy and SciPy: the calls that kernels are compared with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Triple",
    "absent",
    "cholesky_qr",
    "dense",
    "gram_eigh",
    "looped",
    "optional",
    "procrustes",
    "qr_qr_core",
    "randomised",
    "thin_svds",
]

Triple = tuple[Tensor, Tensor, Tensor]
OPTIONAL = ("numpy.linalg", "scipy.linalg")


def optional(name: str) -> Any:
    """A module of NumPy or SciPy, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def absent() -> list[str]:
    """Libraries that would be peers, were they installed."""
    return [name.split(".")[0] for name in OPTIONAL if optional(name) is None]


def looped(function: Callable[..., Any], *batches: Iterable[Any]) -> Callable[[], list[Any]]:
    """The function matrix by matrix, as users' loops do."""
    return lambda: [function(*items) for items in zip(*batches, strict=True)]


def qr_qr_core(B: Tensor, A: Tensor) -> Triple:
    """Truncated SVD of B A through two thin QRs and a small SVD, in the dtype of the factors."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def thin_svds(B: Tensor, A: Tensor) -> Triple:
    """Thin SVD of either stack, then of the core: the published FLoRIST code."""
    U_B, S_B, Vh_B = torch.linalg.svd(B, full_matrices=False)
    U_A, S_A, Vh_A = torch.linalg.svd(A, full_matrices=False)
    U, S, Vh = torch.linalg.svd((S_B[..., None] * Vh_B) @ (U_A * S_A[..., None, :]), full_matrices=False)
    return U_B @ U, S, Vh @ Vh_A


def dense(B: Tensor, A: Tensor) -> Triple:
    """SVD of the update itself (PEFT's ``svd`` merge, FlexLoRA)."""
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return U, S, Vh


def cholesky_qr(X: Tensor, *, twice: bool = False) -> tuple[Tensor, Tensor]:
    """Q and R through the Cholesky factor of the Gram; twice, it repairs what squaring the condition lost."""
    R = torch.linalg.cholesky(X.mT @ X, upper=True)
    Q = torch.linalg.solve_triangular(R, X, upper=True, left=False)
    if not twice:
        return Q, R
    second, R_2 = cholesky_qr(Q)
    return second, R_2 @ R


def cholesky_qr_core(B: Tensor, A: Tensor) -> Triple:
    """As `qr_qr_core`, with Cholesky-QR of either factor, twice, in float64."""
    (Q_B, R_B), (Q_A, R_A) = (cholesky_qr(X, twice=True) for X in (B.double(), A.mT.double()))
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return (Q_B @ U).to(B.dtype), S, (Vh @ Q_A.mT).to(A.dtype)


def gram_eigh(B: Tensor, A: Tensor) -> Triple:
    """Through float64 Grams and one symmetric eigenproblem: the strongest composition of library calls."""
    G_B, G_A = (B.mT.double() @ B.double()), (A.double() @ A.mT.double())
    jitter = 1e-14 * G_B.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    F = torch.linalg.cholesky(G_B + jitter * torch.eye(G_B.shape[-1], device=B.device, dtype=torch.float64)).mT
    values, vectors = torch.linalg.eigh(F @ G_A @ F.mT)
    S = values.clamp_min(0).sqrt().flip(-1)
    inverse = torch.where(S > 1e-9 * S[..., :1], S.reciprocal(), torch.zeros_like(S))
    right = (inverse[..., None] * (vectors.flip(-1).mT @ F)).to(A.dtype) @ A
    # B (A V) is U S
    left = B @ (A @ right.mT)
    return left * inverse[..., None, :].to(left.dtype), S, right


def randomised(B: Tensor, A: Tensor, p: int) -> Triple:
    """Randomised SVD of the dense update, two power iterations: not exact, its error belongs beside its time."""
    U, S, V = torch.svd_lowrank(B @ A, q=min(p + 8, *B.shape[-2:-1], A.shape[-1]), niter=2)
    return U, S, V.mT


def procrustes(X: Tensor, Y: Tensor) -> Tensor:
    """Rotation of X onto Y (..., rows, r) by the SVD of their correlation."""
    U, _, Vh = torch.linalg.svd(X.mT @ Y)
    Q: Tensor = U @ Vh
    return Q


def align(B: Tensor, A: Tensor, A_ref: Tensor) -> Triple:
    """A pair rotated towards a reference: correlation, SVD, two products."""
    Q = procrustes(A.mT, A_ref.mT)
    return B @ Q, Q.mT @ A, Q
