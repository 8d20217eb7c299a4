"""The oracle: float64 Householder QR and SVD, one matrix at a time; one file per family."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedlora_kernels.backends.reference.gram import update_gram
from fedlora_kernels.backends.reference.procrustes import align_factors, procrustes_rotation, rotate_factors
from fedlora_kernels.backends.reference.product import product_svd
from fedlora_kernels.backends.reference.qr import stacked_qr
from fedlora_kernels.backends.reference.svd import core_svd
from fedlora_kernels.backends.reference.threshold import select_rank

__all__ = ["BACKEND", "ReferenceBackend"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ReferenceBackend:
    """Beyond doubt rather than fast: a loop over matrices on the CPU, so no result depends on its neighbours."""

    name = "reference"
    bitwise = True

    stacked_qr = staticmethod(stacked_qr)
    core_svd = staticmethod(core_svd)
    select_rank = staticmethod(select_rank)
    product_svd = staticmethod(product_svd)
    update_gram = staticmethod(update_gram)
    procrustes_rotation = staticmethod(procrustes_rotation)
    rotate_factors = staticmethod(rotate_factors)
    align_factors = staticmethod(align_factors)

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
