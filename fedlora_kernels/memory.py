"""Host memory that is used again: a page's first touch costs the system more than most kernels spend on it.

Whether a tensor still lies in a buffer is read from the number of references to it, not from a callback: an exception that a
signal raises inside a callback would be lost.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Pool", "Reserve"]


class Pool:
    """Buffers, each used again as soon as no tensor lies in it any more, whoever holds one."""

    def __init__(self) -> None:
        self._buffers: list[Any] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """A buffer of at least ``size`` bytes, (bytes,) uint8; an unused one that is too small makes way for it."""
        with self._lock:
            unused = _unused(self._buffers)
            fitting = [i for i in unused if len(self._buffers[i]) >= size]
            if fitting:
                return torch.from_numpy(self._buffers[fitting[0]])
            if unused:
                del self._buffers[unused[0]]
            self._buffers.append(_fresh(size))
            return torch.from_numpy(self._buffers[-1])


class Reserve:
    """Memory for answers of kernels, used again when no tensor lies in it any more.

    Args:
        limit: bytes that belong to it, used or not; answers beyond them lie in memory of their own.
        smallest: bytes of an answer from which on it is taken from here.
    """

    def __init__(self, limit: int = 64 << 20, smallest: int = 256 << 10) -> None:
        self._limit = limit
        self._smallest = smallest
        self._buffers: list[Any] = []
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the host whose content does not matter, in a storage of its own."""
        size = math.prod(shape) * dtype.itemsize
        if not self._smallest <= size <= self._limit or size == 0:
            return torch.empty(*shape, dtype=dtype)
        with self._lock:
            buffer = self._take(size)
            # a view that keeps the buffer: a storage ends where its answer does
            return torch.empty(*shape, dtype=dtype) if buffer is None else _tensor(buffer[:size], shape, dtype)

    def held(self) -> int:
        """Bytes that belong to it."""
        return sum(map(len, self._buffers))

    def _take(self, size: int) -> Any:
        """An unused buffer of about that size, a new one while there is room, or None."""
        for i in _unused(self._buffers):
            if size <= len(self._buffers[i]) <= size + size // 4:
                return self._buffers[i]
        while self.held() + size > self._limit:
            unused = _unused(self._buffers)
            if not unused:
                return None
            del self._buffers[unused[0]]
        self._buffers.append(_fresh(size))
        return self._buffers[-1]


def _tensor(memory: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(memory).view(dtype).view(*shape)


def _unused(buffers: list[Any]) -> list[int]:
    """Places of those that nobody but the list refers to."""
    return [i for i in range(len(buffers)) if _references(buffers, i) == _ALONE]


def _references(buffers: list[Any], i: int) -> int:
    return sys.getrefcount(buffers[i])


_ALONE = _references([np.empty(0)], 0)


def _fresh(size: int) -> Any:
    """New memory, (size,) uint8, in huge pages where the system has them: it is had ten times as fast."""
    raw = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            raw.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(raw, np.uint8, count=size)
