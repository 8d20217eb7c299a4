"""Everything a run hands over: the common adapter, one per client, the residual and the state, all or nothing.

On disc: ``OUT/`` itself, ``OUT/clients/<name>/``, ``OUT/residual/``, ``OUT/fedlora_state.safetensors`` and ``OUT/report.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.config import peft_config
from fedlora_kernels.adapters.folder import OutputFolder
from fedlora_kernels.adapters.forms import spelled, written_numbers
from fedlora_kernels.adapters.inits import KEEPS_ALPHA, check_kept_rank, kept_init
from fedlora_kernels.adapters.kohya import FILE_SUFFIX
from fedlora_kernels.adapters.kohya_metadata import kept_metadata
from fedlora_kernels.adapters.model import Adapter, ExtraSpec
from fedlora_kernels.adapters.names import path_name
from fedlora_kernels.adapters.options import WriteOptions
from fedlora_kernels.adapters.reader import WEIGHTS_NAME
from fedlora_kernels.adapters.safetensors import disc_errors
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.journal import Journal
from fedlora_kernels.engine.output import FolderOutput, MemoryOutput, Output, resize_pair
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.engine.state import REPORT_NAME, STATE_NAME, State, StateWriter
from fedlora_kernels.errors import InputError
from fedlora_kernels.methods.contract import Memory

__all__ = ["Delivered", "Delivery", "ModuleOutput", "client_folders", "folder_names", "write_report"]


@dataclass
class ModuleOutput:
    """What one module leaves: its common pair, a pair of each client by its number in the cohort, residual and state.

    ``spectrum`` are the singular values of the common pair, where the method knows them.
    """

    name: str
    common: tuple[Tensor, Tensor] | None = None
    personal: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    residual: tuple[Tensor, Tensor] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    spectrum: Sequence[float] | None = None


@dataclass(frozen=True)
class Delivered:
    """What was handed over; ``clients`` by name."""

    adapter: Adapter | None
    clients: Mapping[str, Adapter]
    residual: Adapter | None
    state: State


def client_folders(names: Sequence[str]) -> list[str]:
    """A folder for each client within the output: its name reduced to harmless characters, and no two alike on any file system.

    A kohya file's name goes without its ending, which would promise a file.
    """
    return [
        os.path.join("clients", folder) for folder in folder_names([name.removesuffix(FILE_SUFFIX) for name in names])
    ]


def folder_names(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """A folder's name for each of ``names``, as `client_folders` makes them; none of ``taken``."""
    folders: list[str] = []
    used = {name.lower() for name in taken}
    for name in names:
        base = path_name(name)
        folder, number = base, 2
        while folder.lower() in used:
            folder, number = f"{base[:120]}-{number}", number + 1
        used.add(folder.lower())
        folders.append(folder)
    return folders


