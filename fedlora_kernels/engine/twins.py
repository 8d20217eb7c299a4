"""Clients with the same content under different names: nearly always one adapter that was given twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch

from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.clients import Client

__all__ = ["same_content"]

T = TypeVar("T")


def same_content(clients: Sequence[Client]) -> list[str]:
    """Texts on clients whose tensors are the same, bit by bit.

    Only clients whose headers are alike are looked at, and of these the smallest factor first: what differs there, as everything
    that was trained does, is not read any further.
    """
    texts = []
    for alike in _shared(clients, lambda client: _header(client.opened)):
        for close in _shared(alike, lambda client: _digest(client.opened, [_smallest(client.opened)])):
            for same in _shared(close, lambda client: _digest(client.opened, client.opened.source.tensors)):
                texts += [
                    f"clients {printable(same[0].name)!r} and {printable(other.name)!r} have the same content; it counts twice"
                    for other in same[1:]
                    if _place(other) != _place(same[0])
                ]
    return texts


def _place(client: Client) -> Hashable:
    """Where a client's tensors are: the header says already that a folder was given twice."""
    path = getattr(client.opened.source, "path", None)
    return os.path.realpath(path) if path else id(client.opened.source)


def _shared(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The groups of at least two with an equal key, in order."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def _header(adapter: Adapter) -> Hashable:
    specs = ((name, spec.signature, spec.rank, spec.scale, spec.B.dtype) for name, spec in adapter.modules.items())
    return tuple(sorted(specs, key=lambda spec: spec[0])), frozenset(adapter.extras)


def _smallest(adapter: Adapter) -> str:
    """The key of the smallest lora_B: lora_A may be frozen, and equal in all clients."""
    return min((spec.B for spec in adapter.modules.values()), key=lambda stored: stored.nbytes).key


def _digest(adapter: Adapter, keys: Iterable[str]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for key in sorted(keys):
        tensor = adapter.source.read(key).detach().cpu().contiguous()
        found.update(f"{key}\0{tuple(tensor.shape)}".encode(errors="surrogatepass"))
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.digest()
