"""Host memory that is used again: a page's first touch costs the system more than most kernels spend on it."""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Reserve", "fresh", "lend"]

_lent: dict[int, weakref.ref[Any]] = {}


class Reserve:
    """Memory for answers, kept for the next ones when no tensor lies in it any more.

    Args:
        limit: bytes that may lie unused; what comes back beyond them is given to the system.
        smallest: bytes of an answer from which on it is taken from here.
    """

    def __init__(self, limit: int = 64 << 20, smallest: int = 256 << 10) -> None:
        self._limit = limit
        self._smallest = smallest
        self._unused: list[mmap.mmap] = []
        self._lock = threading.RLock()  # a tensor may die, and give its memory back, at any moment

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the host whose content does not matter, in a storage of its own size."""
        size = math.prod(shape) * dtype.itemsize
        if size < self._smallest:
            return torch.empty(*shape, dtype=dtype)
        return lend(self._take(size), size, self._give_back).view(dtype).view(*shape)

    def unused(self) -> int:
        """Bytes that lie here."""
        return sum(map(len, self._unused))

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            fitting = [raw for raw in self._unused if size <= len(raw) <= size + size // 4]
            if fitting:
                best = min(fitting, key=len)
                self._unused.remove(best)
                return best
        return fresh(size)

    def _give_back(self, raw: mmap.mmap) -> None:
        with self._lock:
            self._unused.append(raw)
            while self.unused() > self._limit:
                self._unused.pop(0)


def fresh(size: int) -> mmap.mmap:
    """New memory, in huge pages where the system has them: it is had ten times as fast."""
    raw = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            raw.madvise(mmap.MADV_HUGEPAGE)
    return raw


def lend(raw: mmap.mmap, size: int, give_back: Callable[[mmap.mmap], None]) -> Tensor:
    """The first bytes of ``raw``, (size,) uint8; it is given back with the last tensor that lies in it."""
    array = np.frombuffer(raw, np.uint8, count=size)
    key = id(array)

    def end(_: object) -> None:
        del _lent[key]
        give_back(raw)

    # every tensor in this memory keeps the array
    _lent[key] = weakref.ref(array, end)
    return torch.from_numpy(array)
