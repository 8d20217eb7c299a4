"""One call of the kernel API on a batch of generated cases, and how its answer is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedlora_kernels.testing import Check

__all__ = ["DTYPES", "LAPACK", "Call", "Form", "Verdict", "name_of", "row_of", "size_class", "to_device"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LAPACK = frozenset({"torch", "reference"})
"""Backends whose float64 core SVD is a library's."""

T = TypeVar("T")


class Form(NamedTuple):
    """How much to run: ``full`` takes the complete sets of generators and sizes; ``seed`` shifts every one of them."""

    full: bool
    seed: int


class Verdict(NamedTuple):
    """Checks of one case, and what the answer says of the route that it took (empty: the regime of the call)."""

    case: str
    checks: list[Check]
    regime: str = ""
    variant: str = ""


@dataclass(frozen=True)
class Call:
    """Cases of one shape, dtype and regime, run as one batch.

    ``run`` takes the name of a backend and a device, ``judge`` the answer on the CPU and the name of the backend that gave it.
    ``left_out`` are cases that this dtype cannot hold. ``sizes`` are those that `Backend.serves` is asked with.
    """

    op: str
    regime: str
    dtype: torch.dtype
    sizes: Mapping[str, int]
    cases: tuple[str, ...]
    run: Callable[[str, torch.device], Any]
    judge: Callable[[str, Any], Iterable[Verdict]]
    left_out: tuple[str, ...] = field(default=())


Calls = Callable[[Form], Iterator[Call]]


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name without torch's prefix."""
    return str(dtype).removeprefix("torch.")


def to_device(value: T, device: torch.device) -> T:
    """Tensors, and lists, tuples and dataclasses of them, on a device; everything else as it is."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device)
    elif isinstance(value, (list, tuple)):
        items = [to_device(item, device) for item in value]
        moved = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_device(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        moved = dataclasses.replace(value, **fields)
    result: T = moved
    return result


def row_of(value: T, i: int) -> T:
    """Matrix i of a batched result: index i of every tensor in it."""
    row: Any = value
    if isinstance(value, Tensor):
        row = value[i]
    elif isinstance(value, tuple):
        row = tuple(row_of(item, i) for item in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        row = dataclasses.replace(
            value, **{f.name: row_of(getattr(value, f.name), i) for f in dataclasses.fields(value)}
        )
    result: T = row
    return result


def size_class(letter: str, size: int, bounds: Iterable[int]) -> str:
    """The range of sizes that ``size`` falls into, such as ``r 17..32``; ``bounds`` are the last sizes of all ranges but one."""
    low = 1
    for high in bounds:
        if size <= high:
            return f"{letter} {low}..{high}" if low < high else f"{letter} {high}"
        low = high + 1
    return f"{letter} >= {low}"
