"""What all benchmarks share: flags, timing (interleaved, warmed up, medians with 20/80 quantiles), the machine, and the rows."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TURN = 0.02
"""Seconds that a call has at a time, at least one run."""


def arguments(doc: str, quick: str) -> argparse.ArgumentParser:
    """A parser with the flags of all benchmarks; ``quick`` says what --quick leaves."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", help="write the figures here")
    return parser


def machine() -> dict[str, Any]:
    """Describe what the figures were taken on: processor or GPU, versions, commit."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }
    if torch.cuda.is_available():
        query = "name,driver_version,clocks.max.sm,clocks.max.mem,memory.total"
        smi = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "nvidia_smi": smi.stdout.strip()}
    return facts


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()


def threaded(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """The call with torch at so many threads."""

    def run() -> object:
        torch.set_num_threads(count)
        return call()

    return run


def measure(
    calls: dict[str, Callable[[], object]], *, device: str = "cpu", seconds: float = 1.0, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Time named calls in turn, so that a noisy moment hits all of them alike. Seconds: median and 20/80 quantiles.

    A turn repeats a call that is shorter than `TURN`: its threads sleep while others have theirs, and waking them is not its work.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds * len(calls) or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            turn = time.perf_counter()
            times[name].append(_once(call, device))
            while time.perf_counter() - turn < TURN:
                times[name].append(_once(call, device))
    return {name: _summary(values) for name, values in times.items()}


def _once(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) * 1e-3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "q20": ordered[len(ordered) // 5],
        "q80": ordered[(4 * len(ordered)) // 5],
        "runs": len(ordered),
    }


def show(row: dict[str, Any]) -> None:
    """Print a row, numbers in three digits."""
    print({key: (f"{value:.3g}" if isinstance(value, float) else value) for key, value in row.items()}, flush=True)


def save(path: str | None, rows: list[dict[str, Any]]) -> None:
    """Write rows and the machine they were taken on as JSON, if a path is given."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
