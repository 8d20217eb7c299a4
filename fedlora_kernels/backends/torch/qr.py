"""Stacked QR by a float64 Gram and Cholesky where that is certified, else by Householder (docs/numerics.md, Stacked QR)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Info, Note, RawQR, Stack
from fedlora_kernels.backends.torch.chunks import exponent, load, pow2, scale_pow2, slices
from fedlora_kernels.backends.torch.gram import gram

__all__ = ["stacked_qr"]

ONE_PASS_LOSS = 1e-8
"""Largest ``2 u64 kF^2`` for which one Cholesky is enough; Q then misses orthogonality by less than 1e-10."""


def stacked_qr(groups: Sequence[Stack], want_q: bool) -> list[RawQR]:
    """Thin row-echelon QR of every stacked matrix; see `Backend.stacked_qr`."""
    return [_group_qr(stack, want_q) for stack in groups]


def _group_qr(stack: Stack, want_q: bool) -> RawQR:
    device = stack.blocks[0].device if stack.blocks else stack.weights.device
    dtype = reduce(torch.promote_types, [block.dtype for block in stack.blocks] or [torch.float32])
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    N, m, R, k = stack.batch, stack.m, stack.width, min(stack.m, stack.width)
    out = RawQR(
        torch.zeros(N, m, k, dtype=dtype, device=device) if want_q else None,
        torch.zeros(N, k, R, dtype=dtype, device=device),
        torch.zeros(N, dtype=torch.int64, device=device),
        torch.zeros(N, dtype=torch.int32, device=device),
        torch.zeros(N, dtype=torch.int32, device=device),
    )
    if k:
        for part in slices(N, 8 * R * (4 * R + 512)):
            _fill(_rows_of(out, part), [block[part] for block in stack.blocks], stack.weights[part].to(device))
    out.notes.copy_(Note.ZERO * (out.rank == 0) + Note.RANK_DEFICIENT * (out.rank < R))
    out.notes.masked_fill_((out.info & Info.NONFINITE) != 0, 0)
    return out


def _rows_of(out: RawQR, part: slice) -> RawQR:
    return RawQR(*(None if field is None else field[part] for field in out))  # type: ignore[arg-type]


class _Columns(NamedTuple):
    """Scale of the columns: the factored stack is ``X * sign * 2^-exponent``, R is restored by ``size * 2^exponent``."""

    sign: Tensor
    size: Tensor
    exponent: Tensor


def _fill(out: RawQR, blocks: list[Tensor], weights: Tensor) -> None:
    """Write the QR of one wave of matrices into ``out``, whose fields are zero."""
    widths = torch.tensor([block.shape[-1] for block in blocks], device=weights.device)
    weights = weights.repeat_interleave(widths, dim=1)
    every = torch.arange(out.R.shape[0], device=out.R.device)
    hard = every if out.R.dtype == torch.float64 else _one_pass(out, blocks, weights)
    m, R = blocks[0].shape[1], weights.shape[1]
    for part in slices(len(hard), 8 * m * R):
        _householder(out, [block[hard[part]] for block in blocks], weights[hard[part]], hard[part])
    bad = (out.info & Info.NONFINITE) != 0
    for field in (out.R, out.Q):
        if field is not None:
            field.masked_fill_(bad[:, None, None], torch.nan)
    out.R.add_(0.0)  # rounding may leave -0
    out.info.add_(Info.OVERFLOW * (~torch.isfinite(out.R).all(-1).all(-1) & ~bad))


def _one_pass(out: RawQR, blocks: list[Tensor], weights: Tensor) -> Tensor:
    """Cholesky of the scaled Gram; returns the indices of the matrices that it cannot certify."""
    G = gram(blocks, None)
    norms = G.diagonal(dim1=-2, dim2=-1).sqrt()
    bad = ~torch.isfinite(norms).all(-1)
    live = (norms > 0) | bad[:, None]
    columns = _Columns(weights.sign(), weights.abs(), exponent(norms) + 1)
    e = columns.exponent
    G = scale_pow2(G, -(e[:, :, None] + e[:, None, :])) * columns.sign[:, :, None] * columns.sign[:, None, :]
    # a zero column becomes a row of the identity: out of the way of the others, and cut from the factors below
    one = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    G = torch.where((live[:, :, None] & live[:, None, :]) & ~bad[:, None, None], G, one)
    L, failed = torch.linalg.cholesky_ex(G)
    inverse = torch.linalg.solve_triangular(L, one.expand_as(L), upper=False)
    upper, inverse = (L * live[:, None, :]).mT, (inverse * live[:, :, None]).mT
    kappa2 = upper.square().sum((-2, -1)) * inverse.square().sum((-2, -1))
    easy = (failed == 0) & (2 * U64 * kappa2 <= ONE_PASS_LOSS) & ~bad
    k = out.R.shape[1]
    live_first = torch.argsort(~live, dim=-1, stable=True)[:, :k]
    upper = upper.gather(1, live_first[:, :, None].expand(-1, -1, upper.shape[-1]))
    out.R.copy_(_restored(upper, columns) * easy[:, None, None])
    out.rank.copy_(live.sum(-1) * easy)
    out.info.copy_(Info.NONFINITE * bad)
    if out.Q is not None:
        inverse = inverse.gather(2, live_first[:, None, :].expand(-1, inverse.shape[1], -1))
        inverse = scale_pow2(inverse * columns.sign[:, :, None], -columns.exponent[:, :, None])
        inverse = torch.where(easy[:, None, None], inverse, 0.0)
        for rows in slices(out.Q.shape[1], 8 * inverse.shape[0] * (inverse.shape[1] + k)):
            out.Q[:, rows] = load(blocks, rows, None) @ inverse
    return torch.nonzero(~easy & ~bad).squeeze(1)


def _householder(out: RawQR, blocks: list[Tensor], weights: Tensor, where: Tensor) -> None:
    """Householder QR of the scaled float64 stacks, written into the matrices ``where`` of ``out``."""
    X = torch.cat([block.double() for block in blocks], dim=-1)
    largest = torch.maximum(X.amax(-2), -X.amin(-2))
    bad = ~torch.isfinite(largest).all(-1)
    X.masked_fill_(bad[:, None, None], 0.0)
    e = exponent(largest).clamp(-1022, 1022)
    X.mul_(pow2(-e)[:, None, :])
    rest = exponent(torch.linalg.vector_norm(X, dim=-2)) + 1
    X.mul_((pow2(-rest) * weights.sign())[:, None, :])
    Q, T = _tall_qr(X, want_q=out.Q is not None)
    diagonal = T.diagonal(dim1=-2, dim2=-1)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(T.dtype)
    T = T * sign[:, :, None]
    rank = torch.full_like(where, T.shape[1])
    if out.Q is not None:
        Q *= sign[:, None, :]
    tolerance = 16 * X.shape[-1] * U64
    for i in torch.nonzero((diagonal.abs() <= tolerance).any(-1)).flatten().tolist():
        Q_s, T[i], rank[i] = _echelon(T[i], tolerance)
        if out.Q is not None:
            Q[i] = Q[i] @ Q_s
    columns = _Columns(weights.sign(), weights.abs(), e + rest)
    out.R[where] = _restored(T, columns).to(out.R.dtype)
    out.rank[where] = rank
    out.info[where] = (Info.NONFINITE * bad).to(torch.int32)
    if out.Q is not None:
        out.Q[where] = Q.to(out.Q.dtype)


def _tall_qr(X: Tensor, want_q: bool) -> tuple[Tensor, Tensor]:
    """Reduced QR in row blocks merged by a QR of their factors: LAPACK's own error grows with the number of rows."""
    N, m, R = X.shape
    height = max(2 * R, 1024)
    if m <= height:
        Q, T = torch.linalg.qr(X, mode="reduced" if want_q else "r")
        return Q, T
    leaves = (torch.nn.functional.pad(X, (0, 0, 0, -m % height)) if m % height else X).view(N, -1, height, R)
    Q, T = torch.linalg.qr(leaves, mode="reduced" if want_q else "r")
    top, T = _tall_qr(T.reshape(N, -1, R), want_q)
    return ((Q @ top.view(N, -1, R, R)).view(N, -1, R)[:, :m] if want_q else top), T


