"""A walk over the factors of a cohort: slabs read ahead, or kept between passes, each block a problem for the method."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.adapters.inits import kept_init
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.alignment import FEWEST, Alignment, looked_at
from fedlora_kernels.engine.carry import Carry
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.comparison import Comparison
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.engine.slabs import Block, Plan, Prefetch, load_block, plan_slabs
from fedlora_kernels.memory import Pool
from fedlora_kernels.methods.contract import Group, Outcome, Previous

__all__ = ["Summed", "Walk"]

PIECE = 32 << 20
"""Bytes of a block of a method that streams: enough for its fixed costs, and little enough to be summed from the caches."""


@dataclass(frozen=True)
class Summed:
    """A plan with its answer, made while it was read; the factors of ``group`` have shapes and no numbers."""

    plan: Plan
    group: Group
    outcome: Outcome


class Walk:
    """What both passes share: the way over the factors of ``cohort``, the dtype of the answer, and the time spent."""

    def __init__(self, settings: Settings, cohort: Cohort) -> None:
        self.settings = settings
        self.cohort = cohort
        self.dtype = settings.dtype or cohort.widest
        self.seconds = dict.fromkeys(("read", "compute", "write", "total"), 0.0)
        self.carry = Carry(settings.memory // 4)
        self.comparison = Comparison([client.name for client in cohort.clients]) if settings.compare else None
        self.alignment = self._aligned()
        self._cached: list[list[Block]] | None = None
        self._pool = Pool()
        state = settings.state
        # the pair of the round before is read beside the clients', as the last of the sources
        pair = state.adapter if state is not None and settings.method.reads_previous == "pair" else None
        self.sources = cohort.adapters if pair is None else [*cohort.adapters, pair]
        self._names = [*(f"client {printable(client.name)!r}" for client in cohort.clients), "previous"]

    def _aligned(self) -> Alignment | None:
        """Who is compared beside the combination, or in the comparison; None where nobody can stand out, or pairs are no updates."""
        cohort = self.cohort
        names = [client.name for client in cohort.clients]
        if len(names) < FEWEST or kept_init(cohort.adapters[0].config) is not None:
            return None
        if self.comparison is not None:
            return self.comparison.alignment
        self._looked = looked_at(cohort.ranks, [cohort.shape(name) for name in cohort.modules])
        return Alignment(names, len(cohort.modules))

    def look(self, group: Group) -> None:
        """Compare the clients in a group, as much as is asked for."""
        if self.comparison is not None:
            self.comparison.add_group(group)
        elif self.alignment is not None:
            chosen = [i for i, name in enumerate(group.modules) if self._looked[self.cohort.index[name]]]
            if chosen:
                self.alignment.add_group(group, chosen)

    def told(self) -> dict[str, Any] | None:
        """What has been found so far of the clients beside each other, as JSON values."""
        looking = self.comparison or self.alignment
        return None if looking is None else looking.take()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a block to ``seconds``."""
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started

    @contextmanager
    def slabs(
        self, stage: str, keep: bool, instead: Callable[[Plan], Summed | None] | None = None, skip: int = 0
    ) -> Iterator[Iterator[Iterator[Block | Summed]]]:
        """Slabs as iterators over blocks, to be taken in order, read ahead, or from the cache; ``keep`` caches them if all fit at once.

        What ``instead`` makes of a plan that is not in the cache takes the place of its block; where it makes nothing, the plan is read.
        The first ``skip`` slabs are left out.
        """
        if self._cached is not None:
            cached = [[block.plan for block in slab] for slab in self._cached]
            yield self._counted(stage, cached, iter(itertools.chain(*self._cached[skip:])), skip)
            return
        piece = self._piece() if instead is None else self.settings.memory
        plans = [[part for plan in slab for part in plan.parts(piece)] for slab in self._plans()]
        every = list(itertools.chain.from_iterable(plans[skip:]))
        keep = keep and sum(plan.nbytes for plan in every) <= self.settings.memory // 2
        stored: list[Block] = []

        def load(plan: Plan) -> Block | Summed:
            if instead is not None:
                with self.timed("compute"):
                    made = instead(plan)
                if made is not None:
                    return made
            with self.timed("read"):
                pool = None if self.settings.device.type == "cuda" else self._pool
                block = load_block(plan, self.sources, pool, self._names)
            if keep:
                stored.append(block)
            return block

        with Prefetch(every, load) as blocks:
            yield self._counted(stage, plans, blocks, skip)
        if keep:
            kept = iter(stored)
            self._cached = [list(itertools.islice(kept, len(slab))) for slab in plans]

    def _counted(
        self, stage: str, slabs: Sequence[Sequence[Plan]], blocks: Iterator[Block | Summed], skip: int
    ) -> Iterator[Iterator[Block | Summed]]:
        """``blocks`` slab by slab, saying after each block how far they are."""
        sizes = [[plan.nbytes for plan in slab] for slab in slabs]
        total, done = sum(map(sum, sizes)), sum(map(sum, sizes[:skip]))

        def told(slab: Sequence[int]) -> Iterator[Block | Summed]:
            nonlocal done
            for size in slab:
                yield next(blocks)
                done += size
                self.settings.progress(stage, done, total)

        self.settings.progress(stage, done, total)
        for slab in sizes[skip:]:
            yield told(slab)

    def _piece(self) -> int:
        """Bytes to read at once: for work that is small beside reading, what stays in the caches until it is done."""
        return PIECE if self.settings.method.streams and self.settings.device.type == "cpu" else self.settings.memory

    def group(self, block: Block) -> Group:
        """The problem that a block is to a method, on the device."""
        count, device = len(self.cohort.clients), self.settings.device
        B, A = (tuple(x.to(device, non_blocking=True) for x in factors[:count]) for factors in (block.B, block.A))
        return self._problem(block.plan, B, A)

    def outline(self, plan: Plan) -> Group:
        """The problem that a plan will be; its factors have shapes and no numbers."""
        count, clients = len(plan.modules), range(len(self.cohort.clients))
        B = [torch.empty(count, plan.m, plan.ranks[k], dtype=plan.dtypes[2 * k], device="meta") for k in clients]
        A = [torch.empty(count, plan.ranks[k], plan.n, dtype=plan.dtypes[2 * k + 1], device="meta") for k in clients]
        return self._problem(plan, tuple(B), tuple(A))

    def _problem(self, plan: Plan, B: tuple[Tensor, ...], A: tuple[Tensor, ...]) -> Group:
        settings, cohort = self.settings, self.cohort
        rows = [cohort.index[name] for name in plan.modules]
        return Group(
            modules=plan.modules,
            kind=plan.kind,
            m=plan.m,
            n=plan.n,
            B=B,
            A=A,
            scale=torch.from_numpy(cohort.scales(rows)),
            weight=torch.from_numpy(cohort.module_weights(rows)),
            clients=tuple(cohort.positions),
            dtype=self.dtype,
            backend=settings.backend,
            seed=settings.seed,
            round=settings.round,
            measure=settings.measure,
            carry=tuple(self._carried(name) for name in plan.modules),
            starts=self._starts(rows[0]),
        )

    def _starts(self, row: int) -> tuple[int, ...]:
        """How many columns of each client are its start: the same in modules of the same ranks; nothing where none has any."""
        held, trained = self.cohort.ranks[row], self.cohort.trained[row]
        return tuple(rank - own for rank, own in zip(held, trained, strict=True)) if held != trained else ()

    def as_sent(self, group: Group) -> Group:
        """The group with the scales of the clients' own, before any clipping."""
        rows = [self.cohort.index[name] for name in group.modules]
        return dataclasses.replace(group, scale=torch.from_numpy(self.cohort.own_scales(rows)))

    def previous(self, block: Block) -> Previous | None:
        """What the round before left of the modules of a block, on the device; None where there is none."""
        state, device = self.settings.state, self.settings.device
        if state is None:
            return None
        if self.settings.method.reads_previous == "state":
            kept = [state.of_module(name) for name in block.plan.modules]
            return Previous(
                state.round, state=tuple({key: tensor.to(device) for key, tensor in own.items()} for own in kept)
            )
        if not block.plan.ranks[-1]:
            return Previous(state.round)
        B, A = block.B[-1].to(device), block.A[-1].to(device)
        scales = torch.tensor(
            [self.sources[-1].modules[name].scale for name in block.plan.modules], dtype=torch.float64
        )
        if bool((scales != 1.0).any()):
            B = B.to(torch.float64) * scales.to(device)[:, None, None]
        return Previous(state.round, B, A)

    def _carried(self, name: str) -> dict[str, Tensor]:
        return {key: tensor.to(self.settings.device) for key, tensor in self.carry.get(name).items()}

    def rebuilt(self) -> Walk:
        """The same after clients were chosen module by module: what was read has to be cut into slabs anew."""
        return self._over(self.cohort)

    def narrowed(self, cohort: Cohort) -> Walk:
        """The same for some of the clients; what has been read so far is kept where the modules keep their order."""
        walk = self._over(cohort)
        rows, keep = self.cohort.places(cohort)
        keep += range(len(self.cohort.clients), len(self.sources))
        if self._cached is not None and rows == sorted(rows):
            known = set(cohort.modules)
            chosen = [[_select(block, keep, known) for block in slab] for slab in self._cached]
            walk._cached = [[block for block in slab if block.plan.modules] for slab in chosen]
        return walk

    def _over(self, cohort: Cohort) -> Walk:
        walk = Walk(self.settings, cohort)
        walk.seconds, walk.carry, walk._pool = self.seconds, self.carry, self._pool
        return walk

    def _plans(self) -> list[list[Plan]]:
        clients = len(self.cohort.clients)

        def reads(k: int, name: str) -> bool:
            if k >= clients:
                return True
            return self.cohort.chosen(k, name) and (not self.settings.method.product_only or self.cohort.reads(k, name))

        return plan_slabs(
            self.sources,
            self.cohort.modules,
            reads,
            limit=self.settings.memory // 4,
            itemsize=self.dtype.itemsize,
        )


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
