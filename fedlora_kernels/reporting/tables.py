"""Tables of a run: totals, modules and clients, from the report alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from fedlora_kernels.reporting.terminal import text

__all__ = [
    "aggregate_tables",
    "by_layer_type",
    "comparison_tables",
    "facts",
    "layer_type",
    "listed",
    "number",
    "size",
    "span",
    "table",
    "trained_rank",
    "worst",
]

MODULE_ROWS = 40
"""More modules than this are shown by layer type."""

SENTENCES = 30
"""More of a kind than this are left to the report."""

WORD = 32
"""Longer words are folded before columns are left out."""
GAP = 2
"""Columns of a terminal between two columns of a table."""

_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])|(?<=\[)\d+(?=\]$)")
_FLATTENED_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")
"""In a kohya name, whose dots are underscores."""


class FittedTable(Table):
    """A table that leaves out its optional columns, the last first, where a terminal is too narrow for all of them."""

    optional: set[int]
    """Positions of the columns that may go."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        every, left = self.columns, dict(enumerate(self.columns))
        for index in sorted(self.optional, reverse=True):
            if sum(map(_least_width, left.values())) + GAP * (len(left) - 1) > options.max_width:
                del left[index]
        self.columns = list(left.values())
        try:
            yield from super().__rich_console__(console, options)
        finally:
            self.columns = every


def _least_width(column: Column) -> int:
    """Of the longest word, up to `WORD`, or of the longest cell of a column that is never folded."""
    cells = [cell.plain if isinstance(cell, Text) else str(cell) for cell in (column.header, *column.cells)]
    if column.no_wrap:
        return max(map(cell_len, cells))
    return min(WORD, max((cell_len(word) for cell in cells for word in cell.split()), default=0))


def table(title: str, *columns: str) -> FittedTable:
    """Return an empty table; a column is right-aligned and never folded if it starts with ``>``, optional if with ``?``."""
    made = FittedTable(
        title=Text("\n").append_text(text(title, "bold")),
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        show_edge=False,
        pad_edge=False,
    )
    made.optional = {index for index, column in enumerate(columns) if column.startswith("?")}
    for column in columns:
        right = column.lstrip("?").startswith(">")
        made.add_column(column.lstrip("?>"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return made


def facts(lines: Mapping[str, object]) -> Table:
    """Return lines of a name and what is said of it."""
    grid = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        grid.add_row(text(name, "bold"), text(value))
    return grid


def number(value: float | None, digits: int = 3) -> str:
    """Return a number in few digits; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def size(count: float | None) -> str:
    """Return bytes in the unit that reads best; a dash for None."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def span(low: int | None, high: int | None) -> str:
    """Return the ranks from ``low`` to ``high``; a dash where nothing was read."""
    if low is None:
        return "-"
    return str(low) if low == high else f"{low}-{high}"


def layer_type(module: str) -> str:
    """Return a module's name with its numbers, and that of an expert, as ``*``: what layers of one kind share."""
    flattened = module.startswith("lora_") and "." not in module
    return (_FLATTENED_NUMBER if flattened else _LAYER_NUMBER).sub("*", module)


def by_layer_type(modules: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the modules of each layer type and shape, m x n."""
    layers: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for module in modules:
        layers.setdefault((layer_type(module["name"]), f"{module['m']} x {module['n']}"), []).append(module)
    return layers


def trained_rank(rank: object, *modules: Mapping[str, Any]) -> str:
    """Return a rank that an inspection tells, and whether a start is subtracted beside it."""
    return f"{rank}, start" if any(module["start"] for module in modules) else str(rank)


def worst(modules: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the module with the largest error, of those whose error is known if there are any."""
    return max(modules, key=lambda module: -1.0 if module["error"] is None else module["error"])


def aggregate_tables(report: Mapping[str, Any], out: str) -> RenderableType:
    """Return the tables of an aggregation report (schema 1): totals, modules, clients."""
    modules: Sequence[Mapping[str, Any]] = report["modules"]
    rows = _by_layer(modules) if len(modules) > MODULE_ROWS else _by_module(modules)
    parts: list[RenderableType] = [_totals(report, out), rows, _clients(report["clients"], _decided(report))]
    if report.get("comparison") is not None:
        parts += comparison_tables(report["comparison"])
    return Group(*parts, *listed("Notes", report["notes"]))


def listed(title: str, lines: Sequence[str], style: str = "") -> list[RenderableType]:
    """Return sentences under a title; nothing of none. Of many, the first are shown."""
    if not lines:
        return []
    shown = [text(""), text(title, "bold"), *(text(f"- {line}", style) for line in lines[:SENTENCES])]
    if len(lines) > SENTENCES:
        shown.append(text(f"- and {len(lines) - SENTENCES} more; --report FILE.json holds all"))
    return list(shown)


def _totals(report: Mapping[str, Any], out: str) -> Table:
    totals, backend, seconds = report["totals"], report["backend"], report["seconds"]
    used = sum(client["status"] in ("used", "clipped") for client in report["clients"])
    rule = report["method"].get("rule")
    lines = {
        "wrote": out,
        "method": report["method"]["name"] + (f", {rule}" if rule else ""),
        "clients": f"{used} of {totals['clients']}",
        "modules": totals["modules"],
        "rank": f"{totals['rank_in']} in, {totals['rank']} out (sums over modules)",
        "size": f"{totals['parameters']} parameters, {size(totals['bytes'])}",
        "error": _error(totals),
        **({} if totals["cancellation"] is None else {"cancellation": _cancelled(totals["cancellation"])}),
        "backend": f"{_joined(backend['used'])} on {backend['device']}" if backend["used"] else "none needed",
        "seconds": ", ".join(f"{stage} {number(spent)}" for stage, spent in seconds.items()),
    }
    grid = facts(lines)
    for fallback in backend.get("fallbacks", ()):
        grid.add_row(
            text("fallback", "bold"), text(f"{fallback['op']}: not {fallback['backend']}, {fallback['reason']}")
        )
    return grid


def _cancelled(cancellation: float) -> str:
    left = math.sqrt(cancellation)
    return (
        f"{number(cancellation)} (1: all agree, 0: nothing left); |D|_F is {number(left)} of what the updates add up to"
    )


def _error(totals: Mapping[str, Any]) -> str:
    if totals["error"] is None:
        return "not known: not measured, or no common adapter"
    return f"{number(totals['error'])} of |D|_F, certified at most {number(totals['error_bound'])}"


def _by_module(modules: Sequence[Mapping[str, Any]]) -> Table:
    rows = table("Modules", "module", "?>m x n", "?>rank in", ">rank", "?>|D|_F", ">error", "?>at most", "notes")
    for module in modules:
        rows.add_row(
            text(module["name"]),
            text(f"{module['m']} x {module['n']}"),
            text(module["stacked_rank"]),
            text(module["rank"]),
            text(number(_norm(module["energy"]))),
            text(number(module["error"])),
            text(number(module["error_bound"])),
            text(_joined(module["notes"])),
        )
    return rows


def _by_layer(modules: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "modules",
        ">count",
        "?>m x n",
        "?>rank min",
        ">median",
        "?>max",
        ">worst error",
        "?>at most",
        "?worst in",
    )
    rows = table("Modules by layer type", *columns)
    for (layer, shape), members in by_layer_type(modules).items():
        ranks, lost = [member["rank"] for member in members], worst(members)
        rows.add_row(
            text(layer),
            text(len(members)),
            text(shape),
            text(min(ranks)),
            text(number(statistics.median(ranks), 6)),
            text(max(ranks)),
            text(number(lost["error"])),
            text(number(lost["error_bound"])),
            text(lost["name"]),
        )
    return rows


def _clients(clients: Iterable[Mapping[str, Any]], decided: Mapping[str, Mapping[str, Any]]) -> Table:
    names = [f">{name}" for name in decided]
    rows = table("Clients", "client", ">weight", "status", "?>rank", "?>norm", "?>size", *names, "reason")
    for client in clients:
        status = client["status"]
        rows.add_row(
            text(client["name"]),
            text(number(client["weight"], 4)),
            text(status, "" if status == "used" else "yellow"),
            text(span(client["rank_min"], client["rank_max"])),
            text(number(client["norm"])),
            text(size(client["bytes"])),
            *(text(_plain(values.get(client["name"]))) for values in decided.values()),
            text(_reason(client)),
        )
    return rows


COSINE_COLUMNS = 8
"""More clients than this make a matrix that no terminal holds; then only the extremes are shown."""


def comparison_tables(comparison: Mapping[str, Any]) -> list[RenderableType]:
    """Return the tables of clients beside each other and their weighted sum; none for a single client."""
    names = comparison["clients"]
    if len(names) < 2:
        return []
    shown = table("Clients and their weighted sum", "client", ">|D|_F", ">cosine: sum", ">others", "?>|sum| without it")
    columns = (comparison[key] for key in ("norms", "with_sum", "with_rest", "without"))
    for name, norm, with_sum, with_rest, without in zip(names, *columns, strict=True):
        cosines = (number(cosine) for cosine in (with_sum, with_rest))
        shown.add_row(*(text(cell) for cell in (name, number(norm), *cosines, number(without))))
    told = (
        f"sum: |D|_F {number(comparison['norm'])}; cancellation {number(comparison['cancellation'])} (1: all agree; "
        f"{number(comparison['orthogonal'])}: orthogonal; 0: nothing left); means of factors miss "
        f"{number(comparison['drift'])} of it"
    )
    matrix = [] if comparison["cosines"] is None else [_cosines(names, comparison["cosines"])]
    return [shown, text(told), *matrix]


def _cosines(names: Sequence[str], cosines: Sequence[Sequence[float | None]]) -> Table:
    if len(names) > COSINE_COLUMNS:
        return _extreme_cosines(names, cosines)
    rows = table("Cosines between updates", "", *(f">{index + 1}" for index in range(len(names))))
    for index, name in enumerate(names):
        cells = ("-" if value is None else f"{value:.3f}" for value in cosines[index])
        rows.add_row(text(f"{index + 1} {name}"), *(text(cell) for cell in cells))
    return rows


def _extreme_cosines(names: Sequence[str], cosines: Sequence[Sequence[float | None]]) -> Table:
    rows = table("Cosines between updates: each client's least and most alike", "client", ">least", "", ">most", "")
    for index, name in enumerate(names):
        row = enumerate(cosines[index])
        others = [(value, names[other]) for other, value in row if other != index and value is not None]
        (low, far), (high, near) = min(others, default=(0.0, "-")), max(others, default=(0.0, "-"))
        rows.add_row(text(name), text(f"{low:.3f}"), text(far), text(f"{high:.3f}"), text(near))
    return rows


def _decided(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What method and robust rule decided of each client, one value each, by what it is called."""
    names = {client["name"] for client in report["clients"]}
    columns: dict[str, Mapping[str, Any]] = {}
    for key, values in (report.get("decision") or {}).items():
        if isinstance(values, Mapping) and set(values) <= names and not any(map(_nested, values.values())):
            columns[key] = values
    rule = (report.get("robust") or {}).get("clients") or {}
    if any(verdict["score"] is not None for verdict in rule.values()):
        columns["score"] = {name: verdict["score"] for name, verdict in rule.items()}
    return columns


def _nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, (float, int)) or value is None else str(value)


def _reason(client: Mapping[str, Any]) -> str:
    reason = client.get("reason") or ""
    factor = client.get("factor")
    return f"scaled by {number(factor)} {reason}".strip() if client["status"] == "clipped" else reason


def _norm(energy: float | None) -> float | None:
    return None if energy is None else math.sqrt(max(0.0, energy))


def _joined(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
