"""Pairs of frames for orthogonal Procrustes, as functions ``(rows, r, seed, dtype) -> (source, target)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fedlora_kernels.testing.gallery import GALLERY
from fedlora_kernels.testing.matrices import generator, orthonormal, prescribed, spectrum

__all__ = ["FRAMES", "Frames", "gauge"]

Frames = Callable[[int, int, int, torch.dtype], tuple[Tensor, Tensor]]


def gauge(r: int, seed: int, *, reflected: bool = False) -> Tensor:
    """Haar orthogonal (r, r) of determinant 1, or -1 if ``reflected``."""
    Q = orthonormal(r, r, seed)
    if r and bool(torch.linalg.det(Q) < 0) != reflected:
        Q[:, 0] = -Q[:, 0]
    return Q


def _normal(rows: int, r: int, seed: int) -> Tensor:
    return torch.randn(rows, r, dtype=torch.float64, generator=generator(seed))


def turned(
    rows: int, r: int, seed: int, dtype: torch.dtype, *, noise: float = 0.0, reflected: bool = False
) -> tuple[Tensor, Tensor]:
    """A Gaussian frame, and the same turned (and mirrored) with noise on top."""
    X = _normal(rows, r, seed)
    Y = X @ gauge(r, seed + 1, reflected=reflected) + noise * _normal(rows, r, seed + 2)
    return X.to(dtype), Y.to(dtype)


def same(rows: int, r: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One frame twice: the identity."""
    X = _normal(rows, r, seed).to(dtype)
    return X, X.clone()


def independent(rows: int, r: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two Gaussian frames that have nothing in common."""
    return _normal(rows, r, seed).to(dtype), _normal(rows, r, seed + 1).to(dtype)


def zero_target(rows: int, r: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """No target yet, as in a first round."""
    return _normal(rows, r, seed).to(dtype), torch.zeros(rows, r, dtype=dtype)


def half_target(rows: int, r: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Half of the target's columns are zero: the rest of the rotation is free."""
    X, Y = turned(rows, r, seed, dtype)
    Y[:, r // 2 :] = 0
    return X, Y


def conditioned(rows: int, r: int, seed: int, dtype: torch.dtype, *, kappa: float) -> tuple[Tensor, Tensor]:
    """A frame of condition ``kappa`` and the same turned."""
    X = prescribed(rows, r, spectrum("geometric", min(rows, r), kappa), seed)
    return X.to(dtype), (X @ gauge(r, seed + 1)).to(dtype)


def half_turn(rows: int, r: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turned by an angle of pi in every plane: the far side of the group."""
    X = _normal(rows, r, seed)
    P = gauge(r, seed + 1)
    signs = torch.where(torch.arange(r) < r // 2 * 2, -1.0, 1.0).double()
    return X.to(dtype), (X @ (P * signs @ P.mT)).to(dtype)


def sized(rows: int, r: int, seed: int, dtype: torch.dtype, *, exponent: float) -> tuple[Tensor, Tensor]:
    """A turned frame near one end of the range: ``exponent`` of the dtype's largest (or, negative, smallest) number.

    Half of that for float64, beyond which the singular values of ``X^T Y`` have no type.
    """
    limits = torch.finfo(dtype)
    exponent = exponent / 2 if dtype == torch.float64 else exponent
    end = math.log(limits.max) if exponent > 0 else -math.log(limits.smallest_normal)
    size = math.exp(exponent * end)
    X = _normal(rows, r, seed).clamp(-3, 3)
    Y = X @ gauge(r, seed + 1)
    return (X * size / 64).to(dtype), (Y * size / 64).to(dtype)


def correlated(rows: int, r: int, seed: int, dtype: torch.dtype, *, name: str) -> tuple[Tensor, Tensor]:
    """``X^T Y`` is a matrix of the gallery, exactly: X is the identity over zeros."""
    X, Y = torch.zeros(2, max(rows, r), r, dtype=dtype)
    X[:r], Y[:r] = torch.eye(r, dtype=dtype), GALLERY[name](r, r, seed, dtype)
    return X, Y


FRAMES: Mapping[str, Frames] = {
    "turned": turned,
    "turned, noisy": partial(turned, noise=0.3),
    "reflected": partial(turned, reflected=True),
    "reflected, noisy": partial(turned, noise=0.3, reflected=True),
    "same": same,
    "independent": independent,
    "zero target": zero_target,
    "half target": half_target,
    "half turn": half_turn,
    "huge": partial(sized, exponent=0.9),
    "tiny": partial(sized, exponent=-0.9),
    **{f"kappa 1e{e}": partial(conditioned, kappa=10.0**e) for e in (1, 3, 6, 9, 12)},
    **{f"correlation {name}": partial(correlated, name=name) for name in GALLERY},
}
"""By name; those that are not finite in a dtype are to be left out there."""
