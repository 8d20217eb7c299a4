"""What ``fedlora inspect`` shows: adapters side by side, spectra, cosines, and what looks wrong."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from fedlora_kernels.reporting.tables import (
    MODULE_ROWS,
    by_layer_type,
    comparison_tables,
    listed,
    number,
    size,
    span,
    table,
    trained_rank,
)
from fedlora_kernels.reporting.terminal import text

__all__ = ["inspect_tables"]

SPECTRA = 8
"""More adapters than this have their spectra in the report alone."""


def inspect_tables(report: Mapping[str, Any]) -> RenderableType:
    """Return the tables of an inspection: adapters, spectra, cosines, findings."""
    adapters: Sequence[Mapping[str, Any]] = report["adapters"]
    parts: list[RenderableType] = [_adapters(adapters)]
    parts += [_spectra(adapter) for adapter in adapters[:SPECTRA]]
    if len(adapters) > SPECTRA:
        parts += [
            text(""),
            text(f"Spectra of {len(adapters) - SPECTRA} more: --report FILE.html or FILE.json holds all"),
        ]
    parts += comparison_tables(report["comparison"])
    parts += _findings(report["findings"])
    return Group(*parts)


def _findings(findings: Sequence[str]) -> list[RenderableType]:
    if not findings:
        return [text(""), text("Nothing looks wrong.", "green")]
    return listed("What looks wrong", findings, "yellow")


def _adapters(adapters: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "adapter",
        ">modules",
        ">rank",
        "?>effective",
        "?>stable",
        "?>scale",
        "?dtype",
        ">|D|_F",
        "?>size",
        "?base model",
        "?extras",
    )
    rows = table("Adapters", *columns)
    for adapter in adapters:
        rows.add_row(
            text(adapter["name"]),
            text(len(adapter["modules"])),
            text(trained_rank(span(adapter["rank_min"], adapter["rank_max"]), *adapter["modules"])),
            text(number(adapter["effective_rank"])),
            text(number(adapter["stable_rank"])),
            text(_span(adapter["scales"])),
            text(", ".join(adapter["dtypes"])),
            text(number(adapter["norm"])),
            text(size(adapter["bytes"])),
            text(adapter["base_model"] or "-"),
            text(", ".join(extra["name"] for extra in adapter["extras"]) or "-"),
        )
    return rows


def _span(values: Sequence[float]) -> str:
    return ", ".join(number(value) for value in values) if len(values) < 4 else f"{values[0]:.3g}-{values[-1]:.3g}"


def _spectra(adapter: Mapping[str, Any]) -> Table:
    modules: Sequence[Mapping[str, Any]] = adapter["modules"]
    columns = (
        "module",
        "?>m x n",
        ">rank",
        "?>scale",
        "?>s_1",
        ">effective",
        "?>stable",
        "?>rank 90 %",
        ">99 %",
        "?>|D|_F",
    )
    rows = table(f"Spectra of {adapter['name']}", *columns)
    if len(modules) <= MODULE_ROWS:
        for module in modules:
            rows.add_row(*(text(value) for value in _module_cells(module)))
        return rows
    for (layer, shape), members in by_layer_type(modules).items():
        cells = [f"{layer} ({len(members)}, medians)", shape]
        for key in ("rank", "scale", "s_1", "effective_rank", "stable_rank", "rank_90", "rank_99", "norm"):
            values = [value for value in (_value(member, key) for member in members) if value is not None]
            cells.append(number(statistics.median(values)) if values else "-")
        rows.add_row(*(text(cell) for cell in cells))
    return rows


def _module_cells(module: Mapping[str, Any]) -> list[object]:
    cells: list[object] = [module["name"], f"{module['m']} x {module['n']}", trained_rank(module["rank"], module)]
    if module["problem"] is not None:
        return [*cells, number(module["scale"]), *["-"] * 6]
    return [
        *cells,
        number(module["scale"]),
        number(_value(module, "s_1")),
        number(module["effective_rank"]),
        number(module["stable_rank"]),
        module["rank_90"],
        module["rank_99"],
        number(module["norm"]),
    ]


def _value(module: Mapping[str, Any], key: str) -> float | None:
    if key != "s_1":
        return module.get(key)
    values = module.get("singular_values")
    return values[0] if values else None
