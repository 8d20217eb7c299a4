"""Inner products of client updates, one pair at a time (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors
from fedlora_kernels.backends.reference.powers import exponent_of, times_power

__all__ = ["update_gram"]


def update_gram(groups: Sequence[Factors]) -> list[Tensor]:
    """Inner products (N, K, K) of the weighted updates; see `Backend.update_gram`."""
    return [_update_gram(group) for group in groups]


def _update_gram(group: Factors) -> Tensor:
    N, K = group.weights.shape
    G = torch.zeros(N, K, K, dtype=torch.float64)
    for n in range(N):
        for i in range(K):
            for j in range(i, K):
                pair = ((group.B[k][n], group.A[k][n], group.weights[n, k]) for k in (i, j))
                G[n, i, j] = G[n, j, i] = _inner(*next(pair), *next(pair))
    return G


def _inner(B_i: Tensor, A_i: Tensor, w_i: Tensor, B_j: Tensor, A_j: Tensor, w_j: Tensor) -> Tensor:
    """``<w_i B_i A_i, w_j B_j A_j>`` as ``sum((B_i^T B_j) o (A_i A_j^T))``; NaN if a factor is not finite."""
    if not all(torch.isfinite(X).all() for X in (B_i, A_i, B_j, A_j)):
        return torch.tensor(torch.nan, dtype=torch.float64)
    B_i, A_i, e_i = _in_range(B_i.double(), A_i.double(), w_i)
    B_j, A_j, e_j = _in_range(B_j.double(), A_j.double(), w_j)
    return times_power(((B_i.mT @ B_j) * (A_i @ A_j.mT)).sum(), e_i + e_j)


def _in_range(B: Tensor, A: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B', A', e with ``B' A' = w B A 2^-e``: columns of B' and the heaviest row of A' near 1, so that squares stay in range."""
    live = B.any(0) & A.any(1)
    B, A = B[:, live], A[live]
    if not A.numel():
        return B, A, torch.tensor(0)
    b, a, e_w = exponent_of(B.abs().amax(0)), exponent_of(A.abs().amax(1)), exponent_of(w)
    e = (b + a).max()
    return times_power(B, -b), times_power(w, -e_w) * times_power(A, (b - e)[:, None]), e + e_w
