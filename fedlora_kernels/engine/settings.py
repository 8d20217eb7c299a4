"""The arguments of an aggregation, checked before anything is read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.engine.output import REPORT_NAME
from fedlora_kernels.engine.result import Result, State
from fedlora_kernels.errors import BackendError, InputError
from fedlora_kernels.linalg.rules import RankRule, parse_size
from fedlora_kernels.methods.contract import Method, make_method

__all__ = [
    "Progress",
    "Settings",
    "count_of",
    "device_of",
    "dtype_of",
    "memory_of",
    "method_of",
    "options_of",
    "round_of",
]

Progress = Callable[[str, int, int], None]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MEMORY = 1 << 30
Options = TypeVar("Options", ReadOptions, WriteOptions)


@dataclass(frozen=True)
class Settings:
    """The arguments of `aggregate`, checked."""

    method: Method
    policy: Policy
    read: ReadOptions
    write: WriteOptions
    normalize: bool
    dtype: torch.dtype | None
    device: torch.device
    backend: str
    memory: int
    seed: int
    round: int
    progress: Progress


def method_of(method: str | Method, rule: RankRule | None, write: WriteOptions, options: Mapping[str, Any]) -> Method:
    """The method, with its rule and options, and the place of the singular values that the output asks for."""
    made = _made(method, rule, options)
    if made.gives != ("common",) or made.needs_previous:
        raise InputError(
            f"method {made.name!r} gives more or other than one common pair, or needs the pair of the round before; not in this "
            "version"
        )
    if isinstance(method, Method) or "output" in options or write.output == "left":
        return made
    if not hasattr(made, "output"):
        raise InputError(
            f"WriteOptions(output={write.output!r}): method {method!r} has no singular values to place; leave it out"
        )
    return dataclasses.replace(made, output=write.output)  # type: ignore[call-arg]


def _made(method: str | Method, rule: RankRule | None, options: Mapping[str, Any]) -> Method:
    if isinstance(method, Method):
        if rule is not None or options:
            raise InputError(
                f"method is of type {type(method).__name__} already; give its options to it, not to aggregate"
            )
        return method
    if not isinstance(method, str):
        raise InputError(f"method is of type {type(method).__name__}; a method's name needed, such as 'florist'")
    return make_method(method, options, rule)


def options_of(name: str, value: Any, kind: type[Options]) -> Options:
    """A record of options; its defaults where None. InputError for anything else."""
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{name} is of type {type(value).__name__}; {kind.__name__}(...) needed")
    return kind() if value is None else value


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of the answer; None leaves it to the clients."""
    made = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if made is not None and made not in DTYPES:
        listing = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise InputError(f"dtype is {dtype!r}; one of {listing} needed")
    return made


def device_of(device: str | torch.device | None, backend: str) -> torch.device:
    """Where to compute: what is asked, else the GPU if there is one that the backend can use."""
    if device is None:
        on_gpu = torch.cuda.is_available() and backend in ("auto", "cuda", "triton", "torch")
        return torch.device("cuda" if on_gpu else "cpu")
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}; 'cpu' or 'cuda' needed") from error
    if made.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {device!r}: torch {torch.__version__} finds no GPU here. Use device='cpu'")
    if made.type not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; 'cpu' or 'cuda' needed")
    return made


def memory_of(memory: int | str | None) -> int:
    """Bytes for data in flight."""
    if memory is None:
        return MEMORY
    try:
        return parse_size(memory)
    except ValueError as error:
        raise InputError(f"memory: {error}") from None


def count_of(name: str, value: int) -> int:
    """An integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name} is {value!r}; an integer of at least 0 needed")
    return value


def round_of(value: int | None, previous: Any) -> int:
    """The 0-based round: as given, else the one after ``previous``, else 0."""
    if value is not None:
        return count_of("round", value)
    return 0 if previous is None else _known_round(previous) + 1


def _known_round(previous: Any) -> int:
    if isinstance(previous, Result):
        return previous.state.round
    if isinstance(previous, State):
        return previous.round
    if isinstance(previous, Adapter):
        found: Any = previous.metadata.get("fedlora.round")
    elif isinstance(previous, str) and not previous:
        raise InputError("previous is an empty path; an output folder needed")
    elif isinstance(previous, (str, os.PathLike)):
        found = _reported(Path(previous))
    else:
        kind = type(previous).__name__
        raise InputError(f"previous is of type {kind}; an output folder, an Adapter, a Result or a State needed")
    try:
        return count_of("round", int(found))
    except (TypeError, ValueError):
        where = printable(getattr(previous, "label", previous))
        raise InputError(f"previous {where} does not say its round; give round=, counted from 0") from None


def _reported(folder: Path) -> Any:
    try:
        with open(folder / REPORT_NAME, encoding="utf-8") as file:
            report = json.load(file)
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError:
        reason = "it is no JSON"
    else:
        return report.get("round") if isinstance(report, dict) else None
    raise InputError(
        f"previous {printable(folder)}: {REPORT_NAME} cannot be read: {reason}; an output folder needed, or give round="
    )
