"""Weighted and mixed sums of client blocks."""

from __future__ import annotations

import functools
from typing import Any, Literal

from fedlora_kernels.backends.contract import Backend, RawSum
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.arrays import Caller, parse_dtype
from fedlora_kernels.linalg.blocks import by_dtype, corner_problems, mixed_problems
from fedlora_kernels.linalg.call import run
from fedlora_kernels.linalg.results import WeightedSum

__all__ = ["mixed_sum", "weighted_sum"]


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


def mixed_sum(
    blocks: Any,
    mixers: Any,
    *,
    side: Literal["right", "left"] = "right",
    dtype: Any = None,
    check: bool = True,
    backend: str = "auto",
) -> Any:
    """Sum of client blocks times small matrices, ``sum_k X_k M_k`` or ``sum_k M_k X_k``, each block read once.

    Products and sums are float64 and rounded once at the end (to a half type by way of float32). Means of rotated factors need no
    rotated copies: ``sum_k B_k (w_k Q_k)``, ``sum_k (w_k Q_k^T) A_k``.

    Args:
        blocks: list of K client blocks, or one array, or `Ragged` of either; ``(..., p, r_k)`` on the right side, ``(..., r_k, p)`` on
            the left; float64, float32, float16 or bfloat16.
        mixers: as many matrices ``(..., r_k, q)``, or ``(..., q, r_k)`` on the left; of those dtypes, best float64. A block whose mixer
            is zero is not seen: its NaN stay out of the sum.
        side: of the mixers, "right" or "left".
        dtype: of the sum; None is the common dtype of the blocks (NumPy arrays of bfloat16 answer in float32).
        check: read ``info`` once and raise for trouble; False never raises for data.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        `WeightedSum` of ``(..., p, q)``, or ``(..., q, p)`` on the left; a list for `Ragged`.

    Raises:
        NonFiniteError: NaN or Inf in a block or mixer, or a sum beyond float64 (``check=True``; names the matrix).
        OutputOverflowError: a sum beyond ``dtype`` (``check=True``).
        MismatchError, InputError, TypeError, BackendError: shapes, side, dtype, framework, device, backend.

    Source: docs/numerics.md, Weighted sums.
    """
    caller = Caller("mixed_sum")
    if side not in ("right", "left"):
        raise InputError(f"mixed_sum: side is {side!r}; 'right' or 'left' is needed")
    asked = None if dtype is None else parse_dtype(caller.function, dtype)
    problems = mixed_problems(caller, blocks, mixers, side == "left")
    dtypes = [asked or caller.answer_dtype(problem.dtype) for problem in problems]

    def work(chosen: Backend) -> list[RawSum]:
        raws = by_dtype(problems, dtypes, lambda dtype: functools.partial(chosen.mixed_sum, dtype=dtype))
        return [raw._replace(sum=(raw.sum.mT if side == "left" else raw.sum).contiguous()) for raw in raws]

    return run(caller, problems, work, WeightedSum, like=blocks, backend=backend, check=check)
