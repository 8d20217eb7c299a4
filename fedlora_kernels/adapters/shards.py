"""Adapters in several safetensors files: an index says which file holds which tensor.

The index comes from whoever made the adapter, so it may name nothing but files beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora_kernels.adapters.model import TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.safetensors import HEADER_CAP, SafetensorsFile, read_json
from fedlora_kernels.errors import FormatError, LimitError

__all__ = ["INDEX_NAME", "SHARD", "ShardedFile", "count_files"]

INDEX_NAME = "adapter_model.safetensors.index.json"
SHARD = re.compile(r"adapter_model-[0-9]+-of-[0-9]+\.safetensors")
"""How such files are usually called; the index may call them otherwise."""
MOST_SHARDS = 4096
LARGEST = 1 << 63


class ShardedFile:
    """The files of an index as one source of tensors: all headers are read and checked on opening, tensors on demand.

    FormatError, naming index or file, where they disagree: a file is missing or lies elsewhere, a tensor is in two files, in
    another one than the index says or in none, or the bytes do not add up.
    """

    def __init__(self, index: str | os.PathLike[str]) -> None:
        self.path = os.fspath(index)
        self._where = printable(self.path)
        placed, self._size = self._read_index()
        self._files: dict[str, SafetensorsFile] = {}
        try:
            for name in sorted(set(placed.values())):
                self._files[name] = self._open(name)
            self.tensors = self._merged(placed)
        except BaseException:
            self.close()
            raise
        self._owners = {key: self._files[name] for key, name in placed.items()}
        self.metadata = next(iter(self._files.values())).metadata

    def read(self, key: str, out: Tensor | None = None) -> Tensor:
        """Return tensor ``key`` as `SafetensorsFile.read` does."""
        return self._owners[key].read(key, out)

    def read_stacks(self, stacks: Iterable[tuple[Sequence[str], Tensor]]) -> None:
        """Read tensors into stacks as `SafetensorsFile.read_stacks` does, each file's at once."""
        parts: dict[int, list[tuple[Sequence[str], Tensor]]] = {}
        for keys, out in stacks:
            if len(keys) != len(out):
                raise ValueError(f"out must be a tensor of {len(keys)} matrices")
            for i, key in enumerate(keys):
                parts.setdefault(id(self._owners[key]), []).append(([key], out[i : i + 1]))
        for file in self._files.values():
            file.read_stacks(parts.get(id(file), []))

    def place(self, key: str) -> tuple[int, int]:
        """Where tensor ``key`` lies, as `SafetensorsFile.place` says."""
        return self._owners[key].place(key)

    def read_rows(self, key: str, start: int, out: Tensor) -> None:
        """Read rows of tensor ``key`` as `SafetensorsFile.read_rows` does."""
        self._owners[key].read_rows(key, start, out)

    def check_unchanged(self) -> None:
        """Raise FormatError where somebody wrote into a file since it was opened."""
        for file in self._files.values():
            file.check_unchanged()

    def fingerprint(self) -> str:
        """What tells this content from another without reading all of it."""
        parts = [f"{name}:{file.fingerprint()}" for name, file in self._files.items()]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def close(self) -> None:
        """Close all files. Idempotent."""
        for file in self._files.values():
            file.close()

    def _read_index(self) -> tuple[dict[str, str], int | None]:
        index = read_json(self.path, HEADER_CAP)
        placed, metadata = index.get("weight_map"), index.get("metadata", {})
        if not isinstance(placed, dict) or not placed:
            raise FormatError(f"{self._where}: no weight_map; one that names the file of each tensor needed")
        for key, name in placed.items():
            if not _is_plain(name):
                raise FormatError(
                    f"{self._where}: tensor {printable(key)!r} is said to be in {printable(name)!r}; the name of a "
                    "safetensors file beside the index needed"
                )
        if (count := len(set(placed.values()))) > MOST_SHARDS:
            raise LimitError(f"{self._where}: {count} files; at most {MOST_SHARDS}. Save it in fewer, larger ones")
        return placed, _total(metadata, self._where)

    def _open(self, name: str) -> SafetensorsFile:
        path = Path(self.path).parent / name
        if not os.path.lexists(path):
            raise FormatError(f"{printable(path)}: no such file, but the index names it; copy the whole folder anew")
        # the links of a download cache lead index and files into one folder; any other link leads to a stranger's file
        allowed = {os.path.realpath(path.parent), os.path.dirname(os.path.realpath(self.path))}
        if os.path.dirname(os.path.realpath(path)) not in allowed:
            raise FormatError(f"{printable(path)}: a link that leads out of the folder; the file itself needed")
        return SafetensorsFile(path)

    def _merged(self, placed: Mapping[str, str]) -> dict[str, TensorSpec]:
        tensors: dict[str, TensorSpec] = {}
        holders: dict[str, str] = {}
        for name, file in self._files.items():
            for key, spec in file.tensors.items():
                if key in holders:
                    raise self._refused(key, f"is in {printable(holders[key])} and in {printable(name)}; one needed")
                holders[key], tensors[key] = name, spec
        for key, name in placed.items():
            if key not in holders:
                raise self._refused(key, f"is not in {printable(name)}; the files are not those of the index")
            if holders[key] != name:
                raise self._refused(key, f"is in {printable(holders[key])}, not in {printable(name)}")
        for key, name in holders.items():
            if key not in placed:
                raise self._refused(key, f"is in {printable(name)}, but the index does not list it")
        size = sum(spec.nbytes for spec in tensors.values())
        if self._size not in (None, size):
            raise FormatError(
                f"{self._where}: total_size says {self._size} bytes, the files hold {size}; both equal needed"
            )
        return tensors

    def _refused(self, key: str, text: str) -> FormatError:
        return FormatError(f"{self._where}: tensor {printable(key)!r} {text}")


def count_files(folder: str | os.PathLike[str]) -> int:
    """How many files a folder would keep open as an adapter, at most."""
    with suppress(OSError, ValueError):
        names = os.listdir(folder)
        if INDEX_NAME in names:
            return sum(name.endswith(".safetensors") for name in names)
    return 1


def _is_plain(name: Any) -> bool:
    """Whether a name is that of a safetensors file in the same folder, on any system."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(char in name for char in "/\\:\0")
        and len(name) <= 255
    )


def _total(metadata: Any, where: str) -> int | None:
    """The bytes of all tensors as the index says; some writers make it a float."""
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < LARGEST:
        raise FormatError(f"{where}: total_size is {printable(size)!r}; a number of bytes needed")
    return int(size)
