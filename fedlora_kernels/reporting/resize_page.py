"""The written part of the page of several resized adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora_kernels.reporting.markup import Markup, table
from fedlora_kernels.reporting.pieces import chart, figure, footer, header, listed, page_body, percent, section
from fedlora_kernels.reporting.tables import size

__all__ = ["resize_sections"]

Report = Mapping[str, Any]


def resize_sections(report: Report) -> tuple[str, Markup]:
    """Return the title and the body of the page of several resized adapters."""
    adapters = report["adapters"]
    title = f"{len(adapters)} adapters, resized"
    before, after = (sum(adapter[key] for adapter in adapters) for key in ("bytes_in", "bytes"))
    kept = [adapter["energy_kept"] for adapter in adapters if adapter["energy_kept"] is not None]
    tiles = [
        ("Adapters", str(len(adapters)), f"{sum(adapter['modules'] for adapter in adapters):,} modules"),
        (
            "Total rank",
            f"{sum(adapter['rank'] for adapter in adapters):,}",
            f"of {sum(adapter['rank_in'] for adapter in adapters):,}",
        ),
        ("Size", size(after), f"from {size(before)}"),
        ("Least energy kept", percent(min(kept, default=None)), "share of |D|² of an adapter"),
    ]
    rows = [
        (
            adapter["name"],
            f"{adapter['rank_in']:,}",
            f"{adapter['rank']:,}",
            size(adapter["bytes_in"]),
            size(adapter["bytes"]),
            percent(adapter["energy_kept"]),
            figure(adapter["error"]),
            figure(adapter["error_bound"]),
            adapter["folder"],
        )
        for adapter in adapters
    ]
    columns = (
        "adapter",
        ">rank before",
        ">after",
        ">size before",
        ">after",
        ">energy kept",
        ">error",
        ">at most",
        "folder",
    )
    told = "Ranks are sums over modules; errors are relative to the norm of the adapter. Each folder holds a report of its own."
    sizes = section(
        "Sizes",
        "Bytes of the factors, before and after.",
        chart("sizes", f"Sizes of {len(adapters)} adapters before and after"),
    )
    parts = [
        header("resize", title, ", ".join(dict.fromkeys(adapter["rule"] for adapter in adapters)), tiles),
        listed("Warnings", [f"{adapter['name']}: {text}" for adapter in adapters for text in adapter["warnings"]]),
        section("Adapters", told, table("Adapters", columns, rows)),
        sizes,
        listed(
            "Notes", [f"{adapter['name']}: {text}" for adapter in adapters for text in adapter["notes"]], warn=False
        ),
        footer(report),
    ]
    return title, page_body(parts)
