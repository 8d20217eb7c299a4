"""How fast the kernels are on this machine: beside the libraries' best calls, with the accuracy of both and the floor.

Ratios are those of one run, medians of interleaved calls, both sides at their better number of threads; absolute times of a
shared machine say little.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fedlora_kernels import backends
from fedlora_kernels.backends.native.threads import thread_count
from fedlora_kernels.bench.comparison import Setting
from fedlora_kernels.bench.floors import measure_rates
from fedlora_kernels.bench.peers import absent
from fedlora_kernels.bench.suites import SUITES
from fedlora_kernels.environment import machine
from fedlora_kernels.errors import BackendError, InputError

__all__ = ["SUITES", "run"]

SCHEMA = 1
"""Version of this report."""

Progress = Callable[[str, int, int], None]


def run(
    suites: Sequence[str] = (),
    *,
    backend: str = "auto",
    threads: int | None = None,
    seconds: float = 0.5,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run suites and return the report.

    Args:
        suites: names of `SUITES`; none means all.
        backend: who computes our side; ``auto`` or a name, which must be able to run here.
        threads: the most to use, beside 1; None: FEDLORA_NUM_THREADS or torch's number.
        seconds: at least so long for each call.
        quick: tiny problems, which show that everything works and say nothing of speed.
        progress: called with ("bench", suites done, suites in all).

    Returns:
        ``rows``, one for each problem: our figures and every peer's (``seconds`` for each problem of the batch, quantiles, threads,
        accuracy), ``ratio`` to the fastest peer (None where ``red`` says what our answer misses), ``floor`` and ``times_floor``;
        ``rates`` of this machine; versions, threads and load; ``passed``: no row is red.

    Raises:
        InputError: an unknown suite or backend. BackendError: the named backend cannot run here, or serves no row.
    """
    wanted = _wanted(suites)
    if backend != "auto":
        backends.get(backend)
    most = thread_count() if threads is None else threads
    setting = Setting(backend, tuple(sorted({1, most})), seconds, quick)
    begin = time.perf_counter()
    with _own_threads():
        facts = machine()
        rates = {count: measure_rates(count, seconds=seconds, quick=quick) for count in setting.threads}
        rows = []
        for number, name in enumerate(wanted):
            if progress:
                progress("bench", number, len(wanted))
            rows += [comparison.run(setting, rates) for comparison in SUITES[name](setting)]
    if all(row["reason"] for row in rows):
        raise BackendError("; ".join(dict.fromkeys(row["reason"] for row in rows)))
    return {
        "schema": SCHEMA,
        **facts,
        "suites": wanted,
        "backend": backend,
        "threads": list(setting.threads),
        "seconds_per_call": seconds,
        "form": "quick" if quick else "full",
        "rates": {str(count): rate._asdict() for count, rate in rates.items()},
        "absent": absent(),
        "rows": rows,
        "passed": not any(row.get("red") for row in rows),
        "seconds": time.perf_counter() - begin,
    }


def _wanted(suites: Sequence[str]) -> list[str]:
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise InputError(f"unknown suite {unknown[0]!r}; known suites: {', '.join(SUITES)}")
    return [name for name in SUITES if not suites or name in suites]


@contextmanager
def _own_threads() -> Iterator[None]:
    """Let the kernels follow torch's number of threads, which is what is tried, and put everything back after."""
    setting, before = os.environ.pop("FEDLORA_NUM_THREADS", None), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if setting is not None:
            os.environ["FEDLORA_NUM_THREADS"] = setting
