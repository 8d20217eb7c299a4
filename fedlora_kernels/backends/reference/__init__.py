"""The oracle: float64 Householder QR and SVD, one matrix at a time; one file per family."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch

from fedlora_kernels.backends.contract import OPS
from fedlora_kernels.backends.reference.gram import update_gram
from fedlora_kernels.backends.reference.procrustes import align_factors, procrustes_rotation, rotate_factors
from fedlora_kernels.backends.reference.product import product_svd
from fedlora_kernels.backends.reference.qr import stacked_qr
from fedlora_kernels.backends.reference.sums import mixed_sum, weighted_sum
from fedlora_kernels.backends.reference.svd import core_svd
from fedlora_kernels.backends.reference.threshold import select_rank

__all__ = ["BACKEND", "ReferenceBackend"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_P = ParamSpec("_P")
_T = TypeVar("_T")
_one_at_a_time = threading.Lock()


def _after_fork() -> None:
    global _one_at_a_time  # noqa: PLW0603 - the thread that held it does not exist in the child
    _one_at_a_time = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _single_threaded(op: Callable[_P, _T]) -> Callable[_P, _T]:
    """The operation on one thread: BLAS and LAPACK split their sums by the number of threads, which changes bits."""

    @functools.wraps(op)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        # The thread count of BLAS belongs to the process: two calls at once would restore it under each other.
        with _one_at_a_time:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return op(*args, **kwargs)
            finally:
                torch.set_num_threads(threads)

    return run


class ReferenceBackend:
    """Beyond doubt rather than fast: a loop over matrices on the CPU, on one thread, so no result depends on its neighbours."""

    name = "reference"
    bitwise = frozenset(OPS)

    stacked_qr = staticmethod(_single_threaded(stacked_qr))
    core_svd = staticmethod(_single_threaded(core_svd))
    select_rank = staticmethod(_single_threaded(select_rank))
    product_svd = staticmethod(_single_threaded(product_svd))
    update_gram = staticmethod(_single_threaded(update_gram))
    weighted_sum = staticmethod(_single_threaded(weighted_sum))
    mixed_sum = staticmethod(_single_threaded(mixed_sum))
    procrustes_rotation = staticmethod(_single_threaded(procrustes_rotation))
    rotate_factors = staticmethod(_single_threaded(rotate_factors))
    align_factors = staticmethod(_single_threaded(align_factors))

    def available(self) -> tuple[bool, str]:
        """Always, with the version of torch."""
        return True, f"torch {torch.__version__}"

    def serves(self, op: str, dtype: torch.dtype, device: torch.device, sizes: Mapping[str, int]) -> tuple[bool, str]:
        """Everything in the four floating-point types, on the CPU only."""
        if dtype not in _DTYPES:
            return False, f"dtype {dtype} is none of float64, float32, float16, bfloat16"
        if device.type != "cpu":
            return False, f"the tensors are on {device}; the reference computes on the CPU and moves nothing"
        return True, "float64 Householder QR and SVD, one matrix at a time"


BACKEND = ReferenceBackend()
