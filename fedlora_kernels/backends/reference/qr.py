"""Stacked QR by Householder reflections of the concatenated stack, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Info, Note, RawQR, Stack
from fedlora_kernels.backends.reference.powers import exponent_of, times_power

__all__ = ["stacked_qr"]


def stacked_qr(groups: Sequence[Stack], want_q: bool) -> list[RawQR]:
    """Thin row-echelon QR of every stacked matrix (docs/numerics.md, Stacked QR); float64 throughout, cast at the end."""
    return [_group_qr(stack, want_q) for stack in groups]


def _group_qr(stack: Stack, want_q: bool) -> RawQR:
    device = stack.blocks[0].device if stack.blocks else stack.weights.device
    dtype = reduce(torch.promote_types, [block.dtype for block in stack.blocks] or [torch.float32])
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    k = min(stack.m, stack.width)
    Q = torch.zeros(stack.batch, stack.m, k, dtype=dtype, device=device) if want_q else None
    R = torch.zeros(stack.batch, k, stack.width, dtype=dtype, device=device)
    rank, info, notes = [], [], []
    for i in range(stack.batch):
        X = torch.cat([torch.zeros(stack.m, 0, device=device), *(block[i].double() for block in stack.blocks)], dim=1)
        if not torch.isfinite(X).all():
            for answer in (R, Q):
                if answer is not None:
                    answer[i] = torch.nan
            rank.append(0)
            info.append(int(Info.NONFINITE))
            notes.append(0)
            continue
        full_Q, full_R, r = _weighted_qr(X, _column_weights(stack, i).to(X.device))
        R[i] = full_R.to(dtype) + 0.0  # rounding to float32 may leave -0
        if Q is not None:
            Q[i] = full_Q
        rank.append(r)
        info.append(0 if torch.isfinite(R[i]).all() else int(Info.OVERFLOW))
        notes.append((Note.ZERO if r == 0 else 0) | (Note.RANK_DEFICIENT if r < stack.width else 0))
    as_int32 = [torch.tensor(codes, dtype=torch.int32, device=device) for codes in (info, notes)]
    return RawQR(Q, R, torch.tensor(rank, dtype=torch.int64, device=device), *as_int32)


def _column_weights(stack: Stack, i: int) -> Tensor:
    widths = torch.tensor([block.shape[-1] for block in stack.blocks], dtype=torch.int64)
    return stack.weights[i].cpu().repeat_interleave(widths)


def _weighted_qr(X: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, int]:
    """QR of ``X diag(weights)`` for a finite float64 X: only the signs of the weights reach the factorisation."""
    if X.numel() == 0:
        k = min(X.shape)
        return X.new_zeros(X.shape[0], k), X.new_zeros(k, X.shape[1]), 0
    largest = exponent_of(X.abs().amax(dim=0))
    X = times_power(X, -largest)
    norm = exponent_of(torch.linalg.vector_norm(X, dim=0))
    X = times_power(X, -norm) * weights.sign()
    Q, T = _householder(X)
    Q_s, R_s, rank = _echelon_qr(T)
    return Q @ Q_s, times_power(R_s, largest + norm) * weights.abs(), rank


def _householder(X: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR in row blocks merged by a QR of their factors: LAPACK's own error grows with the number of rows."""
    m, R = X.shape
    height = max(2 * R, 1024)
    if m <= height:
        Q, T = torch.linalg.qr(X)
        return Q, T
    leaves = [torch.linalg.qr(rows) for rows in torch.split(X, height)]
    top, T = _householder(torch.cat([leaf.R for leaf in leaves]))
    tops = torch.split(top, [leaf.R.shape[0] for leaf in leaves])
    return torch.cat([leaf.Q @ part for leaf, part in zip(leaves, tops, strict=True)]), T


def _echelon_qr(F: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return Q_s, R and the rank: R in row-echelon form with positive leading entries, ``F = Q_s R``, zero beyond the rank."""
    rows, columns = F.shape
    F = F.clone()
    Q = torch.eye(rows, dtype=F.dtype, device=F.device)
    i = 0
    for j in range(columns):
        if i == rows:
            break
        x = F[i:, j].clone()
        norm = torch.linalg.vector_norm(x)
        if norm <= 16 * columns * U64:
            # a dependent column: its rounding noise must not decide the direction of the later rows
            F[i:, j] = 0
            continue
        v = x
        v[0] += torch.copysign(norm, x[0])
        v /= torch.linalg.vector_norm(v)
        F[i:] -= 2 * torch.outer(v, v @ F[i:])
        Q[:, i:] -= 2 * torch.outer(Q[:, i:] @ v, v)
        if F[i, j] < 0:
            F[i] = -F[i]
            Q[:, i] = -Q[:, i]
        F[i + 1 :, j] = 0
        i += 1
    Q[:, i:] = 0
    F[i:] = 0
    return Q, F, i
