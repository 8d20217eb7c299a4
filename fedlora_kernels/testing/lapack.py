"""Test matrices after LAPACK's own suites (LAWN 41: dchkbd, dlatms), as functions ``(m, n, seed, dtype)``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fedlora_kernels.testing.matrices import Matrix, generator, prescribed, spectrum
from fedlora_kernels.testing.tolerances import roundoff

__all__ = ["LAPACK", "bidiagonal", "diagonal", "identity", "latms", "latms_spectrum", "product", "random", "zero"]

COND = 1e4
"""Ratio of the largest to the smallest singular value, where a spectrum has one."""


def zero(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """All elements 0."""
    return torch.zeros(m, n, dtype=dtype)


def identity(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """Ones on the diagonal."""
    return torch.eye(m, n, dtype=dtype)


def diagonal(
    m: int, n: int, seed: int, dtype: torch.dtype, *, values: str, exponent: int = 0, cond: float = COND
) -> Tensor:
    """Singular values on the diagonal, times ``2^exponent``; ``values`` names a `spectrum`."""
    X = torch.zeros(m, n, dtype=torch.float64)
    X.diagonal().copy_(spectrum(values, min(m, n), cond, seed))
    return (X * 2.0**exponent).to(dtype)


def product(
    m: int, n: int, seed: int, dtype: torch.dtype, *, values: str, exponent: int = 0, cond: float = COND
) -> Tensor:
    """``U D V^T`` with Haar orthonormal U and V, times ``2^exponent``; ``values`` names a `spectrum`."""
    return (prescribed(m, n, spectrum(values, min(m, n), cond, seed), seed) * 2.0**exponent).to(dtype)


def random(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Independent elements, uniform in (-1, 1)."""
    return (2 * torch.rand(m, n, dtype=torch.float64, generator=generator(seed)) - 1).to(dtype)


def bidiagonal(m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Upper bidiagonal, elements log-uniform in (u, 1/u) and of any sign: graded without any order."""
    u = max(roundoff(dtype), 2.0**-24 if dtype != torch.float64 else 0.0)
    made = generator(seed)

    def draw(count: int) -> Tensor:
        signs = 2.0 * torch.randint(0, 2, (count,), generator=made) - 1
        return signs * u ** (1 - 2 * torch.rand(count, dtype=torch.float64, generator=made))

    X = torch.zeros(m, n, dtype=torch.float64)
    for offset in (0, 1):
        band = X.diagonal(offset)
        band.copy_(draw(len(band)))
    return _finite(X, dtype)


def latms_spectrum(mode: int, k: int, cond: float, seed: int) -> Tensor:
    """Values (k,) of dlatms: mode 1 one large, 2 one small, 3 geometric, 4 arithmetic, 5 log-uniform, 6 normal; negative: reversed."""
    names = {1: "cluster0", 2: "cluster1", 3: "geometric", 4: "even", 5: "logrand"}
    if abs(mode) == 6:
        values = torch.randn(k, dtype=torch.float64, generator=generator(seed)).abs().sort(descending=True).values
    else:
        values = spectrum(names[abs(mode)], k, cond, seed)
    return values.flip(0) if mode < 0 else values


def latms(m: int, n: int, seed: int, dtype: torch.dtype, *, mode: int, cond: float = COND) -> Tensor:
    """``U D V^T`` with the values of `latms_spectrum`."""
    return prescribed(m, n, latms_spectrum(mode, min(m, n), cond, seed), seed, dtype)


def _finite(X: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to ``dtype``, within its range."""
    largest = torch.finfo(dtype).max
    return X.clamp(-largest, largest).to(dtype)


def _members() -> dict[str, Matrix]:
    made: dict[str, Matrix] = {"zero": zero, "identity": identity, "random": random, "bidiagonal": bidiagonal}
    for exponent in (0, 60, -60):
        scaled = f" 2^{exponent}" if exponent else ""
        for values in ("even", "geometric", "cluster0"):
            made[f"diagonal {values}{scaled}"] = partial(diagonal, values=values, exponent=exponent)
            made[f"product {values}{scaled}"] = partial(product, values=values, exponent=exponent)
    for mode in (1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -6):
        made[f"latms {mode}"] = partial(latms, mode=mode)
    return made


LAPACK: Mapping[str, Matrix] = _members()
"""By name; a matrix that leaves the range of a narrow dtype there (2^60 in float16) is left out by `gallery`."""