def _restored(R: Tensor, columns: _Columns) -> Tensor:
    return scale_pow2(R, columns.exponent[:, None, :]) * columns.size[:, None, :]


def _echelon(F: Tensor, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """Return Q_s, R and the rank: R in row-echelon form with positive leading entries, ``F = Q_s R``, zero beyond the rank.

    A column whose rest is at most ``tolerance`` is dependent: zeroed, so that its noise cannot rotate the later rows.
    """
    rows, width = F.shape
    R, Q = F.clone(), torch.eye(rows, dtype=F.dtype, device=F.device)
    i = j = 0
    while i < rows and j < width:
        dependent = torch.linalg.vector_norm(R[i:, j:], dim=0) <= tolerance
        skip = int(dependent.long().cumprod(0).sum())
        R[i:, j : j + skip] = 0
        j += skip
        if j == width:
            break
        q, t = torch.linalg.qr(R[i:, j:], mode="complete")
        diagonal = t.diagonal()
        taken = int((diagonal.abs() > tolerance).long().cumprod(0).sum())
        sign = torch.where(diagonal[:taken] < 0, -1.0, 1.0).to(F.dtype)
        t[:taken] *= sign[:, None]
        q[:, :taken] *= sign
        R[i:, j:] = t
        Q[:, i:] = Q[:, i:] @ q
        i, j = i + taken, j + taken
    Q[:, i:] = 0
    R[i:] = 0
    return Q, R, i
