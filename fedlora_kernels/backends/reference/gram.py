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
    (B_i, b_i), (A_i, a_i), (B_j, b_j), (A_j, a_j) = (_in_range(X) for X in (B_i, A_i, B_j, A_j))
    total = ((B_i.mT @ B_j) * (A_i @ A_j.mT)).sum()
    return times_power(total * w_i * w_j, b_i + a_i + b_j + a_j)


def _in_range(X: Tensor) -> tuple[Tensor, Tensor]:
    """``X 2^-e`` in float64 with its largest element in [1/2, 1), and e: its squares stay in range."""
    e = exponent_of(X.double().abs().amax() if X.numel() else torch.zeros(()))
    return times_power(X.double(), -e), e
