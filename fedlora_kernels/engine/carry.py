"""What a survey keeps for the second pass: in memory, and past a limit in temporary files without a name."""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.adapters.safetensors import disc_errors

__all__ = ["Carry", "spilled"]


class _Place(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Carry:
    """Tensors by module and name. `put` keeps up to ``limit`` bytes in memory and spills the rest; RunError where the disc is full."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._spilled: dict[str, dict[str, _Place]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def put(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a module, on the host. What was put once is not put again before `clear`."""
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in host.values())
        if self._held + size <= self._limit:
            self._held += size
            # a copy: a view would keep the whole batch alive
            self._kept[module] = {name: tensor.clone() for name, tensor in host.items()}
        else:
            self._spilled[module] = {name: self._spill(tensor) for name, tensor in host.items()}

    def get(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module, by name; none where nothing was put."""
        if module in self._kept:
            return self._kept[module]
        return {name: self._load(place) for name, place in self._spilled.get(module, {}).items()}

    def clear(self) -> None:
        """Drop everything, and start anew."""
        self._kept.clear()
        self._spilled.clear()
        self._held = self._end = 0

    def close(self) -> None:
        """Drop everything, and the file with it. Idempotent."""
        self.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _spill(self, tensor: Tensor) -> _Place:
        place = _Place(self._end, tuple(tensor.shape), tensor.dtype)
        with disc_errors(tempfile.gettempdir()):
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="fedlora-", buffering=0)  # noqa: SIM115 - it lives as long as we do
            done, buffer = 0, _bytes(tensor)
            while done < len(buffer):
                done += os.pwrite(self._file.fileno(), buffer[done:], place.offset + done)
        self._end += len(buffer)
        return place

    def _load(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        assert self._file is not None
        done, buffer = 0, _bytes(tensor)
        with disc_errors(tempfile.gettempdir()):
            while done < len(buffer):
                got = os.preadv(self._file.fileno(), [buffer[done:]], place.offset + done)
                if got == 0:
                    raise OSError(errno.EIO, "a temporary file was cut short")
                done += got
        return tensor


def spilled(shape: tuple[int, ...], dtype: np.dtype[Any], limit: int) -> np.ndarray:
    """An array of zeros; one of more than ``limit`` bytes in a temporary file that is mapped.

    The system writes it out where it needs the memory. Nobody but this process knows the file, and its room is reserved first: RunError
    where the disc is full.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= limit:
        return np.zeros(shape, dtype)
    with disc_errors(tempfile.gettempdir()), tempfile.TemporaryFile(prefix="fedlora-") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return np.frombuffer(mmap.mmap(file.fileno(), size), dtype).reshape(shape)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
