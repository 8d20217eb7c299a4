"""The passes over the data: survey, and combine. Knows clients, adapters and methods; no arguments, no files of its own."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.engine.clients import Client
from fedlora_kernels.engine.extras import nonfinite
from fedlora_kernels.engine.output import Pair
from fedlora_kernels.engine.report import module_rows
from fedlora_kernels.engine.slabs import Block, Drain, Loaded, Plan, Prefetch, load_slab, plan_slabs
from fedlora_kernels.errors import ConvergenceError, FedLoRAError, OutputOverflowError, RunError, WeightError
from fedlora_kernels.methods.contract import Census, Group, Method, Outcome
from fedlora_kernels.methods.factors import client_gram, client_squares

__all__ = ["Engine", "Progress", "SurveyResult"]

Progress = Callable[[str, int, int], None]
_log = logging.getLogger("fedlora_kernels")


@dataclass
class SurveyResult:
    """What the first pass leaves.

    ``squares`` (L, K): squared norms of the scaled updates; ``finite`` (L, K); ``errors``: the first bad element of a client, by
    its position; ``gram`` (L, K, K), only for a method that decides; ``stats`` are the method's own.
    """

    squares: np.ndarray
    finite: np.ndarray
    gram: np.ndarray | None
    errors: dict[int, FedLoRAError]
    stats: dict[str, np.ndarray]


@dataclass
class Engine:
    """One aggregation at work.

    ``clients`` take part, ``weights`` are theirs after normalisation, ``positions`` theirs in the caller's order, ``modules``
    the names in canonical order. ``factors`` (L, K) multiply scales (clipping). ``cached`` holds the slabs between passes.
    """

    method: Method
    clients: Sequence[Client]
    positions: Sequence[int]
    weights: Sequence[float]
    modules: Sequence[str]
    missing: str
    dtype: torch.dtype
    device: torch.device
    backend: str
    seed: int
    round: int
    memory: int
    progress: Progress
    factors: np.ndarray | None = None
    cached: list[Loaded] | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "compute", "write", "total"), 0.0))

    def __post_init__(self) -> None:
        self._adapters: list[Adapter] = [client.opened for client in self.clients]
        self._index = {name: row for row, name in enumerate(self.modules)}
        self._ranks = [
            [a.modules[name].rank if name in a.modules else 0 for a in self._adapters] for name in self.modules
        ]
        self._owns = np.array([[name in a.modules for a in self._adapters] for name in self.modules])
        self._scale = np.array(
            [[a.modules[name].scale if name in a.modules else 0.0 for a in self._adapters] for name in self.modules]
        )

    def _plans(self) -> list[list[Plan]]:
        def reads(k: int, name: str) -> bool:
            return not self.method.product_only or self._scale[self._index[name], k] != 0.0

        return plan_slabs(self._adapters, self.modules, reads, limit=self.memory // 4, itemsize=self.dtype.itemsize)

    @contextmanager
    def _slabs(self, stage: str, keep: bool) -> Iterator[Iterator[Iterator[Block]]]:
        """Slabs as iterators over blocks, read ahead, or from the cache; ``keep`` caches them if all fit at once."""
        cached = self.cached
        plans = self._plans() if cached is None else [[block.plan for block in loaded.blocks] for loaded in cached]
        sizes = [sum(plan.nbytes for plan in slab) for slab in plans]
        keep = keep and sum(sizes) <= self.memory // 2
        stored: list[Loaded] = []

        def load(slab: list[Plan]) -> Loaded:
            started = time.perf_counter()
            loaded = load_slab(slab, self._adapters, pin=self.device.type == "cuda")
            loaded.keep = keep
            self.seconds["read"] += time.perf_counter() - started
            return loaded

        def blocks(slabs: Iterable[Loaded]) -> Iterator[Iterator[Block]]:
            done = 0
            self.progress(stage, done, sum(sizes))
            for loaded, size in zip(slabs, sizes, strict=True):
                if keep:
                    stored.append(loaded)
                yield loaded.take()
                done += size
                self.progress(stage, done, sum(sizes))

        if cached is not None:
            yield blocks(cached)
            return
        with Prefetch(plans, load) as slabs:
            yield blocks(slabs)
        if keep:
            self.cached = stored

    def _group(self, block: Block) -> Group:
        rows = [self._index[name] for name in block.plan.modules]
        scale = self._scale[rows] if self.factors is None else self._scale[rows] * self.factors[rows]
        return Group(
            modules=block.plan.modules,
            kind=block.plan.kind,
            m=block.plan.m,
            n=block.plan.n,
            B=tuple(B.to(self.device, non_blocking=True) for B in block.B),
            A=tuple(A.to(self.device, non_blocking=True) for A in block.A),
            scale=torch.from_numpy(scale),
            weight=torch.from_numpy(self._module_weights(rows)),
            clients=tuple(self.positions),
            dtype=self.dtype,
            backend=self.backend,
            seed=self.seed,
            round=self.round,
        )

    def _module_weights(self, rows: Sequence[int]) -> np.ndarray:
        """(N, K) weights: all clients', or the owners' brought to the same sum where missing modules renormalise."""
        weights = np.tile(np.asarray(self.weights, dtype=np.float64), (len(rows), 1))
        if self.missing != "renormalize":
            return weights
        whole = math.fsum(self.weights)
        for i, row in enumerate(rows):
            owns = self._owns[row]
            if not owns.all():
                share = math.fsum(weights[i, owns])
                if share == 0.0:
                    name = printable(self.modules[row])
                    raise WeightError(
                        f"module {name!r}: the weights of its owners sum to 0; missing='zero' or other weights needed"
                    )
                weights[i] = np.where(owns, weights[i] * (whole / share), 0.0)
        return weights

    def survey(self) -> SurveyResult:
        """First pass: Gram and finiteness of every client in every module, and the method's own statistics."""
        L, K = len(self.modules), len(self.clients)
        gram = np.zeros((L, K, K)) if self.method.needs_decision else None
        result = SurveyResult(np.zeros((L, K)), np.ones((L, K), dtype=bool), gram, {}, {})
        with self._slabs("survey", keep=True) as slabs:
            for slab in slabs:
                for block in slab:
                    started = time.perf_counter()
                    self._survey_block(block, result)
                    self.seconds["compute"] += time.perf_counter() - started
        return result

    def _survey_block(self, block: Block, result: SurveyResult) -> None:
        group = self._group(block)
        rows = [self._index[name] for name in group.modules]
        if result.gram is None:
            squares = client_squares(group).numpy()
        else:
            result.gram[rows] = gram = client_gram(group).numpy()
            squares = np.einsum("nkk->nk", gram)
        finite = np.isfinite(squares)
        result.squares[rows], result.finite[rows] = squares, finite
        for k in np.flatnonzero(~finite.all(0)).tolist():
            i = int(np.flatnonzero(~finite[:, k])[0])
            result.errors.setdefault(k, self._locate(block, i, k) or self._beyond_float64(block, i, k))
        own = self.method.survey(group)
        for name, values in (own.stats if own is not None else {}).items():
            store = result.stats.setdefault(name, np.zeros((len(self.modules), *values.shape[1:]), values.dtype))
            store[rows] = values

    def _locate(self, block: Block, i: int, k: int) -> FedLoRAError | None:
        """The error that names client, module, tensor and place of the first NaN or Inf; None if all is finite."""
        where = f"client {printable(self.clients[k].name)!r}, module {printable(block.plan.modules[i])!r}"
        return nonfinite(block.A[k][i], f"{where}, lora_A") or nonfinite(block.B[k][i], f"{where}, lora_B")

    def _beyond_float64(self, block: Block, i: int, k: int) -> FedLoRAError:
        where = f"client {printable(self.clients[k].name)!r}, module {printable(block.plan.modules[i])!r}"
        return OutputOverflowError(
            f"{where}: the squared norm of the update exceeds float64; less than 1e154 needed. Scale it down"
        )

    def select(self, keep: Sequence[int], modules: Sequence[str], weights: Sequence[float]) -> Engine:
        """The same work for some of the clients; what has been read so far is kept where the modules keep their order."""
        rows = [self._index[name] for name in modules]
        cached = None
        if self.cached is not None and rows == sorted(rows):
            known = set(modules)
            chosen = [[_select(block, keep, known) for block in loaded.blocks] for loaded in self.cached]
            cached = [Loaded([block for block in blocks if block.plan.modules], keep=True) for blocks in chosen]
        return dataclasses.replace(
            self,
            clients=[self.clients[k] for k in keep],
            positions=[self.positions[k] for k in keep],
            weights=weights,
            modules=modules,
            factors=None if self.factors is None else self.factors[np.ix_(rows, keep)],
            cached=cached,
        )

    def census(self, survey: SurveyResult) -> Census:
        """The whole model for `decide`; ``survey`` must belong to these clients and modules."""
        gram = survey.gram
        assert gram is not None
        if self.factors is not None:
            gram = gram * self.factors[:, :, None] * self.factors[:, None, :]
        specs = [next(a.modules[name] for a in self._adapters if name in a.modules) for name in self.modules]
        return Census(
            modules=tuple(self.modules),
            gram=gram,
            finite=survey.finite,
            ranks=np.array(self._ranks),
            weight=np.asarray(self.weights, dtype=np.float64),
            shapes=np.array([(spec.m, spec.n) for spec in specs]),
        )

    def bias_scales(self, module: str | None) -> list[float]:
        """s_k of every client in a module, clipping included; 0 where it lacks the module."""
        row = self._index[module or ""]
        scale = self._scale[row] if self.factors is None else self._scale[row] * self.factors[row]
        return [float(value) for value in scale]

    def combine(self, plan: Any, sink: Callable[[Sequence[Pair]], None], *, drop_zero: bool) -> list[dict[str, Any]]:
        """Second (or only) pass: give pairs to ``sink`` in canonical order, in a thread; return the rows of the report."""
        rows: list[dict[str, Any]] = []

        def write(pairs: Sequence[Pair]) -> None:
            started = time.perf_counter()
            sink(pairs)
            self.seconds["write"] += time.perf_counter() - started

        with self._slabs("combine", keep=False) as slabs, Drain(write) as drain:
            for slab in slabs:
                pairs: list[Pair] = []
                for block in slab:
                    started = time.perf_counter()
                    made, described = self._combine_block(block, plan)
                    self.seconds["compute"] += time.perf_counter() - started
                    if drop_zero:
                        made = [pair for pair, row in zip(made, described, strict=True) if not _drop(row)]
                    pairs += made
                    rows += described
                pairs.sort(key=lambda pair: self._index[pair[0]])
                drain.put(pairs)
        return sorted(rows, key=lambda row: self._index[row["name"]])

    def _combine_block(self, block: Block, plan: Any) -> tuple[list[Pair], list[dict[str, Any]]]:
        group = self._group(block)
        outcome = self.method.combine(group, plan, None)
        self._raise_for_info(block, group, plan, outcome)
        assert outcome.B is not None
        assert outcome.A is not None
        assert outcome.rank is not None
        pairs: list[Pair] = []
        for i, name in enumerate(group.modules):
            p = int(outcome.rank[i])
            # a copy: a view would keep the padding of the whole batch alive
            B = outcome.B[i, :, :p].to("cpu", copy=True).contiguous()
            A = outcome.A[i, :p].to("cpu", copy=True).contiguous()
            pairs.append((name, B, A))
        trained = [self._ranks[self._index[name]] for name in group.modules]
        return pairs, module_rows(group.modules, group.kind, group.m, group.n, trained, outcome)

    def _raise_for_info(self, block: Block, group: Group, plan: Any, outcome: Outcome) -> None:
        if outcome.info is None or not bool(outcome.info.any()):
            return
        i = int(outcome.info.nonzero()[0, 0])
        code = int(outcome.info[i])
        where = f"module {printable(group.modules[i])!r}"
        if code & Info.NONFINITE:
            for k in range(len(self.clients)):
                if (error := self._locate(block, i, k)) is not None:
                    raise error
            raise RunError(
                f"{where}: the result is not finite although every input is; report this with the adapters' shapes"
            )
        if code & Info.NOT_CONVERGED:
            raise ConvergenceError(
                f"{where}: an iteration hit its guard; certified results needed. Use backend='reference'"
            )
        largest = self._largest(group, i, plan)
        raise OutputOverflowError(
            f"{where}: max|x| of the result is {largest:.4g}; {str(self.dtype).removeprefix('torch.')} holds "
            f"{torch.finfo(self.dtype).max:.4g}. Use output='balanced', bfloat16 or a wider dtype"
        )

    def _largest(self, group: Group, i: int, plan: Any) -> float:
        one = dataclasses.replace(
            group,
            modules=group.modules[i : i + 1],
            B=tuple(B[i : i + 1] for B in group.B),
            A=tuple(A[i : i + 1] for A in group.A),
            scale=group.scale[i : i + 1],
            weight=group.weight[i : i + 1],
            dtype=torch.float64,
        )
        wide = self.method.combine(one, plan, None)
        assert wide.B is not None
        assert wide.A is not None
        return max(float(wide.B.abs().max()), float(wide.A.abs().max()))


def _drop(row: dict[str, Any]) -> bool:
    """Whether a row is that of a zero module, which then stands in the report with rank 0."""
    if Note.ZERO.name not in row["notes"]:
        return False
    row["rank"] = 0
    return True


def _select(block: Block, keep: Sequence[int], known: Container[str]) -> Block:
    """The clients ``keep`` and the modules ``known`` of a block; what all of it needs is not copied."""
    left = [i for i, name in enumerate(block.plan.modules) if name in known]
    rows = slice(None) if len(left) == len(block.plan.modules) else left
    plan = dataclasses.replace(
        block.plan,
        modules=tuple(block.plan.modules[i] for i in left),
        ranks=tuple(block.plan.ranks[k] for k in keep),
        dtypes=tuple(dtype for k in keep for dtype in block.plan.dtypes[2 * k : 2 * k + 2]),
    )
    return Block(plan, tuple(block.B[k][rows] for k in keep), tuple(block.A[k][rows] for k in keep))
