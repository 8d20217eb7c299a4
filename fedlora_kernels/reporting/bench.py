"""What ``fedlora bench`` shows: our time beside the fastest peer's, with the accuracy of both and the distance to the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedlora_kernels.reporting.tables import facts, number, table
from fedlora_kernels.reporting.terminal import text

__all__ = ["bench_tables"]


def bench_tables(report: Mapping[str, Any]) -> RenderableType:
    """Return the rates of the machine, a table for each suite, and what was not compared."""
    suites = [_suite(name, [row for row in report["rows"] if row["suite"] == name]) for name in report["suites"]]
    return Group(_head(report), *suites, *_missing(report))


def _head(report: Mapping[str, Any]) -> Table:
    processor, packages = report["processor"], report["packages"]
    lines = {
        "processor": f"{processor['name']}, {processor['simd']}, load {number(report['load'])} on {processor['cores']} cores",
        "versions": f"fedlora_kernels {report['tool']['version']}, torch {packages['torch']}, numpy {packages['numpy']}, "
        f"scipy {packages['scipy'] or 'absent'}",
    }
    for threads, rate in report["rates"].items():
        lines[f"rates, {threads} thread{'s' if threads != '1' else ''}"] = (
            f"{_giga(rate['float64'])} Gflop/s float64, {_giga(rate['float32'])} float32, copy {_giga(rate['copy'])} GB/s"
        )
    return facts(lines)


def _giga(rate: float) -> str:
    return "unknown" if rate != rate else number(rate * 1e-9)  # noqa: PLR0124 - NaN


def _suite(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "case",
        "backend",
        ">us each",
        ">20..80 %",
        ">times the floor",
        "fastest peer",
        ">us each",
        ">ratio",
        "accuracy, ours and peer",
    )
    shown = table(name, *columns)
    for row in rows:
        case = text(", ".join(f"{key} {value}" if key != "dtype" else str(value) for key, value in row["case"].items()))
        if row["reason"]:
            shown.add_row(case, text("not served"), *[text("")] * 6, text(row["reason"]))
            continue
        ours, peer = row["ours"], row["peers"].get(row["peer"])
        ratio = text(number(row["ratio"])) if not row["red"] else text("REFUSED: " + "; ".join(row["red"]), "red")
        shown.add_row(
            case,
            text(row["backend"]),
            text(_micro(ours["seconds"])),
            text(f"{_micro(ours['q20'])}..{_micro(ours['q80'])}"),
            text(number(row["times_floor"])),
            text(row["peer"] or "-"),
            text(_micro(peer["seconds"]) if peer else "-"),
            ratio,
            _accuracy(ours, peer),
        )
        for label, bound in row["bounds"].items():
            shown.add_row(
                text(""), text(""), *[text("")] * 3, text(label), text(_micro(bound["seconds"])), text(""), text("")
            )
    return shown


def _accuracy(ours: Mapping[str, Any], peer: Mapping[str, Any] | None) -> Text:
    other = peer["accuracy"] if peer else {}
    return text(
        ", ".join(
            f"{name} {value:.0e}" + (f" {other[name]:.0e}" if name in other else "")
            for name, value in ours["accuracy"].items()
        )
    )


def _micro(seconds: float) -> str:
    return number(1e6 * seconds)


def _missing(report: Mapping[str, Any]) -> list[Text]:
    lines = [text(f"absent: {name} is not installed, so it is no peer") for name in report["absent"]]
    for row in report["rows"]:
        failed: Mapping[str, str] = row.get("failed_peers") or {}
        case = ", ".join(str(value) for value in row["case"].values())
        lines += [text(f"{row['suite']} {case}: {name} broke down: {why}") for name, why in failed.items()]
    if report["form"] == "quick":
        lines.append(text("quick form: tiny problems, which say nothing of speed"))
    return lines
