"""The written part of an inspection's page: adapters side by side, and what looks wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_kernels.reporting.markup import Markup, element, table
from fedlora_kernels.reporting.pieces import (
    alike_section,
    figure,
    footer,
    header,
    layer_section,
    listed,
    page_body,
    section,
    spectra_section,
    sum_tiles,
)
from fedlora_kernels.reporting.tables import size, span, trained_rank

__all__ = ["inspect_sections"]

MODULE_TABLES = 8
"""Adapters whose modules stand in tables of their own."""
Report = Mapping[str, Any]


def inspect_sections(report: Report, data: Report) -> tuple[str, Markup]:
    """Return the title and the body of an inspection's page; ``data`` is what its charts are drawn from."""
    adapters = report["adapters"]
    title = adapters[0]["name"] if len(adapters) == 1 else f"{len(adapters)} adapters side by side"
    bases = ", ".join(dict.fromkeys(adapter["base_model"] or "unknown base model" for adapter in adapters))
    findings = report["findings"]
    wrong = (
        listed("What looks wrong", findings)
        if findings
        else element("section", element("p", "Nothing looks wrong.", class_="good"))
    )
    parts = [
        header("inspect", title, bases, _inspect_tiles(report)),
        wrong,
        _adapters(report),
        alike_section(report, data),
        layer_section("Layers and modules", "Each cell is one module; choose what it shows.", data),
        spectra_section(data),
        _adapter_modules(adapters),
        footer(report),
    ]
    return f"{title} — inspection", page_body(parts)


def _inspect_tiles(report: Report) -> list[tuple[str, str, str]]:
    adapters = report["adapters"]
    norms = [adapter["norm"] for adapter in adapters if adapter["norm"] is not None]
    ranks = [adapter[key] for adapter in adapters for key in ("rank_min", "rank_max")]
    modules = {row["name"] for adapter in adapters for row in adapter["modules"]}
    low, high = min(norms, default=None), max(norms, default=None)
    spread = figure(low) if low == high else f"{figure(low)} to {figure(high)}"
    return [
        ("Adapters", str(len(adapters)), f"{len(modules):,} modules"),
        ("Ranks", span(min(ranks, default=None), max(ranks, default=None)), "as trained"),
        (
            "Size",
            size(sum(adapter["bytes"] for adapter in adapters)),
            f"{sum(a['parameters'] for a in adapters):,} parameters",
        ),
        ("Norms", spread, "|D| over all modules"),
        ("Findings", str(len(report["findings"])), "below" if report["findings"] else "nothing looks wrong"),
        *sum_tiles(report["comparison"]),
    ]


def _adapters(report: Report) -> Markup:
    comparison = report["comparison"]
    together = len(report["adapters"]) > 1
    rows = []
    for i, adapter in enumerate(report["adapters"]):
        beside = [figure(comparison[key][i]) for key in ("with_sum", "with_rest", "without")] if together else []
        rows.append(
            (
                adapter["name"],
                figure(adapter["weight"], 4),
                len(adapter["modules"]),
                span(adapter["rank_min"], adapter["rank_max"]),
                figure(adapter["effective_rank"], 4),
                figure(adapter["stable_rank"], 4),
                figure(adapter["norm"]),
                figure(adapter["norm_score"]),
                *beside,
                size(adapter["bytes"]),
                ", ".join(adapter["dtypes"]),
                adapter["init"] or "-",
                adapter["content"][:12],
            )
        )
    columns = [
        "adapter",
        ">weight",
        ">modules",
        ">rank",
        ">effective",
        ">stable",
        ">|D|",
        ">norm score",
        *((">cosine: sum", ">others", ">|sum| without") if together else ()),
        ">size",
        "dtype",
        "init",
        "content",
    ]
    told = "Effective and stable rank are those of all modules together."
    return section("Adapters", told, table("Adapters", columns, rows))


def _adapter_modules(adapters: Sequence[Report]) -> Markup:
    more = len(adapters) - MODULE_TABLES
    told = element("p", f"Those of {more} more adapters stand in the JSON report.", class_="lead") if more > 0 else None
    return element("section", element("h2", "Modules"), told, *map(_own_modules, adapters[:MODULE_TABLES]))


def _own_modules(adapter: Report) -> Markup:
    rows = [
        (
            row["name"],
            f"{row['m']} × {row['n']}",
            trained_rank(row["rank"], row),
            figure(row["scale"]),
            figure(row["norm"]),
            figure(row["effective_rank"]),
            figure(row["stable_rank"]),
            *("-" if row[key] is None else row[key] for key in ("rank_90", "rank_99")),
            figure(row["norm_A"]),
            figure(row["norm_B"]),
            row["problem"] or "-",
        )
        for row in adapter["modules"]
    ]
    figures = (">m × n", ">rank", ">scale", ">|D|", ">effective", ">stable", ">90 %", ">99 %", ">|A|", ">|B|")
    shown = table(f"Modules of {adapter['name']}", ("module", *figures, "problem"), rows)
    return element("details", element("summary", f"{adapter['name']}: {len(rows)} modules"), shown)
