"""What a round leaves for the next: the pair that was broadcast, and what a method remembers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.expert_check import expert_misfits
from fedlora_kernels.adapters.model import Adapter, ModuleSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import WRITTEN_HERE
from fedlora_kernels.adapters.reader import CONFIG_NAME, WEIGHTS_NAME, StateDict, open_adapter
from fedlora_kernels.adapters.safetensors import SafetensorsFile
from fedlora_kernels.adapters.safetensors_writer import SafetensorsWriter
from fedlora_kernels.errors import FormatError, InputError, MismatchError
from fedlora_kernels.methods.contract import Memory, Method

__all__ = [
    "REPORT_NAME",
    "STATE_NAME",
    "State",
    "StateWriter",
    "check_experts",
    "check_modules",
    "check_pair",
    "check_state",
    "previous_state",
]

REPORT_NAME = "report.json"
STATE_NAME = "fedlora_state.safetensors"
MEMORY = "memory:"
"""Before the names of model-wide tensors in a state file, without a dot; those of modules are ``<module>.<name>``, with one."""
FACT = "fedlora.memory."
HEADER_SHARE = 4096
"""Bytes of header kept free for the tensors of one module."""


@dataclass(frozen=True)
class State:
    """What a later round needs: the method, its 0-based round, and what that method remembers.

    ``adapter`` is the common pair as broadcast; ``tensors`` are the method's own, keyed ``<module>.<name>``, and ``memory`` is
    what it keeps of the whole model.
    """

    method: str
    round: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Memory | None = None
    adapter: Adapter | None = field(default=None, compare=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> State:
        """Read the state of an output folder; tensors stay in their files until they are asked for.

        Raises InputError where the folder holds no report of an aggregation, FormatError for a broken state file.
        """
        path = Path(folder)
        method, number = _reported(path)
        held = (path / CONFIG_NAME).exists() or (path / WEIGHTS_NAME).exists()
        adapter = open_adapter(path, WRITTEN_HERE) if held else None
        if not (path / STATE_NAME).exists():
            return cls(method, number, adapter=adapter)
        file = SafetensorsFile(path / STATE_NAME)
        if (found := file.metadata.get("fedlora.method")) != method:
            raise FormatError(
                f"{printable(path / STATE_NAME)}: of method {printable(found)!r}, but {REPORT_NAME} says {printable(method)!r}"
            )
        if (found := file.metadata.get("fedlora.round")) != str(number):
            raise FormatError(
                f"{printable(path / STATE_NAME)}: of round {printable(found)}, but {REPORT_NAME} says {number}"
            )
        return cls(method, number, _Lazy(file), _memory(file), adapter)

    def of_module(self, module: str) -> dict[str, Tensor]:
        """The method's tensors of one module, by name."""
        start = f"{module}."
        return {key[len(start) :]: self.tensors[key] for key in self._names.get(module, ()) if key.startswith(start)}

    def check_unchanged(self) -> None:
        """Raise FormatError where a file of it was written into since it was opened."""
        try:
            if self.adapter is not None:
                self.adapter.source.check_unchanged()
            if isinstance(self.tensors, _Lazy):
                self.tensors.check_unchanged()
        except FormatError as error:
            raise FormatError(f"previous: {error}") from None

    def fingerprint(self) -> str:
        """Text that differs for any other state."""
        tensors = self.tensors
        memory = StateDict({} if self.memory is None else self.memory.tensors).fingerprint()
        parts = {
            "method": self.method,
            "round": self.round,
            "adapter": None if self.adapter is None else [self.adapter.source.fingerprint(), dict(self.adapter.config)],
            "tensors": (tensors if isinstance(tensors, _Lazy) else StateDict(tensors)).fingerprint(),
            "memory": [memory, {} if self.memory is None else dict(self.memory.facts)],
        }
        return json.dumps(parts, sort_keys=True, default=repr)

    @property
    def _names(self) -> Mapping[str, Sequence[str]]:
        names: dict[str, list[str]] | None = self.__dict__.get("_by_module")
        if names is None:
            names = {}
            for key in self.tensors:
                names.setdefault(key.rpartition(".")[0], []).append(key)
            object.__setattr__(self, "_by_module", names)
        return names


class _Lazy(Mapping[str, Tensor]):
    """The tensors of modules in a state file, read when asked for."""

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file
        self._keys = [key for key in file.tensors if not _is_memory(key)]

    def __getitem__(self, key: str) -> Tensor:
        return self._file.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def fingerprint(self) -> str:
        return self._file.fingerprint()

    def check_unchanged(self) -> None:
        self._file.check_unchanged()


