"""Exact answers: the update and its SVD in extended precision, by means that share nothing with the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlora_kernels.testing.factors import LoRAProblem

__all__ = ["Exact", "exact_svd"]

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
