"""The clients of an aggregation: opened, named, weighted."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora_kernels.adapters.folder import check_inputs
from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter, open_initial
from fedlora_kernels.adapters.shards import count_files
from fedlora_kernels.adapters.validation import Failure, failure_text
from fedlora_kernels.errors import FedLoRAError, FormatError, InputError, LimitError, WeightError

__all__ = ["PRESENT", "Client", "check_apart", "check_unchanged", "normalised", "open_clients", "present"]

SPARE_FILES = 64
"""Open files beside those of the clients."""
PRESENT = ("used", "clipped")
"""States of a client that takes part; the others are "absent" (weight 0), "dropped" and "rejected" (by a robust rule)."""


@dataclass
class Client:
    """One client as the caller gave it; ``status`` is used, absent (weight 0), dropped, rejected or clipped."""

    name: str
    source: str
    weight: float
    adapter: Adapter | None = None
    failures: list[Failure | FedLoRAError] = field(default_factory=list)
    status: str = "used"
    norm: float | None = None
    factor: float = 1.0
    owned: bool = False
    folder: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the client was dropped."""
        return "; ".join(failure_text(self.failures).splitlines()) or None

    @property
    def drop_text(self) -> str:
        """That and why the client was dropped, its name once."""
        who = f"client {printable(self.name)!r}"
        reasons = [
            line.removeprefix(f"{who}: ").removeprefix(f"{who}, ") for line in failure_text(self.failures).splitlines()
        ]
        return f"{who} was dropped: {'; '.join(reasons)}"

    @property
    def opened(self) -> Adapter:
        """The adapter of a client that could be opened."""
        assert self.adapter is not None
        return self.adapter

    def row(self, weight: float) -> dict[str, Any]:
        """The client's row of the report; ``weight`` is what it counted with."""
        ranks = [spec.trained for spec in self.adapter.modules.values()] if self.adapter else []
        return {
            "name": self.name,
            "source": self.source,
            "weight": weight,
            "status": self.status,
            "reason": self.reason,
            "rank_min": min(ranks, default=None),
            "rank_max": max(ranks, default=None),
            "bytes": self.adapter.nbytes if self.adapter else None,
            "norm": self.norm,
            "factor": self.factor,
            "folder": self.folder,
        }

    def close(self) -> None:
        """Close the adapter if it was opened here."""
        if self.owned and self.adapter is not None:
            self.adapter.close()


def open_clients(
    clients: Any, weights: Any, *, normalize: bool, read: ReadOptions, written: bool = False
) -> list[Client]:
    """Open every client; one that cannot be read carries its failure. ``written``: each will have a file of its own to write.

    Raises InputError for no clients or something that is no collection of clients, WeightError for wrong weights.
    """
    named = _named(clients)
    if len(named) > read.limits.clients:
        raise read.limits.over("clients", len(named))
    values = _weights(weights, [name for name, _ in named], normalize)
    paths = [source for _, source in named if isinstance(source, (str, os.PathLike))]
    _allow_files(len(named), sum(map(count_files, paths)) + written * len(named))
    # one for all: each client would open it again
    read = dataclasses.replace(read, init_factors=open_initial(read.init_factors, read))
    opened: list[Client] = []
    for (name, source), weight in zip(named, values, strict=True):
        client = Client(name, _source_text(source), weight, status="used" if weight != 0.0 else "absent")
        client.owned = not isinstance(source, Adapter)
        try:
            client.adapter = open_adapter(source, read, name=name)
        except InputError as error:
            client.failures.append(error)
        except BaseException:
            for done in opened:
                done.close()
            raise
        opened.append(client)
    return opened


def check_apart(roster: Sequence[Client], out: str | os.PathLike[str], read: ReadOptions | None = None) -> None:
    """Raise InputError where the output would replace a client, or what clients started from."""
    sources = {f"client {printable(client.name)!r}": client.source for client in roster}
    check_inputs(out, {**sources, "init_factors": None if read is None else read.init_factors})


