"""QR of stacked client blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fedlora_kernels.backends.contract import Backend, RawQR, Stack
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.arrays import Caller
from fedlora_kernels.linalg.blocks import Part, Problem, solve, stack_problems
from fedlora_kernels.linalg.call import run
from fedlora_kernels.linalg.results import QRResult

__all__ = ["stacked_qr"]


def stacked_qr(blocks: Any, *, weights: Any = None, mode: str = "r", check: bool = True, backend: str = "auto") -> Any:
    """Thin QR of ``X = [w_1 X_1 | ... | w_K X_K]``, given as blocks that are never concatenated.

    R is upper triangular in the given column order with diagonal >= 0 and ``X^T X = R^T R``; a deficient X gives row-echelon
    form with positive leading entries, which is unique. Rows of R and columns of Q from ``rank`` on are zero. Errors are
    column-wise: ``|x_j - Q r_j|`` is a few rounding units of ``|x_j|``.

    Args:
        blocks: ``(..., m, R)``, or a list of client blocks ``(..., m, r_k)``, or `Ragged` of either; float64, float32,
            float16 or bfloat16.
        weights: None (all 1), ``(K,)`` or ``(..., K)`` finite reals. Columns of a client of weight 0 are zero in R, unread.
        mode: ``r`` computes R alone (Q is None), ``reduced`` Q as well.
        check: read ``info`` once and raise for trouble; False never raises for data, nor waits for the device but where the backend must.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        `QRResult` with k = min(m, R), in the common dtype of the blocks, half inputs in float32; a list for `Ragged`.

    Raises:
        NonFiniteError: NaN or Inf in a block (``check=True``; the message names the matrix).
        MismatchError, WeightError, InputError, TypeError, BackendError: as in `product_svd`.

    Source: docs/numerics.md, Stacked QR.
    """
    caller = Caller("stacked_qr")
    if mode not in ("r", "reduced"):
        raise InputError(f"stacked_qr: mode is {mode!r}; 'r' or 'reduced' is needed")
    problems = [_in_its_dtype(problem) for problem in stack_problems(caller, blocks, weights)]

    def work(chosen: Backend) -> list[RawQR]:
        return solve(problems, lambda groups: chosen.stacked_qr(groups, mode == "reduced"), _widen)

    return run(caller, problems, work, QRResult, like=blocks, backend=backend, check=check)


def _in_its_dtype(problem: Problem[Stack]) -> Problem[Stack]:
    """A problem that is answered in float64 also where its float64 clients were removed: their weights are 0 there."""
    if problem.dtype != torch.float64:
        return problem
    return dataclasses.replace(problem, parts=tuple(map(_in_float64, problem.parts)))


def _in_float64(part: Part[Stack]) -> Part[Stack]:
    """A part of a float64 problem: one of its blocks is float64, or all are made so."""
    if any(block.dtype == torch.float64 for block in part.group.blocks):
        return part
    wide = tuple(block.double() for block in part.group.blocks)
    return dataclasses.replace(part, group=dataclasses.replace(part.group, blocks=wide))


def _widen(problem: Problem[Stack], part: Part[Stack], raw: RawQR) -> RawQR:
    """Put zero columns back into R for clients that were removed, and pad R and Q to min(m, R) of all blocks."""
    dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    Q = None if raw.Q is None else raw.Q.to(dtype)
    R = raw.R.to(dtype)
    if len(part.clients) == len(problem.ranks):
        return raw._replace(Q=Q, R=R)
    width = sum(problem.ranks)
    k = min(part.group.m, width)
    starts = [sum(problem.ranks[:client]) for client in range(len(problem.ranks))]
    kept = [starts[client] + j for client in part.clients for j in range(problem.ranks[client])]
    columns = torch.tensor(kept, dtype=torch.int64).to(R.device, non_blocking=True)
    whole = R.new_zeros(R.shape[0], k, width)
    whole[:, : R.shape[1], columns] = R
    if Q is not None:
        Q = torch.nn.functional.pad(Q, (0, k - Q.shape[2]))
    return raw._replace(Q=Q, R=whole)
