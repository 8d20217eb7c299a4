"""Low-rank plus block-sparse splitting of N small matrices at once, each with its own weight and its own stop.

    (L, S) = argmin |L|_* + lam sum_k |S_k|_F    subject to    L + S = X = [ X_1 | ... | X_K ]

Source: ADMM for principal component pursuit (Lin, Chen, Ma, arXiv 1009.5055), with whole blocks of columns in place of
entries (after outlier pursuit, arXiv 1010.4237).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Split", "block_norms", "low_rank_plus_sparse"]

FIRST_PENALTY = 1.25
"""Penalty of the first step, over the spectral norm of X."""
GROWTH = 1.02
"""Of the penalty, per step. Up to 1.05 reaches the same optimum, 1.2 does not."""
LARGEST_PENALTY = 1e7 * FIRST_PENALTY


class Split(NamedTuple):
    """``X = low_rank + sparse``, (N, q, p) float64; on the host ``steps`` (N,) int64 and ``converged`` (N,) bool."""

    low_rank: Tensor
    sparse: Tensor
    steps: Tensor
    converged: Tensor


def low_rank_plus_sparse(X: Tensor, widths: Sequence[int], lam: Tensor, tol: float, max_iter: int) -> Split:
    """Split each matrix of ``X`` (N, q, p) float64, finite, whose K blocks of columns have ``widths``; ``lam`` is (N,).

    A matrix leaves the batch once ``|X - L - S|_F <= tol |X|_F``, at the latest after ``max_iter`` steps. Zero needs none.
    """
    low_rank, sparse = torch.zeros_like(X), torch.zeros_like(X)
    steps = torch.zeros(X.shape[0], dtype=torch.int64)
    size = torch.linalg.matrix_norm(X, 2)
    converged = (size == 0.0).cpu()
    live = size.nonzero()[:, 0]
    # divided by their spectral norms, all matrices share one penalty
    size = size[live, None, None]
    X, lam = X[live] / size, lam.to(X.device)[live]
    limit = tol * torch.linalg.matrix_norm(X)
    S = Y = torch.zeros_like(X)  # Y is the multiplier over the penalty
    penalty = FIRST_PENALTY
    for step in range(1, max_iter + 1):
        if not live.numel():
            break
        L = _shrunk_spectrum(X - S + Y, 1.0 / penalty)
        T = X - L + Y
        S = T * _kept_share(T, widths, lam / penalty)
        gap = torch.linalg.matrix_norm(T - S - Y)  # of X - L - S
        Y = T - S
        done = gap <= limit
        last = done if step < max_iter else torch.ones_like(done)
        if bool(last.any()):
            stopped = live[last]
            low_rank[stopped], sparse[stopped] = L[last] * size[last], S[last] * size[last]
            steps[stopped.cpu()], converged[stopped.cpu()] = step, done[last].cpu()
            live, X, S, Y, lam, limit, size = (x[~last] for x in (live, X, S, Y, lam, limit, size))
        growth = min(GROWTH, LARGEST_PENALTY / penalty)
        penalty, Y = penalty * growth, Y / growth
    return Split(low_rank, sparse, steps, converged)


def block_norms(X: Tensor, widths: Sequence[int]) -> Tensor:
    """Frobenius norm of each block of columns of ``X`` (N, q, p), (N, K)."""
    return torch.stack([torch.linalg.matrix_norm(block) for block in torch.split(X, list(widths), dim=2)], 1)


def _shrunk_spectrum(Z: Tensor, cut: float) -> Tensor:
    """``Z`` (N, q, p) with every singular value s replaced by max(s - cut, 0).

    From the eigenvectors of the smaller Gram: values near the cut, which are at least 1e-7 of the largest, are off by no more
    than rounding over that ratio, and those far below it do not enter.
    """
    if Z.shape[1] > Z.shape[2]:
        return _shrunk_spectrum(Z.mT, cut).mT
    squares, U = torch.linalg.eigh(Z @ Z.mT)
    kept = (1.0 - cut / squares.clamp(min=0.0).sqrt()).clamp(min=0.0)
    shrunk: Tensor = (U * kept[:, None, :]) @ (U.mT @ Z)
    return shrunk


def _kept_share(T: Tensor, widths: Sequence[int], cut: Tensor) -> Tensor:
    """``max(0, 1 - cut / |T_k|_F)`` of the block of each column, (N, 1, p); ``cut`` is (N,)."""
    share = (1.0 - cut[:, None] / block_norms(T, widths)).clamp(min=0.0)
    columns = torch.tensor(widths, device=T.device)
    return share.repeat_interleave(columns, dim=1)[:, None, :]
