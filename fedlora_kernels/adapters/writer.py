"""Write PEFT folders and kohya files: streaming, atomically, with the scale in the factors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.config import peft_config
from fedlora_kernels.adapters.folder import OutputFolder
from fedlora_kernels.adapters.forms import NamedPair, Pad, Units, stored_pieces, stored_shapes
from fedlora_kernels.adapters.inits import KEEPS_ALPHA, kept_init
from fedlora_kernels.adapters.keys import PREFIX
from fedlora_kernels.adapters.kohya import ALPHA
from fedlora_kernels.adapters.kohya_metadata import HASH, data_hash, diffusers_config, kept_metadata, network_facts
from fedlora_kernels.adapters.kohya_scales import DIFFUSERS
from fedlora_kernels.adapters.model import Adapter, ExtraSpec, ModuleSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import WRITTEN_HERE
from fedlora_kernels.adapters.output_file import names_file
from fedlora_kernels.adapters.reader import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from fedlora_kernels.adapters.safetensors import disc_errors
from fedlora_kernels.adapters.safetensors_writer import SafetensorsWriter
from fedlora_kernels.errors import InputError, OutputOverflowError, RunError
from fedlora_kernels.rows import random_rows

__all__ = [
    "KohyaFileWriter",
    "PeftFileWriter",
    "file_writer",
    "pad_to_uniform",
    "save_adapter",
    "verify_adapter",
    "write_config",
]

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]
LARGEST_RANK = 10**7
"""No rank has more digits: what the header of a file reserves."""


class PeftFileWriter(SafetensorsWriter):
    """An ``adapter_model.safetensors`` written module by module.

    Args:
        path: the file; must not exist.
        modules: what may come, by name; their forms decide keys and shapes.
        extras: tensors that may come beside the factors, by name.
        dtype: of all tensors.
        metadata: strings for ``__metadata__``.
        pad: brings pairs that share a target to one rank; with zeros where not given.
        marks: of an earlier process, as for `SafetensorsWriter`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        modules: Mapping[str, ModuleSpec],
        extras: Mapping[str, ExtraSpec],
        dtype: torch.dtype,
        metadata: Mapping[str, str] | None = None,
        pad: Pad | None = None,
        marks: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        written = {name: rank for mark in marks or () for name, rank in mark["ranks"].items()}
        self._modules, self._units, self._ranked = modules, Units(modules, pad, written), len(written)
        super().__init__(path, self._announced(extras, dtype), metadata, marks=marks)

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks at which the modules so far are written."""
        return self._units.ranks

    @property
    def holds(self) -> bool:
        """Whether pairs are held back until their target is complete: a mark would leave them out."""
        return self._units.holds

    def mark(self) -> dict[str, Any] | None:
        """What was appended since the last mark, with the ranks of its modules."""
        made = super().mark()
        ranks = dict(itertools.islice(self._units.found.items(), self._ranked, None))
        self._ranked = len(self._units.found)
        return None if made is None else {**made, "ranks": ranks}

    def add_pair(self, name: str, B: Tensor, A: Tensor) -> None:
        """Take the pair of module ``name``: B (m, p), A (p, n), scale in the factors. Appended when its target is complete."""
        for unit in self._units.add((name, B, A)):
            self._append(unit)

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Append what is held back, fill in the header, make it durable and close. Idempotent."""
        for unit in self._units.rest():
            self._append(unit)
        super().close(metadata)

    def add_extra(self, name: str, tensor: Tensor) -> None:
        """Append a tensor that is no factor, under its canonical name."""
        self.add(f"{PREFIX}{name}", tensor)

    def _announced(self, extras: Mapping[str, ExtraSpec], dtype: torch.dtype) -> Entries:
        entries: Entries = {}
        for module in self._modules.values():
            entries.update({key: (dtype, shape) for key, shape in stored_shapes(module, LARGEST_RANK).items()})
        entries.update({f"{PREFIX}{name}": (dtype, extra.tensor.shape) for name, extra in extras.items()})
        return entries

    def _append(self, unit: list[NamedPair]) -> None:
        for key, shape, pieces in stored_pieces(unit, self._modules):
            self.add_pieces(key, shape, pieces)


