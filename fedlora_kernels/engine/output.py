"""One adapter on its way out: into a folder, written as a stream, or into memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora_kernels.adapters.forms import NamedPair, Pad, Units, own_keys, stored_tensors, whole_units
from fedlora_kernels.adapters.keys import PREFIX
from fedlora_kernels.adapters.kohya import ALPHA, alpha_tensor
from fedlora_kernels.adapters.lora_config import LoRAConfig
from fedlora_kernels.adapters.model import Adapter, ExtraSpec, ModuleSpec
from fedlora_kernels.adapters.options import WRITTEN_HERE, WriteOptions
from fedlora_kernels.adapters.reader import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from fedlora_kernels.adapters.writer import KohyaFileWriter, file_writer, pad_to_uniform, verify_adapter, write_config
from fedlora_kernels.rows import random_rows

__all__ = ["FolderOutput", "MemoryOutput", "Output", "adapter_in_memory", "resize_pair"]


class Output(Protocol):
    """What takes one adapter: pairs in canonical order, extras, then `finish`."""

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks at which the modules so far go out, before any padding of the whole adapter."""

    def add_pairs(self, pairs: Sequence[NamedPair]) -> None:
        """Take pairs (name, B (m, p), A (p, n)), scale in the factors."""

    def add_extra(self, name: str, tensor: Tensor) -> None:
        """Take a tensor that is no factor."""

    def finish(self, config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Complete the tensors; nothing more is added."""

    def mark(self) -> dict[str, Any] | None:
        """What was added since the last mark, durable and described for `Journal`; None where nothing was."""

    @property
    def holds(self) -> bool:
        """Whether pairs are held back until others of their target come."""

    def open(self, place: Path | None) -> Adapter:
        """The finished adapter; ``place`` is where its folder is by now."""

    def abandon(self) -> None:
        """Let go of files: the run has failed."""


def resize_pair(
    B: Tensor,
    A: Tensor,
    rank: int,
    *,
    seed: int,
    round: int,  # noqa: A002
    module: str,
    fill: str = "random",
) -> tuple[Tensor, Tensor]:
    """Cut a pair to its first ``rank`` components, or pad it: zero columns of B beside random (or zero) rows of A.

    Zeros in both factors would never get a gradient; the product does not change.
    """
    p = A.shape[0]
    if rank <= p:
        return B[:, :rank].clone(), A[:rank].clone()
    wide, tall = B.new_zeros(B.shape[0], rank), A.new_zeros(rank, A.shape[1])
    wide[:, :p] = B
    tall[:p] = A
    if fill == "random":
        tall[p:] = random_rows(seed, round, module, range(p, rank), A.shape[1]).to(A.dtype)
    return wide, tall


def adapter_in_memory(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    modules: Mapping[str, ModuleSpec],
    extras: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    label: str,
    metadata: Mapping[str, str] | None = None,
    keys: Mapping[str, str] | None = None,
) -> Adapter:
    """An adapter over tensors in memory, under the keys of a file or ``keys`` for them; ``modules`` say in which form, in order."""
    state: dict[str, Tensor] = {}
    for unit in whole_units([(name, B, A) for name, (B, A) in pairs.items()], modules):
        state.update(stored_tensors(unit, modules))
    if next(iter(modules.values())).form.spelling is not None:
        known = LoRAConfig(config, label)
        state.update({f"{name}{ALPHA}": alpha_tensor(known.resolve(name)[1]) for name in pairs})
        adapter = open_adapter(state, WRITTEN_HERE, name=label)
        return dataclasses.replace(adapter, label=label, config=config, metadata=dict(metadata or {}))
    state.update({f"{PREFIX}{name}": tensor for name, tensor in extras.items()})
    state = {(keys or {}).get(key, key): tensor for key, tensor in state.items()}
    adapter = open_adapter((state, config), WRITTEN_HERE, name=label)
    return dataclasses.replace(adapter, label=label, metadata=dict(metadata or {}))


class MemoryOutput:
    """An adapter that stays in memory, under the keys that its modules and extras have where they come from."""

    def __init__(
        self,
        label: str,
        modules: Mapping[str, ModuleSpec],
        extras: Mapping[str, ExtraSpec],
        metadata: Mapping[str, str],
        write: WriteOptions,
        seed: int,
        round: int,  # noqa: A002
    ) -> None:
        self._modules, self._units = modules, Units(modules, _pad(write, seed, round))
        self._keys = own_keys(modules, extras)
        self._label, self._write = label, write
        self._seed, self._round = seed, round
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._extras: dict[str, Tensor] = {}
        self._config: dict[str, Any] = {}
        self._metadata = {"format": "pt", **metadata}

    def add_pairs(self, pairs: Sequence[NamedPair]) -> None:
        """Keep the pairs, each in memory of its own."""
        for pair in pairs:
            for unit in self._units.add(pair):
                self._keep(unit)

    def _keep(self, unit: Sequence[NamedPair]) -> None:
        self._pairs.update({name: (_own(B), _own(A)) for name, B, A in unit})

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of the modules so far."""
        return self._units.ranks

    def add_extra(self, name: str, tensor: Tensor) -> None:
        """Keep the tensor."""
        self._extras[name] = tensor

    def finish(self, config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Pad to one rank if asked."""
        for unit in self._units.rest():
            self._keep(unit)
        self._config = dict(config)
        self._metadata.update(metadata)
        if self._write.pads:
            for key in ("rank_pattern", "alpha_pattern"):
                self._config.pop(key, None)
            for name, (B, A) in self._pairs.items():
                self._pairs[name] = resize_pair(
                    B, A, config["r"], seed=self._seed, round=self._round, module=name, fill=self._write.fill
                )

    def mark(self) -> dict[str, Any] | None:
        """Nothing outlives the process."""
        return None

    @property
    def holds(self) -> bool:
        """Whether pairs are held back."""
        return self._units.holds

    def open(self, place: Path | None) -> Adapter:
        """Return the adapter."""
        return adapter_in_memory(
            self._pairs,
            self._modules,
            self._extras,
            self._config,
            label=self._label,
            metadata=self._metadata,
            keys=self._keys,
        )

    def abandon(self) -> None:
        """Nothing is held."""


def _pad(write: WriteOptions, seed: int, round: int) -> Pad:  # noqa: A002
    """How pairs that share a target are brought to one rank."""

    def pad(pair: NamedPair, rank: int) -> NamedPair:
        name, B, A = pair
        return name, *resize_pair(B, A, rank, seed=seed, round=round, module=name, fill=write.fill)

    return pad


def _own(tensor: Tensor) -> Tensor:
    """The tensor, in memory that holds nothing else."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


class FolderOutput:
    """A folder in the making: tensors and configuration as PEFT has them, or the tensors of a kohya file.

    ``marks`` are those of an earlier process that began it (`SafetensorsWriter`); ``aside`` is where the file stays as marked when
    it is rewritten with padding.
    """

    def __init__(
        self,
        folder: Path,
        modules: Mapping[str, ModuleSpec],
        extras: Mapping[str, ExtraSpec],
        dtype: torch.dtype,
        metadata: Mapping[str, str],
        write: WriteOptions,
        seed: int,
        round: int,  # noqa: A002
        marks: Sequence[Mapping[str, Any]] | None = None,
        aside: Path | None = None,
    ) -> None:
        self._folder, self._write, self._seed, self._round, self._aside = folder, write, seed, round, aside
        pad = _pad(write, seed, round)
        self._file = file_writer(modules)(folder / WEIGHTS_NAME, modules, extras, dtype, metadata, pad, marks)
        self._first: NamedPair | None = None
        self._last: NamedPair | None = None

    def add_pairs(self, pairs: Sequence[NamedPair]) -> None:
        """Append the pairs to the file."""
        for pair in pairs:
            name, B, A = pair
            self._file.add_pair(name, B, A)
            self._first, self._last = self._first or (name, _own(B), _own(A)), pair

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of the modules so far."""
        return self._file.ranks

    def add_extra(self, name: str, tensor: Tensor) -> None:
        """Append the tensor to the file."""
        self._file.add_extra(name, tensor)

    def finish(self, config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Fill in the header, pad to one rank if asked, and read back: all shapes, and the numbers of two modules."""
        self._file.close(metadata)
        if not isinstance(self._file, KohyaFileWriter):
            write_config(self._folder / CONFIG_NAME, config)
        ranks = self.ranks
        if self._write.pads:
            if self._aside is not None:
                _keep(self._folder / WEIGHTS_NAME, self._aside)
            rank = pad_to_uniform(self._folder, None, self._write.fill, seed=self._seed, round=self._round)
            ranks = dict.fromkeys(ranks, rank)
        verify_adapter(
            self._folder, ranks, {pair[0]: pair[1:] for pair in (self._first, self._last) if pair is not None}
        )

    def mark(self) -> dict[str, Any] | None:
        """What was added to the file."""
        return self._file.mark()

    @property
    def holds(self) -> bool:
        """Whether pairs are held back."""
        return self._file.holds

    def open(self, place: Path | None) -> Adapter:
        """Open what was written."""
        return open_adapter(self._folder if place is None else place, WRITTEN_HERE)

    def abandon(self) -> None:
        """Close the file; the output folder's own context removes it."""
        self._file.abandon()


def _keep(file: Path, aside: Path) -> None:
    """A second name for a file whose first one goes to another; where links are unknown, a run killed from here on starts anew."""
    with suppress(OSError):
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        os.link(file, aside)
