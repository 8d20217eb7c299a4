"""What no implementation can undercut on this machine: rates measured in the same run, and work by formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from fedlora_kernels import backends
from fedlora_kernels.backends.cpu import BACKEND
from fedlora_kernels.backends.cpu.calibration import multiply_adds
from fedlora_kernels.bench.timing import measure

__all__ = ["Rates", "Stage", "best", "core_stages", "measure_rates", "sweeps", "total"]

STEPS = 200_000
COPIED = 1 << 25
"""Elements of float32 that are copied: far beyond any cache."""


class Rates(NamedTuple):
    """Operations per second of fused multiply-adds (two each) in float64 and float32, bytes per second of a copy, read and written.

    Without the native library the first two are NaN, and so are floors that need them.
    """

    float64: float
    float32: float
    copy: float

    def flops(self, dtype: torch.dtype) -> float:
        """The rate in which a dtype computes."""
        return self.float64 if dtype == torch.float64 else self.float32


def measure_rates(threads: int, *, seconds: float, quick: bool = False) -> Rates:
    """Measure with so many threads, both at their 20 % quantile of time: rates that this machine does reach."""
    torch.set_num_threads(threads)
    source = torch.zeros(COPIED >> 6 * quick)
    target = torch.empty_like(source)
    steps = STEPS >> 6 * quick
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    work = {"copy": 8.0 * len(source)}
    if backends.status()["cpu"][0]:
        for name, dtype in _TYPES.items():
            calls[name] = partial(multiply_adds, BACKEND.library, dtype, steps, threads)
            work[name] = multiply_adds(BACKEND.library, dtype, steps, threads)
    took = measure(calls, seconds=seconds)
    rate = {name: amount / took[name].q20 for name, amount in work.items()}
    return Rates(rate.get("float64", math.nan), rate.get("float32", math.nan), rate["copy"])


_TYPES: Mapping[str, torch.dtype] = {"float64": torch.float64, "float32": torch.float32}


def best(rates: Iterable[Rates]) -> Rates:
    """The highest of each rate, at whichever number of threads: what the machine can do."""
    return Rates(*map(max, zip(*rates, strict=True)))


class Stage(NamedTuple):
    """Part of a computation that no other part overlaps: bytes moved, and operations in float64 and in float32."""

    name: str
    bytes: float = 0.0
    float64: float = 0.0
    float32: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """The longer of moving and computing."""
        work = (self.float64 / rates.float64 if self.float64 else 0.0) + (
            self.float32 / rates.float32 if self.float32 else 0.0
        )
        return max(self.bytes / rates.copy, work) if not math.isnan(work) else math.nan

    def bound(self, rates: Rates) -> str:
        """Which of the two it is."""
        return "memory" if self.bytes / rates.copy >= self.seconds(rates) else "multiply-add"


def total(stages: Iterable[Stage], rates: Rates) -> float:
    """Seconds of stages one after the other."""
    return sum(stage.seconds(rates) for stage in stages)


def sweeps(r: int) -> int:
    """Sweeps of Jacobi to convergence that are counted, the checking one included: the fewest seen on LoRA-like matrices."""
    return 5 if r <= 8 else 6 if r <= 64 else 7 if r <= 128 else 8


def core_stages(count: int, r: int, dtype: torch.dtype) -> list[Stage]:
    """SVDs of ``count`` r x r matrices: read and write, scaled rotations of both sides, two triangularisations above 32."""
    size = torch.finfo(dtype).bits // 8
    # 2.5 instructions per element and rotation, each worth two operations at the peak
    work = 2 * 2.5 * sweeps(r) * r**3 + (8 / 3 * r**3 if r > 32 else 0)
    moved = count * (3 * r * r + r) * size
    stage = {"float64": count * work} if dtype == torch.float64 else {"float32": count * work}
    return [Stage("svd", moved, **stage)]
