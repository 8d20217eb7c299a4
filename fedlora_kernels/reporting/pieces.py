"""Pieces that pages share: head and foot, tiles, lists, and the places where charts are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_kernels.reporting.markup import Markup, element, join, table
from fedlora_kernels.reporting.tables import number

__all__ = [
    "alike_section",
    "chart",
    "chooser",
    "figure",
    "footer",
    "header",
    "layer_section",
    "listed",
    "page_body",
    "percent",
    "section",
    "spectra_section",
    "sum_tiles",
]

LISTED = 200
"""Findings and warnings that a page lists; the JSON report holds all."""
Report = Mapping[str, Any]


def page_body(parts: Sequence[Markup | None]) -> Markup:
    """The body of a page: its parts in order, the first one its header; None is left out."""
    skip = element("a", "Skip to the report", href="#report", class_="skip")
    script = element(
        "noscript", element("p", "Charts need JavaScript; the numbers stand in the tables.", class_="lead")
    )
    first, *rest = parts
    return element("div", skip, first, element("main", script, *rest, id="report"), class_="page")


def header(command: str, title: str, subtitle: str, tiles: Sequence[tuple[str, str, str]]) -> Markup:
    """The head of a page: title, and tiles of (label, value, note)."""
    shown = [
        element(
            "div",
            element("dt", label),
            element("dd", element("div", value, class_="value"), element("div", note, class_="note")),
            class_="tile",
        )
        for label, value, note in tiles
    ]
    return element(
        "header",
        element("p", f"fedlora · {command}", class_="mark"),
        element("h1", title),
        element("p", subtitle, class_="sub"),
        element("dl", *shown, class_="tiles"),
    )


def sum_tiles(comparison: Report | None) -> list[tuple[str, str, str]]:
    """Tiles of what comparison says of the weighted sum; none for a single client."""
    if comparison is None or len(comparison["clients"]) < 2:
        return []
    orthogonal = comparison["orthogonal"]
    aside = "all updates are zero" if orthogonal is None else f"1: agree, {figure(orthogonal)}: orthogonal, 0: cancel"
    return [
        ("Cancellation", figure(comparison["cancellation"]), aside),
        ("Factor averaging misses", percent(comparison["drift"]), "of |D|"),
    ]


def section(title: str, lead: str, *parts: Markup | None) -> Markup:
    """A part of a page under its heading, led in by a sentence."""
    return element("section", element("h2", title), element("p", lead, class_="lead"), *parts)


def layer_section(title: str, lead: str, data: Report) -> Markup | None:
    """The heat map of layers and kinds of modules; None where there is nothing to show."""
    if not data["map"]["grids"]:
        return None
    told = f"Heat map of {len(data['map']['rows'])} kinds of modules by {len(data['map']['columns'])} layers"
    return section(title, lead, chooser("map", "Show"), chart("map", told))


def spectra_section(data: Report) -> Markup | None:
    """The spectra of all modules, and that of one; None where there are none."""
    if not data["spectra"]:
        return None
    marked = " The orange line is the rank that was kept." if data["ranks"] is not None else ""
    all_of = section(
        "Spectra of all modules",
        f"Singular values beside the largest of their module.{marked}",
        chooser("spectra", "Of") if len(data["spectra"]) > 1 else None,
        chart("spectra", "Heat map of the singular values of every module"),
    )
    steps = [
        element("button", text, type="button", data_step=step, aria_label=f"{told} module")
        for text, step, told in (("←", "-1", "Previous"), ("→", "1", "Next"))
    ]
    one = section(
        "One spectrum",
        "Singular values of a module, on a logarithmic scale.",
        chooser("spectrum", "Module", *steps),
        chart("spectrum", "Singular values of the chosen module"),
    )
    return element("div", all_of, one, class_="pair")


def alike_section(report: Report, data: Report) -> Markup | None:
    """Norms, cosines and near twins; None for a single client."""
    clients = data["clients"]
    if not clients:
        return None
    norms = section(
        "Norms",
        "A client far louder than the others decides the sum alone.",
        chart("norms", f"Norms of the updates of {len(clients)} clients"),
    )
    matrix = None
    if data["cosines"] is not None:
        matrix = section(
            "Similarity",
            "Cosines between updates: 1 agree, 0 unrelated, -1 opposed.",
            chooser("cosines", "Of"),
            chart("cosines", f"Heat map of the cosines between {len(clients)} clients"),
            _cosine_table(clients, data["cosines"]),
        )
    twins = report["comparison"]["near_twins"]
    told = [f"{one} and {other} are the same but for rounding" for one, other in twins]
    return join([element("div", norms, matrix, class_="pair"), listed("Near twins", told) if twins else None])


def _cosine_table(clients: Sequence[str], cosines: Sequence[Sequence[float | None]]) -> Markup:
    rows = [
        (name, *("-" if value is None else f"{value:.3f}" for value in row))
        for name, row in zip(clients, cosines, strict=True)
    ]
    columns = ("client", *(f">{name}" for name in clients))
    return element("details", element("summary", "As a table"), table("Cosines over the whole model", columns, rows))


def listed(title: str, texts: Sequence[str], warn: bool = True) -> Markup | None:
    """A list of texts; None where there are none."""
    if not texts:
        return None
    items = [element("li", text) for text in texts[:LISTED]]
    if len(texts) > LISTED:
        items.append(element("li", f"and {len(texts) - LISTED} more, in the JSON report"))
    return element("section", element("h2", title), element("ul", *items), class_="warn" if warn else None)


def footer(report: Report) -> Markup:
    """The foot of a page."""
    return element(
        "footer", f"fedlora_kernels {report['tool']['version']}. This page is complete in itself and loads nothing."
    )


def chooser(chart: str, label: str, *more: Markup) -> Markup:
    """The choice of what a chart shows."""
    return element(
        "div", element("label", label, for_=f"{chart}-of"), element("select", id=f"{chart}-of"), *more, class_="bar"
    )


def chart(name: str, told: str) -> Markup:
    """The place of a chart, and what it is for those who do not see it."""
    return element("figure", element("div", id=name, class_="chart", role="img", aria_label=told))


def percent(share: float | None) -> str:
    """A share in per cent; a dash for None."""
    return "-" if share is None else f"{100 * share:.3g} %"


def figure(value: float | None, digits: int = 3) -> str:
    """A number in few digits, large ones not as powers of ten; a dash for None."""
    return f"{value:,.0f}" if value is not None and 1000.0 <= abs(value) < 1e7 else number(value, digits)
