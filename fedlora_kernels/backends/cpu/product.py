"""Truncated SVDs of stacked products: one pass in one call of the native library, the rest by way of the torch backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors, RawProduct, RuleSpec
from fedlora_kernels.backends.native.library import Library
from fedlora_kernels.backends.native.product import Problem, is_served, kernels, solve
from fedlora_kernels.backends.torch import product
from fedlora_kernels.backends.torch.certificate import Spectrum

__all__ = ["STAGES", "product_svd"]

STAGES = ("grams", "cores", "left factors", "right factors")
"""What a call spends its time on: Cholesky, core SVD and rank are the cores, signs belong to the left factors."""


def product_svd(
    library: Library,
    groups: Sequence[Factors],
    rule: RuleSpec,
    output: str,
    dtype: torch.dtype,
    *,
    seconds: Tensor | None = None,
) -> list[RawProduct]:
    """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; see `Backend.product_svd`.

    ``seconds``, as many float64 as there are `STAGES`, takes up what the threads spend on each stage of the library's call.

    Stacks of up to 512 columns go through the library's one pass, all groups in one call: no bit of theirs depends on the batch,
    the slot or the number of threads. What needs a second pass or the dense route, and wider stacks, are the torch backend's with
    the library's QR and core SVD, one matrix at a time: they do not depend on the batch, but torch's matrix products between
    them may round otherwise with another number of threads or another layout of the blocks in memory.
    """
    library.functions("product_svd")
    served = [i for i, group in enumerate(groups) if is_served(group)]
    found = dict(zip(served, _served(library, [groups[i] for i in served], rule, output, dtype, seconds), strict=True))
    others = [group for i, group in enumerate(groups) if i not in found]
    rest = iter(product.product_svd(others, rule, output, dtype, kernels=kernels(library)))
    return [found[i] if i in found else next(rest) for i in range(len(groups))]


def _served(
    library: Library,
    groups: Sequence[Factors],
    rule: RuleSpec,
    output: str,
    dtype: torch.dtype,
    seconds: Tensor | None,
) -> list[RawProduct]:
    """One pass over all groups in one call, and a second one where it is needed."""
    problems = []
    for group in groups:
        left = _zeros((group.batch, group.m, group.p_max), dtype)
        problems.append(Problem.of(group, left, _zeros((group.batch, group.p_max, group.n), dtype)))
    solve(library, problems, rule, output, seconds)
    raws = []
    for group, problem in zip(groups, problems, strict=True):
        raw = problem.answer()
        for i in problem.doubtful().nonzero().flatten().tolist():
            _again(library, group, i, problem, rule, output, raw)
        raws.append(raw)
    return raws


def _again(
    library: Library, group: Factors, i: int, known: Problem, rule: RuleSpec, output: str, raw: RawProduct
) -> None:
    """Matrix i by a second pass, after what the first one leaves of its spectrum."""
    one = slice(i, i + 1)
    problem = product.load_problem(group, one)
    spectrum = Spectrum(
        S=raw.S[one], energy=raw.energy[one], e=problem.e, passes=1, width=group.width, **known.first(i)
    )
    here = RawProduct(*(field[one] for field in raw))
    powers = product.POWERS[output]
    product.second_pass(problem, known.balance[one], spectrum, rule, powers, here, kernels(library))


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Zeros of which only those pages cost time that are touched later: most rules keep far fewer columns than there is room for."""
    line = 64
    memory = np.zeros(math.prod(shape) * dtype.itemsize + line, dtype=np.uint8)
    start = -memory.ctypes.data % line
    return torch.from_numpy(memory[start : memory.size - line + start]).view(dtype).view(shape)
