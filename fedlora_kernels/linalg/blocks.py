"""From what a caller writes to what a backend takes: client blocks, ragged batches, zero weights.

A call is a list of *problems* (one, or those of a `Ragged`); a problem is a batch of equally shaped matrices. Clients of
weight zero are removed here, on the host, and their data is never read; where a batch mixes zero patterns, its matrices are
split into *parts* of one pattern each, and `merge` puts the answers back in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Blocks, Factors, Mixed, Stack
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.linalg.arrays import Array, Caller, promote
from fedlora_kernels.linalg.ragged import each_problem
from fedlora_kernels.linalg.weights import host_weights

__all__ = [
    "Matrices",
    "Part",
    "Problem",
    "by_dtype",
    "corner_problems",
    "factor_problems",
    "largest",
    "matrix_problems",
    "merge",
    "mixed_problems",
    "solve",
    "stack_problems",
    "unflatten",
]

G = TypeVar("G")
T = TypeVar("T", bound=tuple[Any, ...])


@dataclass(frozen=True, slots=True)
class Matrices:
    """One plain argument of N equally shaped matrices ``(N, rows, columns)`` per name, for operations without clients."""

    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Part(Generic[G]):
    """Matrices of a problem that share a zero pattern: which ``rows`` (None = all), which ``clients`` are left."""

    rows: Tensor | None
    clients: tuple[int, ...]
    group: G


@dataclass(frozen=True, slots=True)
class Problem(Generic[G]):
    """One problem: its leading dimensions, its clients' ranks, the common dtype of its blocks, and its parts."""

    batch: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype
    sizes: Mapping[str, int]
    parts: tuple[Part[G], ...]


def factor_problems(caller: Caller, B: Any, A: Any, weights: Any, cap: int | None = None) -> list[Problem[Factors]]:
    """Turn (B, A, weights) into problems for a backend; ``cap`` bounds the number of output columns.

    B is ``(..., m, R)`` or client blocks ``(..., m, r_k)``, A is ``(..., R, n)`` or blocks ``(..., r_k, n)``.
    """
    return [
        _factor_problem(caller, where, *values, cap=cap)
        for where, values in each_problem(caller.function, B=B, A=A, weights=weights)
    ]


def stack_problems(caller: Caller, blocks: Any, weights: Any) -> list[Problem[Stack]]:
    """Turn (blocks, weights) into problems for a backend; blocks is ``(..., m, R)`` or client blocks ``(..., m, r_k)``."""
    return [
        _stack_problem(caller, where, *values)
        for where, values in each_problem(caller.function, blocks=blocks, weights=weights)
    ]


def corner_problems(caller: Caller, blocks: Any, weights: Any) -> list[Problem[Blocks]]:
    """Turn (blocks, weights) into problems for a backend; blocks is ``(..., p, q)`` or client blocks ``(..., p_k, q_k)``."""
    return [
        _corner_problem(caller, where, *values)
        for where, values in each_problem(caller.function, blocks=blocks, weights=weights)
    ]


def mixed_problems(caller: Caller, blocks: Any, mixers: Any, left: bool) -> list[Problem[Mixed]]:
    """Turn (blocks, mixers) into problems for a backend; ``left`` turns ``M_k X_k`` into ``X_k^T M_k^T``, without copies."""
    return [
        _mixed_problem(caller, where, *values, left=left)
        for where, values in each_problem(caller.function, blocks=blocks, mixers=mixers)
    ]


def matrix_problems(caller: Caller, cores: Mapping[str, str], **arguments: Any) -> list[Problem[Matrices]]:
    """Turn plain arrays ``(..., rows, columns)`` with equal leading dimensions into problems without clients.

    ``cores`` gives, in the order of the arguments, their names in messages and a letter for rows and columns: equal letters
    are equal sizes.
    """
    return [
        _matrix_problem(caller, where, cores, values) for where, values in each_problem(caller.function, **arguments)
    ]


