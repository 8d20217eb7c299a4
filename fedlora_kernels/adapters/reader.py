"""Open adapters: PEFT folders, kohya files, and state dicts in memory. PEFT itself is never imported."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.adapters.assembly import assemble
from fedlora_kernels.adapters.inits import kept_init, since_start
from fedlora_kernels.adapters.keys import PREFIX
from fedlora_kernels.adapters.kohya import FILE_SUFFIX, carries_scales
from fedlora_kernels.adapters.kohya_scales import DIFFUSERS
from fedlora_kernels.adapters.model import Adapter, TensorSource, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.safetensors import SafetensorsFile, open_file, read_json
from fedlora_kernels.adapters.shards import INDEX_NAME, SHARD, ShardedFile
from fedlora_kernels.adapters.tied import check_tied
from fedlora_kernels.errors import FedLoRAError, FormatError, InputError

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "StateDict", "open_adapter", "open_initial"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CONFIG_CAP = 1 << 20


class StateDict:
    """Tensors in memory as a source: torch tensors on any device, or NumPy arrays."""

    def __init__(self, state: Mapping[str, Any], where: str = "state dict") -> None:
        self._state = dict(state)
        self.tensors: dict[str, TensorSpec] = {}
        for key, value in self._state.items():
            if not isinstance(key, str) or not isinstance(value, Tensor | np.ndarray):
                kind = type(value).__name__
                raise FormatError(
                    f"{where}: entry {printable(key)!r} is of type {kind}; a tensor or NumPy array needed"
                )
            if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta):
                found = "on the meta device" if value.is_meta else str(value.layout).removeprefix("torch.")
                raise FormatError(f"{where}: tensor {printable(key)!r} is {found}; a dense tensor with data needed")
            self.tensors[key] = TensorSpec(key, tuple(value.shape), _dtype(value, key, where))

    def read(self, key: str, out: Tensor | None = None) -> Tensor:
        """Return the tensor itself, detached; a copy in ``out`` (same shape and dtype) if given. Never write into it."""
        value = self._state[key]
        spec = self.tensors[key]
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value)).reshape(spec.shape)
        if out is None:
            return tensor
        if tuple(out.shape) != spec.shape or out.dtype != spec.dtype:
            raise ValueError(f"out must be a {spec.dtype} tensor of shape {spec.shape}")
        return out.copy_(tensor)

    def read_rows(self, key: str, start: int, out: Tensor) -> None:
        """Copy rows of a tensor from ``start`` on, as many as ``out`` has."""
        out.copy_(self.read(key)[start : start + len(out)])

    def check_unchanged(self) -> None:
        """Nothing to check: the tensors belong to the caller."""

    def fingerprint(self) -> str:
        """A hash of all keys, shapes, dtypes and numbers."""
        found = hashlib.blake2b(digest_size=16)
        for key, spec in self.tensors.items():
            found.update(f"{key}\0{spec.shape}{spec.dtype}".encode())
            tensor = self.read(key).cpu().contiguous()
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data if spec.nbytes else b"")
        return found.hexdigest()

    def close(self) -> None:
        """Nothing to release: the tensors belong to the caller."""


def open_adapter(source: Any, options: ReadOptions | None = None, *, name: str | None = None) -> Adapter:
    """Open an adapter: headers and configuration are read and checked, tensors stay where they are.

    The one thing read of the data is whether a tied head holds its embedding's transposes.

    Args:
        source: path of a PEFT folder or of a kohya or diffusers file (``.safetensors``), an Adapter (returned as it is), a
            (state_dict, config) pair, or a bare state dict with ``options.config`` or with kohya's keys. A config is a mapping
            or an object with ``to_dict()``.
        options: how to read.
        name: the client's name for messages; without it they name the source.

    Raises FormatError where files, configuration or keys cannot be read as a LoRA adapter, UnsupportedVariantError for known
    variants whose update is not ``scale * B @ A``. Texts worth a warning are collected in ``Adapter.warnings``.
    """
    options = options or ReadOptions()
    if isinstance(source, Adapter):
        return source
    if isinstance(source, str | os.PathLike):
        label = os.fspath(source)
        with _named(name):
            if not label:
                raise InputError("the path is empty; the folder of an adapter needed")
            tensors, config = _open_path(Path(source), options)
        metadata = dict(getattr(tensors, "metadata", {}))
    else:
        label, metadata = "state dict", {}
        with _named(name):
            tensors, config = _open_memory(source, options)
    who = f"client {printable(name)!r}" if name is not None else f"adapter {printable(label)!r}"
    try:
        adapter = assemble(label, tensors, config, metadata, who, options)
        check_tied(adapter.modules, adapter.config, adapter.source, who)
        if options.init_factors is None:
            return adapter
        if kept_init(adapter.config) is None:
            text = f"{who}: its initialisation leaves the base weights as they are; init_factors was not subtracted"
            return dataclasses.replace(adapter, warnings=(*adapter.warnings, text))
        initial = open_initial(options.init_factors, options)
        assert initial is not None
        return since_start(adapter, initial, who)
    except BaseException:
        tensors.close()
        raise


def open_initial(factors: Any, options: ReadOptions) -> Adapter | None:
    """Open what ``init_factors`` stands for: an adapter's source, or (A0, B0, s0) by module; None stays None."""
    if factors is None or isinstance(factors, Adapter):
        return factors
    options = dataclasses.replace(options, init="keep", init_factors=None)
    if not isinstance(factors, Mapping):
        return open_adapter(factors, options, name="init_factors")
    triples = {str(name).removeprefix(PREFIX): _triple(name, triple) for name, triple in factors.items()}
    state: dict[str, Any] = {}
    for name, (A, B, _) in triples.items():
        state |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    options = dataclasses.replace(options, rank_from="tensor")
    adapter = open_adapter((state, {"peft_type": "LORA"}), options, name="init_factors")
    modules = {name: dataclasses.replace(spec, scale=triples[name][2]) for name, spec in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules)


