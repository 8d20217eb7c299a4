"""One size shared over all modules: which components it affords, and what is held until all spectra are known.

The rule is docs/algorithms.md, Budget: components in the order of their energy per parameter, ties in the order of modules, each
taken if it still fits. A component of a module costs its m + n numbers, twice where a tied head is written too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedlora_kernels.adapters.forms import written_numbers
from fedlora_kernels.adapters.model import ModuleSpec
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
    ``uniform``: all modules are padded to one rank, which they pay for. ``cap`` bounds every rank. ``targets`` names what modules
    are written together with, at one rank: their components are taken together; a module that is not named there is alone.
    """

    rule: str
    size: int
    costs: Mapping[str, int]
    keep_all: bool = True
    uniform: bool = False
    cap: int | None = None
    targets: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, budget: Budget, modules: Mapping[str, ModuleSpec], dtype: torch.dtype, **how: bool) -> Share:
        """The share of a budget for factors in ``dtype``. InputError where it is too small for any."""
        costs = {name: written_numbers(spec) * dtype.itemsize for name, spec in modules.items()}
        targets = {name: spec.form.target for name, spec in modules.items()}
        share = cls(str(budget), budget.nbytes, costs, cap=budget.cap, targets=targets, **how)
        prices = share._prices()
        share._require(sum(prices.values()) if share.keep_all else min(prices.values()))
        return share

    def ranks(self, spectra: Spectra) -> dict[str, int]:
        """Ranks of all modules, by name. InputError where the size affords none of them."""
        joint = self._joint(spectra)
        written = {target: price for target, price in self._prices().items() if self.keep_all or len(joint[target])}
        if not written:
            return dict.fromkeys(self.costs, 0)
        self._require(sum(written.values()) if self.keep_all or self.uniform else min(written.values()))
        common = dict.fromkeys(written, self._widest(written)) if self.uniform else self._greedy(joint)
        least = int(self.keep_all)
        return {name: max(least, min(common.get(self._target(name), 0), len(spectra[name]))) for name in self.costs}

    def most(self, spectra: Spectra) -> dict[str, int]:
        """What no module seen so far can exceed, whatever the spectra of the others are.

        The others only raise the energy per parameter at which a first component does not fit. From there on the room is less
        than the dearest component.
        """
        joint, prices = self._joint(spectra), self._prices()
        if self.uniform:
            written = {target: price for target, price in prices.items() if self.keep_all or len(joint.get(target, ()))}
            common = dict.fromkeys(joint, self._widest(written) if written else 1)
        else:
            names, costs, owner, room = self._candidates(joint)
            fitting = int(np.searchsorted(np.cumsum(costs[owner]), room, side="right"))
            taken = np.bincount(owner[:fitting], minlength=len(names)) + self.keep_all
            spare = (max(prices.values()) - 1) // costs
            common = dict(zip(names, (taken + spare).tolist(), strict=True))
        return {
            name: max(1, min(common.get(self._target(name), len(values)), len(values)))
            for name, values in spectra.items()
        }

    def _greedy(self, joint: Mapping[str, np.ndarray]) -> dict[str, int]:
        names, costs, owner, room = self._candidates(joint)
        spent = np.cumsum(costs[owner])
        fitting = int(np.searchsorted(spent, room, side="right"))
        taken = np.bincount(owner[:fitting], minlength=len(names)) + self.keep_all
        room -= int(spent[fitting - 1]) if fitting else 0
        for k in owner[fitting:].tolist():
            # what follows in the same target costs as much: each keeps a prefix
            if costs[k] <= room:
                room -= int(costs[k])
                taken[k] += 1
        return dict(zip(names, taken.tolist(), strict=True))

    def _candidates(self, joint: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray, np.ndarray, int]:
        """The targets, their costs, whose component is next (by number, the best first), and the bytes left for all these."""
        prices = self._prices()
        names = [target for target in prices if target in joint]
        first = int(self.keep_all)
        values = [joint[name][first : self.cap] for name in names]
        costs = np.array([prices[name] for name in names], dtype=np.int64)
        owner = np.repeat(np.arange(len(names)), [len(own) for own in values])
        # energy per parameter as fraction and exponent: squares of small values may leave the range of float64
        fraction, exponent = np.frexp(np.concatenate([*values, np.zeros(0)]))
        density, more = np.frexp(fraction * fraction / costs[owner])
        order = np.lexsort((-density, -(2 * exponent + more)))
        return names, costs, owner[order], self.size - first * sum(prices.values())

    def _widest(self, written: Mapping[str, int]) -> int:
        return min(self.size // sum(written.values()), self.cap or self.size)

    def _target(self, name: str) -> str:
        return self.targets.get(name, name)

    def _prices(self) -> dict[str, int]:
        """Bytes of one component of each target."""
        prices: dict[str, int] = {}
        for name, cost in self.costs.items():
            prices[self._target(name)] = prices.get(self._target(name), 0) + cost
        return prices

    def _joint(self, spectra: Spectra) -> dict[str, np.ndarray]:
        """What the components of each target weigh that is known whole: the roots of the sums of their squares."""
        members: dict[str, list[str]] = {}
        for name in self.costs:
            members.setdefault(self._target(name), []).append(name)
        return {
            target: _roots([np.asarray(spectra[name], dtype=np.float64) for name in names])
            for target, names in members.items()
            if all(name in spectra for name in names)
        }

    def _require(self, least: int) -> None:
        if self.size < least:
            what = "one component in each of them" if self.keep_all or self.uniform else "one component of the smallest"
            remedy = "" if not self.keep_all or self.uniform else ", or drop_zero=True to leave modules out"
            raise InputError(
                f"{self.rule}: {self.size} bytes for {len(self.costs)} modules; at least {least} needed, {what}. "
                f"Give a larger size or a narrower dtype{remedy}"
            )


def _roots(spectra: Sequence[np.ndarray]) -> np.ndarray:
    """Roots of the sums of squares, place by place, of which none leaves float64."""
    if len(spectra) == 1:
        return spectra[0]
    longest = max(len(values) for values in spectra)
    padded = np.stack([np.pad(values, (0, longest - len(values))) for values in spectra])
    roots: np.ndarray = np.hypot.reduce(padded, axis=0)
    return roots


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
