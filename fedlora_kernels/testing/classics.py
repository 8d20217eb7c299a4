"""The classics that break solvers, and numbers at the ends of a dtype's range, as functions ``(m, n, seed, dtype)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fedlora_kernels.testing.matrices import CLASSICS, Matrix, generator, orthonormal, prescribed, spectrum
from fedlora_kernels.testing.tolerances import roundoff

__all__ = [
    "HARD",
    "alternating_columns",
    "classic",
    "constant",
    "duplicate_columns",
    "half_precision_max",
    "negative_zero",
    "orthogonal",
    "repeated",
    "scaled_normal",
    "subnormal",
    "twins",
]


def classic(m: int, n: int, seed: int, dtype: torch.dtype, *, make: Callable[[int, int], Tensor]) -> Tensor:  # noqa: ARG001
    """A member of `CLASSICS`, rounded."""
    return make(m, n).to(dtype)


def twins(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Singular values 1 and ``1 + 10 u`` in turn: a cluster narrower than most stopping rules."""
    values = 1 + 10 * roundoff(dtype) * (torch.arange(min(m, n)) % 2).double()
    return prescribed(m, n, values.sort(descending=True).values, seed, dtype)


def repeated(m: int, n: int, seed: int, dtype: torch.dtype, *, values: str) -> Tensor:
    """Fourfold singular values, or half of them zero: names of `spectrum`."""
    return prescribed(m, n, spectrum(values, min(m, n), 1e3, seed), seed, dtype)


def orthogonal(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Orthonormal columns (rows where m < n): every singular value 1."""
    return (orthonormal(m, n, seed) if m >= n else orthonormal(n, m, seed).mT).to(dtype)


def duplicate_columns(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """The left half twice: exact rank ceil(n / 2), if m allows."""
    X = torch.randn(m, (n + 1) // 2, dtype=torch.float64, generator=generator(seed))
    return torch.cat([X, X], 1)[:, :n].to(dtype)


def scaled_normal(m: int, n: int, seed: int, dtype: torch.dtype, *, size: float) -> Tensor:
    """Normal elements times ``size``, within the range of the dtype."""
    X = torch.randn(m, n, dtype=torch.float64, generator=generator(seed)).clamp(-3, 3)
    return (X * min(size, torch.finfo(dtype).max / (64 * max(m, n, 1)))).to(dtype)


def subnormal(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Elements below the normal range."""
    X = torch.randn(m, n, dtype=torch.float64, generator=generator(seed)).clamp(-4, 4)
    return (X * (torch.finfo(dtype).smallest_normal / 8)).to(dtype)


def alternating_columns(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Columns of size 1e30 and 1e-30 in turn (1e4 and 1e-4 in float16)."""
    size = 1e4 if dtype == torch.float16 else 1e30
    X = torch.randn(m, n, dtype=torch.float64, generator=generator(seed))
    return (X * torch.where(torch.arange(n) % 2 == 0, size, 1 / size)).to(dtype)


def constant(m: int, n: int, seed: int, dtype: torch.dtype, *, value: float) -> Tensor:  # noqa: ARG001
    """All elements equal."""
    return torch.full((m, n), value, dtype=dtype)


def half_precision_max(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Elements 65504 of any sign, the largest number of float16."""
    signs = 2.0 * torch.randint(0, 2, (m, n), generator=generator(seed)) - 1
    return (signs * 65504).to(dtype)


def negative_zero(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """All elements -0."""
    return torch.full((m, n), -0.0, dtype=dtype)


HARD: Mapping[str, Matrix] = {
    **{
        name: partial(classic, make=make)
        for name, make in CLASSICS.items()
        if name not in ("zeros", "ones", "identity")
    },
    "twins": twins,
    "fourfold": partial(repeated, values="fourfold"),
    "half rank": partial(repeated, values="half_rank"),
    "orthogonal": orthogonal,
    "duplicate columns": duplicate_columns,
    "subnormal": subnormal,
    "size 1e38": partial(scaled_normal, size=1e38),
    "size 1e-38": partial(scaled_normal, size=1e-38),
    "columns 1e+-30": alternating_columns,
    "65504": half_precision_max,
    "a third": partial(constant, value=1 / 3),
    "negative zero": negative_zero,
}
"""By name."""
