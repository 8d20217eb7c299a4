"""Test material, public: matrices with prescribed spectra, adversarial factors, limits derived from rounding, exact answers.

Every generator takes ``seed`` and answers the same numbers for the same seed.
Source of the limits: docs/numerics.md, Limits that tests hold.
"""

from fedlora_kernels.testing.check import Check, check_product
from fedlora_kernels.testing.check_qr import check_qr
from fedlora_kernels.testing.check_rotation import check_rotated, check_rotation
from fedlora_kernels.testing.check_sums import check_gram, check_mixed_sum, check_rank, check_weighted_sum
from fedlora_kernels.testing.check_svd import check_svd
from fedlora_kernels.testing.exact import Exact, exact_polar, exact_svd, exact_values, householder_svd
from fedlora_kernels.testing.factors import FAMILIES, LoRAProblem
from fedlora_kernels.testing.frames import FRAMES, gauge
from fedlora_kernels.testing.gallery import GALLERY, SAMPLE, gallery
from fedlora_kernels.testing.lora import LORA
from fedlora_kernels.testing.matrices import CLASSICS, SPECTRA, orthonormal, prescribed, spectrum
from fedlora_kernels.testing.stacks import STACKS, StackProblem
from fedlora_kernels.testing.storage import STORAGES
from fedlora_kernels.testing.tolerances import U64, assert_close, roundoff, tolerance

__all__ = [
    "CLASSICS",
    "FAMILIES",
    "FRAMES",
    "GALLERY",
    "LORA",
    "SAMPLE",
    "SPECTRA",
    "STACKS",
    "STORAGES",
    "U64",
    "Check",
    "Exact",
    "LoRAProblem",
    "StackProblem",
    "assert_close",
    "check_gram",
    "check_mixed_sum",
    "check_product",
    "check_qr",
    "check_rank",
    "check_rotated",
    "check_rotation",
    "check_svd",
    "check_weighted_sum",
    "exact_polar",
    "exact_svd",
    "exact_values",
    "gallery",
    "gauge",
    "householder_svd",
    "orthonormal",
    "prescribed",
    "roundoff",
    "spectrum",
    "tolerance",
]