class KohyaFileWriter(PeftFileWriter):
    """A kohya or diffusers file: alphas equal to the ranks after all factors, or a configuration in the metadata.

    ``metadata`` holds what is kept of the first client (`kept_metadata`); a hash or a configuration in it is made anew.
    """

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Append what is held back and the alphas, fill in the header, make it durable and close. Idempotent."""
        if self._fd < 0:
            return
        for unit in self._units.rest():
            self._append(unit)
        ranks, facts = self.ranks, {}
        if DIFFUSERS in self._metadata:
            facts[DIFFUSERS] = diffusers_config(ranks)
        else:
            facts.update(network_facts(ranks, self._metadata.get("ss_network_module")))
            for name, rank in ranks.items():
                self.add(f"{self._modules[name].form.path}{ALPHA}", torch.tensor(float(rank)))
        if HASH in self._metadata:
            facts[HASH] = data_hash(self.path, 8 + self._reserved)
        super().close({**facts, **(metadata or {})})

    def _announced(self, extras: Mapping[str, ExtraSpec], dtype: torch.dtype) -> Entries:
        alphas = {f"{module.form.path}{ALPHA}": (torch.float32, ()) for module in self._modules.values()}
        return {**super()._announced(extras, dtype), **alphas}

    def _bound(self) -> int:
        """Room for a configuration that names every module three times, in JSON within JSON."""
        return super()._bound() + sum(3 * (8 * len(name.encode()) + 64) for name in self._modules)


def file_writer(modules: Mapping[str, ModuleSpec]) -> type[PeftFileWriter]:
    """The kind of writer for these modules; their forms decide the format."""
    return KohyaFileWriter if _spelled(modules) else PeftFileWriter


def _spelled(modules: Mapping[str, ModuleSpec]) -> bool:
    return any(module.form.spelling is not None for module in modules.values())


def write_config(path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write an ``adapter_config.json`` with sorted keys, as PEFT does. RunError for failures of the disc."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with disc_errors(path), open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def save_adapter(adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write an adapter as a PEFT folder, or as a kohya file where it was one, atomically.

    The scale is baked to 1; an adapter that keeps an OLoRA start keeps its own. The stored dtype is kept where all scales are 1
    and all tensors of one dtype, else float32 (float64 if a tensor is).
    Raises InputError as `check_out`, RunError for failures of the disc.
    """
    if kept_init(adapter.config) == KEEPS_ALPHA:
        modules = {name: dataclasses.replace(module, scale=1.0) for name, module in adapter.modules.items()}
        adapter = dataclasses.replace(adapter, modules=modules)
    dtype = _saved_dtype(adapter)
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    spelled, metadata = _spelled(adapter.modules), adapter.metadata
    if spelled != names_file(path):
        needed = (
            "a kohya file; name one that ends in .safetensors"
            if spelled
            else "a PEFT folder; name one without .safetensors"
        )
        raise InputError(f"output {printable(path)}: this adapter is written as {needed}")
    if spelled:
        metadata = kept_metadata(metadata, f"written by fedlora_kernels {__version__}, scales in the factors")
    config = peft_config([adapter], ranks, adapter.extras)
    with OutputFolder(path, overwrite) as folder:
        target = folder.path / WEIGHTS_NAME
        with file_writer(adapter.modules)(target, adapter.modules, adapter.extras, dtype, metadata) as file:
            for name, pair in adapter.pairs():
                file.add_pair(name, _scaled(pair.B, pair.scale, dtype, name), _scaled(pair.A, 1.0, dtype, name))
            for name, extra in adapter.extras.items():
                file.add_extra(name, _scaled(adapter.extra(name), _extra_scale(adapter, extra), dtype, name))
        if not spelled:
            write_config(folder.path / CONFIG_NAME, config)
        verify_adapter(folder.path, ranks)
        folder.commit()


