"""How the clients' updates compare with each other and with their weighted sum, by module and over the whole model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.engine.alignment import Alignment, beside_others, sum_of_others
from fedlora_kernels.engine.report import number
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Group
from fedlora_kernels.methods.factors import chunks, client_gram, drift, owned, padded_mean
from fedlora_kernels.methods.products import stack_svd
from fedlora_kernels.methods.robust import NOISE, near_twins

__all__ = ["Comparison", "effective_rank", "stable_rank"]

MODEL_CLIENTS = 256
"""More clients than this and the cosines of the whole model are left out: a report is to be read."""
MODULE_CLIENTS = 16
"""The same for the cosines of each module."""
MOST_TWINS = 100
"""Pairs of near twins that a report lists."""


@dataclass
class _Sums:
    """What adds up over modules, of K clients and the weighted sum D of their scaled updates D_i.

    ``gram`` (K, K) holds <D_i, D_j>; ``dot`` <D_i, D>, ``inner`` <D_i, D - w_i D_i>, ``rest`` |D - w_i D_i|^2 and ``squares``
    |w_i D_i|^2, all (K,); ``energy`` is |D|^2.
    """

    gram: np.ndarray
    dot: np.ndarray
    inner: np.ndarray
    rest: np.ndarray
    squares: np.ndarray
    energy: float

    @classmethod
    def of(cls, gram: np.ndarray, weight: np.ndarray) -> _Sums:
        """The sums of one module."""
        dot, (inner, rest, _) = gram @ weight, beside_others(gram, weight)
        return cls(gram, dot, inner, rest, weight**2 * gram.diagonal(), max(0.0, float(weight @ dot)))

    def __add__(self, other: _Sums) -> _Sums:
        names = ("gram", "dot", "inner", "rest", "squares", "energy")
        return _Sums(*(getattr(self, name) + getattr(other, name) for name in names))

    def facts(self, clients: int) -> dict[str, Any]:
        """Plain values; the cosines only up to so many clients. What rounding hides has cosine 0."""
        norms, terms = _roots(self.gram.diagonal()), _roots(self.squares)
        hidden = NOISE * sum_of_others(terms) ** 2
        rest = np.where(self.rest > hidden, self.rest, 0.0)
        whole = self.energy if self.energy > NOISE * terms.sum() ** 2 else 0.0
        return {
            "norm": number(math.sqrt(self.energy)),
            "norms": _values(norms),
            "with_sum": _values(_cosine(self.dot, norms * math.sqrt(whole))),
            "with_rest": _values(_cosine(self.inner, norms * _roots(rest))),
            "without": _values(_roots(rest)),
            "cancellation": number(self.energy / terms.sum() ** 2) if terms.any() else None,
            "orthogonal": number(self.squares.sum() / terms.sum() ** 2) if terms.any() else None,
            "cosines": [_values(row) for row in _cosine(self.gram, np.outer(norms, norms))]
            if len(norms) <= clients
            else None,
        }


@dataclass
class Comparison:
    """Gathers modules of ``clients``, in any order; `report` is plain values, those that are not finite None."""

    clients: Sequence[str]
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    _total: _Sums | None = None
    _taken: int = 0

    def __post_init__(self) -> None:
        self.alignment = Alignment(self.clients)

    def add_group(self, group: Group) -> None:
        """Look at the modules of a group, a few at a time: float64 copies of the factors stay small."""
        for start, stop in chunks(group):
            part = group.part(start, stop)
            grams = client_gram(part).numpy()
            gap = drift(part, part.weight, *padded_mean(part, part.weight), torch.zeros(part.batch))[0]
            spectra = _spectra(part)
            for i, module in enumerate(part.modules):
                self.add(module, grams[i], part.weight[i].numpy(), float(gap[i]), spectra[i])

    def add(
        self,
        module: str,
        gram: np.ndarray,
        weight: np.ndarray,
        gap: float | None = None,
        spectrum: Tensor | None = None,
    ) -> None:
        """Add a module: inner products (K, K) of the scaled updates, weights (K,), drift of factor means, spectrum of the sum."""
        sums = _Sums.of(gram, weight)
        self.alignment.add(gram, weight)
        self._total = sums if self._total is None else self._total + sums
        self.modules[module] = {
            **sums.facts(MODULE_CLIENTS),
            "drift": None if gap is None else number(gap),
            "effective_rank": None if spectrum is None else effective_rank(spectrum),
            "stable_rank": None if spectrum is None else stable_rank(spectrum),
            "singular_values": None if spectrum is None else [s for s in spectrum.tolist() if s > 0.0],
        }

    def take(self) -> dict[str, Any]:
        """What was added since the last call, and all sums so far, as JSON values."""
        new = dict(itertools.islice(self.modules.items(), self._taken, None))
        self._taken = len(self.modules)
        sums = {} if self._total is None else {name: _listed(value) for name, value in vars(self._total).items()}
        return {"modules": new, "sums": sums, "alignment": self.alignment.take()}

    def go_on(self, taken: Sequence[Mapping[str, Any]]) -> None:
        """Start with what was taken before, in order."""
        for part in taken:
            self.modules.update(part["modules"])
            sums: dict[str, Any] = {
                name: np.array(value) if isinstance(value, list) else value for name, value in part["sums"].items()
            }
            self._total = _Sums(**sums) if sums else None
            self.alignment.go_on(part["alignment"])
        self._taken = len(self.modules)

    def report(self, order: Iterable[str]) -> dict[str, Any]:
        """Return the facts of the whole model and, under ``modules``, of each module in ``order``."""
        K = len(self.clients)
        total = self._total or _Sums.of(np.zeros((K, K)), np.zeros(K))
        finite = bool(np.isfinite(total.gram).all())
        twins = near_twins(total.gram)[:MOST_TWINS] if finite and total.gram.any() else []
        return {
            "clients": list(self.clients),
            **total.facts(MODEL_CLIENTS),
            "drift": self._drift(),
            "near_twins": [[self.clients[i], self.clients[j]] for i, j in twins],
            "modules": {name: self.modules[name] for name in order if name in self.modules},
        }

    def _drift(self) -> float | None:
        """Distance of the factor means from the sum over the whole model, relative to it."""
        rows = list(self.modules.values())
        if any(row["drift"] is None or row["norm"] is None for row in rows):
            return None
        energy = math.fsum(row["norm"] ** 2 for row in rows)
        missed = math.fsum((row["drift"] * row["norm"]) ** 2 for row in rows)
        return math.sqrt(missed / energy) if energy > 0.0 else None


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the energy shares ``s_i^2 / sum s_j^2``: r for r equal values, 1 for one, 0 for none."""
    share = _shares(singular_values)
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def stable_rank(singular_values: Tensor) -> float:
    """Return ``sum s_i^2 / s_1^2``: r for r equal values, 1 for one, 0 for none; never more than the rank."""
    share = _shares(singular_values)
    return 1.0 / float(share.max()) if len(share) else 0.0


