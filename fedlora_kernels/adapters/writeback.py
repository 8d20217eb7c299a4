"""Files on their way to the disc while they are still being written: what is there already need not be waited for at the end."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

__all__ = ["Writeback"]

STEP = 8 << 20
WRITE = 2
"""SYNC_FILE_RANGE_WRITE: begin to write what is dirty, and do not wait."""


class Writeback:
    """Lets the system begin with every 8 MiB of a file that is appended to. A wish: nothing depends on it, fsync least of all.

    Args:
        fd: of the file, open for writing.
        begin: the byte from which on it is appended to.
    """

    def __init__(self, fd: int, begin: int) -> None:
        self._fd = fd
        self._begun = begin

    def reached(self, end: int) -> None:
        """Say that bytes up to ``end`` are written."""
        call = _sync_file_range()
        if call is not None and end - self._begun >= STEP:
            call(self._fd, self._begun, end - self._begun, WRITE)
            self._begun = end


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The call of the system; None where it has none."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
