"""One size shared over all modules: which components it affords, and what is held until all spectra are known.

The rule is docs/algorithms.md, Budget: components in the order of their energy per parameter, ties in the order of modules, each
taken if it still fits. A component of a module costs its m + n numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedlora_kernels.engine.carry import Carry
from fedlora_kernels.engine.delivery import ModuleOutput
from fedlora_kernels.engine.report import cut_row
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import Budget

__all__ = ["Held", "Share"]

Spectra = Mapping[str, Sequence[float]]
"""Singular values above the noise floor, descending, by module; none of a module whose update is zero."""


@dataclass(frozen=True)
class Share:
    """What ``size`` bytes afford: ``costs`` are the bytes of one component of each module, in canonical order.

    ``keep_all``: every module keeps at least one component; else some may be left out, as all are whose update is zero.
    ``uniform``: all modules are padded to one rank, which they pay for. ``cap`` bounds every rank.
    """

    rule: str
    size: int
    costs: Mapping[str, int]
    keep_all: bool = True
    uniform: bool = False
    cap: int | None = None

    @classmethod
    def of(cls, budget: Budget, parameters: Mapping[str, int], dtype: torch.dtype, **how: bool) -> Share:
        """The share of a budget for factors in ``dtype``, with m + n of each module; InputError where it is too small for any."""
        costs = {name: count * dtype.itemsize for name, count in parameters.items()}
        share = cls(str(budget), budget.nbytes, costs, cap=budget.cap, **how)
        share._require(sum(costs.values()) if share.keep_all else min(costs.values()))
        return share

    def ranks(self, spectra: Spectra) -> dict[str, int]:
        """Ranks of all modules, by name. InputError where the size affords none of them."""
        written = {name: cost for name, cost in self.costs.items() if self.keep_all or len(spectra[name])}
        if not written:
            return dict.fromkeys(self.costs, 0)
        self._require(sum(written.values()) if self.keep_all or self.uniform else min(written.values()))
        if self.uniform:
            widest = min(self.size // sum(written.values()), self.cap or self.size)
            return {name: min(widest, len(spectra[name])) or int(name in written) for name in self.costs}
        return self._greedy(spectra)

    def most(self, spectra: Spectra) -> dict[str, int]:
        """What no module seen so far can exceed, whatever the spectra of the others are.

        The others only raise the energy per parameter at which a first component does not fit. From there on the room is less
        than the dearest component.
        """
        if self.uniform:
            written = [cost for name, cost in self.costs.items() if self.keep_all or len(spectra.get(name, ()))]
            widest = self.size // sum(written) if written else 0
            return {name: max(1, min(widest, len(values))) for name, values in spectra.items()}
        names, owner, room = self._candidates(spectra)
        costs = np.array([self.costs[name] for name in names], dtype=np.int64)
        fitting = int(np.searchsorted(np.cumsum(costs[owner]), room, side="right"))
        taken = np.bincount(owner[:fitting], minlength=len(names)) + self.keep_all
        spare = (max(self.costs.values()) - 1) // costs
        return dict(zip(names, (taken + spare).tolist(), strict=True))

    def _greedy(self, spectra: Spectra) -> dict[str, int]:
        names, owner, room = self._candidates(spectra)
        costs = np.array([self.costs[name] for name in names], dtype=np.int64)
        spent = np.cumsum(costs[owner])
        fitting = int(np.searchsorted(spent, room, side="right"))
        taken = np.bincount(owner[:fitting], minlength=len(names)) + self.keep_all
        room -= int(spent[fitting - 1]) if fitting else 0
        for k in owner[fitting:].tolist():
            # what follows in the same module costs as much: each keeps a prefix
            if costs[k] <= room:
                room -= int(costs[k])
                taken[k] += 1
        return dict(zip(names, taken.tolist(), strict=True))

    def _candidates(self, spectra: Spectra) -> tuple[list[str], np.ndarray, int]:
        """The modules, whose component is next (their numbers, the best first), and the bytes that are left for all these."""
        names = [name for name in self.costs if name in spectra]
        first = int(self.keep_all)
        values = [np.asarray(spectra[name][first : self.cap], dtype=np.float64) for name in names]
        owner = np.repeat(np.arange(len(names)), [len(own) for own in values])
        # energy per parameter as fraction and exponent: squares of small values may leave the range of float64
        fraction, exponent = np.frexp(np.concatenate([*values, np.zeros(0)]))
        price = np.array([self.costs[name] for name in names], dtype=np.float64)[owner]
        density, more = np.frexp(fraction * fraction / price)
        order = np.lexsort((-density, -(2 * exponent + more)))
        room = self.size - first * sum(self.costs.values())
        return names, owner[order], room

    def _require(self, least: int) -> None:
        if self.size < least:
            what = "one component in each of them" if self.keep_all or self.uniform else "one component of the smallest"
            remedy = "" if not self.keep_all or self.uniform else ", or drop_zero=True to leave modules out"
            raise InputError(
                f"{self.rule}: {self.size} bytes for {len(self.costs)} modules; at least {least} needed, {what}. "
                f"Give a larger size or a narrower dtype{remedy}"
            )


class Held:
    """A sink for modules that keeps of each what it may need, and `deliver`s them cut to their share when all are there."""

    def __init__(self, share: Share, carry: Carry) -> None:
        self._share, self._carry = share, carry
        self._spectra: dict[str, Sequence[float]] = {}

    def add(self, modules: Sequence[ModuleOutput]) -> None:
        """Keep the pairs, as far as the modules seen so far let them count."""
        for module in modules:
            if module.spectrum is None:
                raise InputError(f"{self._share.rule}: the method tells no spectra; a rule for one matrix needed")
            self._spectra[module.name] = module.spectrum
        most = self._share.most(self._spectra)
        for module in modules:
            if module.common is not None:
                B, A = module.common
                self._carry.put(module.name, {"B": B[:, : most[module.name]], "A": A[: most[module.name]]})

    def deliver(
        self, rows: Sequence[dict[str, Any]], sink: Callable[[Sequence[ModuleOutput]], None]
    ) -> list[dict[str, Any]]:
        """Give the pairs to ``sink`` in canonical order, cut; return the rows cut likewise."""
        ranks = self._share.ranks(self._spectra)
        for name, rank in ranks.items():
            pair = self._carry.get(name)
            if pair and rank:
                sink([ModuleOutput(name, common=(pair["B"][:, :rank], pair["A"][:rank]))])
        return [cut_row(row, ranks[row["name"]]) if row["singular_values"] else row for row in rows]
