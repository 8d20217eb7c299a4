"""Limits of the tests, derived from rounding, independent of size (docs/numerics.md, Limits that tests hold); all in one place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["U64", "assert_close", "roundoff", "tolerance"]

U64 = 2.0**-53
"""Unit roundoff of float64."""


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of a floating-point type: half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


def tolerance(
    metric: str,
    *,
    dtype: torch.dtype = torch.float64,
    rho: float = 1.0,
    passes: int = 1,
    energy_ratio: float = 1.0,
    underflow: float = 0.0,
    size: int = 1,
) -> float:
    """Limit of a metric in accurate mode.

    Args:
        metric: ``P1`` relative error of a singular value; ``P2`` orthogonality; ``P3`` residual of the singular pairs;
            ``P4`` excess of the truncation error; ``P5`` relative distance from a threshold below which ranks may differ;
            ``P6`` sine of the angle to the exact subspace, times ``(s_p - s_{p+1}) / s_1``; ``P7`` relative error of the
            energy; ``core`` residual and orthogonality of a core SVD; ``lapack`` the same where LAPACK answers in the type in
            which it computes; ``scaled`` relative error of a singular value where columns are scaled away from condition
            ``rho``; ``gram`` an update Gram, relative to the norms; ``qr`` column-wise backward error and orthogonality of a
            stacked QR; ``rotation`` orthogonality of a rotation; ``rotated`` error of a rotated product, relative to
            ``|B|_F |A|_F``.
        dtype: of the output that the metric looks at.
        rho: cancellation of the value in question: rho_i for P1, rho_p for P2, rho_1 for P3, P5, P6 and P7, but rho_1 rho_p
            for P3 after one pass; the condition for ``scaled``.
        passes: 1 for Grams alone, 2 after orthogonalisation.
        energy_ratio: ``energy_abs / energy``.
        underflow: what a vector lost because the output type has no smaller numbers, relative to the vector.
        size: the R of ``core`` and ``lapack``.
    """
    u = roundoff(dtype) + underflow
    sigma = U64 * (256 + 4 * rho * rho) if passes == 1 else U64 * (128 + 4 * rho)
    # Factors determine their product only to u64 rho_1, and neither side of a float64 residual is free of rounding. Householder QR
    # leaves up to 18 u64 of each column; a vector sees all of that error, a singular value (P1) one number of it.
    representation = U64 * (64 + (4 if passes == 1 else 16) * rho) if dtype == torch.float64 else 0.0
    energy = 256 * U64 * energy_ratio if passes == 1 else U64 * (256 + 16 * rho)
    limits = {
        "P1": sigma,
        "P2": 4 * u + sigma,
        "P3": 8 * u + representation,
        "P4": 1e-12 + 16 * u * u + 64 * U64 * energy_ratio,
        "P5": 1e-10 + (64 * U64 * energy_ratio if passes == 1 else 16 * U64 * rho),
        "P6": 32 * u + representation,
        "P7": energy,
        "core": 4 * math.sqrt(size) * u,
        "lapack": max(100, 32 * math.sqrt(size)) * u,
        "scaled": 30 * u * rho,
        "gram": 64 * U64,
        "qr": 64 * U64 if dtype == torch.float64 else 4 * u,
        "rotation": 16 * U64,
        "rotated": 8 * u,
    }
    return limits[metric]


def assert_close(
    actual: Tensor, expected: Tensor, limit: float, *, scale: float | None = None, seed: int | None = None
) -> None:
    """Assert ``|actual - expected| <= limit * scale`` element by element; NaN fails.

    ``scale`` is the largest ``|expected|`` unless given. The message shows the worst element, both values, the relative
    error, the limit, the dtype and the seed.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not actual.numel():
        return
    wanted = expected.double()
    size = float(wanted.abs().max()) if scale is None else scale
    error = (actual.double() - wanted).abs()
    error = torch.where(error.isnan(), torch.inf, error)
    worst = int(error.argmax())
    if float(error.flatten()[worst]) <= limit * size:
        return
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
    relative = float(error.flatten()[worst]) / size if size else math.inf
    raise AssertionError(
        f"element {place}: {float(actual.flatten()[worst])!r}, expected {float(wanted.flatten()[worst])!r}; "
        f"relative error {relative:.3e}, limit {limit:.3e}; dtype {actual.dtype}, seed {seed}"
    )
