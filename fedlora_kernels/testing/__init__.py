"""Test material, public: matrices with prescribed spectra, adversarial factors, limits derived from rounding, exact answers.

Every generator takes ``seed`` and answers the same numbers for the same seed.
Source of the limits: docs/numerics.md, Limits that tests hold.
"""

from fedlora_kernels.testing.check import Check, check_product
from fedlora_kernels.testing.exact import Exact, exact_svd
from fedlora_kernels.testing.factors import FAMILIES, LoRAProblem
from fedlora_kernels.testing.matrices import CLASSICS, SPECTRA, orthonormal, prescribed, spectrum
from fedlora_kernels.testing.tolerances import U64, assert_close, roundoff, tolerance

__all__ = [
    "CLASSICS",
    "FAMILIES",
    "SPECTRA",
    "U64",
    "Check",
    "Exact",
    "LoRAProblem",
    "assert_close",
    "check_product",
    "exact_svd",
    "orthonormal",
    "prescribed",
    "roundoff",
    "spectrum",
    "tolerance",
]