def pad_to_uniform(
    folder: str | os.PathLike[str],
    rank: int | None = None,
    fill: str = "zero",
    *,
    seed: int = 0,
    round: int = 0,  # noqa: A002
) -> int:
    """Rewrite a folder written here so that all modules have one rank; return it. The update does not change.

    Args:
        folder: an output folder that is not yet in place.
        rank: the common rank, at least the largest; None: the largest.
        fill: "zero" or "random" rows of A (`random_rows`); columns of B are zero.
        seed: key of the random rows.
        round: key of the random rows, counted from 0.
    """
    folder = Path(folder)
    adapter = open_adapter(folder, WRITTEN_HERE)
    largest = max(module.rank for module in adapter.modules.values())
    rank = largest if rank is None else rank
    if rank < largest:
        raise InputError(f"{printable(folder)}: rank {rank} is below the largest rank {largest}; at least that needed")
    target = folder / WEIGHTS_NAME
    dtype = next(iter(adapter.modules.values())).A.dtype
    padded = folder / f"{WEIGHTS_NAME}.padded"
    try:
        with file_writer(adapter.modules)(padded, adapter.modules, adapter.extras, dtype, adapter.metadata) as file:
            for name, pair in adapter.pairs():
                module = adapter.modules[name]
                B, A = pair.B.new_zeros(module.m, rank), pair.A.new_zeros(rank, module.n)
                B[:, : module.rank] = pair.B
                A[: module.rank] = pair.A
                if fill == "random":
                    A[module.rank :] = random_rows(seed, round, name, range(module.rank, rank), module.n).to(dtype)
                file.add_pair(name, B, A)
            for name in adapter.extras:
                file.add_extra(name, adapter.extra(name))
    finally:
        adapter.close()
    if adapter.spelling is None:
        config = {key: value for key, value in adapter.config.items() if key not in ("rank_pattern", "alpha_pattern")}
        write_config(folder / CONFIG_NAME, {**config, "r": rank, "lora_alpha": rank})
    with disc_errors(target):
        os.replace(padded, target)
    verify_adapter(folder, dict.fromkeys(adapter.modules, rank))
    return rank


def verify_adapter(
    folder: str | os.PathLike[str],
    ranks: Mapping[str, int],
    sample: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Read back what was written: the same modules, the ranks intended, every scale exactly 1. RunError otherwise.

    ``sample`` holds pairs (B, A) by module, in the dtype of the file, that must read back bit by bit, padding by zeros in B aside.
    """
    adapter = open_adapter(folder, WRITTEN_HERE)
    try:
        _verify_header(folder, adapter, ranks)
        for name, (B, A) in (sample or {}).items():
            pair, rank = adapter[name], A.shape[0]
            same = torch.equal(pair.B[:, :rank], B) and torch.equal(pair.A[:rank], A)
            if not same or bool(pair.B[:, rank:].any()):
                raise RunError(f"{printable(folder)}: module {printable(name)!r} reads back with other numbers")
    finally:
        adapter.close()


def _verify_header(folder: str | os.PathLike[str], adapter: Adapter, ranks: Mapping[str, int]) -> None:
    found = {name: module.rank for name, module in adapter.modules.items()}
    if found != dict(ranks):
        raise RunError(f"{printable(folder)}: modules or ranks read back differ from those written")
    if kept_init(adapter.config) == KEEPS_ALPHA:
        return
    wrong = next((module for module in adapter.modules.values() if module.scale != 1.0), None)
    if wrong is not None:
        raise RunError(
            f"{printable(folder)}: module {printable(wrong.name)!r} reads back with scale {wrong.scale}, not 1"
        )


def _saved_dtype(adapter: Adapter) -> torch.dtype:
    specs = [spec for module in adapter.modules.values() for spec in (module.B, module.A)]
    dtypes = {spec.dtype for spec in specs} | {extra.tensor.dtype for extra in adapter.extras.values()}
    if len(dtypes) == 1 and all(module.scale == 1.0 for module in adapter.modules.values()):
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _scaled(tensor: Tensor, scale: float, dtype: torch.dtype, name: str) -> Tensor:
    if scale == 1.0:
        return tensor.to(dtype)
    scaled = (tensor.double() * scale).to(dtype)
    if not torch.isfinite(scaled).all() and torch.isfinite(tensor).all():
        raise OutputOverflowError(f"module {printable(name)!r}: times its scale {scale} it leaves the range of {dtype}")
    return scaled


def _extra_scale(adapter: Adapter, extra: ExtraSpec) -> float:
    return adapter.modules[extra.module].scale if extra.rule == "lora_bias" and extra.module is not None else 1.0
