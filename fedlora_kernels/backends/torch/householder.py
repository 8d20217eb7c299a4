"""Second pass and dense route: Householder QR of one problem at a time (docs/numerics.md, Second pass; docs/numerics.md, Dense fallback).

Both answer ``W = 2^e U diag(S) V^T`` with orthonormal U and V in float64, so that nothing is lost to a Gram.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.backends.torch.certificate import Spectrum
from fedlora_kernels.backends.torch.chunks import load, slices
from fedlora_kernels.backends.torch.svd import svd

__all__ = ["QR", "SVD", "Decomposition", "Problem", "dense", "orthogonalised", "qr", "row_bound"]

QR = Callable[[Sequence[Tensor], Tensor | None, Tensor], tuple[Tensor, Tensor]]
"""`qr`, or what stands for it."""

SVD = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""`backends.torch.svd.svd`, or what stands for it."""


class Problem(NamedTuple):
    """N updates: B (N, m, r_k), A^T as blocks (N, n, r_k), om (N, R).

    ``e_left`` and ``e_right`` are exponents (N, R) of the columns, taken out on loading (None: not scaled), ``e`` (N,) that of
    the update.
    """

    B: Sequence[Tensor]
    A: Sequence[Tensor]
    om: Tensor
    e_left: Tensor | None
    e_right: Tensor | None
    e: Tensor


class Decomposition(NamedTuple):
    """U (1, m, k), V (1, n, k), their spectrum and info (1,)."""

    U: Tensor
    V: Tensor
    spectrum: Spectrum
    info: Tensor


def qr(blocks: Sequence[Tensor], e: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``[X_1 | ... | X_K] 2^-e diag(scale) = Q R`` by reflections: Q (N, m, k) orthonormal whatever the rank; e, scale (N, R)."""
    X = load(blocks, slice(0, blocks[0].shape[1]), e).mul_(scale[:, None, :])
    Q, R = torch.linalg.qr(X)
    return Q, R


def orthogonalised(problem: Problem, d: Tensor, first: Spectrum, qr: QR = qr, svd: SVD = svd) -> Decomposition:
    """Second pass: QR of the factors balanced by d (1, R); floor and norms are those of the first pass."""
    Q_B, R_B = qr(problem.B, problem.e_left, d)
    Q_A, R_A = qr(problem.A, problem.e_right, problem.om / d)
    C = R_B @ R_A.mT
    U, S, Vh, info = svd(C)
    spectrum = first._replace(S=S, energy=(C * C).sum((-2, -1)), passes=2)
    return Decomposition(Q_B @ U, Q_A @ Vh.mT, spectrum, info)


def dense(problem: Problem, qr: QR = qr, svd: SVD = svd) -> Decomposition:
    """Dense route: W itself, then the pipeline with an identity as the other factor."""
    W, formed = _form(problem)
    wide = W.shape[-1] > W.shape[-2]
    X = W.mT if wide else W
    Q, R = qr([X], None, torch.ones_like(X[:, 0]))
    U, S, Vh, info = svd(R)
    U, V = Q @ U, Vh.mT
    width = problem.om.shape[-1]
    spectrum = Spectrum(
        S=S,
        energy=(R * R).sum((-2, -1)),
        # sum |G_B o G_A| <= (sum_j |b_j| |om_j a_j|)^2 without the R x R Grams that this route avoids.
        energy_abs=formed * formed,
        # Of the factors as given: a floor from |W| would keep the noise of an exactly cancelling update.
        floor=4 * width**0.5 * U64 * formed,
        norm=row_bound(R.mT @ R).sqrt(),
        e=problem.e,
        passes=2,
        width=width,
        formed=formed,
    )
    return Decomposition(V, U, spectrum, info) if wide else Decomposition(U, V, spectrum, info)


def _form(problem: Problem) -> tuple[Tensor, Tensor]:
    """W (1, m, n) float64 and ``sum_j |b_j| |om_j a_j|`` (1,), a few columns of the stack at a time."""
    m, n = problem.B[0].shape[1], problem.A[0].shape[1]
    W = torch.zeros(1, m, n, dtype=torch.float64, device=problem.om.device)
    formed = torch.zeros(1, dtype=torch.float64, device=problem.om.device)
    start = 0
    for b, a in zip(problem.B, problem.A, strict=True):
        for part in slices(b.shape[-1], 8 * (m + n)):
            columns = slice(start + part.start, start + part.stop)
            e_left, e_right = (None if e is None else e[:, columns] for e in (problem.e_left, problem.e_right))
            X = load([b[..., part]], slice(0, m), e_left)
            Y = load([a[..., part]], slice(0, n), e_right).mul_(problem.om[:, None, columns])
            W.baddbmm_(X, Y.mT)
            formed += (torch.linalg.vector_norm(X, dim=1) * torch.linalg.vector_norm(Y, dim=1)).sum(-1)
        start += b.shape[-1]
    return W, formed


def row_bound(G: Tensor) -> Tensor:
    """Upper bound (N,) of the 2-norm of symmetric G (N, R, R): the smaller of its row-sum and Frobenius norms."""
    if not G.numel():
        return G.new_zeros(G.shape[0])
    return torch.minimum(G.abs().sum(-1).amax(-1), torch.linalg.vector_norm(G, dim=(-2, -1)))