def _triple(name: Any, value: Any) -> tuple[Any, Any, float]:
    """(A0, B0, s0) of a module."""
    if isinstance(value, tuple | list) and len(value) == 3:
        A, B, scale = value
        if isinstance(scale, int | float) and math.isfinite(scale):
            return A, B, float(scale)
    raise InputError(f"init_factors, module {printable(name)!r}: (A0, B0, s0) needed, two tensors and a finite number")


@contextmanager
def _named(name: str | None) -> Iterator[None]:
    """Put the client's name in front of errors that name only the file."""
    try:
        yield
    except FedLoRAError as error:
        if name is None:
            raise
        raise type(error)(f"client {printable(name)!r}: {error}") from None


def _open_memory(source: Any, options: ReadOptions) -> tuple[TensorSource, dict[str, Any] | None]:
    state, config = source if isinstance(source, tuple | list) and len(source) == 2 else (source, options.config)
    if not isinstance(state, Mapping):
        kind = type(source).__name__
        raise InputError(f"an adapter is a path, an Adapter or a (state_dict, config) pair; {kind} found")
    if config is None and carries_scales(key for key in state if isinstance(key, str)):
        return StateDict(state), None
    if config is None:
        raise FormatError("a state dict without a configuration; pass (state_dict, config), or config= in ReadOptions")
    return StateDict(state), _plain_config(config)


def _open_path(path: Path, options: ReadOptions) -> tuple[TensorSource, dict[str, Any] | None]:
    if path.suffix.lower() == FILE_SUFFIX and not path.is_dir():
        return _open_file(path, options)
    return _open_folder(path, options)


