"""Pivoted Cholesky of positive semidefinite Grams, a batch at a time (docs/numerics.md, Pivoted Cholesky)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64

__all__ = ["pivoted_cholesky"]

_PANEL = 64


def pivoted_cholesky(G: Tensor, width: Tensor) -> Tensor:
    """L with ``L L^T = G`` up to a dropped remainder below ``width u64 max(diag G)``. Overwrites G.

    G is (N, R, R) float64, ``width`` (N,) its number of non-zero columns. Rows of L keep the order of G; columns come in
    order of elimination and are zero from the numerical rank on. Hammarling, Higham, Lucas (LAWN 161), blocked.
    """
    N, R, _ = G.shape
    L = torch.zeros_like(G)
    each = torch.arange(N, device=G.device)
    diag = G.diagonal(dim1=-2, dim2=-1).clone()
    stop = diag.amax(-1) * width * U64 if R else diag.new_zeros(N)
    for start in range(0, R, _PANEL):
        panel = L[:, :, start : start + _PANEL]
        for k in range(panel.shape[-1]):
            top, pivot = diag.max(-1)
            root = top.clamp_min(0).sqrt()
            # `not (x > stop)` also ends on NaN; a finished matrix goes on with zero columns.
            alive = top > stop
            column = G[each, pivot]
            if k:
                column = column - (panel[:, :, :k] @ panel[each, pivot, :k, None]).squeeze(-1)
            column = torch.where(alive[:, None] & (diag != -torch.inf), column / root[:, None], 0.0)
            column[each, pivot] = torch.where(alive, root, 0.0)
            diag -= column * column
            diag[each, pivot] = -torch.inf
            panel[:, :, k] = column
        if start + _PANEL < R:
            if not (diag > stop[:, None]).any():
                break
            G.baddbmm_(panel, panel.mT, alpha=-1)
    return L
