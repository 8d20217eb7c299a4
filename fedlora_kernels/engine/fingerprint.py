"""What tells one aggregation from another: only the very same one may go on where a run was ended."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch

from fedlora_kernels import backends
from fedlora_kernels._version import __version__
from fedlora_kernels.backends.native.threads import thread_count
from fedlora_kernels.engine.clients import Client
from fedlora_kernels.engine.settings import Settings

__all__ = ["fingerprint"]

LEFT_OUT = ("progress", "state", "client_state", "read")
"""Settings that change no result, or that are told in words of their own."""
TOLD = ("config", "init_factors")
"""Options of reading that each client tells of itself: the same set, or the same start, may have another text in another process."""


def fingerprint(settings: Settings, roster: Sequence[Client]) -> str:
    """A hash of everything that a result depends on, to the last bit.

    Versions, backends and threads (another order of sums), every setting, and of each client its name, weight, configuration and
    the size, time of change and header of its files, or the content of its tensors in memory.
    """
    read = settings.read
    threads = [thread_count(), torch.get_num_threads()]
    parts = {
        "version": [__version__, torch.__version__, torch.backends.cpu.get_cpu_capability(), threads],
        "backends": [os.environ.get("FEDLORA_BACKEND"), backends.status()],
        "settings": {
            item.name: repr(getattr(settings, item.name))
            for item in dataclasses.fields(settings)
            if item.name not in LEFT_OUT
        },
        "read": {
            item.name: repr(getattr(read, item.name)) for item in dataclasses.fields(read) if item.name not in TOLD
        },
        "clients": [_client(client) for client in roster],
        "state": None if settings.state is None else settings.state.fingerprint(),
        "client_state": settings.client_state,
    }
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _client(client: Client) -> list[Any]:
    adapter = client.adapter
    content = [client.reason] if adapter is None else [adapter.source.fingerprint(), dict(adapter.config)]
    return [client.name, client.weight, *content]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)
