"""The frame of a kernel call: choose a backend, let it work, look for trouble, answer in the caller's framework."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import Backend
from fedlora_kernels.linalg.arrays import Caller, promote
from fedlora_kernels.linalg.blocks import Problem, largest, unflatten
from fedlora_kernels.linalg.ragged import Ragged
from fedlora_kernels.linalg.results import Where, place, raise_for_info

__all__ = ["run"]

T = TypeVar("T", bound=tuple[Any, ...])


def _verify(where: Where, raws: Sequence[Any]) -> None:
    raise_for_info(where, [raw.info for raw in raws])


def run(
    caller: Caller,
    problems: Sequence[Problem[Any]],
    work: Callable[[Backend], Sequence[T]],
    answer: Callable[..., Any],
    *,
    like: Any,
    backend: str,
    check: bool,
    verify: Callable[[Where, Sequence[T]], None] = _verify,
) -> Any:
    """Let a backend ``work`` on all problems of a call, one raw record each, and ``verify`` them if asked to ``check``.

    ``answer`` takes the fields of a record as the caller's arrays. The call answers a list if its argument ``like`` is `Ragged`.
    """
    if not problems:
        return []
    dtype = promote(problem.dtype for problem in problems)
    raws = work(backends.choose(caller.function, backend, dtype, caller.device, largest(problems)))
    batches = [problem.batch for problem in problems]
    ragged = isinstance(like, Ragged)
    if check:
        verify(functools.partial(place, caller.function, batches, ragged), raws)
    answers = [
        answer(*[None if field is None else caller.give(unflatten(field, batch)) for field in raw])
        for batch, raw in zip(batches, raws, strict=True)
    ]
    return answers if ragged else answers[0]
