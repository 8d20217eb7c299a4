"""Safetensors files, written as a stream: tensors are appended as they come, the header is filled in last.

A file may be written in turns by several processes, each of which goes on after the last mark of the one before.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedlora_kernels.adapters.model import TensorSpec
from fedlora_kernels.adapters.safetensors import CHUNK, DTYPES, disc_errors
from fedlora_kernels.adapters.writeback import Writeback
from fedlora_kernels.errors import InputError, RunError

__all__ = ["SafetensorsWriter"]

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
W = TypeVar("W", bound="SafetensorsWriter")


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor: the header's space is reserved at the start and filled on closing.

    Args:
        path: the file; must not exist.
        entries: for each tensor that may come, its dtype and an upper bound of its shape. Those not added are left out.
        metadata: strings for ``__metadata__``; more can be given on closing.
        spare: bytes kept free for metadata given on closing.
        marks: what `mark` returned to an earlier process, in order: the file exists, and what came after the last one is cut off.
            None: a new file without marks; empty: a new one with.

    Failures of the disc raise RunError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        spare: int = 8192,
        marks: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._entries = dict(entries)
        self._metadata = {"format": "pt", **(metadata or {})}
        self._written: dict[str, dict[str, Any]] = {}
        self._position = 0
        self._reserved = self._bound() + spare
        self._reserved += -self._reserved % 8
        self._checksum = None if marks is None else 0
        self._marked = (0, 0)
        if marks and marks[0]["begin"] != 8 + self._reserved:
            raise RunError(f"{self.path}: was begun with another header; delete it and run again")
        new = os.O_EXCL | os.O_CREAT
        with disc_errors(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | (0 if marks else new), 0o666)
            try:
                if marks:
                    self._go_on(marks)
                os.lseek(self._fd, 8 + self._reserved + self._position, os.SEEK_SET)
            except BaseException:
                self.abandon()
                raise
        self._writeback = Writeback(self._fd, 8 + self._reserved + self._position if marks else 0)

    def mark(self) -> dict[str, Any] | None:
        """Make durable what was appended since the last mark and describe it, as JSON values; None where nothing was."""
        (count, start), self._marked = self._marked, (len(self._written), self._position)
        new = dict(itertools.islice(self._written.items(), count, None))
        if not new:
            return None
        with disc_errors(self.path):
            os.fsync(self._fd)
        checksum, self._checksum = self._checksum, 0
        return {
            "begin": 8 + self._reserved,
            "start": start,
            "end": self._position,
            "checksum": checksum,
            "entries": new,
        }

    def announce(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announce a tensor after the start; its entry takes from ``spare``."""
        self._entries[key] = (dtype, shape)

    def add(self, key: str, tensor: Tensor) -> None:
        """Append a tensor. It must be announced in ``entries``, of that dtype and of no larger shape, and come once."""
        self.add_pieces(key, tuple(tensor.shape), [tensor])

    def add_pieces(self, key: str, shape: tuple[int, ...], pieces: Iterable[Tensor]) -> None:
        """Append a tensor as `add` does, its numbers in pieces of any shape."""
        dtype, bound = self._entries[key]
        fits = len(shape) == len(bound) and all(size <= limit for size, limit in zip(shape, bound, strict=True))
        if key in self._written or not fits:
            raise ValueError(f"{key}: {shape} does not fit the announced {bound}, or came before")
        size = 0
        for piece in pieces:
            if piece.dtype != dtype:
                raise ValueError(f"{key}: {piece.dtype} does not fit the announced {dtype}")
            size += self._write(piece)
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{key}: {size} bytes in all; {math.prod(shape) * dtype.itemsize} needed for {shape}")
        self._written[key] = _entry(dtype, shape, self._position, self._position + size)
        self._position += size
        self._writeback.reached(8 + self._reserved + self._position)

    def _write(self, tensor: Tensor) -> int:
        data = tensor.detach().to("cpu").contiguous().reshape(-1)
        if not data.numel():
            return 0
        content = data.view(torch.uint8).numpy().data
        with disc_errors(self.path):
            _write_all(self._fd, content)
        if self._checksum is not None:
            self._checksum = zlib.crc32(content, self._checksum)
        return len(content)

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Fill in the header, make it durable and close. Idempotent."""
        if self._fd < 0:
            return
        header = _dump({"__metadata__": {**self._metadata, **(metadata or {})}, **self._written})
        if len(header) > self._reserved:
            raise InputError(f"{self.path}: metadata of {len(header)} bytes; {self._reserved} were reserved")
        with disc_errors(self.path):
            text = struct.pack("<Q", self._reserved) + header.ljust(self._reserved)
            os.lseek(self._fd, 0, os.SEEK_SET)
            _write_all(self._fd, memoryview(text))
            os.fsync(self._fd)
        self.abandon()

    def abandon(self) -> None:
        """Close without a header: the file is not readable. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self: W) -> W:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _go_on(self, marks: Sequence[Mapping[str, Any]]) -> None:
        for mark in marks:
            self._written.update(mark["entries"])
        self._position = marks[-1]["end"]
        self._marked = (len(self._written), self._position)
        os.ftruncate(self._fd, 8 + self._reserved + self._position)

    def _bound(self) -> int:
        total = sum(TensorSpec("", shape, dtype).nbytes for dtype, shape in self._entries.values())
        entries = {key: _entry(dtype, shape, total, total) for key, (dtype, shape) in self._entries.items()}
        return len(_dump({"__metadata__": self._metadata, **entries}))


def _entry(dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _write_all(fd: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        done += os.write(fd, buffer[done : done + CHUNK])
