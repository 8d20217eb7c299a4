"""Dense matrices: prescribed spectra after LAPACK's latms and MAGMA's names, and the classics that break solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["CLASSICS", "SPECTRA", "Matrix", "generator", "orthonormal", "prescribed", "spectrum"]

Matrix = Callable[[int, int, int, torch.dtype], Tensor]
"""A generator ``(m, n, seed, dtype) -> (m, n)``: the same numbers for the same seed."""

SPECTRA = ("even", "geometric", "cluster0", "cluster1", "logrand", "rand", "fourfold", "half_rank")
"""Names of `spectrum`."""


def generator(seed: int) -> torch.Generator:
    """CPU generator with that seed."""
    return torch.Generator().manual_seed(seed)


def spectrum(name: str, k: int, cond: float = 1e3, seed: int = 0) -> Tensor:
    """Descending singular values (k,) float64 with ``s_1 = 1`` and, where the name allows, ``s_k = 1 / cond``."""
    steps = torch.linspace(0, 1, k, dtype=torch.float64) if k > 1 else torch.zeros(k, dtype=torch.float64)
    uniform = torch.rand(k, dtype=torch.float64, generator=generator(seed))
    values: dict[str, Tensor] = {
        "even": 1 - steps * (1 - 1 / cond),
        "geometric": cond**-steps,
        "cluster0": torch.where(steps > 0, 1 / cond, 1.0).double(),
        "cluster1": torch.where(steps < 1, 1.0, 1 / cond).double(),
        "logrand": cond**-uniform,
        "rand": uniform,
        "fourfold": cond ** -(torch.arange(k) // 4 * 4 / max(k, 1)).double(),
        "half_rank": torch.where(steps <= 0.5, cond**-steps, 0.0),
    }
    descending: Tensor = values[name].sort(descending=True).values
    return descending


def orthonormal(m: int, k: int, seed: int) -> Tensor:
    """Haar-distributed orthonormal columns (m, k) float64."""
    Q, R = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator(seed)))
    columns: Tensor = Q * R.diagonal().sign()
    return columns


def prescribed(m: int, n: int, values: Tensor, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``U diag(values) V^T`` (m, n) with random orthonormal U and V, rounded once to ``dtype``."""
    k = len(values)
    return (orthonormal(m, k, seed) * values @ orthonormal(n, k, seed + 1).mT).to(dtype)


def _indices(m: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)


def _laeuchli(m: int, n: int) -> Tensor:
    """A row of ones over a tiny multiple of the identity: squaring it loses the rank."""
    X = 1e-9 * torch.eye(m, n, dtype=torch.float64)
    X[0] = 1
    return X


def _kahan(m: int, n: int) -> Tensor:
    """Triangular and nearly rank deficient without a small diagonal element."""
    i, j = _indices(m, n)
    sine, cosine = math.sin(1.2), math.cos(1.2)
    return sine**i * (torch.eye(m, n, dtype=torch.float64) - cosine * (j > i).double())


def _hilbert(m: int, n: int) -> Tensor:
    i, j = _indices(m, n)
    return 1 / (i + j + 1)


def _vandermonde(m: int, n: int) -> Tensor:
    i, j = _indices(m, n)
    return ((i + 1) / m) ** j


def _hadamard(m: int, n: int) -> Tensor:
    """Signs; all singular values equal where m or n is a power of two."""
    i, j = (x.long() for x in _indices(m, n))
    bits, parity = i & j, torch.zeros(m, n, dtype=torch.long)
    for shift in range(32):
        parity ^= (bits >> shift) & 1
    return (1 - 2 * parity).double()


def _jordan(m: int, n: int) -> Tensor:
    return torch.eye(m, n, dtype=torch.float64) + torch.ones(m, n, dtype=torch.float64).triu(1).tril(1)


def _negative_zeros(m: int, n: int) -> Tensor:
    X = torch.full((m, n), -0.0, dtype=torch.float64)
    X[-1, -1] = -1
    return X


CLASSICS: Mapping[str, Callable[[int, int], Tensor]] = {
    "zeros": lambda m, n: torch.zeros(m, n, dtype=torch.float64),
    "ones": lambda m, n: torch.ones(m, n, dtype=torch.float64),
    "identity": lambda m, n: torch.eye(m, n, dtype=torch.float64),
    "diagonal": lambda m, n: torch.eye(m, n, dtype=torch.float64) * torch.arange(1, n + 1).double(),
    "jordan": _jordan,
    "laeuchli": _laeuchli,
    "kahan": _kahan,
    "hilbert": _hilbert,
    "vandermonde": _vandermonde,
    "hadamard": _hadamard,
    "negative_zeros": _negative_zeros,
}
"""Functions ``(m, n) -> (m, n) float64``."""
