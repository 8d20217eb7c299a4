"""Test matrices under the names of MAGMA's tester (magma_generate_matrix), as functions ``(m, n, seed, dtype)``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fedlora_kernels.testing.matrices import Matrix, generator, orthonormal, prescribed, spectrum

__all__ = ["MAGMA", "column_scaled", "diag", "elements", "jordan", "kronecker", "ones", "svd"]

COND = 1e4
COND_D = 1e8
DISTRIBUTIONS = {
    "rand": "rand", "logrand": "logrand", "arith": "even", "geo": "geometric", "cluster0": "cluster0", "cluster1": "cluster1",
}  # fmt: skip
"""MAGMA's names of spectra by those of `spectrum`."""
SCALES = ("", "ufl", "ofl", "small", "large", "dominant")


def ones(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """All elements 1: rank one."""
    return torch.ones(m, n, dtype=dtype)


def jordan(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """Ones on the diagonal and above it."""
    X = torch.eye(m, n, dtype=dtype)
    X.diagonal(1).fill_(1)
    return X


def kronecker(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """``1 + k delta_ij`` with k = max(m, n): all singular values equal but one."""
    return (torch.ones(m, n, dtype=torch.float64) + max(m, n) * torch.eye(m, n, dtype=torch.float64)).to(dtype)


def elements(m: int, n: int, seed: int, dtype: torch.dtype, *, distribution: str) -> Tensor:
    """Independent elements: ``rand`` uniform in (0, 1), ``rands`` in (-1, 1), ``randn`` normal."""
    made = generator(seed)
    if distribution == "randn":
        return torch.randn(m, n, dtype=torch.float64, generator=made).to(dtype)
    X = torch.rand(m, n, dtype=torch.float64, generator=made)
    return (X if distribution == "rand" else 2 * X - 1).to(dtype)


def largest_value(scale: str, dtype: torch.dtype) -> float:
    """Largest singular value of a scale: near underflow or overflow, or their square roots; 1 otherwise."""
    limits = torch.finfo(dtype)
    values: dict[str, float] = {
        "ufl": limits.smallest_normal / limits.eps,
        "ofl": limits.max / 16,
        "small": math.sqrt(limits.smallest_normal),
        "large": math.sqrt(limits.max),
    }
    return values.get(scale, 1.0)


def diag(
    m: int, n: int, seed: int, dtype: torch.dtype, *, distribution: str, scale: str = "", cond: float = COND
) -> Tensor:
    """Singular values of a distribution on the diagonal, in one of `SCALES` (``dominant`` adds noise beside the diagonal)."""
    k = min(m, n)
    X = torch.zeros(m, n, dtype=torch.float64)
    X.diagonal().copy_(spectrum(DISTRIBUTIONS[distribution], k, cond, seed) * largest_value(scale, dtype))
    return (_dominant(X, seed) if scale == "dominant" else X).to(dtype)


def svd(
    m: int, n: int, seed: int, dtype: torch.dtype, *, distribution: str, scale: str = "", cond: float = COND
) -> Tensor:
    """``U D V^T`` with Haar orthonormal U, V and singular values of a distribution, in one of `SCALES`."""
    values = spectrum(DISTRIBUTIONS[distribution], min(m, n), cond, seed)
    X = prescribed(m, n, values, seed) * largest_value(scale, dtype)
    return (_dominant(X, seed) if scale == "dominant" else X).to(dtype)


def column_scaled(
    m: int, n: int, seed: int, dtype: torch.dtype, *, cond: float = 10.0, cond_d: float = COND_D
) -> Tensor:
    """``X diag(d)`` with X of condition ``cond`` and d log-uniform over ``cond_d`` (condD), on the shorter side.

    One-sided Jacobi gives all singular values of it to full relative accuracy, which no bidiagonalisation does.
    """
    k = min(m, n)
    tall = orthonormal(max(m, n), k, seed) * spectrum("geometric", k, cond) @ orthonormal(k, k, seed + 1).mT
    d = cond_d ** -torch.rand(k, dtype=torch.float64, generator=generator(seed + 2))
    return (tall * d if m >= n else (tall * d).mT).to(dtype)


def _dominant(X: Tensor, seed: int) -> Tensor:
    """Diagonal made larger than the sum of its row, of any sign."""
    X = X + 1e-3 * torch.randn(X.shape, dtype=torch.float64, generator=generator(seed + 7))
    k = min(X.shape)
    signs = 2.0 * torch.randint(0, 2, (k,), generator=generator(seed + 8)) - 1
    X.diagonal().copy_(signs * X.abs().sum(1)[:k])
    return X


def _members() -> dict[str, Matrix]:
    made: dict[str, Matrix] = {"ones": ones, "jordan": jordan, "kronecker": kronecker, "condD": column_scaled}
    for distribution in ("rand", "rands", "randn"):
        made[distribution] = partial(elements, distribution=distribution)
    kinds = {"diag": diag, "svd": svd}
    for kind, make in kinds.items():
        for distribution in DISTRIBUTIONS:
            for scale in SCALES:
                name = f"{kind} {distribution} {scale}".rstrip()
                made[name] = partial(make, distribution=distribution, scale=scale)
    return made


MAGMA: Mapping[str, Matrix] = _members()
"""By MAGMA's name, with blanks for its underscores."""
