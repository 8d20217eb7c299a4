"""Truncated SVDs of stacked products on a GPU: both passes in one call of the library, without a look at the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fedlora_kernels.backends.contract import Factors, RawProduct, RuleSpec
from fedlora_kernels.backends.native.library import Library
from fedlora_kernels.backends.native.product import Problem, is_served, kernels, scratch, solve
from fedlora_kernels.backends.torch import product

__all__ = ["product_svd"]

_SCRATCH = 4 << 30
"""Bytes that a call may work in: beyond that, updates are solved in several calls."""


def product_svd(
    library: Library, groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype
) -> list[RawProduct]:
    """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; see `Backend.product_svd`.

    Stacks of up to 512 columns go through the library, all groups in one call if the memory allows: nothing waits for the device,
    and no bit depends on the batch or the slot. The dense route and wider stacks are the torch backend's with kernels of the
    library, one matrix at a time; they read ranks back, and so wait.
    """
    library.functions("product_svd")
    served = [i for i, group in enumerate(groups) if is_served(group)]
    problems = {i: _problem(groups[i], dtype) for i in served}
    for call in _calls(library, list(problems.values())):
        solve(library, call, rule, output)
    others = [group for i, group in enumerate(groups) if i not in problems]
    rest = iter(product.product_svd(others, rule, output, dtype, kernels=kernels(library)))
    return [problems[i].answer() if i in problems else next(rest) for i in range(len(groups))]


def _problem(group: Factors, dtype: torch.dtype) -> Problem:
    device = group.B[0].device
    left = torch.zeros(group.batch, group.m, group.p_max, dtype=dtype, device=device)
    return Problem.of(group, left, left.new_zeros(group.batch, group.p_max, group.n))


def _calls(library: Library, problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Parts of the problems that fit the scratch memory together, as many as do."""
    if scratch(library, problems) <= _SCRATCH:
        yield list(problems)
        return
    call: list[Problem] = []
    free = _SCRATCH
    for problem in problems:
        each, begin, batch = scratch(library, [problem.part(slice(0, 1))]), 0, len(problem.left)
        while begin < batch:
            if call and free < each:
                yield call
                call, free = [], _SCRATCH
            end = min(batch, begin + max(1, free // each))
            call.append(problem.part(slice(begin, end)))
            free, begin = free - (end - begin) * each, end
    yield call
