"""How factors stream past: modules cut into slabs, blocks read ahead by one thread, results taken away by another.

A slab is what is written at once: plans of equally shaped modules. Each is read as one block or as several, every client's
factors side by side, into which the source reads directly. Two blocks are alive at any time, the one being computed and the
one being read, and a third one while they change; their memory comes from a pool, because fresh memory costs the system
many times what it takes to read a file that it holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedlora_kernels.adapters.flat import read_flat
from fedlora_kernels.adapters.model import Adapter, ModuleSpec, TensorSource
from fedlora_kernels.adapters.safetensors import SafetensorsFile
from fedlora_kernels.adapters.shards import ShardedFile
from fedlora_kernels.errors import FedLoRAError
from fedlora_kernels.memory import Pool

__all__ = ["Block", "Drain", "Plan", "Prefetch", "load_block", "plan_slabs"]

S = TypeVar("S")
T = TypeVar("T")
LINE = 64
"""Bytes to which stacks are aligned."""
Shape = tuple[str, int, int, tuple[int, ...], tuple[torch.dtype, ...]]


@dataclass(frozen=True)
class Plan:
    """N equally shaped modules to be read: ``ranks[k]`` is 0 where client k is not read, ``dtypes[2k:2k+2]`` are those of B, A."""

    modules: tuple[str, ...]
    kind: str
    m: int
    n: int
    ranks: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors to read."""
        pairs = zip(self.ranks, self.dtypes[::2], self.dtypes[1::2], strict=True)
        each = sum(rank * (self.m * b.itemsize + self.n * a.itemsize) for rank, b, a in pairs)
        return each * len(self.modules)

    def parts(self, limit: int) -> list[Plan]:
        """The same in plans of at most ``limit`` bytes, of equal size but for one module, and of at least one; experts in one."""
        count = len(self.modules)
        # for a part of a flat tensor all of it is read
        parts = 1 if self.kind == "expert" else min(count, -(-self.nbytes // max(limit, 1))) or 1
        bounds = [count * i // parts for i in range(parts + 1)]
        return [
            dataclasses.replace(self, modules=self.modules[start:stop]) for start, stop in itertools.pairwise(bounds)
        ]


@dataclass(frozen=True)
class Block:
    """A plan with its factors: ``B[k]`` (N, m, r_k) and ``A[k]`` (N, r_k, n) on the host."""

    plan: Plan
    B: tuple[Tensor, ...]
    A: tuple[Tensor, ...]


def plan_slabs(
    adapters: Sequence[Adapter],
    modules: Sequence[str],
    reads: Callable[[int, str], bool],
    *,
    limit: int,
    itemsize: int,
) -> list[list[Plan]]:
    """Cut ``modules`` into slabs of at most ``limit`` bytes (always at least one module), in order.

    A slab counts its factors and an answer of the stacked rank in ``itemsize`` bytes. Inside a slab modules of one shape form
    one plan. ``reads(k, module)`` says whether client k is read there.
    """
    slabs: list[list[Plan]] = []
    members: dict[Shape, list[str]] = {}
    filled = 0
    for name in modules:
        shape = _shape(adapters, name, reads)
        one = Plan((name,), *shape)
        cost = one.nbytes + sum(one.ranks) * (one.m + one.n) * itemsize
        if members and filled + cost > limit:
            slabs.append(_plans(members))
            members, filled = {}, 0
        members.setdefault(shape, []).append(name)
        filled += cost
    if members:
        slabs.append(_plans(members))
    return slabs


def _shape(adapters: Sequence[Adapter], name: str, reads: Callable[[int, str], bool]) -> Shape:
    owner = next(adapter.modules[name] for adapter in adapters if name in adapter.modules)
    ranks: list[int] = []
    dtypes: list[torch.dtype] = []
    for k, adapter in enumerate(adapters):
        spec = adapter.modules.get(name)
        if spec is not None and reads(k, name):
            ranks.append(spec.rank)
            dtypes += [spec.B.dtype, spec.A.dtype]
        else:
            ranks.append(0)
            dtypes += [torch.float32, torch.float32]
    return owner.kind, owner.m, owner.n, tuple(ranks), tuple(dtypes)


def _plans(members: dict[Shape, list[str]]) -> list[Plan]:
    return [Plan(tuple(names), *shape) for shape, names in members.items()]


def load_block(
    plan: Plan, adapters: Sequence[Adapter], pool: Pool | None = None, names: Sequence[str] | None = None
) -> Block:
    """Read one block, each tensor directly into its place in the batch, in memory of ``pool``; without one, in pinned memory.

    A file that cannot be read is an error that says whose it is, by ``names``.
    """
    count = len(plan.modules)
    shapes = [shape for rank in plan.ranks for shape in ((count, plan.m, rank), (count, rank, plan.n))]
    stacks = _stacks(shapes, plan.dtypes, pool)
    for k, (adapter, rank) in enumerate(zip(adapters, plan.ranks, strict=True)):
        if rank:
            try:
                _read(adapter, plan.modules, stacks[2 * k], stacks[2 * k + 1])
            except FedLoRAError as error:
                raise error if names is None else type(error)(f"{names[k]}: {error}") from error
    return Block(plan, tuple(stacks[::2]), tuple(stacks[1::2]))


def _stacks(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], pool: Pool | None) -> list[Tensor]:
    """Tensors to be filled, side by side in one buffer of the pool."""
    if pool is None:
        return [torch.empty(*shape, dtype=dtype, pin_memory=True) for shape, dtype in zip(shapes, dtypes, strict=True)]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    ends = list(itertools.accumulate(-(-size // LINE) * LINE for size in sizes))
    buffer = pool.take(ends[-1])
    return [
        buffer[end - -(-size // LINE) * LINE :][:size].view(dtype).view(*shape)
        for shape, dtype, size, end in zip(shapes, dtypes, sizes, ends, strict=True)
    ]


def _read(adapter: Adapter, modules: Sequence[str], B: Tensor, A: Tensor) -> None:
    """Read the factors of equally shaped modules: whole tensors straight into place, those of flat tensors through them."""
    specs = [adapter.modules[name] for name in modules]
    done = 0
    for flat, members in itertools.groupby(enumerate(specs), _run):
        run = [spec for _, spec in members]
        places = slice(done, done + len(run))
        if flat is None:
            _read_whole(adapter.source, run, B[places], A[places])
        else:
            read_flat(adapter.source, run, B[places], A[places])
        done += len(run)


def _run(member: tuple[int, ModuleSpec]) -> tuple[str, int] | None:
    """The same for modules that follow one another in one flat tensor; None for whole tensors."""
    place, spec = member
    return None if spec.whole else (spec.B.key, spec.form.part - place)


def _read_whole(source: TensorSource, specs: Sequence[ModuleSpec], B: Tensor, A: Tensor) -> None:
    stacks = (([spec.B for spec in specs], B), ([spec.A for spec in specs], A))
    if isinstance(source, SafetensorsFile | ShardedFile):
        source.read_stacks([([stored.key for stored in tensors], out) for tensors, out in stacks])
        return
    for tensors, out in stacks:
        for stored, place in zip(tensors, out, strict=True):
            source.read(stored.key, out=place.view(stored.shape))


def _start(thread: threading.Thread, end: Callable[[], None]) -> None:
    """Start a thread; an interrupt meanwhile tells it to ``end``: it may run already, and nobody else would."""
    try:
        thread.start()
    except BaseException:
        end()
        raise


def _slots(count: int) -> queue.SimpleQueue[None]:
    """A semaphore that no interrupt can break: one between the two steps of threading's own would leave its lock taken for ever."""
    slots: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(count):
        slots.put(None)
    return slots


def _await(thread: threading.Thread) -> None:
    """Wait for the end of a thread, interrupted or not: the files that it uses are closed next."""
    try:
        thread.join()
    except BaseException:
        thread.join()
        raise


class Prefetch(Generic[S, T]):
    """Iterate over ``load(item)`` for each item, one item ahead, in a thread. A context manager; errors of ``load`` surface here."""

    def __init__(self, items: Iterable[S], load: Callable[[S], T]) -> None:
        self._items = list(items)
        self._load = load
        self._ready: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._slots = _slots(2)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fedlora-reader", daemon=True)

    def __enter__(self) -> Iterator[T]:
        _start(self._thread, self._end)
        return self._loaded()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        _await(self._thread)

    def _end(self) -> None:
        self._stopped = True
        self._slots.put(None)

    def _run(self) -> None:
        for item in self._items:
            self._slots.get()
            if self._stopped:
                return
            try:
                self._ready.put(self._load(item))
            except BaseException as error:
                self._ready.put(error)
                return

    def _loaded(self) -> Iterator[T]:
        for _ in self._items:
            loaded = self._ready.get()
            if isinstance(loaded, BaseException):
                raise loaded
            yield loaded
            del loaded
            self._slots.put(None)


class Drain(Generic[T]):
    """Give items to ``sink`` in a thread, one at a time and in order. `put` waits for the item before; errors surface in it."""

    def __init__(self, sink: Callable[[T], None]) -> None:
        self._sink = sink
        self._queue: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._slot = _slots(1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fedlora-writer", daemon=True)

    def __enter__(self) -> Drain[T]:
        _start(self._thread, self._end)
        return self

    def put(self, item: T) -> None:
        """Hand over one item (never None)."""
        self._slot.get()
        self._raise()
        self._queue.put(item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        _await(self._thread)
        if error is None:
            self._raise()

    def _end(self) -> None:
        self._queue.put(None)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._sink(item)
            except BaseException as error:
                self._error = error
            finally:
                del item
                self._slot.put(None)
