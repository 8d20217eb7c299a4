"""Procrustes rotations by the native library (docs/numerics.md, Procrustes)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RawRotation
from fedlora_kernels.backends.cpu.answers import ANSWERS
from fedlora_kernels.backends.cpu.library import Library, counts, numbers, rows, table
from fedlora_kernels.backends.cpu.threads import thread_count

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
    correlations = _correlations(library, source, target)
    rotations = [_empty(len(M), M.shape[-1]) for M, _, _ in correlations]
    fields = [table([rows(field) for field in column]) for column in zip(*correlations, strict=True)] or [table([])] * 3
    units = numbers([max(_unit(X), _unit(Y)) for X, Y in zip(source, target, strict=True)])
    threads, count = thread_count(), len(rotations)
    memory, *scratch = library.workspace(op, "fedlora_polar_workspace", fields[0], count, threads)
    answers = table([rows(field) for rotation in rotations for field in rotation])
    library.call(op, "fedlora_polar", *fields, units, answers, count, int(special), blend, *scratch, threads, None)
    del memory
    return rotations


def rotate_factors(
    library: Library, B: Sequence[Tensor], A: Sequence[Tensor], Q: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """``(B Q, Q^T A)``, bit for bit B and A where Q is the identity; see `Backend.rotate_factors`."""
    op = "rotate_factors"
    library.functions(op)
    factors = [factor for b, a in zip(B, A, strict=True) for factor in (b, a.mT)]
    turns = [q for q in Q for _ in range(2)]
    turned = [_like(factor) for factor in factors]
    tables, threads = (table(factors), table(turns), table(turned)), thread_count()
    memory, *scratch = library.workspace(op, "fedlora_turned_workspace", *tables, len(factors), threads)
    library.call(op, "fedlora_turned", *tables, len(factors), *scratch, threads, None)
    del memory
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
    alpha, beta = (0.0 if part is None else w for part, w in zip((reference_A, reference_B), side, strict=True))
    rotations = [_empty(*a.shape[:2]) for a in A]
    left, right = [_like(b) for b in B], [_like(a.mT).mT for a in A]
    tables = [table(part or []) for part in (B, A, reference_B if beta else None, reference_A if alpha else None)]
    answers = [table(left), table(right), table([rows(field) for rotation in rotations for field in rotation])]
    arguments, threads = (*tables, alpha, beta, *answers, len(B)), thread_count()
    memory, *scratch = library.workspace(op, "fedlora_align_factors_workspace", *arguments, threads)
    library.call(op, "fedlora_align_factors", *arguments, int(special), blend, *scratch, threads, None)
    del memory
    return list(zip(left, right, rotations, strict=True))


def _correlations(library: Library, source: Sequence[Tensor], target: Sequence[Tensor]) -> list[_Correlation]:
    """Every source with its target; sources with one target in a row stand together."""
    op = "procrustes_rotation"
    pairs = list(zip(source, target, strict=True))
    runs = [list(run) for _, run in itertools.groupby(pairs, key=lambda pair: _place(pair[1]))]
    out = [
        _Correlation(
            torch.empty(len(X), X.shape[-1], Y.shape[-1], dtype=torch.float64),
            torch.empty(len(X), dtype=torch.float64),
            torch.empty(len(X), dtype=torch.int32),
        )
        for X, Y in pairs
    ]
    blocks, targets = table([X for X, _ in pairs]), table([run[0][1] for run in runs])
    sizes, threads = counts([len(run) for run in runs]), thread_count()
    memory, *scratch = library.workspace(
        op, "fedlora_cross_products_workspace", blocks, sizes, targets, len(runs), threads
    )
    answers = [table([rows(getattr(each, field)) for each in out]) for field in _Correlation._fields]
    library.call(op, "fedlora_cross_products", blocks, sizes, targets, *answers, len(runs), *scratch, threads, None)
    del memory
    return out


def _empty(N: int, r: int) -> RawRotation:
    """Room for N rotations."""
    return RawRotation(
        Q=ANSWERS.empty((N, r, r), torch.float64),
        singular_values=ANSWERS.empty((N, r), torch.float64),
        unique=torch.empty(N, dtype=torch.bool),
        condition=torch.empty(N, dtype=torch.float64),
        info=torch.empty(N, dtype=torch.int32),
        notes=torch.empty(N, dtype=torch.int32),
    )


def _like(factor: Tensor) -> Tensor:
    """Room for a factor (N, rows, r) turned, by columns in memory if it is."""
    N, rows, r = factor.shape
    by_columns = factor.stride(-1) > factor.stride(-2)
    out = ANSWERS.empty((N, r, rows) if by_columns else (N, rows, r), factor.dtype)
    return out.mT if by_columns else out


def _unit(t: Tensor) -> float:
    """Unit roundoff of what the numbers are stored in."""
    return torch.finfo(t.dtype).eps / 2


def _place(t: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in memory."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype
