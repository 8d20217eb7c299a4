"""Procrustes rotations: the torch backend's, with cross products and SVDs of the native library."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RawRotation
from fedlora_kernels.backends.cpu.library import Library, counts, rows, table
from fedlora_kernels.backends.cpu.svd import svd
from fedlora_kernels.backends.cpu.threads import thread_count
from fedlora_kernels.backends.torch import procrustes

__all__ = ["align_factors", "procrustes_rotation"]


def procrustes_rotation(
    library: Library, source: Sequence[Tensor], target: Sequence[Tensor], special: bool, blend: float
) -> list[RawRotation]:
    """Rotation of every source onto its target; see `Backend.procrustes_rotation`."""
    return procrustes.procrustes_rotation(source, target, special, blend, **_kernels(library))


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
    return procrustes.align_factors(B, A, reference_B, reference_A, side, special, blend, **_kernels(library))


def _kernels(library: Library) -> dict[str, Any]:
    return {"svd": partial(svd, library), "cross": partial(_cross_products, library)}


def _cross_products(library: Library, source: Sequence[Tensor], target: Sequence[Tensor]) -> list[procrustes.Cross]:
    """``X^T Y`` of every source and its target, each read once; sources with one target in a row read it once."""
    pairs = list(zip(source, target, strict=True))
    if any(x.dtype == torch.float64 for pair in pairs for x in pair):  # squares of float64 may leave its range
        return procrustes.cross_products(source, target)
    op = "procrustes_rotation"
    runs = [list(run) for _, run in itertools.groupby(pairs, key=lambda pair: _place(pair[1]))]
    products = [torch.empty(len(X), X.shape[-1], Y.shape[-1], dtype=torch.float64) for X, Y in pairs]
    squares = [torch.empty(len(run[0][1]), len(run) + 1, dtype=torch.float64) for run in runs]
    blocks, targets = table([X for X, _ in pairs]), table([run[0][1] for run in runs])
    numbers, threads = counts([len(run) for run in runs]), thread_count()
    memory, *scratch = library.workspace(
        op, "fedlora_cross_products_workspace", blocks, numbers, targets, len(runs), threads
    )
    tables = table(products), table([rows(square) for square in squares])
    library.call(op, "fedlora_cross_products", blocks, numbers, targets, *tables, len(runs), *scratch, threads, None)
    del memory
    rest = iter(products)
    return [cross for square in squares for cross in _crosses(itertools.islice(rest, square.shape[1] - 1), square)]


def _crosses(products: Iterable[Tensor], squares: Tensor) -> list[procrustes.Cross]:
    """Products that were not scaled; ``squares`` (N, K + 1) of their sources and of the target are finite where those are."""
    norms, finite = squares.sqrt(), torch.isfinite(squares)
    sizes, both = norms[:, :-1] * norms[:, -1:], finite[:, :-1] & finite[:, -1:]
    exponent = torch.zeros(len(squares), dtype=torch.int64)
    return [procrustes.Cross(M, sizes[:, k], exponent, both[:, k]) for k, M in enumerate(products)]


def _place(t: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in memory."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype
