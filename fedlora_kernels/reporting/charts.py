"""What the charts of a page are drawn from: the numbers of a report, arranged by layer, module and client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlora_kernels.reporting.layers import by_kind, layer_map

__all__ = ["aggregate_charts", "inspect_charts", "resize_charts"]

SERIES = 24
"""Adapters whose spectra and maps are on the page; the JSON report holds all."""

Rows = Sequence[Mapping[str, Any]]


def aggregate_charts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of an aggregation's charts."""
    comparison, rows = report.get("comparison"), {module["name"]: module for module in report["modules"]}
    names = by_kind(list(rows))
    modules = [rows[name] for name in names]
    compared = [{} if comparison is None else comparison["modules"].get(name, {}) for name in names]
    maps = {
        "": {
            "Rank": [module["rank"] for module in modules],
            "Energy lost": _map(modules, lambda module: module["error"] ** 2),
            "Norm of the sum": _map(modules, lambda module: module["energy"] ** 0.5),
            "Rank needed for all of it": [module["numerical_rank"] for module in modules],
            **_sum_maps(compared),
        }
    }
    spectra = [
        facts.get("singular_values") or module["singular_values"]
        for facts, module in zip(compared, modules, strict=True)
    ]
    return {
        "modules": names,
        "map": _layers(names, maps),
        "spectra": [{"name": "sum of the clients", "values": spectra}] if any(spectra) else [],
        "ranks": [module["rank"] for module in modules],
        "lost": _map(modules, lambda module: module["error"] ** 2),
        "bound": _map(modules, lambda module: module["error_bound"] ** 2),
        **_clients(comparison, compared),
        "sent": {row["name"]: row["norm"] for row in report["clients"] if row["status"] == "clipped"},
    }


def inspect_charts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of an inspection's charts."""
    adapters, comparison = report["adapters"], report["comparison"]
    by_name = [{row["name"]: row for row in adapter["modules"]} for adapter in adapters[:SERIES]]
    names = by_kind(list(comparison["modules"]))
    compared = [comparison["modules"][name] for name in names]
    maps: dict[str, dict[str, list[Any]]] = {}
    if len(adapters) > 1:
        maps["Weighted sum"] = {
            "Norm of the sum": [facts["norm"] for facts in compared],
            **_sum_maps(compared),
        }
    series = []
    for adapter, own in zip(adapters, by_name, strict=False):
        rows = [own.get(name) for name in names]
        maps[adapter["name"]] = {
            label: [None if row is None else row[key] for row in rows]
            for label, key in (
                ("Norm", "norm"),
                ("Effective rank", "effective_rank"),
                ("Stable rank", "stable_rank"),
                ("Rank for 99 % of the energy", "rank_99"),
                ("Rank", "rank"),
            )
        }
        series.append(
            {"name": adapter["name"], "values": [None if row is None else row["singular_values"] for row in rows]}
        )
    if len(adapters) > 1:
        series.append({"name": "weighted sum", "values": [facts["singular_values"] for facts in compared]})
    return {
        "modules": names,
        "map": _layers(names, maps),
        "spectra": series,
        "ranks": None,
        "lost": None,
        "bound": None,
        **_clients(comparison, compared),
        "sent": {},
    }


def resize_charts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of the one chart of several resized adapters: their sizes before and after."""
    adapters = report["adapters"]
    return {
        "modules": [],
        "map": _layers([], {}),
        "spectra": [],
        **_clients(None, []),
        "sizes": [[adapter[key] for adapter in adapters] for key in ("name", "bytes_in", "bytes")],
    }


def _sum_maps(compared: Rows) -> dict[str, list[Any]]:
    """Maps of what comparison says of each module's sum; none where there is none."""
    labels = {
        "effective_rank": "Effective rank of the sum",
        "stable_rank": "Stable rank of the sum",
        "cancellation": "Cancellation (1: agree, 0: cancel)",
        "drift": "Missed by averaging factors",
    }
    found = {label: [facts.get(key) for facts in compared] for key, label in labels.items()}
    return {label: values for label, values in found.items() if any(value is not None for value in values)}


def _clients(comparison: Mapping[str, Any] | None, compared: Rows) -> dict[str, Any]:
    if comparison is None or len(comparison["clients"]) < 2:
        return {"clients": [], "norms": [], "cosines": None, "cosines_of": []}
    return {
        "clients": comparison["clients"],
        "norms": comparison["norms"],
        "cosines": comparison["cosines"],
        "cosines_of": [facts.get("cosines") for facts in compared],
    }


def _map(modules: Rows, value: Callable[[Mapping[str, Any]], float]) -> list[float | None]:
    """A number of each module, None where what it is made of is unknown."""
    found: list[float | None] = []
    for module in modules:
        try:
            found.append(value(module))
        except TypeError:
            found.append(None)
    return found


def _layers(names: Sequence[str], maps: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, Any]:
    """Each quantity as a grid of layers and kinds of modules; modules that share a cell give their mean."""
    rows, columns, cells = layer_map(names)
    grids = []
    for group, quantities in maps.items():
        for label, values in quantities.items():
            gathered: dict[tuple[int, int], list[float]] = {}
            for cell, value in zip(cells, values, strict=True):
                if value is not None:
                    gathered.setdefault(cell, []).append(float(value))
            if not gathered:
                continue
            grid: list[list[float | None]] = [[None] * len(columns) for _ in rows]
            for (row, column), found in gathered.items():
                grid[row][column] = sum(found) / len(found)
            grids.append({"group": group, "label": label, "values": grid})
    return {"rows": rows, "columns": columns, "grids": grids, "kinds": _kinds([row for row, _ in cells])}


def _kinds(rows: Sequence[int]) -> list[list[int]]:
    """Runs of modules of one kind, as (row, first module, number of modules)."""
    runs: list[list[int]] = []
    for i, row in enumerate(rows):
        if runs and runs[-1][0] == row:
            runs[-1][2] += 1
        else:
            runs.append([row, i, 1])
    return runs
