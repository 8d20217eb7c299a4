"""The first pass: what policies and methods must know of all data before anything is combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora_kernels.engine.carry import spilled
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.faults import beyond_float64, nonfinite_factor
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.engine.slabs import Block
from fedlora_kernels.engine.walk import Walk
from fedlora_kernels.errors import FedLoRAError
from fedlora_kernels.methods.contract import Census, Group
from fedlora_kernels.methods.factors import client_gram, client_squares

__all__ = ["Survey", "census", "make_survey"]


@dataclass
class Survey:
    """What the first pass leaves.

    ``squares`` (L, K): squared norms of the scaled updates; ``finite`` (L, K); ``errors``: the first bad element of a client, by
    its position; ``gram`` (L, K, K), only for a method that decides; ``stats`` are the method's own. What is larger than ``limit``
    bytes lies in files (`spilled`).
    """

    squares: np.ndarray
    finite: np.ndarray
    gram: np.ndarray | None
    errors: dict[int, FedLoRAError]
    stats: dict[str, np.ndarray]
    limit: int

    def select(self, rows: Sequence[int], keep: Sequence[int]) -> Survey:
        """The same for some of the modules and of the clients, none of which has errors."""
        return Survey(
            self.squares[np.ix_(rows, keep)],
            self.finite[np.ix_(rows, keep)],
            None if self.gram is None else self._taken(self.gram, rows, np.ix_(keep, keep)),
            {},
            {name: self._taken(values, rows, ...) for name, values in self.stats.items()},
            self.limit,
        )

    def _taken(self, values: np.ndarray, rows: Sequence[int], part: Any) -> np.ndarray:
        """``part`` of some rows."""
        made = spilled((len(rows), *values[0][part].shape), values.dtype, self.limit)
        for i, row in enumerate(rows):
            made[i] = values[row][part]
        return made

    def census(self, cohort: Cohort, settings: Settings) -> Census:
        """The whole model for `decide`; ``cohort`` holds the clients and modules of this survey."""
        squares = self.squares if cohort.factors is None else self.squares * cohort.factors**2
        return census(cohort, settings, self.scaled_gram(cohort), squares)

    def scaled_gram(self, cohort: Cohort) -> np.ndarray | None:
        """The Gram with the factors that policies and rules put on the updates."""
        if self.gram is None or cohort.factors is None:
            return self.gram
        scaled = spilled(self.gram.shape, self.gram.dtype, self.limit)
        np.multiply(self.gram, cohort.factors[:, :, None], out=scaled)
        scaled *= cohort.factors[:, None, :]
        return scaled


def census(
    cohort: Cohort, settings: Settings, gram: np.ndarray | None = None, squares: np.ndarray | None = None
) -> Census:
    """What `decide` sees beside a survey."""
    state, reported = settings.state, settings.client_state
    names = tuple(client.name for client in cohort.clients)
    return Census(
        modules=tuple(cohort.modules),
        clients=names,
        gram=gram,
        ranks=np.array(cohort.ranks),
        weight=np.asarray(cohort.weights, dtype=np.float64),
        shapes=np.array([cohort.shape(name) for name in cohort.modules]),
        round=settings.round,
        memory=None if state is None else state.memory,
        # of clients that were dropped nothing counts
        client_state=None if reported is None else {name: reported[name] for name in names if name in reported},
        squares=squares,
    )


def make_survey(walk: Walk, *, gram: bool, own: bool) -> Survey:
    """Squared norms and finiteness of every client in every module; the Gram and the method's own statistics if asked for.

    What an earlier survey of this walk carried is dropped.
    """
    walk.carry.clear()
    L, K = len(walk.cohort.modules), len(walk.cohort.clients)
    limit = walk.settings.memory // 4
    found = spilled((L, K, K), np.dtype(np.float64), limit) if gram else None
    survey = Survey(np.zeros((L, K)), np.ones((L, K), dtype=bool), found, {}, {}, limit)
    with walk.slabs("survey", keep=True) as slabs:
        for slab in slabs:
            for block in slab:
                assert isinstance(block, Block)  # nothing takes its place here
                with walk.timed("compute"):
                    _add_block(survey, walk, block, own)
                del block  # its memory takes the next one
    return survey


def _add_block(survey: Survey, walk: Walk, block: Block, own: bool) -> None:
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
    # a client that is not finite ends the run or leaves it, and then the method looks again
    if own and finite.all():
        _add_own(survey, walk, group, rows)


def _add_own(survey: Survey, walk: Walk, group: Group, rows: Sequence[int]) -> None:
    own = walk.settings.method.survey(group)
    if own is None:
        return
    for name, values in own.stats.items():
        if name not in survey.stats:
            shape = (len(walk.cohort.modules), *values.shape[1:])
            survey.stats[name] = spilled(shape, values.dtype, survey.limit)
        survey.stats[name][rows] = values
    for module, tensors in zip(group.modules, own.carry, strict=False):
        walk.carry.put(module, tensors)