def _matrix_problem(caller: Caller, where: str, cores: Mapping[str, str], values: Sequence[Array]) -> Problem[Matrices]:
    taken = {name: _take(caller, where, name, array) for name, array in zip(cores, values, strict=True)}
    tensors = list(taken.values())
    batch = _common_batch(where, list(taken), tensors)
    sizes, owner = {"N": math.prod(batch)}, dict[str, str]()
    for name, tensor in taken.items():
        row, column = cores[name][0], cores[name][1]
        core = sizes.setdefault(row, tensor.shape[-2]), sizes.setdefault(column, tensor.shape[-1])
        first, second = owner.setdefault(row, name), owner.setdefault(column, name)
        _require_shape(where, name, tensor, core, first if second == name else second)
    flat = tuple(_flatten(tensor, batch) for tensor in tensors)
    return Problem(batch, (), promote(tensor.dtype for tensor in tensors), sizes, (Part(None, (), Matrices(flat)),))


def _require_shape(where: str, name: str, tensor: Tensor, core: tuple[int, int], like: str) -> None:
    """Raise MismatchError unless ``tensor`` is ``(..., *core)``, which it must be to fit the argument ``like``."""
    if tuple(tensor.shape[-2:]) != core:
        found, needed = tuple(tensor.shape), (*tensor.shape[:-2], *core)
        raise MismatchError(f"{where}{name} has shape {found}; {needed} is needed to fit {like}")


def _factor_problem(caller: Caller, where: str, B: Any, A: Any, weights: Any, *, cap: int | None) -> Problem[Factors]:
    dense = _is_block_list(B), _is_block_list(A)
    if dense[0] != dense[1]:
        raise TypeError(f"{where}one of B and A is a list of client blocks and the other is not; give both alike")
    names_B, blocks_B = _take_blocks(caller, where, "B", B)
    names_A, blocks_A = _take_blocks(caller, where, "A", A)
    if len(blocks_B) != len(blocks_A):
        raise MismatchError(
            f"{where}B has {len(blocks_B)} client blocks and A has {len(blocks_A)}; equal numbers are needed"
        )
    batch = _common_batch(where, names_B + names_A, blocks_B + blocks_A)
    m, n = blocks_B[0].shape[-2], blocks_A[0].shape[-1]
    for name_B, name_A, block_B, block_A in zip(names_B, names_A, blocks_B, blocks_A, strict=True):
        r = block_B.shape[-1]
        _require_shape(where, name_B, block_B, (m, r), names_B[0])
        _require_shape(where, name_A, block_A, (r, n), name_B if block_A.shape[-2] != r else names_A[0])
    ranks = tuple(block.shape[-1] for block in blocks_B)
    p_max = min(m, n, sum(ranks), cap if cap is not None else m)
    flat_B = [_flatten(block, batch) for block in blocks_B]
    flat_A = [_flatten(block, batch) for block in blocks_A]

    def group(rows: Tensor | None, clients: tuple[int, ...], left: Tensor) -> Factors:
        if clients:
            picked_B = tuple(_pick(flat_B[k], rows) for k in clients)
            picked_A = tuple(_pick(flat_A[k], rows) for k in clients)
        else:
            picked_B, picked_A = (_pick(flat_B[0][:, :, :0], rows),), (_pick(flat_A[0][:, :0], rows),)
        return Factors(picked_B, picked_A, left, m, n, p_max)

    parts = _split(host_weights(where, weights, batch, len(ranks)), caller.device, group)
    sizes = {"m": m, "n": n, "R": sum(ranks), "K": len(ranks), "N": math.prod(batch)}
    return Problem(batch, ranks, promote(block.dtype for block in blocks_B + blocks_A), sizes, parts)


def _stack_problem(caller: Caller, where: str, blocks: Any, weights: Any) -> Problem[Stack]:
    names, taken = _take_blocks(caller, where, "blocks", blocks)
    batch = _common_batch(where, names, taken)
    m = taken[0].shape[-2]
    for name, block in zip(names, taken, strict=True):
        _require_shape(where, name, block, (m, block.shape[-1]), names[0])
    ranks = tuple(block.shape[-1] for block in taken)
    flat = [_flatten(block, batch) for block in taken]

    def group(rows: Tensor | None, clients: tuple[int, ...], left: Tensor) -> Stack:
        picked = tuple(_pick(flat[k], rows) for k in clients) or (_pick(flat[0][:, :, :0], rows),)
        return Stack(picked, left, m)

    parts = _split(host_weights(where, weights, batch, len(ranks)), caller.device, group)
    sizes = {"m": m, "R": sum(ranks), "K": len(ranks), "N": math.prod(batch)}
    return Problem(batch, ranks, promote(block.dtype for block in taken), sizes, parts)


def _corner_problem(caller: Caller, where: str, blocks: Any, weights: Any) -> Problem[Blocks]:
    names, taken = _take_blocks(caller, where, "blocks", blocks)
    batch = _common_batch(where, names, taken)
    p, q = (max(block.shape[axis] for block in taken) for axis in (-2, -1))
    flat = [_flatten(block, batch) for block in taken]

    def group(rows: Tensor | None, clients: tuple[int, ...], left: Tensor) -> Blocks:
        picked = tuple(_pick(flat[k], rows) for k in clients) or (_pick(flat[0][:, :0, :0], rows),)
        return Blocks(picked, left, p, q)

    parts = _split(host_weights(where, weights, batch, len(taken)), caller.device, group)
    sizes = {"p": p, "q": q, "K": len(taken), "N": math.prod(batch)}
    return Problem(batch, (), promote(block.dtype for block in taken), sizes, parts)


def _mixed_problem(caller: Caller, where: str, blocks: Any, mixers: Any, *, left: bool) -> Problem[Mixed]:
    names, taken = _take_blocks(caller, where, "blocks", blocks)
    labels, mixing = _take_blocks(caller, where, "mixers", mixers)
    if len(taken) != len(mixing):
        raise MismatchError(f"{where}{len(taken)} blocks and {len(mixing)} mixers; equal numbers are needed")
    batch = _common_batch(where, names + labels, taken + mixing)
    outer, inner = (-1, -2) if left else (-2, -1)
    p, q = taken[0].shape[outer], mixing[0].shape[inner]
    for name, label, block, mixer in zip(names, labels, taken, mixing, strict=True):
        r = block.shape[inner]
        _require_shape(where, name, block, (r, p) if left else (p, r), names[0])
        like = name if mixer.shape[outer] != r else labels[0]
        _require_shape(where, label, mixer, (q, r) if left else (r, q), like)
    flat = [_flatten(tensor, batch) for tensor in taken + mixing]
    flat = [tensor.mT for tensor in flat] if left else flat
    mixers64 = tuple(tensor.to(torch.float64) for tensor in flat[len(taken) :])
    sizes = {"p": p, "q": q, "K": len(taken), "N": math.prod(batch)}
    group = Mixed(tuple(flat[: len(taken)]), mixers64)
    return Problem(batch, (), promote(block.dtype for block in taken), sizes, (Part(None, (), group),))


def _split(
    weights: Tensor, device: torch.device, group: Callable[[Tensor | None, tuple[int, ...], Tensor], G]
) -> tuple[Part[G], ...]:
    """One part per zero pattern. Where no client is left, one block without columns stands in: it carries dtype and device."""
    live = weights != 0.0
    if bool(live.all()):
        clients = tuple(range(weights.shape[1]))
        return (Part(None, clients, group(None, clients, weights)),)
    patterns, member = torch.unique(live, dim=0, return_inverse=True)
    parts = []
    for number, pattern in enumerate(patterns.tolist()):
        clients = tuple(k for k, alive in enumerate(pattern) if alive)
        rows = None if len(patterns) == 1 else (member == number).nonzero()[:, 0]
        left = weights if rows is None else weights[rows]
        left = left[:, list(clients)] if clients else torch.ones(len(left), 1, dtype=torch.float64)
        rows = None if rows is None else rows.to(device, non_blocking=True)
        parts.append(Part(rows, clients, group(rows, clients, left.contiguous())))
    return tuple(parts)


def solve(
    problems: Sequence[Problem[G]],
    call: Callable[[list[G]], Sequence[T]],
    widen: Callable[[Problem[G], Part[G], T], T] | None = None,
) -> list[T]:
    """Hand all groups to a backend in one call and return one raw record per problem; ``widen`` puts back removed clients."""
    raws = iter(call([part.group for problem in problems for part in problem.parts]))
    answers = []
    for problem in problems:
        pieces = [next(raws) for _ in problem.parts]
        if widen is not None:
            pieces = [widen(problem, part, piece) for part, piece in zip(problem.parts, pieces, strict=True)]
        answers.append(merge(problem, pieces))
    return answers


def by_dtype(
    problems: Sequence[Problem[G]],
    dtypes: Sequence[torch.dtype],
    call: Callable[[torch.dtype], Callable[[list[G]], Sequence[T]]],
) -> list[T]:
    """Solve together what is answered in one dtype; one raw record per problem, in their order."""
    raws: dict[int, T] = {}
    for dtype in dict.fromkeys(dtypes):
        members = [i for i, own in enumerate(dtypes) if own == dtype]
        raws.update(zip(members, solve([problems[i] for i in members], call(dtype)), strict=True))
    return [raws[i] for i in range(len(problems))]


def largest(problems: Sequence[Problem[Any]]) -> dict[str, int]:
    """Return the largest sizes among problems, as `Backend.serves` is asked with them."""
    return {key: max(problem.sizes[key] for problem in problems) for key in problems[0].sizes}


def unflatten(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Return ``(N, ...)`` with its leading dimension as the caller gave it."""
    return tensor if len(batch) == 1 else tensor.reshape(batch + tensor.shape[1:])


def merge(problem: Problem[G], pieces: Sequence[T]) -> T:
    """Join the raw records of the parts of a problem into one, every matrix at its place."""
    if problem.parts[0].rows is None:
        return pieces[0]
    count = math.prod(problem.batch)
    joined: list[Tensor | None] = []
    for fields in zip(*pieces, strict=True):
        if fields[0] is None:
            joined.append(None)
            continue
        whole = fields[0].new_empty((count, *fields[0].shape[1:]))
        for part, field in zip(problem.parts, fields, strict=True):
            whole[part.rows] = field
        joined.append(whole)
    kind: Any = type(pieces[0])
    answer: T = kind._make(joined) if hasattr(kind, "_make") else kind(joined)
    return answer


def _is_block_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _take_blocks(caller: Caller, where: str, name: str, value: Any) -> tuple[list[str], list[Tensor]]:
    if not _is_block_list(value):
        return [name], [_take(caller, where, name, value)]
    if not value:
        raise InputError(
            f"{where}{name} is an empty list, which leaves the shape unknown; at least one client block is needed"
        )
    names = [f"{name}[{k}]" for k in range(len(value))]
    return names, [_take(caller, where, label, block) for label, block in zip(names, value, strict=True)]


def _take(caller: Caller, where: str, name: str, array: Array) -> Tensor:
    prefix = where.removeprefix(f"{caller.function}: ")
    tensor = caller.take(f"{prefix}{name}", array)
    if tensor.dim() < 2:
        raise MismatchError(f"{where}{name} has shape {tuple(tensor.shape)}; at least two dimensions are needed")
    return tensor


def _common_batch(where: str, names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[int, ...]:
    batch = tuple(tensors[0].shape[:-2])
    for name, tensor in zip(names, tensors, strict=True):
        if tuple(tensor.shape[:-2]) != batch:
            needed = (
                f"leading dimensions {batch}, those of {names[0]},"
                if batch
                else f"no leading dimensions, as {names[0]},"
            )
            raise MismatchError(
                f"{where}{name} has shape {tuple(tensor.shape)}; {needed} are needed. Use expand to repeat one"
            )
    return batch


def _flatten(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    return tensor if len(batch) == 1 else tensor.reshape(math.prod(batch), *tensor.shape[-2:])


def _pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)
