"""Orthogonal Procrustes: rotations between factor bases, and LoRA pairs rotated without changing their update."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import INFO_TEXT, Backend, Info, RawRotation
from fedlora_kernels.errors import InputError, NonFiniteError, OutputOverflowError
from fedlora_kernels.linalg.arrays import Array, Caller
from fedlora_kernels.linalg.blocks import Matrices, Problem, matrix_problems
from fedlora_kernels.linalg.call import run
from fedlora_kernels.linalg.ragged import Ragged
from fedlora_kernels.linalg.results import Rotation, Where, raise_for_info

__all__ = ["align_factors", "procrustes_rotation", "rotate_factors"]


def procrustes_rotation(
    source: Array | Ragged,
    target: Array | Ragged,
    *,
    special: bool = False,
    blend: float = 1.0,
    check: bool = True,
    backend: str = "auto",
) -> Any:
    """Orthogonal Q that minimises ``|source Q - target|_F``: the polar factor of ``source^T target``.

    Where several Q do equally well the one nearest to the identity is taken (``unique`` is then False); a zero correlation
    gives the identity. Q is orthogonal to a few float64 rounding units.

    Args:
        source: ``(..., N, r)`` float64, float32, float16 or bfloat16, or `Ragged` of such.
        target: as ``source``, same shapes.
        special: restrict to det Q = +1; otherwise a reflection is a legitimate answer.
        blend: t in [0, 1]: the polar factor of ``(1 - t) I + t Q`` instead of Q. 0 is the identity. With ``special=False`` the
            part of Q that is a reflection jumps from the identity to itself at 1/2.
        check: read ``info`` once and raise for trouble; False never raises for data, nor waits for the device but where the backend must.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        `Rotation`, float64; a list of them for `Ragged`.

    Raises:
        NonFiniteError: NaN or Inf in an input (``check=True``; the message names the matrix).
        MismatchError, InputError, TypeError, BackendError: shapes, blend, dtype, framework, device, backend.

    Source: docs/numerics.md, Procrustes; Schoenemann (1966).
    """
    caller = Caller("procrustes_rotation")
    blend = _blend(caller, blend)
    problems = matrix_problems(caller, {"source": "mr", "target": "mr"}, source=source, target=target)

    def work(chosen: Backend) -> list[RawRotation]:
        X, Y = _columns(problems)
        return chosen.procrustes_rotation(X, Y, bool(special), blend)

    return run(caller, problems, work, Rotation, like=source, backend=backend, check=check)


def rotate_factors(
    B: Array | Ragged, A: Array | Ragged, Q: Array | Ragged, *, check: bool = True, backend: str = "auto"
) -> Any:
    """Rotate a LoRA pair within its rank: ``(B Q, Q^T A)``. For orthogonal Q the update B A is unchanged.

    Args:
        B: ``(..., m, r)`` float64, float32, float16 or bfloat16, or `Ragged` of such.
        A: ``(..., r, n)``, likewise.
        Q: ``(..., r, r)``, likewise, usually float64; its orthogonality is the caller's promise.
        check: raise if an answer is not finite; False never raises for data, nor waits for the device but where the backend must.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        Pair ``(B Q, Q^T A)`` in the dtypes of B and A (NumPy arrays of bfloat16 answer in float32); a list for `Ragged`.

    Raises:
        NonFiniteError: NaN or Inf in B, A or Q (``check=True``; the message names the matrix).
        OutputOverflowError: an answer beyond the range of its dtype (``check=True``).
        MismatchError, InputError, TypeError, BackendError: shapes, dtype, framework, device, backend.

    Source: docs/numerics.md, Procrustes.
    """
    caller = Caller("rotate_factors")
    problems = matrix_problems(caller, {"B": "mr", "A": "rn", "Q": "rr"}, B=B, A=A, Q=Q)

    def work(chosen: Backend) -> list[tuple[Tensor, Tensor]]:
        left, right, turns = _columns(problems)
        turns = [turn.to(torch.float64) for turn in turns]
        return chosen.rotate_factors(_widened(caller, left), _widened(caller, right), turns)

    verify = functools.partial(_require_finite, problems)
    return run(caller, problems, work, lambda *pair: pair, like=B, backend=backend, check=check, verify=verify)


def align_factors(
    B: Array | Ragged,
    A: Array | Ragged,
    reference: Any,
    *,
    side: str | tuple[float, float] = "A",
    special: bool = True,
    blend: float = 1.0,
    check: bool = True,
    backend: str = "auto",
) -> Any:
    """Rotate a LoRA pair towards a reference, ``(B Q, Q^T A)``, in one fused call; the update B A is unchanged.

    Q is the `procrustes_rotation` of ``alpha A A_ref^T + beta B^T B_ref``: side "A" is (1, 0), side "B" is (0, 1).

    Args:
        B: ``(..., m, r)`` float64, float32, float16 or bfloat16, or `Ragged` of such.
        A: ``(..., r, n)``, likewise.
        reference: A_ref for side "A", B_ref for side "B", shaped as A or B; or the pair ``(B_ref, A_ref)``, which a weighted
            side needs (the one of weight 0 may be None). In a ragged call each is `Ragged`.
        side: "A", "B", or (alpha, beta), both finite and >= 0, not both 0.
        special: restrict to det Q = +1.
        blend: t in [0, 1], as in `procrustes_rotation`; 0 returns the factors as they are.
        check: read ``info`` once and raise for trouble; False never raises for data, nor waits for the device but where the backend must.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        ``(B Q, Q^T A, Rotation)``, the factors in the dtypes of B and A (NumPy arrays of bfloat16 answer in float32); a list
        for `Ragged`.

    Raises:
        NonFiniteError: NaN or Inf in a factor or reference (``check=True``; the message names the matrix).
        OutputOverflowError: a rotated factor beyond the range of its dtype (``check=True``).
        MismatchError, InputError, TypeError, BackendError: shapes, side, blend, dtype, framework, device, backend.

    Source: docs/numerics.md, Procrustes; FedRot-LoRA, arXiv 2602.23638.
    """
    caller = Caller("align_factors")
    blend = _blend(caller, blend)
    alpha, beta = _side(caller, side)
    B_ref, A_ref = _references(caller, reference, side, alpha, beta)
    cores, arguments = {"B": "mr", "A": "rn"}, {"B": B, "A": A}
    for name, present in (("B", B_ref), ("A", A_ref)):
        if present is not None:
            cores[f"reference {name}"], arguments[f"{name}_ref"] = cores[name], present
    problems = matrix_problems(caller, cores, **arguments)

    def work(chosen: Backend) -> list[tuple[Tensor, ...]]:
        columns = _columns(problems)
        left, right = _widened(caller, columns[0]), _widened(caller, columns[1])
        target_B = columns[2] if B_ref is not None else None
        target_A = columns[-1] if A_ref is not None else None
        triples = chosen.align_factors(left, right, target_B, target_A, (alpha, beta), bool(special), blend)
        return [(BQ, QA, *rotation) for BQ, QA, rotation in triples]

    def verify(where: Where, raws: Sequence[tuple[Tensor, ...]]) -> None:
        raise_for_info(where, [RawRotation(*raw[2:]).info for raw in raws])

    return run(caller, problems, work, _aligned, like=B, backend=backend, check=check, verify=verify)


def _blend(caller: Caller, blend: float) -> float:
    if isinstance(blend, bool) or not isinstance(blend, (int, float)) or not 0.0 <= blend <= 1.0:
        raise InputError(f"{caller.function}: blend is {blend!r}; 0 <= blend <= 1 is needed")
    return float(blend)


def _side(caller: Caller, side: Any) -> tuple[float, float]:
    if side in ("A", "B"):
        return (1.0, 0.0) if side == "A" else (0.0, 1.0)
    if isinstance(side, (tuple, list)) and len(side) == 2:
        numbers = [w for w in side if isinstance(w, (int, float)) and not isinstance(w, bool)]
        if len(numbers) == 2 and all(math.isfinite(w) and w >= 0 for w in numbers) and any(numbers):
            return float(numbers[0]), float(numbers[1])
    raise InputError(f"{caller.function}: side is {side!r}; 'A', 'B' or (alpha, beta) >= 0, not both 0, is needed")


def _references(caller: Caller, reference: Any, side: Any, alpha: float, beta: float) -> tuple[Any, Any]:
    """Return (B_ref, A_ref), None where the weight is zero."""
    if isinstance(reference, (tuple, list)):
        if len(reference) != 2:
            raise InputError(
                f"{caller.function}: reference holds {len(reference)} entries; the pair (B_ref, A_ref) is needed"
            )
        B_ref, A_ref = reference
    elif side in ("A", "B"):
        B_ref = A_ref = reference
    else:
        raise InputError(f"{caller.function}: side {side!r} needs reference as the pair (B_ref, A_ref)")
    B_ref, A_ref = (B_ref if beta else None), (A_ref if alpha else None)
    for name, weight, value in (("B", beta, B_ref), ("A", alpha, A_ref)):
        if weight and value is None:
            raise InputError(f"{caller.function}: side {side!r} needs a reference for {name}; it is None")
    return B_ref, A_ref


def _columns(problems: Sequence[Problem[Matrices]]) -> list[list[Tensor]]:
    """Regroup from problems of several arguments to arguments of several problems."""
    return [list(column) for column in zip(*(problem.parts[0].group.tensors for problem in problems), strict=True)]


def _widened(caller: Caller, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(caller.answer_dtype(tensor.dtype)) for tensor in tensors]


def _aligned(BQ: Array, QA: Array, *rotation: Array) -> tuple[Array, Array, Rotation]:
    return BQ, QA, Rotation(*rotation)


def _require_finite(
    problems: Sequence[Problem[Matrices]], where: Where, pairs: Sequence[tuple[Tensor, Tensor]]
) -> None:
    def finite(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.isfinite().all(-1).all(-1) for tensor in tensors]).all(0)

    good = torch.cat([finite(pair) for pair in pairs]).cpu()
    if good.all():
        return
    first = int((~good).nonzero()[0])
    sound = torch.cat([finite(problem.parts[0].group.tensors) for problem in problems]).cpu()
    if sound[first]:
        raise OutputOverflowError(f"{where(first)}{INFO_TEXT[Info.OVERFLOW]}")
    raise NonFiniteError(f"{where(first)}{INFO_TEXT[Info.NONFINITE]}")
