"""What FedTreeLoRA settles for a whole federation: clusters per layer and shares per client, remembered and recalled."""

from __future__ import annotations

import dataclasses
import json
import numbers
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.errors import InputError
from fedlora_kernels.methods.contract import Memory
from fedlora_kernels.methods.layers import layers_of
from fedlora_kernels.text import harmless

__all__ = ["Expert", "Experts", "TreePlan", "experts", "quoted"]


@dataclass(frozen=True)
class TreePlan:
    """Clusters and shares of N clients, who need not all be present.

    ``layer`` (L,) is the layer of each module, ``labels`` (layers, N) the cluster of each client, numbered from 0, ``lam`` (L, N)
    float64 the share of its cluster pair. ``present`` (K,) are the clients of this round, in the order of the census.
    """

    clients: tuple[str, ...]
    modules: tuple[str, ...]
    layers: tuple[str, ...]
    layer: np.ndarray
    labels: np.ndarray
    lam: np.ndarray
    present: np.ndarray

    @classmethod
    def recall(cls, memory: Memory) -> TreePlan:
        """The plan that `memory` kept, with all clients present. InputError where it holds none, or one that contradicts itself."""
        try:
            clients, modules = (tuple(json.loads(memory.facts[name])) for name in ("clients", "modules"))
            if not all(isinstance(name, str) for name in (*clients, *modules)):
                raise TypeError
            labels = memory.tensors["labels"].cpu().numpy().astype(np.int64)
            lam = memory.tensors["lam"].cpu().numpy().astype(np.float64)
        except (KeyError, TypeError, ValueError):
            raise InputError("fedtree: previous holds no tree; the state of a fedtree result is needed") from None
        layers, layer = layers_of(modules)
        N = len(clients)
        fits = labels.shape == (len(layers), N) and lam.shape == (len(modules), N)
        if not fits or not ((labels >= 0) & (labels < N)).all() or not ((lam >= 0.0) & (lam <= 1.0)).all():
            raise InputError(
                "fedtree: the tree in previous contradicts itself; the state of a fedtree result is needed"
            )
        return cls(clients, modules, layers, layer, labels, lam, np.arange(N))

    def memory(self) -> Memory:
        """The plan as tensors and text."""
        tensors = {"labels": torch.from_numpy(self.labels), "lam": torch.from_numpy(self.lam)}
        return Memory(tensors, {"clients": json.dumps(self.clients), "modules": json.dumps(self.modules)})

    @cached_property
    def row(self) -> dict[str, int]:
        """The place of each module."""
        return {module: i for i, module in enumerate(self.modules)}

    @cached_property
    def place(self) -> dict[str, int]:
        """The place of each client."""
        return {client: k for k, client in enumerate(self.clients)}

    @cached_property
    def cuts(self) -> np.ndarray:
        """Number of clusters of each layer, (layers,)."""
        counts: np.ndarray = self.labels.max(1) + 1
        return counts

    def attended(self, clients: Sequence[str], modules: Sequence[str]) -> TreePlan:
        """The plan in a round of ``clients`` and ``modules``. InputError names the one that the tree does not know."""
        for client in clients:
            if client not in self.place:
                raise InputError(
                    f"client {quoted(client)}: not in the tree, which round 0 settled for {_listed(self.clients)}; method "
                    "'fedtree' needs the clients of round 0. Leave the client out, or start again with round=0 and all clients"
                )
        for module in modules:
            if module not in self.row:
                raise InputError(
                    f"module {quoted(module)}: not in the tree, which round 0 settled; method 'fedtree' needs the modules of "
                    "round 0. Leave the module out, or start again with round=0"
                )
        return dataclasses.replace(self, present=np.array([self.place[client] for client in clients], dtype=np.int64))

    def reported(self, client_state: Mapping[str, Any] | None) -> TreePlan:
        """The plan with the shares that clients report: a number, or numbers in [0, 1] by module or layer.

        A module stands above its layer. Where a layer is one cluster, nobody is outside of it and the share is 1 whatever is
        reported. InputError names the client and the module.
        """
        lam = self.lam.copy()
        if client_state is not None and not isinstance(client_state, Mapping):
            kind = type(client_state).__name__
            raise InputError(
                f"fedtree: client_state is of type {kind}; a mapping from client names to numbers in [0, 1] is needed"
            )
        for client, value in (client_state or {}).items():
            if client not in self.place:
                known = _listed(self.clients)
                raise InputError(
                    f"client_state: no client {quoted(client)} in the tree; method 'fedtree' knows {known}"
                )
            self._report(lam[:, self.place[client]], value, f"client_state of client {quoted(client)}")
        lam[self.cuts[self.layer] == 1] = 1.0
        return dataclasses.replace(self, lam=lam)

    def _report(self, lam: np.ndarray, value: Any, where: str) -> None:
        """Write what one client reports into its ``lam`` (L,)."""
        if not isinstance(value, Mapping):
            lam[:] = _share(value, where)
            return
        for name, share in sorted(value.items(), key=lambda item: item[0] in self.row):  # modules last
            rows = self._rows(name)
            if not rows:
                layers = _listed(self.layers)
                raise InputError(f"{where}: {quoted(name)} is no module and no layer; layers are {layers}")
            lam[rows] = _share(share, f"{where}, module {quoted(name)}")

    def _rows(self, name: object) -> list[int]:
        """The modules that a name stands for: one of that name, or those of a layer, named by text or number."""
        if name in self.row:
            return [self.row[str(name)]]
        if isinstance(name, bool) or str(name) not in self.layers:
            return []
        return [int(i) for i in np.flatnonzero(self.layer == self.layers.index(str(name)))]


