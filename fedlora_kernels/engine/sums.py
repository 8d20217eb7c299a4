"""Sums of factors taken while they are read, for methods that are no more than that: what is read never lies in memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import backends
from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.safetensors import SafetensorsFile
from fedlora_kernels.adapters.shards import ShardedFile
from fedlora_kernels.backends.contract import RawSum
from fedlora_kernels.backends.cpu import CpuBackend
from fedlora_kernels.backends.cpu.ranges import Ranges
from fedlora_kernels.backends.native.library import DTYPE_CODE
from fedlora_kernels.backends.native.svd import LARGEST
from fedlora_kernels.backends.native.threads import thread_count
from fedlora_kernels.engine.slabs import Plan
from fedlora_kernels.engine.walk import Summed, Walk
from fedlora_kernels.linalg import WeightedSum
from fedlora_kernels.methods.common import holders, leaders
from fedlora_kernels.methods.contract import Group, Method, Sums, Turn
from fedlora_kernels.methods.factors import unmeasured

__all__ = ["Summing"]


class Summing:
    """Makes `Summed` of plans; of one that needs more than sums, or whose data are in trouble, nothing: then it has to be read."""

    def __init__(self, walk: Walk, plan: Any, backend: CpuBackend) -> None:
        self._walk, self._plan, self._backend = walk, plan, backend

    @classmethod
    def of(cls, walk: Walk, plan: Any) -> Summing | None:
        """None where nothing can be summed on the way: distances or a comparison are asked for, a GPU computes, or another backend."""
        settings = walk.settings
        if settings.measure or settings.compare or settings.device.type != "cpu":
            return None
        if type(settings.method).sums is Method.sums:
            return None
        backend = backends.choose("weighted_sum", settings.backend, walk.dtype, settings.device, {})
        return cls(walk, plan, backend) if isinstance(backend, CpuBackend) else None

    def __call__(self, plan: Plan) -> Summed | None:
        """The sums of one plan."""
        group, adapters = self._walk.outline(plan), self._walk.cohort.adapters
        live = [k for k, rank in enumerate(group.ranks) if rank > 0]
        if not live or not all(_readable(adapters[k], plan, k) for k in live) or not self._same_frozen(plan, group):
            return None
        sums = self._walk.settings.method.sums(group, self._plan)
        if sums is None:
            return None
        raws = (
            self._sum(plan, group, live, sums) if sums.turn is None else self._turn(plan, group, live, sums, sums.turn)
        )
        if raws is None or any(bool(raw.info.any()) for raw in raws):
            return None
        B, A = (WeightedSum(*raw) for raw in raws)
        return Summed(plan, group, unmeasured(group, B, A))

    def _sum(self, plan: Plan, group: Group, live: Sequence[int], sums: Sums) -> Sequence[RawSum] | None:
        rank = max(group.ranks)
        factors = [(self._ranges(plan, live, letter), getattr(sums, letter)[:, live]) for letter in "BA"]
        return self._backend.read_sum(factors, [(plan.m, rank), (rank, plan.n)], group.dtype)

    def _turn(self, plan: Plan, group: Group, live: Sequence[int], sums: Sums, turn: Turn) -> Sequence[RawSum] | None:
        """The sums of turned pairs; None where the previous pair is not as plain as the clients', or some module lacks a client."""
        last = len(self._walk.sources) - 1
        previous, rank = self._walk.sources[last], max(group.ranks)
        keep = [k for k in live if bool((group.weight[:, k] != 0.0).any())]
        if last < len(group.ranks) or not keep or not bool((group.weight[:, keep] != 0.0).all()):
            return None
        if plan.ranks[last] != rank or not _readable(previous, plan, last) or rank > LARGEST:
            return None
        if any(previous.modules[name].scale != 1.0 for name in plan.modules):
            return None
        dtypes = [plan.dtypes[2 * k + (turn.side == "A")] for k in keep]
        held = len(keep) * rank * max(plan.m, plan.n) * 8 * thread_count()
        if len(set(dtypes)) > 1 or held > self._walk.settings.memory // 4:
            return None
        return self._backend.read_turned(
            (self._ranges(plan, keep, "B"), self._ranges(plan, keep, "A")),
            (sums.B[:, keep], sums.A[:, keep]),
            self._ranges(plan, [last], turn.side),
            turn.side,
            turn.special,
            turn.blend,
            group.dtype,
        )

    def _same_frozen(self, plan: Plan, group: Group) -> bool:
        """Whether the frozen factor, if there is one, is the same in all clients, as far as a look at stored bytes shows."""
        frozen = self._walk.settings.method.frozen_factor(group.round)
        if frozen is None:
            return True
        leader, taking = leaders(group), holders(group)
        first = int(leader[0])
        others = [k for k in range(len(group.ranks)) if k != first and bool(taking[:, k].any())]
        if bool((leader != first).any()) or not bool(taking[:, others].all()):
            return False
        if frozen == "B" and not _one_scale(
            self._walk.as_sent(group).scale[:, [first, *others]], group, [first, *others]
        ):
            return False
        return self._backend.read_alike([self._ranges(plan, [first, *others], frozen)])

    def _ranges(self, plan: Plan, clients: Sequence[int], letter: str) -> Ranges:
        """Where the factors of these clients lie."""
        files = []
        for k in clients:
            adapter = self._walk.sources[k]
            source = adapter.source
            assert isinstance(source, SafetensorsFile | ShardedFile)
            files.append([source.place(getattr(adapter.modules[name], letter).key) for name in plan.modules])
        shapes = [(plan.m, plan.ranks[k]) if letter == "B" else (plan.ranks[k], plan.n) for k in clients]
        return Ranges.of(files, shapes, [plan.dtypes[2 * k + (letter == "A")] for k in clients])


def _readable(adapter: Adapter, plan: Plan, k: int) -> bool:
    """Whether the pairs of client k lie in files as they are, in dtypes that the kernels read."""
    in_files = isinstance(adapter.source, SafetensorsFile | ShardedFile)
    whole = all(adapter.modules[name].whole for name in plan.modules)
    return in_files and whole and all(_is_float(dtype) for dtype in plan.dtypes[2 * k : 2 * k + 2])


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype in DTYPE_CODE


def _one_scale(sent: Tensor, group: Group, clients: Sequence[int]) -> bool:
    """Whether these clients have one scale for each module, not 0, as sent and as it counts."""
    now = group.scale[:, clients]
    same = (sent == sent[:, :1]) & (now == now[:, :1]) & (now != 0.0) & (sent != 0.0)
    return len({group.ranks[k] for k in clients}) == 1 and bool(same.all())
