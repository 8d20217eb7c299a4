"""How many threads the native kernels take."""

from __future__ import annotations

import os

import torch

from fedlora_kernels.errors import InputError

__all__ = ["thread_count"]

_MOST = 1024
_forked = False


def thread_count() -> int:
    """Return FEDLORA_NUM_THREADS, else torch's; 1 in a forked child. InputError where the variable is no such number."""
    if _forked:
        return 1
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