def check_unchanged(clients: Sequence[Client]) -> None:
    """Raise FormatError where the file of a client was written while it was being read."""
    for client in clients:
        try:
            client.opened.source.check_unchanged()
        except FormatError as error:
            raise FormatError(f"client {printable(client.name)!r}: {error}") from None


def _allow_files(clients: int, count: int) -> None:
    """Make room for the ``count`` open files of the clients: a limit of this process must not look like a client's fault."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count + SPARE_FILES if os.path.isdir("/proc/self/fd") else count + 1024
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise LimitError(
            f"{clients} clients need {needed} open files; the system allows {hard}. Raise it (ulimit -n), or aggregate in two levels"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _named(clients: Any) -> list[tuple[str, Any]]:
    if isinstance(clients, Mapping):
        pairs = _unique([(str(name), source) for name, source in clients.items()])
    elif isinstance(clients, (str, os.PathLike, Adapter)) or not isinstance(clients, Sequence):
        found = type(clients).__name__
        raise InputError(
            f"clients is of type {found}; a list of folders, adapters or (state_dict, config) pairs, or a mapping by name, needed"
        )
    else:
        pairs = _unique([(_name(source, k), source) for k, source in enumerate(clients)])
    if not pairs:
        raise InputError("no clients; at least one needed")
    return pairs


def _name(source: Any, position: int) -> str:
    if isinstance(source, Adapter):
        source = source.label
    if isinstance(source, (str, os.PathLike)) and source != "":
        return Path(os.path.abspath(os.fspath(source))).name or f"client_{position}"
    return f"client_{position}"


def _unique(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    taken = {name for name, _ in pairs}
    seen: set[str] = set()
    following: dict[str, int] = {}
    result = []
    for name, source in pairs:
        unique, number = name, following.get(name, 2)
        while unique in seen or (unique != name and unique in taken):
            unique, number = f"{name}_{number}", number + 1
        following[name] = number
        seen.add(unique)
        result.append((unique, source))
    return result


def _source_text(source: Any) -> str:
    if isinstance(source, Adapter):
        return source.label
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "state dict"


def _weights(weights: Any, names: Sequence[str], normalize: bool) -> list[float]:
    """Return the weights as floats, 1 for each client where None. WeightError names the client and its weight."""
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, Tensor) or hasattr(weights, "tolist"):
        weights = weights.tolist()
    if isinstance(weights, (str, Mapping)) or not isinstance(weights, Sequence):
        raise WeightError(
            f"weights is of type {type(weights).__name__}; a list of {len(names)} numbers, one per client, needed"
        )
    if len(weights) != len(names):
        raise WeightError(f"{len(weights)} weights for {len(names)} clients; one per client needed, in the same order")
    values = [_weight(value, name, normalize) for value, name in zip(weights, names, strict=True)]
    if not any(values):
        raise WeightError(f"weights are all 0; client {printable(names[0])!r} or another one needs a weight above 0")
    return values


def _weight(value: Any, name: str, normalize: bool) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise WeightError(
            f"client {printable(name)!r}: weight {value!r} is no number; a finite number needed"
        ) from None
    if not math.isfinite(number):
        raise WeightError(f"client {printable(name)!r}: weight {number}; a finite number needed")
    if normalize and number < 0.0:
        raise WeightError(
            f"client {printable(name)!r}: weight {number:g} is negative; at least 0 needed. normalize=False takes any sign"
        )
    return number


def normalised(weights: Sequence[float], normalize: bool) -> list[float]:
    """Weights divided by their sum; as they are without ``normalize``."""
    if not normalize:
        return list(weights)
    # scaled by a power of two first, which is exact: a sum of weights near the largest float would overflow
    exponent = math.frexp(max(weights))[1]
    scaled = [math.ldexp(weight, -exponent) for weight in weights]
    total = math.fsum(scaled)
    return [weight / total for weight in scaled]


def present(roster: Sequence[Client]) -> list[Client]:
    """The clients that take part, in order."""
    return [client for client in roster if client.status in PRESENT]
