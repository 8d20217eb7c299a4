"""The peak rate of fused multiply-adds, which floors are counted in."""

from __future__ import annotations

import ctypes

import torch

from fedlora_kernels.backends.native.library import Library

__all__ = ["multiply_adds"]

_CODE = {torch.float32: 0, torch.float64: 1}


def multiply_adds(library: Library, dtype: torch.dtype, steps: int, threads: int) -> float:
    """Run independent chains of so many steps on every thread and return the operations done, for the caller to time.

    Raises BackendError where the library is absent, KeyError for a dtype other than float32 and float64.
    """
    flops = ctypes.c_double()
    library.call("calibrate", "fedlora_calibrate", _CODE[dtype], steps, ctypes.byref(flops), threads, None)
    return flops.value