def _shares(singular_values: Tensor) -> Tensor:
    """Shares of the energy, those above 0; divided by the largest value first, whose square may leave float64."""
    values = singular_values.double()
    values = values[values > 0]
    if not len(values):
        return values
    energy = (values / values.max()).square()
    energy = energy / energy.sum()
    return energy[energy > 0]


def _spectra(group: Group) -> list[Tensor | None]:
    """Singular values of each module's sum, float64; None where it has none that can be trusted."""
    B, A, weight = owned(group)
    if not B:
        return [torch.zeros(0, dtype=torch.float64)] * group.batch
    svd = stack_svd(group, B, A, weight, Energy(1.0), "usv")
    info, S = svd.info.cpu(), svd.S.cpu()
    return [None if int(info[i]) else S[i] for i in range(group.batch)]


def _roots(squares: np.ndarray) -> np.ndarray:
    roots: np.ndarray = np.sqrt(np.maximum(squares, 0.0))
    return roots


def _cosine(inner: np.ndarray, scale: np.ndarray) -> np.ndarray:
    cosine: np.ndarray = np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0.0)
    return np.clip(cosine, -1.0, 1.0, out=cosine)


def _listed(value: np.ndarray | float) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _values(array: np.ndarray) -> list[float | None]:
    return [number(value) for value in array.tolist()]
