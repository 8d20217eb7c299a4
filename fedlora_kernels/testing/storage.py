"""The same numbers in other places of memory: what a kernel that reads strides must not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["STORAGES"]


def dense(X: Tensor) -> Tensor:
    """By rows, without gaps."""
    return X.contiguous()


def transposed(X: Tensor) -> Tensor:
    """By columns."""
    return X.mT.contiguous().mT


def strided(X: Tensor) -> Tensor:
    """Every second element of rows with a NaN between any two."""
    room = torch.full((*X.shape[:-1], 2 * X.shape[-1]), torch.nan, dtype=X.dtype, device=X.device)
    room[..., ::2] = X
    return room[..., ::2]


def offset(X: Tensor) -> Tensor:
    """One element behind an aligned address: 2 bytes for a half."""
    room = torch.full((X.numel() + 1,), torch.nan, dtype=X.dtype, device=X.device)
    room[1:] = X.flatten()
    return room[1:].view(X.shape)


def batch_last(X: Tensor) -> Tensor:
    """The batch is the fastest dimension: matrices lie interleaved."""
    return X.movedim(0, -1).contiguous().movedim(-1, 0) if X.dim() > 2 else transposed(X)


STORAGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    store.__name__: store for store in (dense, transposed, strided, offset, batch_last)
}
"""By name: functions of a tensor (..., p, q) to an equal one."""
