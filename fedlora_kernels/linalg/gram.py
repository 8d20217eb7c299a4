"""Inner products of client updates, from their factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import INFO_TEXT, Backend, Factors, Info
from fedlora_kernels.errors import NonFiniteError, OutputOverflowError
from fedlora_kernels.linalg.arrays import Caller
from fedlora_kernels.linalg.blocks import Part, Problem, factor_problems, solve
from fedlora_kernels.linalg.call import run
from fedlora_kernels.linalg.results import Where

__all__ = ["update_gram"]


def update_gram(B: Any, A: Any, *, weights: Any = None, check: bool = True, backend: str = "auto") -> Any:
    """Inner products of the weighted client updates, ``G[i, j] = <w_i B_i A_i, w_j B_j A_j>``, which are never formed.

    The diagonal holds squared Frobenius norms of the updates, the sum of all elements is that of the aggregate. Accumulated
    in float64: the error of G[i, j] is at most a few rounding units of ``|w_i B_i| |A_i| |w_j B_j| |A_j|``.

    Args:
        B: list of K client blocks ``(..., m, r_k)``, or one array ``(..., m, R)`` (K = 1), or `Ragged` of either.
        A: list of K client blocks ``(..., r_k, n)``, or one array, or `Ragged`, as B.
        weights: None (all 1), ``(K,)`` or ``(..., K)`` finite reals. A client of weight 0 has zero row and column, unread.
        check: raise if a client holds NaN or Inf; False leaves NaN in that client's row and column and never waits.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        ``(..., K, K)`` float64, symmetric; a list for `Ragged`.

    Raises:
        NonFiniteError: NaN or Inf in a factor (``check=True``; names matrix and client).
        OutputOverflowError: a squared norm beyond float64 (``check=True``).
        MismatchError, WeightError, InputError, TypeError, BackendError: as in `product_svd`.

    Source: docs/algorithms.md, Inner products of updates.
    """
    caller = Caller("update_gram")
    problems = factor_problems(caller, B, A, weights)

    def work(chosen: Backend) -> list[tuple[Tensor]]:
        return solve(problems, lambda groups: [(gram,) for gram in chosen.update_gram(groups)], _widen)

    return run(caller, problems, work, lambda gram: gram, like=B, backend=backend, check=check, verify=_require_finite)


def _widen(problem: Problem[Factors], part: Part[Factors], raw: tuple[Tensor]) -> tuple[Tensor]:
    (gram,) = raw
    count = len(problem.ranks)
    if len(part.clients) == count:
        return raw
    whole = gram.new_zeros(len(gram), count, count)
    if part.clients:
        index = torch.tensor(part.clients).to(gram.device, non_blocking=True)
        whole[:, index[:, None], index] = gram
    return (whole,)


def _require_finite(where: Where, raws: Sequence[tuple[Tensor]]) -> None:
    norms = [gram.diagonal(dim1=-2, dim2=-1) for (gram,) in raws]
    finite = torch.cat([norm.isfinite().all(-1) for norm in norms]).cpu()
    if finite.all():
        return
    first = int((~finite).nonzero()[0])
    row = [row for norm in norms for row in norm][first]
    client = int((~row.isfinite()).nonzero()[0])
    if row[client].isnan():
        raise NonFiniteError(f"{where(first)}client block {client}: {INFO_TEXT[Info.NONFINITE]}")
    raise OutputOverflowError(
        f"{where(first)}client block {client}: the squared norm of its update is beyond float64; less than 1.8e308 is needed. Scale it down"
    )
