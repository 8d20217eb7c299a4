"""The clients that take part, as tables over modules and clients: who owns what, at which rank, scale and weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedlora_kernels.adapters.model import Adapter, ModuleSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.clients import PRESENT, Client, normalised
from fedlora_kernels.errors import WeightError

__all__ = ["Cohort"]


@dataclass
class Cohort:
    """K clients that take part, and the L modules of the output.

    ``weights`` are the clients' after normalisation, ``positions`` theirs in the caller's order, ``modules`` the names in
    canonical order. ``factors`` (L, K) multiply scales (clipping); ``table`` (L, K) are weights decided module by module, in
    place of the clients'. ``index`` gives the row of a module; ``owns`` (L, K) and
    ``ranks`` (L, K; 0 where a client lacks the module) say what the clients have, ``trained`` what they trained of it.
    """

    clients: Sequence[Client]
    positions: Sequence[int]
    weights: list[float]
    modules: Sequence[str]
    missing: str
    factors: np.ndarray | None = None
    table: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.adapters: list[Adapter] = [client.opened for client in self.clients]
        self.index = {name: row for row, name in enumerate(self.modules)}
        specs = [[a.modules.get(name) for a in self.adapters] for name in self.modules]
        self.ranks = [[spec.rank if spec else 0 for spec in row] for row in specs]
        self.trained = [[spec.trained if spec else 0 for spec in row] for row in specs]
        self.owns = np.array([[spec is not None for spec in row] for row in specs])
        self._scale = np.array([[spec.scale if spec else 0.0 for spec in row] for row in specs])

    @classmethod
    def of(cls, roster: Sequence[Client], modules: Sequence[str], *, normalize: bool, missing: str) -> Cohort:
        """The clients of ``roster`` that take part."""
        positions = [k for k, client in enumerate(roster) if client.status in PRESENT]
        clients = [roster[k] for k in positions]
        weights = list(normalised([client.weight for client in clients], normalize))
        return cls(clients, positions, weights, modules, missing)

    @property
    def widest(self) -> torch.dtype:
        """float64 if a factor of a client is, else float32."""
        specs = (
            spec for adapter in self.adapters for module in adapter.modules.values() for spec in (module.B, module.A)
        )
        return torch.float64 if any(spec.dtype == torch.float64 for spec in specs) else torch.float32

    def chosen(self, k: int, name: str) -> bool:
        """Whether client k takes part in a module that it owns."""
        return self.table is None or bool(self.table[self.index[name], k] != 0.0)

    def reads(self, k: int, name: str) -> bool:
        """Whether client k adds anything to the product of a module."""
        return bool(self._scale[self.index[name], k] != 0.0)

    def narrowed(self, part: Cohort) -> Cohort:
        """``part`` of the clients and modules, with the weights and factors decided here."""
        rows, keep = self.places(part)
        part.weights = [self.weights[k] for k in keep]
        if self.factors is not None:
            part.factors = self.factors[np.ix_(rows, keep)]
        return part

    def scales(self, rows: Sequence[int]) -> np.ndarray:
        """(N, K) scales s_k, clipping included; 0 where a client lacks the module."""
        own = self.own_scales(rows)
        return own if self.factors is None else own * self.factors[rows]

    def own_scales(self, rows: Sequence[int]) -> np.ndarray:
        """(N, K) scales s_k as the clients sent them; 0 where a client lacks the module."""
        scale: np.ndarray = self._scale[rows]
        return scale

    def module_weights(self, rows: Sequence[int]) -> np.ndarray:
        """(N, K) weights: all clients', or the owners' brought to the same sum where missing modules renormalise."""
        if self.table is not None:
            return self.table[list(rows)]
        weights = np.tile(np.asarray(self.weights, dtype=np.float64), (len(rows), 1))
        if self.missing != "renormalize":
            return weights
        whole = math.fsum(self.weights)
        for i, row in enumerate(rows):
            owns = self.owns[row]
            if not owns.all():
                share = math.fsum(weights[i, owns])
                if share == 0.0:
                    name = printable(self.modules[row])
                    raise WeightError(
                        f"module {name!r}: the weights of its owners sum to 0; missing='zero' or other weights needed"
                    )
                weights[i] = np.where(owns, weights[i] * (whole / share), 0.0)
        return weights

    def spec(self, name: str) -> ModuleSpec:
        """A module as its first owner has it; all owners agree on shape and form."""
        return next(adapter.modules[name] for adapter in self.adapters if name in adapter.modules)

    def shape(self, name: str) -> tuple[int, int]:
        """(m, n) of a module."""
        spec = self.spec(name)
        return spec.m, spec.n

    def places(self, part: Cohort) -> tuple[list[int], list[int]]:
        """The rows of the modules and the numbers of the clients of ``part``, in its order."""
        number = {position: k for k, position in enumerate(self.positions)}
        return [self.index[name] for name in part.modules], [number[position] for position in part.positions]
