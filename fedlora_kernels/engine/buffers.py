"""Host memory for slabs, used again as soon as nothing refers to it: fresh pages cost more than reading the file into them."""

from __future__ import annotations

import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

__all__ = ["Buffers"]

LEAST = 1 << 16
"""Smaller tensors are left to the allocator, which recycles them itself."""
SPARE = 4
"""A buffer serves tensors down to this fraction of its size."""


class Buffers:
    """Tensors on recycled memory.

    Every tensor, and every view of it, holds a reference to the array that it lies on; an array that only this pool knows is idle.
    ``limit`` bounds the bytes that the pool holds: idle arrays make room for new ones, and what has no room is not kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of this shape."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < LEAST:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            return torch.from_numpy(self._array(nbytes)[:nbytes]).view(dtype).view(shape)

    def _array(self, nbytes: int) -> np.ndarray:
        idle = [array for array in self._arrays if _idle(array)]
        fitting = [array for array in idle if nbytes <= array.nbytes <= SPARE * nbytes]
        if fitting:
            return min(fitting, key=lambda array: array.nbytes)
        held = sum(array.nbytes for array in self._arrays)
        for array in sorted(idle, key=lambda array: -array.nbytes):
            if held + nbytes <= self._limit:
                break
            self._arrays = [other for other in self._arrays if other is not array]
            held -= array.nbytes
        made = np.empty(nbytes, dtype=np.uint8)
        if held + nbytes <= self._limit:
            self._arrays.append(made)
        return made


def _idle(array: np.ndarray) -> bool:
    """Whether only the pool's list, the caller's loop, this call and its own argument refer to an array."""
    return sys.getrefcount(array) <= _ALONE


def _count_alone() -> int:
    """What `_idle` counts for an array that only a list holds, in this interpreter."""
    held = [np.empty(1, dtype=np.uint8)]
    return next(iter([_references(array) for array in held]))


def _references(array: np.ndarray) -> int:
    return sys.getrefcount(array)


_ALONE = _count_alone()
