"""Exact answers: the update and its SVD in extended precision, by means that share nothing with the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlora_kernels.testing.factors import LoRAProblem

__all__ = ["Exact", "exact_polar", "exact_residual", "exact_skew", "exact_svd", "exact_values", "householder_svd"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Exact:
    """``W = U diag(s) V^T`` rounded to float64 once: W (m, n), U (m, q), s (q,), V (n, q); energy is ``|W|_F^2``."""

    W: Tensor
    U: Tensor
    s: Tensor
    V: Tensor
    energy: float


def exact_svd(problem: LoRAProblem) -> Exact:
    """SVD of the update in 80-bit arithmetic (float64 where the platform has no wider type), by one-sided Jacobi.

    Relative errors of the singular values are about ``1e-19 rho``. Cost grows with ``min(m, n)^2 max(m, n)``: meant for
    matrices up to a few hundred columns.
    """
    W = sum(
        np.longdouble(w) * (_wide(B) @ _wide(A))
        for w, B, A in zip(problem.weights.tolist(), problem.B, problem.A, strict=True)
    )
    W = np.asarray(W, dtype=np.longdouble)
    tall = W.shape[0] >= W.shape[1]
    U, s, V = _jacobi(W if tall else W.T)
    U, V = (U, V) if tall else (V, U)
    return Exact(_narrow(W), _narrow(U), _narrow(s), _narrow(V), float((W * W).sum()))


def householder_svd(problem: LoRAProblem) -> Exact:
    """SVD of the dense update by LAPACK in float64: for sizes beyond `exact_svd`, where the factors cancel little."""
    W = problem.update()
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return Exact(W, U, s, Vh.mT, float(W.square().sum()))


def exact_values(X: Tensor) -> Tensor:
    """Singular values (q,) of a tall matrix (p, q), to full relative accuracy where its columns are merely badly scaled."""
    return _narrow(_jacobi(_wide(X))[1])


def exact_skew(X: Tensor, kept: int | None = None) -> float:
    """``max |X^T X - D|`` in extended precision, D the identity on the first ``kept`` columns (None: on all) and zero beyond.

    For judging float64: equal numbers add up with one-sided rounding, and a float64 Gram is then itself 90 units off.
    """
    G = _wide(X).T @ _wide(X)
    D = np.eye(len(G))
    D[len(G) if kept is None else kept :] = 0
    return float(np.abs(G - D).max(initial=0))


def exact_residual(X: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``X - left right`` in extended precision, rounded once."""
    return _narrow(_wide(X) - _wide(left) @ _wide(right))


def exact_polar(X: Tensor, Y: Tensor, *, special: bool) -> tuple[Tensor, bool]:
    """Orthogonal polar factor of ``X^T Y`` of full rank (of determinant 1 if ``special``), and whether that cost a direction."""
    U, _, V = _jacobi(_wide(X).T @ _wide(Y))
    Q = U @ V.T
    reflected = special and bool(np.linalg.det(Q.astype(np.float64)) < 0)
    return _narrow(Q - 2 * reflected * np.outer(U[:, -1], V[:, -1])), reflected


def _wide(X: Tensor) -> Array:
    return X.double().numpy().astype(np.longdouble)


def _narrow(X: Array) -> Tensor:
    return torch.from_numpy(X.astype(np.float64))


def _jacobi(X: Array) -> tuple[Array, Array, Array]:
    """U, s, V of a tall matrix: rotate pairs of columns until all are orthogonal (Demmel, Veselic 1992)."""
    n = X.shape[1]
    odd = n % 2
    X = np.concatenate([X, np.zeros((X.shape[0], odd), X.dtype)], 1)
    J = np.eye(n + odd, dtype=X.dtype)
    order = np.arange(n + odd)
    tol = 4 * np.finfo(X.dtype).eps * np.sqrt(np.longdouble(max(n, 1)))
    for _ in range(60):
        rotated = False
        for _ in range(n + odd - 1):
            i, j = order[: len(order) // 2], order[: len(order) // 2 - 1 : -1]
            rotated |= _rotate(X, J, i, j, tol)
            order = np.concatenate([order[:1], order[-1:], order[1:-1]])
        if not rotated:
            break
    s = np.sqrt((X * X).sum(0))
    by_size = np.argsort(-s, kind="stable")[:n]
    U = np.divide(X, s, out=np.zeros_like(X), where=s > 0)
    return U[:, by_size], s[by_size], J[:n, by_size]


def _rotate(X: Array, J: Array, i: Array, j: Array, tol: Any) -> bool:
    """Make columns i and j of X pairwise orthogonal, and J with them; whether any pair needed it."""
    x, y = X[:, i], X[:, j]
    a, b, g = (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)
    # Columns below the rounding of the largest are noise: rotating them would never end.
    above = np.minimum(a, b) > (np.finfo(X.dtype).eps * 1e-3) ** 2 * (X * X).sum(0).max()
    needed = above & (np.abs(g) > tol * np.sqrt(a) * np.sqrt(b))
    if not needed.any():
        return False
    safe = np.where(needed, g, 1)
    z = (b - a) / (2 * safe)
    t = np.where(z < 0, -1, 1) / (np.abs(z) + np.sqrt(1 + z * z))
    t = np.where(needed, t, 0)
    c = 1 / np.sqrt(1 + t * t)
    for M in (X, J):
        x, y = M[:, i], M[:, j]
        M[:, i], M[:, j] = c * (x - t * y), c * (y + t * x)
    return True
