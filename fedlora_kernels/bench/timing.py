"""Timing of calls that are to be compared: warmed up, interleaved, medians with 20/80 quantiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

__all__ = ["Timing", "measure", "summary"]

WARM_UP = 3
RUNS = 20
"""Runs of each call, unless they take longer than four times the seconds asked for."""
FEWEST = 3
TURN = 0.02
"""Seconds that a call has at a time, at least one run."""

K = TypeVar("K", bound=Hashable)


class Timing(NamedTuple):
    """Seconds of a call: median, 20 % and 80 % quantiles, number of runs."""

    median: float
    q20: float
    q80: float
    runs: int


def measure(
    calls: Mapping[K, Callable[[], Any]], *, seconds: float, prepare: Callable[[K], Any] = lambda _: None
) -> dict[K, Timing]:
    """Time calls in turn, so that a noisy moment hits all of them alike; ``prepare`` is called before each turn, outside its time.

    Each is run for at least so many seconds and 20 times, or four times as many seconds. A turn repeats a call that is shorter
    than `TURN`: its threads sleep while others have theirs, and waking them is not its work.
    """
    times: dict[K, list[float]] = {key: [] for key in calls}
    for key, call in calls.items():
        _warm_up(key, call, prepare, seconds)
    open_calls = dict(calls)
    while open_calls:
        for key, call in list(open_calls.items()):
            prepare(key)
            turn = sum(times[key]) + TURN
            times[key].append(_once(call))
            while sum(times[key]) < turn:
                times[key].append(_once(call))
            if _done(times[key], seconds):
                del open_calls[key]
    return {key: summary(found) for key, found in times.items()}


def _warm_up(key: K, call: Callable[[], Any], prepare: Callable[[K], Any], seconds: float) -> None:
    spent = 0.0
    for _ in range(WARM_UP):
        prepare(key)
        spent += _once(call)
        if spent > seconds:
            return


def _done(times: Sequence[float], seconds: float) -> bool:
    spent = sum(times)
    return len(times) >= FEWEST and spent >= seconds and (len(times) >= RUNS or spent >= 4 * seconds)


def _once(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def summary(times: Sequence[float]) -> Timing:
    """Median and quantiles of a list of seconds."""
    ordered = sorted(times)
    return Timing(
        statistics.median(ordered), ordered[len(ordered) // 5], ordered[(4 * len(ordered)) // 5], len(ordered)
    )