class StateWriter(SafetensorsWriter):
    """A state file written module by module."""

    def __init__(
        self,
        path: Path,
        method: str,
        round: int,  # noqa: A002
        modules: int,
        marks: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        metadata = {"fedlora.version": __version__, "fedlora.method": method, "fedlora.round": str(round)}
        super().__init__(path, {}, metadata, spare=(1 << 20) + HEADER_SHARE * modules, marks=marks)

    def add_module(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Append what the method keeps of one module."""
        for name, tensor in tensors.items():
            self._append(f"{module}.{name}", tensor)

    def finish(self, memory: Memory | None) -> None:
        """Append what the method remembers of the model, and close."""
        facts: Mapping[str, str] = {} if memory is None else memory.facts
        for name, tensor in ({} if memory is None else memory.tensors).items():
            self._append(f"{MEMORY}{name}", tensor)
        self.close({f"{FACT}{name}": text for name, text in facts.items()})

    def _append(self, key: str, tensor: Tensor) -> None:
        self.announce(key, tensor.dtype, tuple(tensor.shape))
        self.add(key, tensor)


def previous_state(previous: Any) -> State | None:
    """The state that ``previous`` stands for: an output folder or file, an Adapter, a State, or anything with a ``state``."""
    if previous is None or isinstance(previous, State):
        return previous
    if isinstance(state := getattr(previous, "state", None), State):
        return state
    if isinstance(previous, Adapter):
        found = re.fullmatch("[0-9]{1,18}", previous.metadata.get("fedlora.round", ""))
        return State(previous.metadata.get("fedlora.method", ""), int(found[0]) if found else -1, adapter=previous)
    if isinstance(previous, str) and not previous:
        raise InputError("previous is an empty path; an output folder needed")
    if isinstance(previous, (str, os.PathLike)) and os.path.isfile(previous):
        return previous_state(open_adapter(previous, WRITTEN_HERE))
    if isinstance(previous, (str, os.PathLike)):
        return State.load(previous)
    kind = type(previous).__name__
    raise InputError(f"previous is of type {kind}; an output folder, an Adapter, a Result or a State needed")


def check_state(state: State | None, method: Method, round: int) -> State | None:  # noqa: A002
    """The state as far as ``method`` reads it, None where it does not.

    Raises InputError where the method cannot go on without, or where the state is another method's or holds nothing.
    """
    if method.reads_previous is None or (method.needs_previous and round == 0):  # such a method starts anew in round 0
        return None
    if state is None:
        if method.needs_previous:
            raise InputError(
                f"method {method.name!r} in round {round} needs previous=, the result of the round before; without one "
                "start with round=0"
            )
        return None
    if state.method not in ("", method.name):
        raise InputError(
            f"previous is a result of method {printable(state.method)!r}; method {method.name!r} needs one of its own"
        )
    held = state.adapter is not None if method.reads_previous == "pair" else state.memory is not None
    if not held:
        what = "common adapter" if method.reads_previous == "pair" else STATE_NAME
        raise InputError(
            f"previous holds no {what}, which method {method.name!r} needs; give the whole output of round {state.round}"
        )
    return state


def check_pair(state: State, method: Method, modules: Mapping[str, ModuleSpec]) -> None:
    """Raise MismatchError where the pair of the round before does not fit the modules of this one."""
    adapter = state.adapter
    for name, module in modules.items() if adapter is not None else ():
        spec = adapter.modules.get(name) if adapter is not None else None
        if spec is None and method.needs_previous:
            raise MismatchError(
                f"module {printable(name)!r}: not in previous; method {method.name!r} needs every module. Keep zero modules "
                "(drop_zero=False) and the set of modules from round to round"
            )
        if spec is not None and spec.signature != module.signature:
            raise MismatchError(
                f"module {printable(name)!r}: {module.shape_text} in the clients, {spec.shape_text} in previous; one shape needed"
            )


def check_experts(state: State, name: str, client: Adapter) -> None:
    """Raise MismatchError where the experts of a client, which those of all others fit, do not fit those of the round before."""
    adapters = {} if state.adapter is None else {"previous": state.adapter, name: client}
    for misfit in expert_misfits(adapters) if len(adapters) == 2 else ():
        raise MismatchError(f"client {printable(misfit.client)!r}, {misfit.where}: {misfit.text}")


def check_modules(state: State, method: Method, modules: Sequence[str]) -> None:
    """Raise MismatchError where the method kept nothing of a module."""
    for name in modules:
        if not state.of_module(name):
            raise MismatchError(
                f"module {printable(name)!r}: not in the state of round {state.round}; method {method.name!r} needs the same "
                "modules in every round"
            )


def _is_memory(key: str) -> bool:
    # a client may name a module as it likes
    return key.startswith(MEMORY) and "." not in key


def _memory(file: SafetensorsFile) -> Memory:
    tensors = {key[len(MEMORY) :]: file.read(key) for key in file.tensors if _is_memory(key)}
    facts = {key[len(FACT) :]: text for key, text in file.metadata.items() if key.startswith(FACT)}
    return Memory(tensors, facts)


def _reported(folder: Path) -> tuple[str, int]:
    where = f"previous {printable(folder)}"
    try:
        with open(folder / REPORT_NAME, encoding="utf-8") as file:
            report = json.load(file)
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError):
        reason = "it is no JSON"
    else:
        number = report.get("round") if isinstance(report, dict) else None
        method = report.get("method") if isinstance(report, dict) else None
        name = method.get("name") if isinstance(method, dict) else None
        if not isinstance(name, str) or type(number) is not int or number < 0:
            raise InputError(f"{where}: {REPORT_NAME} does not say its method and round; an output folder needed")
        return name, number
    raise InputError(
        f"{where}: {REPORT_NAME} cannot be read: {reason}; an output folder needed, or an Adapter and round="
    )
