"""Who computes: the registry of backends, and the only place where one is chosen.

``auto`` walks `NAMES` in order and takes the first backend that is available here and declares that it serves the call.
Passing one by is a fallback: logged once per operation and reason on the logger ``fedlora_kernels``, listed by `fallbacks`
and caught by `record`. A backend named explicitly runs or raises.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, cast

import torch

from fedlora_kernels.backends.contract import OPS, Backend
from fedlora_kernels.errors import BackendError, InputError

__all__ = ["NAMES", "Choice", "Fallback", "choose", "fallbacks", "get", "names", "record", "status"]

NAMES = ("cuda", "cpu", "torch", "reference")
"""Backends in the order in which ``auto`` asks them; each is the object ``BACKEND`` of the module of that name here."""

_HOME = {"cuda": "cuda", "cpu": "cpu"}
"""Backends that take tensors on one type of device: elsewhere nobody expects them, and passing them by is no fallback."""

_log = logging.getLogger("fedlora_kernels")


class Fallback(NamedTuple):
    """A backend that ``auto`` passed by for an operation, and why."""

    op: str
    backend: str
    reason: str


class Choice(NamedTuple):
    """The backend that ran an operation."""

    op: str
    backend: str


_FALLBACKS: dict[Fallback, None] = {}
_RECORD: ContextVar[dict[Choice | Fallback, None] | None] = ContextVar("fedlora_backend_record", default=None)


def names() -> tuple[str, ...]:
    """Return the names of all backends, in the order of ``auto``."""
    return NAMES


@functools.cache
def _load(name: str) -> tuple[Backend | None, bool, str]:
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except (ImportError, OSError) as error:
        return None, False, f"cannot be loaded: {error}"
    backend = cast(Backend, module.BACKEND)
    return backend, *backend.available()


def _known(name: str) -> str:
    if name not in NAMES:
        raise InputError(f"unknown backend {name!r}; known backends: auto, {', '.join(NAMES)}")
    return name


def get(name: str) -> Backend:
    """Return the backend of that name. InputError if there is none, BackendError if it cannot run here."""
    backend, available, reason = _load(_known(name))
    if backend is None or not available:
        raise BackendError(f"backend {name!r} cannot run here: {reason}. Use backend='auto' or see `fedlora env`")
    return backend


def status() -> dict[str, tuple[bool, str]]:
    """Return for every backend whether it can run here, and why (not)."""
    return {name: _load(name)[1:] for name in NAMES}


def fallbacks() -> list[Fallback]:
    """Return every fallback of this process so far, each once, oldest first."""
    return list(_FALLBACKS)


@contextmanager
def record() -> Iterator[dict[Choice | Fallback, None]]:
    """Collect the choices and fallbacks made inside the ``with`` block by this thread, each once, in order."""
    seen: dict[Choice | Fallback, None] = {}
    token = _RECORD.set(seen)
    try:
        yield seen
    finally:
        _RECORD.reset(token)


def _note(entry: Choice | Fallback) -> None:
    if (seen := _RECORD.get()) is not None:
        seen[entry] = None
    if isinstance(entry, Fallback) and entry not in _FALLBACKS:
        _FALLBACKS[entry] = None
        _log.info("%s: backend %s passed by: %s", *entry)


def choose(op: str, requested: str, dtype: torch.dtype, device: torch.device, sizes: Mapping[str, int]) -> Backend:
    """Return the backend that runs ``op`` for inputs of this dtype, device and size.

    Args:
        op: one of `contract.OPS`.
        requested: a name of `NAMES`, or ``auto``, for which the environment variable FEDLORA_BACKEND may name one.
        dtype: common dtype of the inputs.
        device: the device that holds all inputs.
        sizes: largest sizes of the call, keys as in `contract.Backend.serves`.

    Raises:
        InputError: no backend has that name.
        BackendError: the named backend cannot run here or does not serve the call, or under ``auto`` none does.
    """
    if op not in OPS:
        raise ValueError(f"unknown operation {op!r}")
    if requested == "auto":
        requested = os.environ.get("FEDLORA_BACKEND") or "auto"
    if requested != "auto":
        backend = get(requested)
        serves, reason = backend.serves(op, dtype, device, sizes)
        if not serves:
            raise BackendError(f"backend {requested!r} does not serve this {op}: {reason}. Use backend='auto'")
        _note(Choice(op, requested))
        return backend
    passed = []
    for name in NAMES:
        if _HOME.get(name, device.type) != device.type:
            continue
        candidate, serves, reason = _load(name)
        if candidate is not None and serves:
            serves, reason = candidate.serves(op, dtype, device, sizes)
            if serves:
                _note(Choice(op, name))
                return candidate
        _note(Fallback(op, name, reason))
        passed.append(f"{name}: {reason}")
    raise BackendError(f"no backend serves this {op} ({'; '.join(passed)})")