class Delivery:
    """Where the modules of a run go, in canonical order; `finish` completes the tensors, `commit` puts everything in place."""

    def __init__(
        self,
        settings: Settings,
        cohort: Cohort,
        extras: Mapping[str, ExtraSpec],
        dtype: torch.dtype,
        metadata: Mapping[str, str],
        folder: OutputFolder | None,
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal
        self._settings, self._cohort, self._extras, self._dtype = settings, cohort, extras, dtype
        self._metadata, self._folder = dict(metadata), folder
        self._init = kept_init(cohort.adapters[0].config)
        method = settings.method
        self._gives_state = "state" in method.gives
        # on disc as asked; in memory what for_client cannot make from the common pair
        self.personal = settings.per_client if folder is not None else "personal" in method.gives
        self._outputs: dict[str, Output] = {}
        self._places = client_folders([client.name for client in cohort.clients])
        self._tensors: dict[str, Tensor] = {}
        self._state: StateWriter | None = None
        self._memory: Memory | None = None
        if self._gives_state and folder is not None:
            path, marks = Path(folder.path) / STATE_NAME, None if journal is None else journal.marks(STATE_NAME)
            self._state = StateWriter(path, method.name, settings.round, len(cohort.modules), marks)
        try:
            for place in () if journal is None else journal.places(WEIGHTS_NAME):
                self._output(place)
        except BaseException:
            self.abandon()
            raise

    def mark(self) -> dict[str, dict[str, Any]] | None:
        """What was added to each file since the last mark, durable, by its path within the output; None while pairs are held back."""
        if any(output.holds for output in self._outputs.values()):
            return None
        writers: dict[str, Output | StateWriter] = {
            os.path.join(place, WEIGHTS_NAME): output for place, output in self._outputs.items()
        }
        if self._state is not None:
            writers[STATE_NAME] = self._state
        marks = {path: writer.mark() for path, writer in writers.items()}
        return {path: mark for path, mark in marks.items() if mark is not None}

    def add(self, modules: Sequence[ModuleOutput]) -> None:
        """Take what some modules leave."""
        for module in modules:
            self._keep_init(module)
            self._add_common(module)
            self._add_clients(module)
            if module.residual is not None:
                self._output("residual").add_pairs([(module.name, *module.residual)])
            if self._state is not None:
                self._state.add_module(module.name, module.state)
            else:
                self._tensors.update({f"{module.name}.{name}": tensor for name, tensor in module.state.items()})

    def add_extra(self, name: str, tensor: Tensor, client: int | None = None) -> None:
        """Take a tensor that is no factor, for everybody or for one client."""
        if client is not None:
            if self.personal:
                self._output(self._places[client]).add_extra(name, tensor)
            return
        if "common" in self._settings.method.gives:
            self._output("").add_extra(name, tensor)
        if self.personal:
            for k, adapter in enumerate(self._cohort.adapters):
                if name in adapter.extras:
                    self._output(self._places[k]).add_extra(name, tensor)

    def finish(self, kept: Mapping[str, ExtraSpec], metadata: Mapping[str, str], memory: Memory | None) -> None:
        """Complete all tensors. ``kept`` are the extras that were added; ``metadata`` goes with the common adapter."""
        self._memory = memory
        if "common" in self._settings.method.gives:
            self._output("")  # an output without modules is refused below
        elif not self._outputs.keys() - {"residual"}:
            raise InputError("no modules to write; every module was zero or left out")
        for place, output in self._outputs.items():
            owners, extras = self._cohort.adapters, kept
            if place in self._places:
                owner = self._cohort.adapters[self._places.index(place)]
                owners, extras = [owner], {name: spec for name, spec in kept.items() if name in owner.extras}
            config = peft_config(owners, output.ranks, {} if place == "residual" else extras)
            output.finish(config, metadata if place == "" else {})
        if self._state is not None:
            self._state.finish(memory)

    def commit(self, report: Mapping[str, Any]) -> Delivered:
        """Write the report, put the folder in place, and open what was handed over."""
        folder = self._folder
        if folder is not None:
            write_report(Path(folder.path) / REPORT_NAME, report)
            if self._journal is not None:
                self._journal.finish()
            folder.commit()
        out = None if folder is None else Path(folder.out)
        opened = {place: output.open(out and out / place) for place, output in self._outputs.items()}
        names = [client.name for client in self._cohort.clients]
        clients = {name: opened[place] for name, place in zip(names, self._places, strict=True) if place in opened}
        return Delivered(opened.get(""), clients, opened.get("residual"), self._next_state(out, opened.get("")))

    def place(self, k: int) -> str | None:
        """The folder of client k within the output; None where it has none."""
        return self._places[k] if self._folder is not None and self._places[k] in self._outputs else None

    def abandon(self) -> None:
        """Close all files; the output folder's own context removes them."""
        for output in self._outputs.values():
            output.abandon()
        if self._state is not None:
            self._state.abandon()

    @property
    def parameters(self) -> int:
        """Numbers in the factors of the common adapter; where there is none, of the largest personal one."""
        counts = {place: self._count(output) for place, output in self._outputs.items() if place != "residual"}
        return counts.get("", max(counts.values(), default=0))

    def _count(self, output: Output) -> int:
        ranks = output.ranks
        largest = max(ranks.values(), default=0) if self._settings.write.pads else None
        return sum(written_numbers(self._cohort.spec(name)) * (largest or rank) for name, rank in ranks.items())

    def _keep_init(self, module: ModuleOutput) -> None:
        """Bring a common pair to the clients' rank, and to their scale if need be, where they keep their initialisation."""
        if self._init is None or module.common is None:
            return
        B, A = module.common
        own = self._cohort.spec(module.name)
        check_kept_rank(own, max(own.rank, A.shape[0]), self._init)
        if A.shape[0] < own.rank:
            settings = self._settings
            B, A = resize_pair(
                B, A, own.rank, seed=settings.seed, round=settings.round, module=module.name, fill=settings.write.fill
            )
        if self._init == KEEPS_ALPHA:
            B = (B.to(torch.float64) / own.scale).to(B.dtype)
        module.common = B, A

    def _add_common(self, module: ModuleOutput) -> None:
        if module.common is not None:
            self._output("").add_pairs([(module.name, *module.common)])

    def _add_clients(self, module: ModuleOutput) -> None:
        if not self.personal:
            return
        for k, pair in module.personal.items():
            self._output(self._places[k]).add_pairs([(module.name, *pair)])
        if "personal" not in self._settings.method.gives and module.common is not None:
            for k in self._owners(module.name):
                self._output(self._places[k]).add_pairs(
                    [(module.name, *self._for_client(k, module.name, *module.common))]
                )

    def _owners(self, module: str) -> list[int]:
        return [k for k, adapter in enumerate(self._cohort.adapters) if module in adapter.modules]

    def _for_client(self, k: int, module: str, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        method, spec = self._settings.method, self._cohort.adapters[k].modules[module]
        rank = method.client_rank(method.own_rank(spec.trained, spec.rank), A.shape[0])
        if rank <= A.shape[0]:
            # views: many clients hold on to parts of one pair
            return B[:, :rank], A[:rank]
        return resize_pair(B, A, rank, seed=self._settings.seed, round=self._settings.round, module=module)

    def _output(self, place: str) -> Output:
        if place not in self._outputs:
            self._outputs[place] = self._made(place)
        return self._outputs[place]

    def _made(self, place: str) -> Output:
        settings = self._settings
        # what is merged into a base weight, or loaded by one client, needs no padding to a common rank but that client's
        write = WriteOptions() if place == "residual" else settings.write
        modules = spelled({name: self._cohort.spec(name) for name in self._cohort.modules}, self._spelling)
        metadata = self._metadata
        if self._spelling is not None:
            metadata = {**kept_metadata(self._origin(place).metadata, self._comment()), **metadata}
        extras = {} if place == "residual" else self._extras
        if self._folder is None:
            return MemoryOutput(place or "aggregate", modules, extras, metadata, write, settings.seed, settings.round)
        folder = Path(self._folder.path) / place
        with disc_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = os.path.join(place, WEIGHTS_NAME)
        marks, aside = (None, None) if self._journal is None else (self._journal.marks(path), self._journal.aside(path))
        return FolderOutput(
            folder, modules, extras, self._dtype, metadata, write, settings.seed, settings.round, marks, aside
        )

    @property
    def _spelling(self) -> tuple[str, str] | None:
        """How the keys of a kohya output are spelled: as the first client's; None for PEFT's."""
        return self._cohort.adapters[0].spelling

    def _origin(self, place: str) -> Adapter:
        """Whose metadata an output takes over: the client's own, else the first one's."""
        return self._cohort.adapters[self._places.index(place) if place in self._places else 0]

    def _comment(self) -> str:
        method, rule = self._settings.method.name, self._settings.rule
        how = method if rule is None else f"{method}, {rule}"
        count = len(self._cohort.clients)
        return f"{count} adapter{'s' * (count > 1)} by fedlora_kernels {__version__} ({how})"

    def _next_state(self, out: Path | None, adapter: Adapter | None) -> State:
        method, number = self._settings.method.name, self._settings.round
        if not self._gives_state:
            return State(method, number, adapter=adapter)
        return State(method, number, self._tensors, self._memory, adapter) if out is None else State.load(out)


def _lines(report: Mapping[str, Any]) -> str:
    """The report as JSON, a line for each entry and for each row of its tables: all at once, as Python's own layout is slow."""
    entries = []
    for key, value in report.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and any(isinstance(row, dict) for row in value):
            rows = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in value)
            text = f"[\n{rows}\n  ]"
        entries.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def write_report(target: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, durably. RunError for failures of the disc."""
    text = _lines(report)
    with disc_errors(target), open(target, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
