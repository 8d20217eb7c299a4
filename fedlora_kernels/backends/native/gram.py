"""Grams of stacked blocks and inner products of updates in float64, straight from any dtype (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors
from fedlora_kernels.backends.native.library import Library, counts, table
from fedlora_kernels.backends.torch.chunks import pow2, slices

__all__ = ["gram", "update_gram"]

_SCRATCH = 1 << 30
"""Bytes of Grams that a call of `update_gram` may hold: beyond that, problems are solved a few at a time."""


def gram(library: Library, blocks: Sequence[Tensor], e: Tensor | None) -> Tensor:
    """``X^T X`` of the stack ``[X_1 | ... | X_K] 2^-e``, each block read once; as `backends.torch.gram.gram`."""
    N, R, device = len(blocks[0]), sum(block.shape[-1] for block in blocks), blocks[0].device
    G = torch.empty(N, R, R, dtype=torch.float64, device=device)
    scale = G.new_empty(N, 0, R) if e is None else pow2(-e).expand(N, R)[:, None]
    X, numbers, out = table(blocks), counts([len(blocks)]), table([G])
    library.run("update_gram", "fedlora_gram", (X, numbers, out, 1), (X, numbers, table([scale]), out, 1), device)
    return G


class _Problems(NamedTuple):
    """Some equally shaped problems, and where their inner products go."""

    B: Sequence[Tensor]
    A: Sequence[Tensor]
    weights: Tensor
    inner: Tensor

    def part(self, some: slice) -> _Problems:
        return _Problems([b[some] for b in self.B], [a[some] for a in self.A], self.weights[some], self.inner[some])


def update_gram(library: Library, groups: Sequence[Factors]) -> list[Tensor]:
    """Inner products of the weighted updates, by a library that has fedlora_update_gram; see `Backend.update_gram`."""
    library.functions("update_gram")
    problems = [_problems(library, group) for group in groups]
    solvable = [problem for problem in problems if problem.inner.numel()]
    calls = [solvable]
    if _scratch(library, solvable) > _SCRATCH:
        calls = [[part] for problem in solvable for part in _parts(library, problem)]
    for call in calls:
        _solve(library, call)
    return [problem.inner for problem in problems]


def _problems(library: Library, group: Factors) -> _Problems:
    N, K = group.weights.shape
    device = group.B[0].device if K else torch.device(library.device)
    inner = torch.empty(N, K, K, dtype=torch.float64, device=device)
    return _Problems(group.B, group.A, group.weights, inner)


def _parts(library: Library, problem: _Problems) -> list[_Problems]:
    each = _scratch(library, [problem.part(slice(0, 1))])
    return [problem.part(some) for some in slices(len(problem.inner), each, _SCRATCH)]


def _scratch(library: Library, problems: Sequence[_Problems]) -> int:
    if not problems:
        return 0
    sizes = (*_tables(problems), table([problem.inner for problem in problems]), len(problems))
    return library.scratch("update_gram", "fedlora_update_gram", sizes, problems[0].inner.device)


def _solve(library: Library, problems: Sequence[_Problems]) -> None:
    if not problems:
        return
    tables, inner, n = _tables(problems), table([problem.inner for problem in problems]), len(problems)
    weights = table([problem.weights[None] for problem in problems])
    arguments = (*tables, weights, inner, n)
    library.run("update_gram", "fedlora_update_gram", (*tables, inner, n), arguments, problems[0].inner.device)


def _tables(problems: Sequence[_Problems]) -> tuple[Any, ...]:
    """Descriptors of all blocks of B and of A, and how many are those of each problem."""
    B, A = ([block for problem in problems for block in problem[side]] for side in (0, 1))
    return table(B), table(A), counts([len(problem.B) for problem in problems])