def _open_file(path: Path, options: ReadOptions) -> tuple[TensorSource, dict[str, Any] | None]:
    """A single file; where its keys say nothing of scales, it may belong to a folder whose configuration does."""
    if (file := _self_contained(path)) is not None:
        return file, None
    if options.config is not None:
        return SafetensorsFile(path), _plain_config(options.config)
    if (path.parent / CONFIG_NAME).exists():
        raise FormatError(
            f"{printable(path)}: {CONFIG_NAME} lies beside it and says its scale; give the folder {printable(path.parent)}"
        )
    return SafetensorsFile(path), None


def _self_contained(path: Path) -> SafetensorsFile | None:
    """The file, if it says its scales itself."""
    file = SafetensorsFile(path)
    if DIFFUSERS in file.metadata or carries_scales(file.tensors):
        return file
    file.close()
    return None


def _open_folder(folder: Path, options: ReadOptions) -> tuple[TensorSource, dict[str, Any] | None]:
    where = printable(folder)
    try:
        entries = sorted(entry.name for entry in os.scandir(folder))
    except NotADirectoryError:
        raise FormatError(
            f"{where}: a file; the folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a kohya {FILE_SUFFIX} needed"
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if CONFIG_NAME in entries:
        config = read_json(folder / CONFIG_NAME, CONFIG_CAP)
    elif options.config is not None:
        config = _plain_config(options.config)
    elif WEIGHTS_NAME in entries and (file := _self_contained(folder / WEIGHTS_NAME)) is not None:
        return file, None
    else:
        raise FormatError(f"{where}: no {CONFIG_NAME}{_hint(folder, entries)}")
    if WEIGHTS_NAME in entries:
        return SafetensorsFile(folder / WEIGHTS_NAME), config
    if INDEX_NAME in entries:
        return ShardedFile(folder / INDEX_NAME), config
    if PICKLE_NAME in entries:
        return _read_pickle(folder / PICKLE_NAME), config
    if f"{PICKLE_NAME}.index.json" in entries:
        raise FormatError(f"{where}: an adapter in several pickles; re-save it as safetensors")
    if (shard := next((entry for entry in entries if SHARD.fullmatch(entry)), None)) is not None:
        raise FormatError(f"{where}: {shard} without {INDEX_NAME}, which says what is in which file; copy that one too")
    raise FormatError(f"{where}: neither {WEIGHTS_NAME} nor {PICKLE_NAME}; one of them needed")


def _hint(folder: Path, entries: list[str]) -> str:
    inside = [entry for entry in entries if (folder / entry / CONFIG_NAME).is_file()]
    if len(inside) == 1:
        return f"; the sub-folder {printable(inside[0])!r} has one. Give {printable(folder / inside[0])} instead"
    return "; a PEFT adapter folder needed"


def _read_pickle(path: Path) -> StateDict:
    where = printable(path)
    file = os.fdopen(open_file(path, where), "rb")
    try:
        with file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load passes on whatever a broken or hostile pickle provokes
        raise FormatError(
            f"{where}: cannot be loaded with weights_only=True ({type(error).__name__}); re-save it as safetensors"
        ) from None
    if not isinstance(state, Mapping):
        raise FormatError(f"{where}: holds a {type(state).__name__}; a state dict needed")
    return StateDict(state, where)


def _plain_config(config: Any) -> dict[str, Any]:
    value = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(value, Mapping):
        raise InputError(f"config is of type {type(config).__name__}; a mapping needed")
    return {str(key): _plain(entry) for key, entry in value.items()}


def _plain(value: Any) -> Any:
    """Return what JSON would hold: a live configuration has sets, enumerations and dataclasses."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _dtype(value: Tensor | np.ndarray, key: str, where: str) -> torch.dtype:
    if isinstance(value, Tensor):
        return value.dtype
    try:
        return torch.from_numpy(np.empty(0, value.dtype)).dtype
    except (TypeError, ValueError):  # ValueError: bytes in the order of another machine
        raise FormatError(
            f"{where}: tensor {printable(key)!r} is a NumPy array of {value.dtype}; native float64, float32 or float16 needed"
        ) from None
