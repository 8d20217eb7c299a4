"""Tables of resized adapters, from their reports alone: ranks before and after, what was kept, what was lost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from fedlora_kernels.reporting.tables import MODULE_ROWS, by_layer_type, facts, listed, number, size, table, worst
from fedlora_kernels.reporting.terminal import text

__all__ = ["resize_tables"]


def resize_tables(reports: Sequence[Mapping[str, Any]], out: str) -> RenderableType:
    """Return the tables of one resized adapter, module by module, or of several, one row each (schema of aggregations)."""
    if len(reports) > 1:
        notes = [f"{report['clients'][0]['name']}: {note}" for report in reports for note in report["notes"]]
        return Group(_wrote(reports, out), _by_adapter(reports), *listed("Notes", notes))
    modules = reports[0]["modules"]
    rows = _by_layer(modules) if len(modules) > MODULE_ROWS else _by_module(modules)
    return Group(_wrote(reports, out), rows, *listed("Notes", reports[0]["notes"]))


def _wrote(reports: Sequence[Mapping[str, Any]], out: str) -> Table:
    first = reports[0]
    lines = {"wrote": out, "rule": f"{first['method']['rule']}, {first['dtype']}"}
    if len(reports) == 1:
        totals = first["totals"]
        lines["rank"] = f"{_change(totals['rank_in'], totals['rank'])} (sums over {totals['modules']} modules)"
        lines["size"] = f"{_size_change(first)}, {totals['parameters']} parameters"
        lines["energy kept"] = number(totals["energy_kept"], 6)
        lines["error"] = f"{number(totals['error'])} of |D|_F, certified at most {number(totals['error_bound'])}"
    for stage in ("read", "compute", "write", "total"):
        spent = sum(report["seconds"][stage] for report in reports)
        lines["seconds"] = ", ".join(filter(None, (lines.get("seconds"), f"{stage} {number(spent)}")))
    return facts(lines)


def _by_adapter(reports: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("adapter", "?>modules", ">rank", ">size", ">energy kept", "?>error", "?>at most")
    rows = table("Adapters", *columns)
    for report in reports:
        totals = report["totals"]
        cells = (
            report["clients"][0]["name"],
            totals["modules"],
            _change(totals["rank_in"], totals["rank"]),
            _size_change(report),
            number(totals["energy_kept"], 6),
            number(totals["error"]),
            number(totals["error_bound"]),
        )
        rows.add_row(*(text(cell) for cell in cells))
    return rows


def _by_module(modules: Sequence[Mapping[str, Any]]) -> Table:
    rows = table("Modules", "module", "?>m x n", ">rank", ">energy kept", ">error", "?>at most", "?notes")
    for module in modules:
        cells = (
            module["name"],
            f"{module['m']} x {module['n']}",
            _change(module["stacked_rank"], module["rank"]),
            number(module["energy_kept"], 6),
            number(module["error"]),
            number(module["error_bound"]),
            ", ".join(module["notes"]),
        )
        rows.add_row(*(text(cell) for cell in cells))
    return rows


def _by_layer(modules: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "modules",
        ">count",
        "?>m x n",
        ">rank",
        "?>median",
        "?>max",
        ">least energy kept",
        "?>error",
        "?worst in",
    )
    rows = table("Modules by layer type", *columns)
    for (layer, shape), members in by_layer_type(modules).items():
        before, after = ([member[key] for member in members] for key in ("stacked_rank", "rank"))
        lost = worst(members)
        cells = (
            layer,
            len(members),
            shape,
            _change(sum(before), sum(after)),
            number(statistics.median(after), 6),
            max(after),
            number(lost["energy_kept"], 6),
            number(lost["error"]),
            lost["name"],
        )
        rows.add_row(*(text(cell) for cell in cells))
    return rows


def _change(before: int, after: int) -> str:
    return f"{before} -> {after}"


def _size_change(report: Mapping[str, Any]) -> str:
    return f"{size(report['clients'][0]['bytes'])} -> {size(report['totals']['bytes'])}"
