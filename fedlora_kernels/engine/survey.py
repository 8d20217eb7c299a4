"""The first pass: what policies and methods must know of all data before anything is combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.faults import beyond_float64, nonfinite_factor
from fedlora_kernels.engine.slabs import Block
from fedlora_kernels.engine.walk import Walk
from fedlora_kernels.errors import FedLoRAError
from fedlora_kernels.methods.contract import Census
from fedlora_kernels.methods.factors import client_gram, client_squares

__all__ = ["Survey", "make_survey"]


@dataclass
class Survey:
    """What the first pass leaves.

    ``squares`` (L, K): squared norms of the scaled updates; ``finite`` (L, K); ``errors``: the first bad element of a client, by
    its position; ``gram`` (L, K, K), only for a method that decides; ``stats`` are the method's own.
    """

    squares: np.ndarray
    finite: np.ndarray
    gram: np.ndarray | None
    errors: dict[int, FedLoRAError]
    stats: dict[str, np.ndarray]

    def select(self, rows: Sequence[int], keep: Sequence[int]) -> Survey:
        """The same for some of the modules and of the clients, none of which has errors."""
        return Survey(
            self.squares[np.ix_(rows, keep)],
            self.finite[np.ix_(rows, keep)],
            None if self.gram is None else self.gram[np.ix_(rows, keep, keep)],
            {},
            {name: values[rows] for name, values in self.stats.items()},
        )

    def census(self, cohort: Cohort) -> Census:
        """The whole model for `decide`; ``cohort`` holds the clients and modules of this survey."""
        gram = self.gram
        assert gram is not None
        if cohort.factors is not None:
            gram = gram * cohort.factors[:, :, None] * cohort.factors[:, None, :]
        specs = [next(a.modules[name] for a in cohort.adapters if name in a.modules) for name in cohort.modules]
        return Census(
            modules=tuple(cohort.modules),
            clients=tuple(client.name for client in cohort.clients),
            gram=gram,
            ranks=np.array(cohort.ranks),
            weight=np.asarray(cohort.weights, dtype=np.float64),
            shapes=np.array([(spec.m, spec.n) for spec in specs]),
        )


def make_survey(walk: Walk) -> Survey:
    """Gram and finiteness of every client in every module, and the method's own statistics."""
    L, K = len(walk.cohort.modules), len(walk.cohort.clients)
    gram = np.zeros((L, K, K)) if walk.settings.method.needs_decision else None
    survey = Survey(np.zeros((L, K)), np.ones((L, K), dtype=bool), gram, {}, {})
    with walk.slabs("survey", keep=True) as slabs:
        for slab in slabs:
            for block in slab:
                with walk.timed("compute"):
                    _add_block(survey, walk, block)
    return survey


def _add_block(survey: Survey, walk: Walk, block: Block) -> None:
    group, cohort = walk.group(block), walk.cohort
    rows = [cohort.index[name] for name in group.modules]
    if survey.gram is None:
        squares = client_squares(group).numpy()
    else:
        survey.gram[rows] = gram = client_gram(group).numpy()
        squares = np.einsum("nkk->nk", gram)
    finite = np.isfinite(squares)
    survey.squares[rows], survey.finite[rows] = squares, finite
    for k in np.flatnonzero(~finite.all(0)).tolist():
        i = int(np.flatnonzero(~finite[:, k])[0])
        name = cohort.clients[k].name
        survey.errors.setdefault(k, nonfinite_factor(block, i, k, name) or beyond_float64(block, i, name))
    own = walk.settings.method.survey(group)
    for name, values in (own.stats if own is not None else {}).items():
        store = survey.stats.setdefault(name, np.zeros((len(cohort.modules), *values.shape[1:]), values.dtype))
        store[rows] = values
