"""Accurate mode composed of torch.linalg, on the device of the tensors; one file per family."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedlora_kernels.backends.torch.gram import update_gram
from fedlora_kernels.backends.torch.procrustes import align_factors, procrustes_rotation, rotate_factors
from fedlora_kernels.backends.torch.product import product_svd
from fedlora_kernels.backends.torch.qr import stacked_qr
from fedlora_kernels.backends.torch.sums import mixed_sum, weighted_sum
from fedlora_kernels.backends.torch.svd import core_svd
from fedlora_kernels.backends.torch.threshold import select_rank

__all__ = ["BACKEND", "TorchBackend"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TorchBackend:
    """Runs wherever torch runs. Batched library calls are not bitwise independent of the batch."""

    name = "torch"
    bitwise: frozenset[str] = frozenset()

    stacked_qr = staticmethod(stacked_qr)
    core_svd = staticmethod(core_svd)
    select_rank = staticmethod(select_rank)
    product_svd = staticmethod(product_svd)
    update_gram = staticmethod(update_gram)
    weighted_sum = staticmethod(weighted_sum)
    mixed_sum = staticmethod(mixed_sum)
    procrustes_rotation = staticmethod(procrustes_rotation)
    rotate_factors = staticmethod(rotate_factors)
    align_factors = staticmethod(align_factors)

    def available(self) -> tuple[bool, str]:
        """Always, with the version of torch."""
        return True, f"torch {torch.__version__}"

    def serves(self, op: str, dtype: torch.dtype, device: torch.device, sizes: Mapping[str, int]) -> tuple[bool, str]:
        """Everything on every device, in the four floating-point types."""
        if dtype not in _DTYPES:
            return False, f"dtype {dtype} is none of float64, float32, float16, bfloat16"
        return True, "torch.linalg on the device of the tensors"


BACKEND = TorchBackend()
