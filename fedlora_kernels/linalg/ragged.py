"""Batches of problems of different shapes, and the walk over the problems of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fedlora_kernels.errors import MismatchError

__all__ = ["Ragged", "each_problem"]


class Ragged(Sequence[Any]):
    """A batch of problems of different shapes, answered by a list in the same order.

    Each problem is what the call takes otherwise: an array, or a list of client blocks. All arguments of a call are ragged
    together; ``weights`` may be `Ragged` (one entry per problem) or one array that serves every problem.
    """

    def __init__(self, problems: Sequence[Any]) -> None:
        if not isinstance(problems, (list, tuple)):
            raise TypeError(f"Ragged takes a list of problems, not {type(problems).__name__}")
        if any(isinstance(problem, Ragged) for problem in problems):
            raise TypeError("Ragged takes problems, not further Ragged batches")
        self._problems = tuple(problems)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: Any) -> Any:
        return self._problems[index]

    def __repr__(self) -> str:
        return f"Ragged(<{len(self)} problems>)"


class _Argument(NamedTuple):
    """One problem of a call: how its messages start, and its argument values."""

    where: str
    values: tuple[Any, ...]


def each_problem(function: str, shared: tuple[str, ...] = ("weights",), **arguments: Any) -> Iterator[_Argument]:
    """Walk the problems of a call. Arguments are all Ragged of one length, or none is; None and ``shared`` ones may stay plain."""
    ragged = {name: value for name, value in arguments.items() if isinstance(value, Ragged)}
    if not ragged:
        yield _Argument(f"{function}: ", tuple(arguments.values()))
        return
    plain = [
        name for name, value in arguments.items() if name not in ragged and name not in shared and value is not None
    ]
    if plain:
        raise TypeError(
            f"{function}: {next(iter(ragged))} is Ragged and {plain[0]} is not; wrap both in Ragged or none"
        )
    lengths = {name: len(value) for name, value in ragged.items()}
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name} holds {count}" for name, count in lengths.items())
        raise MismatchError(f"{function}: {listing} problems; equal numbers are needed")
    for index in range(next(iter(lengths.values()))):
        values = tuple(value[index] if name in ragged else value for name, value in arguments.items())
        yield _Argument(f"{function}: problem {index}: ", values)
