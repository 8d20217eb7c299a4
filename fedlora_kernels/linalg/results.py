"""What the kernel API answers: values, certificates, and per matrix what went wrong (``info``) or is worth knowing (``notes``)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import TypeVar

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import INFO_TEXT, NOTE_TEXT, Info, Note
from fedlora_kernels.errors import ConvergenceError, FedLoRAError, NonFiniteError, OutputOverflowError
from fedlora_kernels.linalg.arrays import Array

__all__ = [
    "Certificate",
    "Info",
    "Note",
    "ProductSVD",
    "QRResult",
    "Rotation",
    "SVDResult",
    "WeightedSum",
    "Where",
    "info_text",
    "note_text",
    "place",
    "raise_for_info",
]

Where = Callable[[int], str]
"""Names a matrix of a call by its number, counted over all problems, as the start of a message."""

Flag = TypeVar("Flag", bound=IntFlag)

_ERROR: Mapping[Info, type[FedLoRAError]] = {
    Info.NONFINITE: NonFiniteError,
    Info.NOT_CONVERGED: ConvergenceError,
    Info.OVERFLOW: OutputOverflowError,
}


@dataclass(frozen=True, eq=False)
class SVDResult:
    """``C = U diag(S) Vh``: U (..., p, k), S (..., k) descending, Vh (..., k, q), k = min(p, q); info, notes (...) int32."""

    U: Array
    S: Array
    Vh: Array
    info: Array
    notes: Array


@dataclass(frozen=True, eq=False)
class QRResult:
    """``X = Q R``: Q (..., m, k) or None, R (..., k, width) in row-echelon form, k = min(m, width).

    ``rank`` (...) int64: rows of R and columns of Q from it on are zero. ``info``, ``notes`` (...) int32.
    """

    Q: Array | None
    R: Array
    rank: Array
    info: Array
    notes: Array


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """Answer of `weighted_sum` and `mixed_sum`: sum (..., p, q) in the output dtype, rounded once from float64.

    ``norm`` (...) float64 is the Frobenius norm of the sum and ``rounding`` (...) float64 that of what its dtype took away;
    ``info``, ``notes`` (...) int32.
    """

    sum: Array
    norm: Array
    rounding: Array
    info: Array
    notes: Array


@dataclass(frozen=True, eq=False)
class Rotation:
    """Orthogonal Procrustes solution: Q (..., r, r) and singular_values (..., r) of source^T target, both float64.

    ``unique`` (...) bool: no other rotation does as well. ``condition`` (...) float64: how much the inputs' rounding is
    amplified in Q. ``info``, ``notes`` (...) int32.
    """

    Q: Array
    singular_values: Array
    unique: Array
    condition: Array
    info: Array
    notes: Array


@dataclass(frozen=True, eq=False)
class Certificate:
    """What a truncated SVD vouches for, per matrix (docs/numerics.md, Floor and certificate).

    ``rho`` float64 measures cancellation (infinite if nothing is kept), ``sigma_err`` float64 bounds the relative error of
    every kept singular value, ``passes`` int32 is 1 or 2, ``energy_abs`` float64 is the sum of the magnitudes whose signed
    sum is the energy, ``numerical_rank`` int64 counts the singular values above the noise floor.
    """

    rho: Array
    sigma_err: Array
    passes: Array
    energy_abs: Array
    numerical_rank: Array


@dataclass(frozen=True, eq=False)
class ProductSVD:
    """Truncated SVD of ``W = sum_k w_k B_k A_k``, padded with zeros to p_max = min(m, n, R, cap) columns.

    left (..., m, p_max) and right (..., p_max, n) in the output dtype; S (..., p_max) float64; ``rank`` p (...) int64;
    ``energy`` (...) float64 is ``|W|_F^2``; ``error`` (...) float64 is ``|W - W_p|_F / |W|_F`` and ``error_bound`` what it
    surely does not exceed; ``info``, ``notes`` (...) int32 hold `Info` and `Note` bits.
    """

    left: Array
    S: Array
    right: Array
    rank: Array
    energy: Array
    error: Array
    error_bound: Array
    certificate: Certificate
    info: Array
    notes: Array

    @property
    def kept(self) -> Array:
        """Share of the energy that is kept, ``(s_1^2 + ... + s_p^2) / |W|_F^2``; 1 where W is zero: nothing is lost."""
        # The quotient itself leaves the range of float64 long before W does.
        return 1 - self.error * self.error

    def trim(self) -> ProductSVD:
        """Return the result without padding: cut to the largest rank of the batch, so that it stays one rectangular batch.

        Waits for the device. A matrix of lower rank than the largest keeps zero columns up to it.
        """
        p = int(self.rank.max()) if math.prod(self.rank.shape) else 0
        return dataclasses.replace(self, left=self.left[..., :p], S=self.S[..., :p], right=self.right[..., :p, :])


def info_text(code: int) -> list[str]:
    """Return the texts of the `Info` bits set in one matrix's ``info``; empty means fine."""
    return _texts(INFO_TEXT, code)


def note_text(code: int) -> list[str]:
    """Return the texts of the `Note` bits set in one matrix's ``notes``."""
    return _texts(NOTE_TEXT, code)


def _texts(table: Mapping[Flag, str], code: int) -> list[str]:
    return [text for flag, text in table.items() if int(code) & int(flag)]


def place(function: str, batches: Sequence[tuple[int, ...]], ragged: bool, flat: int) -> str:
    """Name matrix number ``flat`` of a call, counted over all problems, as the start of a message."""
    problem = 0
    while flat >= math.prod(batches[problem]):
        flat -= math.prod(batches[problem])
        problem += 1
    text = f"{function}: problem {problem}: " if ragged else f"{function}: "
    if not batches[problem]:
        return text
    index = []
    for size in reversed(batches[problem]):
        flat, position = divmod(flat, size)
        index.append(str(position))
    return f"{text}matrix ({', '.join(reversed(index))}): "


def raise_for_info(where: Where, infos: Sequence[Tensor]) -> None:
    """Raise for the gravest trouble in ``infos`` (one (N,) tensor per problem), naming the first matrix that has it."""
    if not infos:
        return
    codes = torch.cat(list(infos)).cpu()
    if not codes.any():
        return
    for flag, error in _ERROR.items():
        hit = (codes & int(flag)).nonzero()[:, 0].tolist()
        if hit:
            others = f" ({len(hit)} matrices of {len(codes)} are affected)" if len(hit) > 1 else ""
            raise error(f"{where(hit[0])}{INFO_TEXT[flag]}{others}")
