"""Whose update points elsewhere than those of the others: one decision for inspections, comparisons and every run."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.methods.contract import Group
from fedlora_kernels.methods.factors import client_gram
from fedlora_kernels.methods.robust import NOISE

__all__ = ["FEWEST", "Alignment", "aloof", "beside_others", "looked_at", "sum_of_others"]

FEWEST = 3
"""Clients of which one can point elsewhere."""
ALIKE = 0.2
"""Where clients agree so much with the rest, by the median, one that does not stands out."""
ALOOF = 0.25
"""Share of that median below which a client's cosine with the rest stands out."""
EVERY = 16
"""One module in so many is looked at beside the combination: its Gram takes up to a third of what its exact sum does."""
AT_LEAST = 8
"""Modules of which all are looked at."""
LARGEST = 2.0**300
"""Inner products and weights from here on are left out: what is made of them must stay within float64."""
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
NARROW = 256
"""Stacked ranks of no consequence, whatever the layer."""


class Alignment:
    """Gathers inner products of the updates of ``clients``, module by module in any order: their norms and cosines with the others.

    Of a client count the modules in which its update is not zero: there the others are its rest, and lacking a module is no other
    direction. ``modules`` of ``every`` have been looked at.
    """

    def __init__(self, clients: Sequence[str], every: int = 0) -> None:
        K = len(clients)
        self.clients, self.every, self.modules = clients, every, 0
        # <D_k, R_k>, |D_k|^2, |R_k|^2 and what of it rounding may be
        self._sums = {name: np.zeros(K) for name in ("inner", "own", "rest", "noise")}

    def add(self, gram: np.ndarray, weight: np.ndarray) -> None:
        """Add a module: inner products (K, K) of the scaled updates, weights (K,). One whose squares leave float64 is passed over."""
        largest = np.array([np.abs(gram).max(initial=0.0), np.abs(weight).max(initial=0.0)])
        if not bool((largest < LARGEST).all()):
            return
        self.modules += 1
        inner, rest, terms = beside_others(gram, weight)
        own = gram.diagonal()
        new = {"inner": inner, "own": own, "rest": rest, "noise": NOISE * terms**2}
        for name, values in new.items():
            self._sums[name] += np.where(own > 0.0, values, 0.0)

    def add_group(self, group: Group, chosen: Sequence[int]) -> None:
        """Add the modules ``chosen`` of a group, by their numbers."""
        part = group if len(chosen) == group.batch else _picked(group, chosen)
        for gram, weight in zip(client_gram(part).numpy(), part.weight.numpy(), strict=True):
            self.add(gram, weight)

    @property
    def norms(self) -> np.ndarray:
        """Norms of the updates, (K,)."""
        norms: np.ndarray = np.sqrt(np.maximum(self._sums["own"], 0.0))
        return norms

    @property
    def cosines(self) -> np.ndarray:
        """Cosine of each update with the sum of the others, (K,): 0 where rounding hides that, NaN for an update of zero."""
        rest, norms = self._sums["rest"], self.norms
        rest = np.sqrt(np.where(rest > self._sums["noise"], rest, 0.0))
        cosine = np.divide(
            self._sums["inner"], norms * rest, out=np.zeros_like(rest), where=(norms > 0.0) & (rest > 0.0)
        )
        return np.where(norms > 0.0, np.clip(cosine, -1.0, 1.0), np.nan)

    @property
    def extent(self) -> str:
        """How much of the model was looked at, in brackets; nothing where that is all of it."""
        return f" (in {self.modules} of {self.every} modules)" if self.modules < self.every else ""

    def take(self) -> dict[str, Any]:
        """All sums so far, as JSON values."""
        return {"modules": self.modules, **{name: values.tolist() for name, values in self._sums.items()}}

    def go_on(self, taken: Mapping[str, Any]) -> None:
        """Start with what was taken before."""
        self.modules = taken["modules"]
        self._sums = {name: np.array(taken[name]) for name in self._sums}


def beside_others(gram: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``<D_k, R_k>``, ``|R_k|^2`` and ``sum |w_j| |D_j|`` over the others, (K,): each update beside the sum R_k of the others.

    From inner products (K, K) of the updates D_k and weights (K,).
    """
    own, dot = gram.diagonal(), gram @ weight
    terms = np.abs(weight) * np.sqrt(np.maximum(own, 0.0))
    inner, rest = dot - weight * own, weight @ dot - 2.0 * weight * dot + weight**2 * own
    around = sum_of_others(terms)
    # the one that makes up most of the sum is not subtracted from it: the others would be left as its rounding
    for k in np.flatnonzero(terms > around):
        others = np.where(np.arange(len(weight)) == k, 0.0, weight)
        part = gram @ others
        inner[k], rest[k] = part[k], others @ part
    return inner, np.maximum(rest, 0.0), around


def sum_of_others(terms: np.ndarray) -> np.ndarray:
    """``sum of t_j over j != k`` (K,) of terms that are not negative; nothing is subtracted, which a large one would not survive."""
    before, after = np.cumsum(terms), np.cumsum(terms[::-1])[::-1]
    around: np.ndarray = np.concatenate([[0.0], before[:-1]]) + np.concatenate([after[1:], [0.0]])
    return around


def aloof(alignment: Alignment) -> dict[str, str]:
    """What is said of the clients that point elsewhere while the others agree, by name; orthogonal ones are alike in that."""
    rest = {name: c for name, c in zip(alignment.clients, alignment.cosines.tolist(), strict=True) if not math.isnan(c)}
    if len(rest) < FEWEST or (middle := statistics.median(rest.values())) < ALIKE:
        return {}
    return {
        name: f"its cosine with the sum of the others is {cosine:.2g}, the median is {middle:.2g}{alignment.extent}; another task, or "
        "bad data?"
        for name, cosine in rest.items()
        if cosine < ALOOF * middle
    }


def looked_at(ranks: Sequence[Sequence[int]], shapes: Sequence[tuple[int, int]]) -> list[bool]:
    """Which modules to look at beside the combination, by the ``ranks`` of the clients in each and its shape.

    All of a few, else one in `EVERY` of each shape, the first included: of those in a row no two, and of q, o, q, o, ... both kinds.
    Not those whose stack is much wider than the matrix, where the sum itself is no longer made from stacks.
    """
    share, seen = max(1.0 / EVERY, AT_LEAST / max(len(ranks), 1)), Counter[tuple[int, int]]()
    looked = []
    for own, shape in zip(ranks, shapes, strict=True):
        looked.append(seen[shape] * GOLDEN % 1.0 < share and sum(own) <= max(2 * min(shape), NARROW))
        seen[shape] += 1
    return looked


def _picked(group: Group, chosen: Sequence[int]) -> Group:
    """Some modules of a group; copies."""
    rows = torch.tensor(chosen)

    def picked(x: Tensor) -> Tensor:
        return x[rows.to(x.device)]

    return Group(
        modules=tuple(group.modules[i] for i in chosen),
        kind=group.kind,
        m=group.m,
        n=group.n,
        B=tuple(map(picked, group.B)),
        A=tuple(map(picked, group.A)),
        scale=picked(group.scale),
        weight=picked(group.weight),
        clients=group.clients,
        dtype=group.dtype,
        backend=group.backend,
    )
