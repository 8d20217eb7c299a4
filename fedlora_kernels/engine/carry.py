"""What a survey keeps of each module for the second pass: in memory, and past a limit in a nameless temporary file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.adapters.safetensors import disc_errors

__all__ = ["Carry"]


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
        self._fd = -1
        self._end = 0

    def put(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a module, on the host."""
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

    def close(self) -> None:
        """Drop everything. Idempotent."""
        self._kept.clear()
        self._spilled.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _spill(self, tensor: Tensor) -> _Place:
        place = _Place(self._end, tuple(tensor.shape), tensor.dtype)
        with disc_errors(tempfile.gettempdir()):
            if self._fd < 0:
                self._fd, path = tempfile.mkstemp(prefix="fedlora-")
                os.unlink(path)
            done, buffer = 0, _bytes(tensor)
            while done < len(buffer):
                done += os.pwrite(self._fd, buffer[done:], place.offset + done)
        self._end += len(buffer)
        return place

    def _load(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        done, buffer = 0, _bytes(tensor)
        with disc_errors(tempfile.gettempdir()):
            while done < len(buffer):
                got = os.preadv(self._fd, [buffer[done:]], place.offset + done)
                if got == 0:
                    raise OSError(errno.EIO, "a temporary file was cut short")
                done += got
        return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
