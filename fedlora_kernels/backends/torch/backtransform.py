"""Inverse-free back-transform: coefficients to singular vectors, fused with sign and cast (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.torch.chunks import load, slices
from fedlora_kernels.backends.torch.svd import column_signs

__all__ = ["write_left", "write_right"]


def write_left(blocks: Sequence[Tensor], e: Tensor | None, K: Tensor, out: Tensor) -> Tensor:
    """Write ``[X_1 | ... | X_K] 2^-e K`` to the first columns of out (N, m, p_max); answer the signs (N, p) applied.

    Whole columns are held in float64, as many as fit: the sign of a column is decided by its largest element.
    """
    N, p = K.shape[0], K.shape[-1]
    signs = torch.ones(N, p, dtype=torch.float64, device=K.device)
    for part in slices(N, 8 * out.shape[1] * p):
        X_blocks = [block[part] for block in blocks]
        for columns in slices(p, 8 * out.shape[1] * (part.stop - part.start)):
            X = _product(X_blocks, None if e is None else e[part], K[part, :, columns])
            signs[part, columns] = column_signs(X)
            out[part, :, columns] = X.mul_(signs[part, None, columns])
    return signs


def _product(blocks: Sequence[Tensor], e: Tensor | None, K: Tensor) -> Tensor:
    N, m, R = blocks[0].shape[0], blocks[0].shape[1], K.shape[1]
    # Column by column in memory: the search for the largest element is several times faster along it.
    X = torch.empty(N, K.shape[-1], m, dtype=torch.float64, device=K.device).mT
    for rows in slices(m, 8 * N * R):
        X.mT[..., rows] = K.mT @ load(blocks, rows, e).mT
    return X


def write_right(blocks: Sequence[Tensor], e: Tensor | None, K: Tensor, out: Tensor) -> None:
    """Write ``([X_1 | ... | X_K] 2^-e K)^T`` to the first rows of out (N, p_max, n), a few columns at a time."""
    N, R, p = K.shape
    for columns in slices(out.shape[2], 8 * N * (R + p)):
        out[:, :p, columns] = K.mT @ load(blocks, columns, e).mT
