"""Every kernel of every backend here on generated cases, judged by independent means (docs/numerics.md, Limits that tests hold).

`run` makes a report of plain values; nothing in it is timed but the run itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fedlora_kernels import backends
from fedlora_kernels.environment import machine
from fedlora_kernels.errors import BackendError, InputError
from fedlora_kernels.testing import Check
from fedlora_kernels.validate.calls import Call, Calls, Form, Verdict, name_of
from fedlora_kernels.validate.decompositions import core_svd_calls, stacked_qr_calls
from fedlora_kernels.validate.products import product_svd_calls, update_gram_calls
from fedlora_kernels.validate.rotations import align_factors_calls, procrustes_calls, rotate_factors_calls
from fedlora_kernels.validate.sums import mixed_sum_calls, select_rank_calls, weighted_sum_calls

__all__ = ["OPS", "run"]

SCHEMA = 1
"""Version of this report."""

OPS: Mapping[str, Calls] = {
    "core_svd": core_svd_calls,
    "product_svd": product_svd_calls,
    "stacked_qr": stacked_qr_calls,
    "select_rank": select_rank_calls,
    "update_gram": update_gram_calls,
    "weighted_sum": weighted_sum_calls,
    "mixed_sum": mixed_sum_calls,
    "procrustes_rotation": procrustes_calls,
    "rotate_factors": rotate_factors_calls,
    "align_factors": align_factors_calls,
}
"""Calls of each operation, in the order of the report."""

Progress = Callable[[str, int, int], None]


def run(
    *,
    backend: str = "all",
    ops: Sequence[str] = (),
    full: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Validate backends and return the report.

    Args:
        backend: a name, which must be able to run here, or ``all``: those that cannot are listed with their reason.
        ops: operations of `OPS`; none means all.
        full: the complete sets of generators and sizes instead of a sample of them.
        seed: of every generator.
        progress: called with ("validate", operations done, operations in all).

    Returns:
        ``rows``, one for each backend, device, operation, regime, variant and dtype, with the number of cases and, for the
        worst of them in units of its limit, metric, error, limit and case; ``unserved`` and ``left_out`` with reasons;
        ``passed``; versions and machine.

    Raises:
        InputError: an unknown backend or operation.
        BackendError: the named backend cannot run here, or serves none of the operations.
    """
    targets, status = _targets(backend)
    wanted = _wanted(ops)
    tables = _Tables()
    begin = time.perf_counter()
    for number, op in enumerate(wanted):
        if progress:
            progress("validate", number, len(wanted))
        for call in OPS[op](Form(full, seed)):
            tables.leave_out(call)
            for name, device in targets:
                tables.take(call, name, device)
    if not tables.rows:
        reasons = "; ".join(dict.fromkeys(f"{entry['op']}: {entry['reason']}" for entry in tables.unserved.values()))
        raise BackendError(f"backend {backend!r} serves nothing of what was asked for: {reasons}")
    rows = tables.sorted_rows(wanted)
    return {
        "schema": SCHEMA,
        **machine(),
        "form": "full" if full else "quick",
        "seed": seed,
        "operations": wanted,
        "backends": status,
        "rows": rows,
        "unserved": list(tables.unserved.values()),
        "left_out": list(tables.left_out.values()),
        "cases": sum(row["cases"] for row in rows),
        "passed": all(row["passed"] for row in rows),
        "seconds": time.perf_counter() - begin,
    }


def _targets(backend: str) -> tuple[list[tuple[str, torch.device]], list[dict[str, Any]]]:
    status = backends.status()
    if backend != "all":
        backends.get(backend)
        status = {backend: status[backend]}
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    targets = [(name, device) for name, (on, _) in status.items() if on for device in devices]
    return targets, [{"name": name, "on": on, "reason": reason} for name, (on, reason) in status.items()]


def _wanted(ops: Sequence[str]) -> list[str]:
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise InputError(f"unknown operation {unknown[0]!r}; known operations: {', '.join(OPS)}")
    return [op for op in OPS if not ops or op in ops]


class _Tables:
    """What was found so far, by what it was found for."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        self.unserved: dict[tuple[str, ...], dict[str, Any]] = {}
        self.left_out: dict[tuple[str, ...], dict[str, Any]] = {}

    def leave_out(self, call: Call) -> None:
        """Note the cases of a call that its dtype cannot hold."""
        if call.left_out:
            reason = "not finite in this dtype, or of another shape"
            entry = {"op": call.op, "dtype": name_of(call.dtype), "cases": list(call.left_out), "reason": reason}
            self.left_out.setdefault((call.op, name_of(call.dtype), *call.left_out), entry)

    def take(self, call: Call, name: str, device: torch.device) -> None:
        """Run a call on a backend and enter its verdicts, or why there are none."""
        serves, reason = backends.get(name).serves(call.op, call.dtype, device, call.sizes)
        if not serves:
            key = (name, device.type, call.op, call.regime, name_of(call.dtype))
            labels = dict(zip(("backend", "device", "op", "regime", "dtype"), key, strict=True))
            entry = self.unserved.setdefault(key, {**labels, "cases": 0, "reason": reason})
            entry["cases"] += len(call.cases)
            return
        for verdict in _verdicts(call, name, device):
            self._enter(call, name, device, verdict)

    def _enter(self, call: Call, name: str, device: torch.device, verdict: Verdict) -> None:
        key = (name, device.type, call.op, verdict.regime or call.regime, verdict.variant, name_of(call.dtype))
        if key not in self.rows:
            labels = dict(zip(("backend", "device", "op", "regime", "variant", "dtype"), key, strict=True))
            self.rows[key] = {**labels, "cases": 0, "failed": 0, "passed": True, "worst": None, "metrics": {}}
        row = self.rows[key]
        row["cases"] += 1
        failed = [check for check in verdict.checks if not check.passed]
        row["failed"] += bool(failed)
        row["passed"] &= not failed
        for check in verdict.checks:
            found = _entry(check, verdict.case)
            for table, place in ((row["metrics"], check.name), (row, "worst")):
                if table.get(place) is None or found["ratio"] > table[place]["ratio"]:
                    table[place] = found

    def sorted_rows(self, ops: Sequence[str]) -> list[dict[str, Any]]:
        """Rows by backend, then operation in the order of the report, then in the order of their first case."""
        names = list(backends.names())
        return sorted(
            self.rows.values(), key=lambda row: (names.index(row["backend"]), row["device"], ops.index(row["op"]))
        )


def _verdicts(call: Call, name: str, device: torch.device) -> Iterable[Verdict]:
    try:
        return list(call.judge(name, call.run(name, device)))
    except Exception as error:
        # any fault of a backend is what this command is asked to show
        crash = Check(f"{type(error).__name__}: {error}", math.inf, 0.0)
        return [Verdict(case, [crash]) for case in call.cases]


def _entry(check: Check, case: str) -> dict[str, Any]:
    """A check as plain values, with its error in units of its limit; what is not a number is worse than anything."""
    if math.isnan(check.value):
        ratio = math.inf
    elif check.limit > 0:
        ratio = max(0.0, check.value / check.limit)
    else:
        ratio = math.inf if check.value > check.limit else 0.0
    return {"metric": check.name, "error": check.value, "limit": check.limit, "ratio": ratio, "case": case}
