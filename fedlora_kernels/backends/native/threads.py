"""How many threads the native kernels take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fedlora_kernels.errors import InputError

__all__ = ["spare_threads", "thread_count"]

_MOST = 1024
_SPARED: ContextVar[int] = ContextVar("fedlora_threads_spared", default=0)
_forked = False


def thread_count() -> int:
    """Return FEDLORA_NUM_THREADS, else torch's, less those spared, at least 1; 1 in a forked child.

    InputError where the variable is no such number.
    """
    return 1 if _forked else max(1, _asked() - _SPARED.get())


@contextmanager
def spare_threads(count: int) -> Iterator[None]:
    """Within it, kernels called by this thread take ``count`` threads fewer: somebody else keeps as many processors busy.

    A parallel region that has to wait for a processor waits for the scheduler, which takes longer than a small region's work.
    """
    token = _SPARED.set(count)
    try:
        yield
    finally:
        _SPARED.reset(token)


def _asked() -> int:
    setting = os.environ.get("FEDLORA_NUM_THREADS", "").strip()
    if not setting:
        return torch.get_num_threads()
    if not (setting.isascii() and setting.isdigit() and 1 <= int(setting) <= _MOST):
        raise InputError(
            f"FEDLORA_NUM_THREADS={setting!r}: needs a whole number from 1 to {_MOST}; correct or unset it"
        )
    return int(setting)


def _after_fork() -> None:
    # A child that opens a parallel region of two threads after its parent had one hangs in the OpenMP runtime.
    global _forked  # noqa: PLW0603
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
