"""Figures of an answer beside its time, in float64, the same for ours and for every peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["of_gram", "of_product", "of_qr", "of_rotation", "of_svd", "orthogonality"]

FEW = 8
"""Matrices of a batch that are looked at."""


def orthogonality(X: Tensor) -> float:
    """``max |X^T X - I|`` of columns (..., m, k)."""
    X = X.double()
    gram = sum(rows.mT @ rows for rows in torch.split(X, 256, dim=-2))
    return float((gram - torch.eye(X.shape[-1], dtype=torch.float64)).abs().max())


def of_svd(C: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Mapping[str, float]:
    """Worst relative residual and orthogonality of the first matrices of (N, p, q)."""
    C, U, S, Vh = (X[:FEW].double() for X in (C, U, S, Vh))
    residual = (C - (U * S[..., None, :]) @ Vh).flatten(1).norm(dim=1) / C.flatten(1).norm(dim=1)
    return {"residual": float(residual.max()), "orthogonality": max(orthogonality(U), orthogonality(Vh.mT))}


def of_product(exact: Tensor, p: int, U: Tensor, S: Tensor) -> Mapping[str, float]:
    """Worst relative error of the first p singular values (P1), and orthogonality of U (P2), of one matrix."""
    s = S[:p].double()
    error = (s - exact[: len(s)]).abs() / exact[: len(s)]
    return {"value": float(error.max()), "orthogonality": orthogonality(U[:, :p])}


def of_qr(X: Tensor, Q: Tensor | None, R: Tensor) -> Mapping[str, float]:
    """Column-wise backward error (of the Gram where there is no Q) and orthogonality, of one matrix."""
    X, R = X.double(), R.double()
    norms = X.norm(dim=0)
    if Q is None:
        return {"backward": float(((R.mT @ R - X.mT @ X).abs() / (norms[:, None] * norms)).max())}
    backward = (X - Q.double() @ R).norm(dim=0) / norms
    return {"backward": float(backward.max()), "orthogonality": orthogonality(Q)}


def of_gram(exact: Tensor, scale: Tensor, G: Tensor) -> Mapping[str, float]:
    """Worst error of inner products, relative to the norms of the factors."""
    return {"error": float(((G.double() - exact).abs() / scale).max())}


def of_rotation(X: Tensor, Y: Tensor, Q: Tensor) -> Mapping[str, float]:
    """Orthogonality, and what the best trace exceeds the one reached by, relative; first matrices of (N, rows, r)."""
    X, Y, Q = (Z[:FEW].double() for Z in (X, Y, Q))
    M = X.mT @ Y
    best = torch.linalg.svdvals(M).sum(-1)
    reached = (Q.mT @ M).diagonal(dim1=-2, dim2=-1).sum(-1)
    return {"orthogonality": orthogonality(Q), "excess": float(((best - reached) / best).max())}


def of_aligned(B: Tensor, A: Tensor, left: Tensor, right: Tensor) -> Mapping[str, float]:
    """Worst change of the product by a rotation that should keep it, relative to the norms of the factors."""
    pairs: Sequence[tuple[Tensor, ...]] = [
        tuple(Z[i].double() for Z in (B, A, left, right)) for i in range(min(FEW, len(B)))
    ]
    lost = [float((x @ y - b @ a).norm() / (b.norm() * a.norm())) for b, a, x, y in pairs]
    return {"product": max(lost)}
