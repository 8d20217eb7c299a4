"""One kernel on one problem beside its peers: timed together, accuracy of each, floor, and no ratio without a green gate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fedlora_kernels import backends
from fedlora_kernels.bench.floors import Rates, Stage, best, total
from fedlora_kernels.bench.timing import Timing, measure
from fedlora_kernels.errors import BackendError
from fedlora_kernels.testing import Check

__all__ = ["Comparison", "Peer", "Setting"]


class Setting(NamedTuple):
    """How to run: backend, numbers of threads to try, seconds for each call, and whether sizes are tiny."""

    backend: str
    threads: tuple[int, ...]
    seconds: float
    quick: bool


class Peer(NamedTuple):
    """A call on so many problems, and the figures of its answer; ``own_threads``: it does not follow torch's number."""

    call: Callable[[], Any]
    problems: int
    accuracy: Callable[[Any], Mapping[str, float]]
    own_threads: bool = False


@dataclass(frozen=True)
class Comparison:
    """A kernel call on ``count`` problems and its peers, by name.

    ``gate`` judges our answer within the limits of docs/numerics.md, Limits that tests hold; ``floor`` are the stages of the
    whole call. Peers that are ``bounds`` (a copy of the same bytes) are no competitors: they are timed, and no ratio is taken.
    """

    suite: str
    case: Mapping[str, Any]
    op: str
    count: int
    ours: Callable[[], Any]
    accuracy: Callable[[Any], Mapping[str, float]]
    gate: Callable[[Any, str], Sequence[Check]]
    floor: Sequence[Stage]
    peers: Mapping[str, Peer]
    bounds: Mapping[str, Peer] = field(default_factory=dict)

    def run(self, setting: Setting, rates: Mapping[int, Rates]) -> dict[str, Any]:
        """Time everything and return one row of plain values; a call that the backend does not serve is a row with its reason."""
        torch.set_num_threads(max(setting.threads))
        row: dict[str, Any] = {"suite": self.suite, "case": dict(self.case), "count": self.count, "reason": None}
        try:
            with backends.record() as seen:
                answer = self.ours()
        except BackendError as error:
            return row | {"reason": str(error)}
        served = [entry.backend for entry in seen if isinstance(entry, backends.Choice) and entry.op == self.op]
        row["backend"] = served[0]
        red = [check for check in self.gate(answer, served[0]) if not check.passed]
        row["red"] = [f"{check.name} {check.value:.1e}, limit {check.limit:.1e}" for check in red]
        accuracy = _plain(self.accuracy(answer))
        del answer
        known, row["failed_peers"] = _probed(self.peers)
        calls = self._calls(setting, known)
        took = measure(calls, seconds=setting.seconds, prepare=lambda key: torch.set_num_threads(key[1]))
        row["ours"] = _best("ours", self.count, took) | {"accuracy": accuracy}
        row["peers"] = {
            name: _best(name, self.peers[name].problems, took) | {"accuracy": found} for name, found in known.items()
        }
        row["bounds"] = {name: _best(name, bound.problems, took) for name, bound in self.bounds.items()}
        return row | self._ratio(row) | self._floor(row["ours"]["seconds"], best(rates.values())) | {"load": _load()}

    def _calls(self, setting: Setting, known: Iterable[str]) -> dict[tuple[str, int], Callable[[], Any]]:
        others = {name: self.peers[name] for name in known} | dict(self.bounds)
        calls: dict[tuple[str, int], Callable[[], Any]] = {}
        for threads in setting.threads:
            calls["ours", threads] = self.ours
            for name, peer in others.items():
                if not peer.own_threads or threads == setting.threads[-1]:
                    calls[name, threads] = peer.call
        return calls

    def _ratio(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The fastest peer and how many times longer it takes, unless our own answer is not what it must be."""
        peers = row["peers"]
        best = min(peers, key=lambda name: peers[name]["seconds"], default=None)
        compared = best is not None and not row["red"]
        return {"peer": best, "ratio": peers[best]["seconds"] / row["ours"]["seconds"] if compared else None}

    def _floor(self, seconds: float, rates: Rates) -> dict[str, Any]:
        count = max(self.count, 1)
        floor = total(self.floor, rates) / count
        known = math.isfinite(floor) and floor > 0
        stages = [
            {"stage": stage.name, "seconds": stage.seconds(rates) / count, "bound": stage.bound(rates)}
            for stage in self.floor
        ]
        return {"floor": floor if known else None, "times_floor": seconds / floor if known else None, "stages": stages}


def _best(name: str, count: int, took: Mapping[tuple[str, int], Timing]) -> dict[str, Any]:
    """Figures of a call at its better number of threads, in seconds for each problem, and its medians at the others."""
    each = {threads: timing for (known, threads), timing in took.items() if known == name}
    best = min(each, key=lambda threads: each[threads].median)
    median, q20, q80, runs = each[best]
    figures = {"seconds": median / count, "q20": q20 / count, "q80": q80 / count, "runs": runs}
    by_threads = {str(threads): timing.median / count for threads, timing in each.items()}
    return {**figures, "threads": best, "seconds_by_threads": by_threads}


def _probed(peers: Mapping[str, Peer]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Accuracy of each peer, and of those that break down on this problem what they say."""
    known, failed = {}, {}
    for name, peer in peers.items():
        try:
            known[name] = _plain(peer.accuracy(peer.call()))
        except Exception as error:
            # a library that gives up on a problem is a finding, not a fault of this run
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return known, failed


def _plain(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
