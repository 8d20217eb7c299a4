"""Procrustes rotations by the native library (docs/numerics.md, Procrustes)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RawRotation
from fedlora_kernels.backends.native.library import Library, counts, numbers, rows, table

__all__ = ["align_factors", "procrustes_rotation", "rotate_factors"]


class _Correlation(NamedTuple):
    """``X^T Y 2^-exponent`` (N, r, r), ``|X|_F |Y|_F 2^-exponent`` (N,), float64; exponent (N,) int32."""

    M: Tensor
    size: Tensor
    exponent: Tensor


def procrustes_rotation(
    library: Library, source: Sequence[Tensor], target: Sequence[Tensor], special: bool, blend: float
) -> list[RawRotation]:
    """Rotation of every source onto its target; see `Backend.procrustes_rotation`."""
    op = "procrustes_rotation"
    library.functions(op)
    if not source:
        return []
    correlations = _correlations(library, source, target)
    rotations = [_empty(library, len(M), M.shape[-1], M.device) for M, _, _ in correlations]
    fields = [table([rows(field) for field in column]) for column in zip(*correlations, strict=True)]
    units = numbers([max(_unit(X), _unit(Y)) for X, Y in zip(source, target, strict=True)])
    answers, count = table([rows(field) for rotation in rotations for field in rotation]), len(rotations)
    arguments = (*fields, units, answers, count, int(special), blend)
    library.run(op, "fedlora_polar", (fields[0], count), arguments, source[0].device)
    return rotations


def rotate_factors(
    library: Library, B: Sequence[Tensor], A: Sequence[Tensor], Q: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """``(B Q, Q^T A)``, bit for bit B and A where Q is the identity; see `Backend.rotate_factors`."""
    op = "rotate_factors"
    library.functions(op)
    if not B:
        return []
    factors = [factor for b, a in zip(B, A, strict=True) for factor in (b, a.mT)]
    turns = [q for q in Q for _ in range(2)]
    turned = [_like(library, factor) for factor in factors]
    arguments = (table(factors), table(turns), table(turned), len(factors))
    library.run(op, "fedlora_turned", arguments, arguments, B[0].device)
    return [(left, right.mT) for left, right in zip(turned[::2], turned[1::2], strict=True)]


def align_factors(
    library: Library,
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    reference_B: Sequence[Tensor] | None,
    reference_A: Sequence[Tensor] | None,
    side: tuple[float, float],
    special: bool,
    blend: float,
) -> list[tuple[Tensor, Tensor, RawRotation]]:
    """Every pair rotated towards its reference; see `Backend.align_factors`."""
    op = "align_factors"
    library.functions(op)
    if not B:
        return []
    alpha, beta = (0.0 if part is None else w for part, w in zip((reference_A, reference_B), side, strict=True))
    rotations = [_empty(library, len(a), a.shape[1], a.device) for a in A]
    left, right = [_like(library, b) for b in B], [_like(library, a.mT).mT for a in A]
    tables = [table(part or []) for part in (B, A, reference_B if beta else None, reference_A if alpha else None)]
    answers = [table(left), table(right), table([rows(field) for rotation in rotations for field in rotation])]
    arguments = (*tables, alpha, beta, *answers, len(B))
    library.run(op, "fedlora_align_factors", arguments, (*arguments, int(special), blend), B[0].device)
    return list(zip(left, right, rotations, strict=True))


def _correlations(library: Library, source: Sequence[Tensor], target: Sequence[Tensor]) -> list[_Correlation]:
    """Every source with its target; sources with one target in a row stand together."""
    op = "procrustes_rotation"
    pairs = list(zip(source, target, strict=True))
    runs = [list(run) for _, run in itertools.groupby(pairs, key=lambda pair: _place(pair[1]))]
    out = [
        _Correlation(
            torch.empty(len(X), X.shape[-1], Y.shape[-1], dtype=torch.float64, device=X.device),
            torch.empty(len(X), dtype=torch.float64, device=X.device),
            torch.empty(len(X), dtype=torch.int32, device=X.device),
        )
        for X, Y in pairs
    ]
    blocks, targets = table([X for X, _ in pairs]), table([run[0][1] for run in runs])
    given = (blocks, counts([len(run) for run in runs]), targets)
    answers = [table([rows(getattr(each, field)) for each in out]) for field in _Correlation._fields]
    arguments = (*given, *answers, len(runs))
    library.run(op, "fedlora_cross_products", (*given, len(runs)), arguments, source[0].device)
    return out


def _empty(library: Library, N: int, r: int, device: torch.device) -> RawRotation:
    """Room for N rotations."""
    return RawRotation(
        Q=library.empty((N, r, r), torch.float64, device),
        singular_values=library.empty((N, r), torch.float64, device),
        unique=torch.empty(N, dtype=torch.bool, device=device),
        condition=torch.empty(N, dtype=torch.float64, device=device),
        info=torch.empty(N, dtype=torch.int32, device=device),
        notes=torch.empty(N, dtype=torch.int32, device=device),
    )


def _like(library: Library, factor: Tensor) -> Tensor:
    """Room for a factor (N, rows, r) turned, by columns in memory if it is."""
    N, rows, r = factor.shape
    by_columns = factor.stride(-1) > factor.stride(-2)
    out = library.empty((N, r, rows) if by_columns else (N, rows, r), factor.dtype, factor.device)
    return out.mT if by_columns else out


def _unit(t: Tensor) -> float:
    """Unit roundoff of what the numbers are stored in."""
    return torch.finfo(t.dtype).eps / 2


def _place(t: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in memory."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype
