"""Stacked client blocks for QR: every matrix of the gallery cut into blocks, and what clients add to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedlora_kernels.testing.gallery import GALLERY
from fedlora_kernels.testing.matrices import generator, prescribed, spectrum

__all__ = ["STACKS", "StackProblem"]


@dataclass(frozen=True)
class StackProblem:
    """``[w_1 X_1 | ... | w_K X_K]``: blocks[k] (m, r_k), weights (K,) float64; ``rank`` where rounding to a dtype keeps it."""

    blocks: tuple[Tensor, ...]
    weights: Tensor
    rank: int | None = None

    def stacked(self) -> Tensor:
        """The stacked matrix (m, R) in float64."""
        return torch.cat([w * X.double() for w, X in zip(self.weights, self.blocks, strict=True)], 1)


Stacked = Callable[[int, Sequence[int], int, torch.dtype], StackProblem]


def cut(m: int, ranks: Sequence[int], seed: int, dtype: torch.dtype, *, name: str) -> StackProblem:
    """A member of the gallery, cut into blocks; weights 1."""
    X = GALLERY[name](m, sum(ranks), seed, dtype)
    return StackProblem(torch.split(X, list(ranks), 1), torch.ones(len(ranks), dtype=torch.float64))


def _normal(m: int, r: int, seed: int) -> Tensor:
    return torch.randn(m, r, dtype=torch.float64, generator=generator(seed))


def independent(m: int, ranks: Sequence[int], seed: int, dtype: torch.dtype) -> StackProblem:
    """Gaussian clients, weights of both signs."""
    blocks = tuple(_normal(m, r, seed + k).to(dtype) for k, r in enumerate(ranks))
    weights = torch.tensor([(-1.0) ** k * (k + 1) for k in range(len(ranks))], dtype=torch.float64)
    return StackProblem(blocks, weights, min(m, sum(ranks)))


def duplicates(m: int, ranks: Sequence[int], seed: int, dtype: torch.dtype) -> StackProblem:
    """Every client sends the leading columns of one block."""
    X = _normal(m, max(ranks, default=0), seed).to(dtype)
    ones = torch.ones(len(ranks), dtype=torch.float64)
    return StackProblem(tuple(X[:, :r] for r in ranks), ones, min(m, max(ranks, default=0)))


def zero_first(m: int, ranks: Sequence[int], seed: int, dtype: torch.dtype) -> StackProblem:
    """The first client is all zero: R begins with zero columns."""
    base = independent(m, ranks, seed, dtype)
    blocks = (torch.zeros_like(base.blocks[0]), *base.blocks[1:])
    return StackProblem(blocks, base.weights, min(m, sum(ranks[1:])))


def zero_weight(m: int, ranks: Sequence[int], seed: int, dtype: torch.dtype) -> StackProblem:
    """The first client has weight 0, so its columns of R are zero."""
    base = independent(m, ranks, seed, dtype)
    weights = base.weights.clone()
    weights[0] = 0
    return StackProblem(base.blocks, weights, min(m, sum(ranks[1:])))


def graded(m: int, ranks: Sequence[int], seed: int, dtype: torch.dtype) -> StackProblem:
    """Columns falling over eight decades, weights over six more."""
    grades = torch.logspace(2, -6 if dtype != torch.float16 else -2, sum(ranks), dtype=torch.float64)
    X = (_normal(m, sum(ranks), seed) * grades).to(dtype)
    weights = torch.logspace(3, -3, len(ranks), dtype=torch.float64)
    return StackProblem(torch.split(X, list(ranks), 1), weights, min(m, sum(ranks)))


def conditioned(m: int, ranks: Sequence[int], seed: int, dtype: torch.dtype, *, kappa: float) -> StackProblem:
    """Singular values of the whole stack falling geometrically to ``1 / kappa``."""
    R = sum(ranks)
    X = prescribed(m, R, spectrum("geometric", min(m, R), kappa), seed, dtype)
    return StackProblem(torch.split(X, list(ranks), 1), torch.ones(len(ranks), dtype=torch.float64))


STACKS: Mapping[str, Stacked] = {
    "independent": independent,
    "duplicates": duplicates,
    "zero first": zero_first,
    "zero weight": zero_weight,
    "graded": graded,
    **{f"kappa 1e{e}": partial(conditioned, kappa=10.0**e) for e in range(0, 16, 2)},
    **{name: partial(cut, name=name) for name in GALLERY},
}
"""Functions ``(m, ranks, seed, dtype) -> StackProblem`` by name."""