class Expert(NamedTuple):
    """One pair of one module: ``B`` (m, r) with the scale folded in, ``A`` (r, n)."""

    B: Tensor
    A: Tensor


class Experts(NamedTuple):
    """What one client mixes in one module; ``outside`` is None where nobody is outside its cluster, ``lam`` the cluster's share."""

    cluster: Expert
    outside: Expert | None
    lam: float


class Remembered(Protocol):
    """What `experts` reads of a round: tensors keyed ``<module>.<name>`` and the memory."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The method's tensors of all modules."""

    @property
    def memory(self) -> Memory | None:
        """What the method remembers of the whole model."""


def experts(state: Remembered, client: str) -> dict[str, Experts]:
    """The cluster pair and the external pair of ``client``, unmixed, for each module: what it goes on training from.

    The mixed pair of a client cannot be taken apart where its share is 0 or 1; the state can. The client need not have been
    present. B holds the scale: a client that trains at scale s divides B by s.

    Args:
        state: ``Result.state`` of a fedtree result, or anything with its ``tensors`` and ``memory``.
        client: the client's name in round 0.

    Raises:
        InputError: the state is not that of this method, or does not know the client.
    """
    if state.memory is None:
        raise InputError("experts: the state holds no memory; the state of a fedtree result is needed")
    plan = TreePlan.recall(state.memory)
    if client not in plan.place:
        raise InputError(f"experts: no client {quoted(client)}; clients: {_listed(plan.clients)}")
    k = plan.place[client]
    held = set(state.tensors)
    found = {}
    for module, layer, lam in zip(plan.modules, plan.layer, plan.lam[:, k], strict=True):
        label = int(plan.labels[layer, k])
        if f"{module}.cluster_B" in held:
            outside = _expert(state, f"{module}.outside", label) if f"{module}.outside_B" in held else None
            found[module] = Experts(_expert(state, f"{module}.cluster", label), outside, float(lam))
    return found


def _expert(state: Remembered, which: str, label: int) -> Expert:
    return Expert(state.tensors[f"{which}_B"][label], state.tensors[f"{which}_A"][label])


def quoted(name: object) -> str:
    """A name as it stands in a message."""
    return repr(harmless(name))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(quoted, names[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _share(value: Any, where: str) -> float:
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    if not real or not 0.0 <= value <= 1.0:
        raise InputError(f"{where}: {harmless(reprlib.repr(value))}; a number lam with 0 <= lam <= 1 is needed")
    return float(value)
