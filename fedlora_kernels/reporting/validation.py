"""What ``fedlora validate`` shows: the worst error of every kernel beside its limit, and what was not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedlora_kernels.reporting.tables import table
from fedlora_kernels.reporting.terminal import text

__all__ = ["validation_tables"]


def validation_tables(report: Mapping[str, Any]) -> RenderableType:
    """Return one table for each backend and device, then what was not run and the verdict; variants of a regime are merged."""
    rows = _merged(report["rows"])
    places = dict.fromkeys((row["backend"], row["device"]) for row in rows)
    tables = [_backend(*place, [row for row in rows if (row["backend"], row["device"]) == place]) for place in places]
    verdict = text(_verdict(report), "" if report["passed"] else "red")
    return Group(*tables, *_missing(report), Text("\n").append_text(verdict))


def _merged(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("backend", "device", "op", "regime", "dtype"))
        if key not in merged:
            merged[key] = dict(row)
            continue
        here = merged[key]
        for name in ("cases", "failed"):
            here[name] += row[name]
        here["passed"] &= row["passed"]
        if here["worst"] is None or (row["worst"] and row["worst"]["ratio"] > here["worst"]["ratio"]):
            here["worst"] = row["worst"]
    return list(merged.values())


def _backend(name: str, device: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("operation", "regime", "dtype", ">cases", "", "worst", ">error", ">limit", "case")
    title = f"Backend {name}" + (f" on {device}" if device != "cpu" else "")
    shown = table(f"{title}, worst case in units of its limit", *columns)
    before = ""
    for row in rows:
        worst, op = row["worst"], row["op"]
        numbers = (
            (worst["metric"], f"{worst['error']:.1e}", f"{worst['limit']:.1e}", worst["case"]) if worst else ("",) * 4
        )
        metric, error, limit, case = (text(value) for value in numbers)
        verdict = text("ok") if row["passed"] else text(f"{row['failed']} FAILED", "red")
        label = text("" if op == before else op, "bold")
        shown.add_row(
            label, text(row["regime"]), text(row["dtype"]), text(row["cases"]), verdict, metric, error, limit, case
        )
        before = op
    return shown


def _missing(report: Mapping[str, Any]) -> list[Table]:
    """Backends that are off, calls that a backend does not serve, and cases that a dtype cannot hold: each with its reason."""
    entries: dict[tuple[str, str, str], int] = {}
    for backend in report["backends"]:
        if not backend["on"]:
            entries[backend["name"], "everything", backend["reason"]] = 0
    for entry in report["unserved"]:
        key = (
            entry["backend"] + (f" on {entry['device']}" if entry["device"] != "cpu" else ""),
            entry["op"],
            entry["reason"],
        )
        entries[key] = entries.get(key, 0) + entry["cases"]
    for entry in report["left_out"]:
        key = ("every one", f"{entry['op']} in {entry['dtype']}", f"cases {entry['reason']}")
        entries[key] = entries.get(key, 0) + len(entry["cases"])
    if not entries:
        return []
    shown = table("Not run", "backend", "what", ">cases", "reason")
    for (backend, what, reason), count in entries.items():
        shown.add_row(text(backend), text(what), text(count or "-"), text(reason))
    return [shown]


def _verdict(report: Mapping[str, Any]) -> str:
    failed = sum(row["failed"] for row in report["rows"])
    cases, seconds = report["cases"], report["seconds"]
    told = f"{cases - failed} of {cases} cases within their limits, {seconds:.0f} s, {report['form']} form, seed {report['seed']}"
    return f"passed: {told}" if report["passed"] else f"FAILED: {told}"
