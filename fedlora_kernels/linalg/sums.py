"""Weighted sums of client blocks."""

from __future__ import annotations

import functools
from typing import Any

from fedlora_kernels.backends.contract import Backend, RawSum
from fedlora_kernels.linalg.arrays import Caller, parse_dtype
from fedlora_kernels.linalg.blocks import by_dtype, corner_problems
from fedlora_kernels.linalg.call import run
from fedlora_kernels.linalg.results import WeightedSum

__all__ = ["weighted_sum"]


def weighted_sum(
    blocks: Any, *, weights: Any = None, dtype: Any = None, check: bool = True, backend: str = "auto"
) -> Any:
    """Weighted sum ``sum_k w_k X_k`` of client blocks, each read once, on the top left corner of the sum.

    Products and sums are float64, in the order of the blocks, without fused multiply-add, and rounded once at the end (to a half
    type by way of float32): every backend answers the same bits.

    Args:
        blocks: list of K client blocks ``(..., p_k, q_k)``, or one array, or `Ragged` of either; float64, float32, float16 or
            bfloat16. The sum is ``(..., max p_k, max q_k)``: a smaller block counts as padded with zeros.
        weights: None (all 1), ``(K,)`` or ``(..., K)`` finite reals. A block of weight 0 is never read.
        dtype: of the sum; None is the common dtype of the blocks (NumPy arrays of bfloat16 answer in float32).
        check: read ``info`` once and raise for trouble; False never raises for data.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        `WeightedSum`; a list for `Ragged`.

    Raises:
        NonFiniteError: NaN or Inf in a block, or a sum beyond float64 (``check=True``; names the matrix).
        OutputOverflowError: a sum beyond ``dtype`` (``check=True``).
        MismatchError, WeightError, InputError, TypeError, BackendError: as in `product_svd`.

    Source: docs/numerics.md, Weighted sums.
    """
    caller = Caller("weighted_sum")
    asked = None if dtype is None else parse_dtype(caller.function, dtype)
    problems = corner_problems(caller, blocks, weights)
    dtypes = [asked or caller.answer_dtype(problem.dtype) for problem in problems]

    def work(chosen: Backend) -> list[RawSum]:
        return by_dtype(problems, dtypes, lambda dtype: functools.partial(chosen.weighted_sum, dtype=dtype))

    return run(caller, problems, work, WeightedSum, like=blocks, backend=backend, check=check)
