"""Safetensors files, written as a stream: tensors are appended as they come, the header is filled in last."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedlora_kernels.adapters.model import TensorSpec
from fedlora_kernels.adapters.safetensors import CHUNK, DTYPES, disc_errors
from fedlora_kernels.adapters.writeback import Writeback
from fedlora_kernels.errors import InputError

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

    Failures of the disc raise RunError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        spare: int = 8192,
    ) -> None:
        self.path = os.fspath(path)
        self._entries = dict(entries)
        self._metadata = {"format": "pt", **(metadata or {})}
        self._written: dict[str, dict[str, Any]] = {}
        self._position = 0
        self._reserved = self._bound() + spare
        self._reserved += -self._reserved % 8
        with disc_errors(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.lseek(self._fd, 8 + self._reserved, os.SEEK_SET)
        self._writeback = Writeback(self._fd, 0)

    def announce(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announce a tensor after the start; its entry takes from ``spare``."""
        self._entries[key] = (dtype, shape)

    def add(self, key: str, tensor: Tensor) -> None:
        """Append a tensor. It must be announced in ``entries``, of that dtype and of no larger shape, and come once."""
        dtype, bound = self._entries[key]
        shape = tuple(tensor.shape)
        fits = len(shape) == len(bound) and all(size <= limit for size, limit in zip(shape, bound, strict=True))
        if key in self._written or tensor.dtype != dtype or not fits:
            raise ValueError(
                f"{key}: {tensor.dtype} {shape} does not fit the announced {dtype} {bound}, or came before"
            )
        data = tensor.detach().to("cpu").contiguous().reshape(-1)
        size = data.numel() * dtype.itemsize
        if size:
            with disc_errors(self.path):
                _write_all(self._fd, data.view(torch.uint8).numpy().data)
        self._written[key] = _entry(dtype, shape, self._position, self._position + size)
        self._position += size
        self._writeback.reached(8 + self._reserved + self._position)

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
