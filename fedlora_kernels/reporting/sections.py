"""The written part of a page: headline facts, warnings, tables, and the places where charts are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_kernels.reporting.markup import Markup, element, join, table
from fedlora_kernels.reporting.tables import number, size, span

__all__ = ["aggregate_sections", "inspect_sections", "resize_sections"]

LISTED = 200
"""Findings and warnings that a page lists; the JSON report holds all."""
WORST = 10
MODULE_TABLES = 8
"""Adapters whose modules stand in tables of their own."""

Report = Mapping[str, Any]


def aggregate_sections(report: Report, data: Report) -> tuple[str, Markup]:
    """Return the title and the body of an aggregation's page; ``data`` is what its charts are drawn from."""
    totals, method = report["totals"], report["method"]
    used = sum(client["status"] in ("used", "clipped") for client in report["clients"])
    resized = len(report["clients"]) == 1
    title = f"{report['clients'][0]['name']}, resized" if resized else f"{used} adapters into one"
    about = ", ".join([method["name"], *filter(None, [method["rule"]])])
    settings = f"{about} · {report['dtype']} · round {report['round']} · {totals['modules']} modules"
    parts = [
        _header("resize" if resized else "aggregate", title, settings, _aggregate_tiles(report, used)),
        _listed("Warnings", report["warnings"]),
        None if resized else _clients(report),
        _map("Rank by layer and module", "Where the update needs directions: each cell is one module.", data),
        _spectra(data),
        _lost(report["modules"]),
        _alike(report, data),
        _modules(report["modules"]),
        _run(report),
        _listed("Notes", report["notes"], warn=False),
        _footer(report),
    ]
    return f"{title} — {about}", _page(parts)


def inspect_sections(report: Report, data: Report) -> tuple[str, Markup]:
    """Return the title and the body of an inspection's page; ``data`` is what its charts are drawn from."""
    adapters = report["adapters"]
    title = adapters[0]["name"] if len(adapters) == 1 else f"{len(adapters)} adapters side by side"
    bases = ", ".join(dict.fromkeys(adapter["base_model"] or "unknown base model" for adapter in adapters))
    findings = report["findings"]
    wrong = (
        _listed("What looks wrong", findings)
        if findings
        else element("section", element("p", "Nothing looks wrong.", class_="good"))
    )
    parts = [
        _header("inspect", title, bases, _inspect_tiles(report)),
        wrong,
        _adapters(report),
        _alike(report, data),
        _map("Layers and modules", "Each cell is one module; choose what it shows.", data),
        _spectra(data),
        _adapter_modules(adapters),
        _footer(report),
    ]
    return f"{title} — inspection", _page(parts)


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
        ("Least energy kept", _percent(min(kept, default=None)), "share of |D|² of an adapter"),
    ]
    rows = [
        (
            adapter["name"],
            f"{adapter['rank_in']:,}",
            f"{adapter['rank']:,}",
            size(adapter["bytes_in"]),
            size(adapter["bytes"]),
            _percent(adapter["energy_kept"]),
            _figure(adapter["error"]),
            _figure(adapter["error_bound"]),
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
    sizes = element(
        "section",
        element("h2", "Sizes"),
        element("p", "Bytes of the factors, before and after.", class_="lead"),
        _chart("sizes", f"Sizes of {len(adapters)} adapters before and after"),
    )
    parts = [
        _header("resize", title, ", ".join(dict.fromkeys(adapter["rule"] for adapter in adapters)), tiles),
        _listed("Warnings", [f"{adapter['name']}: {text}" for adapter in adapters for text in adapter["warnings"]]),
        element(
            "section", element("h2", "Adapters"), element("p", told, class_="lead"), table("Adapters", columns, rows)
        ),
        sizes,
        _listed(
            "Notes", [f"{adapter['name']}: {text}" for adapter in adapters for text in adapter["notes"]], warn=False
        ),
        _footer(report),
    ]
    return title, _page(parts)


def _page(parts: Sequence[Markup | None]) -> Markup:
    skip = element("a", "Skip to the report", href="#report", class_="skip")
    script = element(
        "noscript", element("p", "Charts need JavaScript; the numbers stand in the tables.", class_="lead")
    )
    header, *rest = parts
    return element("div", skip, header, element("main", script, *rest, id="report"), class_="page")


def _header(command: str, title: str, subtitle: str, tiles: Sequence[tuple[str, str, str]]) -> Markup:
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


def _aggregate_tiles(report: Report, used: int) -> list[tuple[str, str, str]]:
    totals, clients = report["totals"], report["clients"]
    states = ("dropped", "rejected", "clipped", "absent")
    counts = {state: sum(client["status"] == state for client in clients) for state in states}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "all as they were sent"
    error, bound = totals["error"], totals["error_bound"]
    lone = len(clients) == 1
    tiles = [
        ("Modules", f"{totals['modules']:,}", "of one adapter")
        if lone
        else ("Clients", f"{used} of {len(clients)}", told),
        ("Total rank", f"{totals['rank']:,}", f"of {totals['rank_in']:,} stacked, over {totals['modules']:,} modules"),
        (
            "Size",
            size(totals["bytes"]),
            f"from {size(clients[0]['bytes'])}" if lone else f"{totals['parameters']:,} parameters",
        ),
        ("Energy kept", "unknown" if error is None else _percent(max(0.0, 1.0 - error * error)), "share of |D|²"),
        (
            "Error",
            "unknown" if error is None else _figure(error),
            "not measured" if bound is None else f"of |D|, certified at most {_figure(bound)}",
        ),
    ]
    return tiles + _sum_tiles(report.get("comparison"))


def _sum_tiles(comparison: Report | None) -> list[tuple[str, str, str]]:
    if comparison is None or len(comparison["clients"]) < 2:
        return []
    orthogonal = comparison["orthogonal"]
    aside = "all updates are zero" if orthogonal is None else f"1: agree, {_figure(orthogonal)}: orthogonal, 0: cancel"
    return [
        ("Cancellation", _figure(comparison["cancellation"]), aside),
        ("Factor averaging misses", _percent(comparison["drift"]), "of |D|"),
    ]


def _inspect_tiles(report: Report) -> list[tuple[str, str, str]]:
    adapters = report["adapters"]
    norms = [adapter["norm"] for adapter in adapters if adapter["norm"] is not None]
    ranks = [adapter[key] for adapter in adapters for key in ("rank_min", "rank_max")]
    modules = {row["name"] for adapter in adapters for row in adapter["modules"]}
    low, high = min(norms, default=None), max(norms, default=None)
    spread = _figure(low) if low == high else f"{_figure(low)} to {_figure(high)}"
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
        *_sum_tiles(report["comparison"]),
    ]


def _clients(report: Report) -> Markup:
    comparison = report.get("comparison") or {"clients": []}
    place = {name: i for i, name in enumerate(comparison["clients"])}

    def compared(key: str, name: str) -> str:
        return _figure(comparison[key][place[name]]) if name in place else "-"

    rows = [
        (
            client["name"],
            element("span", client["status"], class_=f"tag {client['status']}"),
            _figure(client["weight"], 4),
            span(client["rank_min"], client["rank_max"]),
            size(client["bytes"]),
            compared("norms", client["name"]) if place else _figure(client["norm"]),
            compared("with_sum", client["name"]),
            compared("with_rest", client["name"]),
            _reason(client),
        )
        for client in report["clients"]
    ]
    columns = ("client", "status", ">weight", ">rank", ">size", ">norm", ">cosine: sum", ">others", "reason")
    policy = report["policy"]
    told = f"Policy {policy['kind']}" + (
        f", norms up to {policy['max_update_norm'] or 'median'}" * (policy["kind"] == "clip")
    )
    if report["robust"] is not None:
        told += f"; robust rule {report['robust']['name']} per {report['robust']['scope']}"
    return element(
        "section", element("h2", "Clients"), element("p", told, class_="lead"), table("Clients", columns, rows)
    )


def _reason(client: Report) -> str:
    scaled = f"scaled by {_figure(client['factor'])}" if client["factor"] != 1.0 else ""
    return ". ".join(filter(None, [scaled, client["reason"]])) or "-"


def _adapters(report: Report) -> Markup:
    comparison = report["comparison"]
    together = len(report["adapters"]) > 1
    rows = []
    for i, adapter in enumerate(report["adapters"]):
        beside = [_figure(comparison[key][i]) for key in ("with_sum", "with_rest", "without")] if together else []
        rows.append(
            (
                adapter["name"],
                _figure(adapter["weight"], 4),
                len(adapter["modules"]),
                span(adapter["rank_min"], adapter["rank_max"]),
                _figure(adapter["effective_rank"], 4),
                _figure(adapter["stable_rank"], 4),
                _figure(adapter["norm"]),
                _figure(adapter["norm_score"]),
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
    return element(
        "section", element("h2", "Adapters"), element("p", told, class_="lead"), table("Adapters", columns, rows)
    )


def _map(title: str, lead: str, data: Report) -> Markup | None:
    if not data["map"]["grids"]:
        return None
    told = f"Heat map of {len(data['map']['rows'])} kinds of modules by {len(data['map']['columns'])} layers"
    return element(
        "section", element("h2", title), element("p", lead, class_="lead"), _chooser("map", "Show"), _chart("map", told)
    )


def _spectra(data: Report) -> Markup | None:
    if not data["spectra"]:
        return None
    marked = " The orange line is the rank that was kept." if data["ranks"] is not None else ""
    all_of = element(
        "section",
        element("h2", "Spectra of all modules"),
        element("p", f"Singular values beside the largest of their module.{marked}", class_="lead"),
        _chooser("spectra", "Of") if len(data["spectra"]) > 1 else None,
        _chart("spectra", "Heat map of the singular values of every module"),
    )
    steps = [
        element("button", text, type="button", data_step=step, aria_label=f"{told} module")
        for text, step, told in (("←", "-1", "Previous"), ("→", "1", "Next"))
    ]
    one = element(
        "section",
        element("h2", "One spectrum"),
        element("p", "Singular values of a module, on a logarithmic scale.", class_="lead"),
        _chooser("spectrum", "Module", *steps),
        _chart("spectrum", "Singular values of the chosen module"),
    )
    return element("div", all_of, one, class_="pair")


def _lost(modules: Sequence[Report]) -> Markup:
    title = element("h2", "What was lost")
    known = [module for module in modules if module["error"] is not None]
    if not known:
        told = "The distance from the weighted sum was not measured, or there is no common adapter to measure."
        return element("section", title, element("p", told, class_="lead"))
    worst = sorted(known, key=lambda module: -module["error"])[:WORST]
    rows = [
        (
            module["name"],
            _percent(module["error"] ** 2),
            _figure(module["error"]),
            _figure(module["error_bound"]),
            module["rank"],
            module["stacked_rank"],
        )
        for module in worst
    ]
    columns = ("module", ">energy lost", ">error", ">at most", ">rank", ">stacked")
    return element(
        "section",
        title,
        element(
            "p",
            "Share of each module's energy |D|² that the result does not hold; the error is |D - BA| / |D|.",
            class_="lead",
        ),
        _chart("lost", f"Energy lost in each of {len(modules)} modules"),
        element(
            "details",
            element("summary", f"The {len(worst)} that lose most"),
            table("Modules that lose most", columns, rows),
        ),
    )


def _alike(report: Report, data: Report) -> Markup | None:
    clients = data["clients"]
    if not clients:
        return None
    norms = element(
        "section",
        element("h2", "Norms"),
        element("p", "A client far louder than the others decides the sum alone.", class_="lead"),
        _chart("norms", f"Norms of the updates of {len(clients)} clients"),
    )
    matrix = None
    if data["cosines"] is not None:
        matrix = element(
            "section",
            element("h2", "Similarity"),
            element("p", "Cosines between updates: 1 agree, 0 unrelated, -1 opposed.", class_="lead"),
            _chooser("cosines", "Of"),
            _chart("cosines", f"Heat map of the cosines between {len(clients)} clients"),
            _cosine_table(clients, data["cosines"]),
        )
    twins = report["comparison"]["near_twins"]
    told = [f"{one} and {other} are the same but for rounding" for one, other in twins]
    return join([element("div", norms, matrix, class_="pair"), _listed("Near twins", told) if twins else None])


def _cosine_table(clients: Sequence[str], cosines: Sequence[Sequence[float | None]]) -> Markup:
    rows = [
        (name, *("-" if value is None else f"{value:.3f}" for value in row))
        for name, row in zip(clients, cosines, strict=True)
    ]
    columns = ("client", *(f">{name}" for name in clients))
    return element("details", element("summary", "As a table"), table("Cosines over the whole model", columns, rows))


def _modules(modules: Sequence[Report]) -> Markup:
    rows = [
        (
            module["name"],
            f"{module['m']} × {module['n']}",
            module["stacked_rank"],
            module["rank"],
            _figure(None if module["energy"] is None else math.sqrt(max(0.0, module["energy"]))),
            _figure(module["error"]),
            _figure(module["error_bound"]),
            ", ".join(module["notes"]) or "-",
        )
        for module in modules
    ]
    columns = ("module", ">m × n", ">stacked", ">rank", ">|D|", ">error", ">at most", "notes")
    shown = element("details", element("summary", f"All {len(modules)} modules"), table("Modules", columns, rows))
    return element("section", element("h2", "Modules"), shown)


def _adapter_modules(adapters: Sequence[Report]) -> Markup:
    more = len(adapters) - MODULE_TABLES
    told = element("p", f"Those of {more} more adapters stand in the JSON report.", class_="lead") if more > 0 else None
    return element("section", element("h2", "Modules"), told, *map(_own_modules, adapters[:MODULE_TABLES]))


def _own_modules(adapter: Report) -> Markup:
    rows = [
        (
            row["name"],
            f"{row['m']} × {row['n']}",
            row["rank"],
            _figure(row["scale"]),
            _figure(row["norm"]),
            _figure(row["effective_rank"]),
            _figure(row["stable_rank"]),
            *("-" if row[key] is None else row[key] for key in ("rank_90", "rank_99")),
            _figure(row["norm_A"]),
            _figure(row["norm_B"]),
            row["problem"] or "-",
        )
        for row in adapter["modules"]
    ]
    figures = (">m × n", ">rank", ">scale", ">|D|", ">effective", ">stable", ">90 %", ">99 %", ">|A|", ">|B|")
    shown = table(f"Modules of {adapter['name']}", ("module", *figures, "problem"), rows)
    return element("details", element("summary", f"{adapter['name']}: {len(rows)} modules"), shown)


def _run(report: Report) -> Markup:
    backend, method = report["backend"], report["method"]
    fallbacks = [f"{entry['op']}: not {entry['backend']}, {entry['reason']}" for entry in backend["fallbacks"]]
    lines = {
        "method": method["name"],
        "options": ", ".join(f"{key} = {value}" for key, value in method["options"].items()) or "none",
        "rank rule": method["rule"] or "none",
        "weights": "divided by their sum" if report["normalize"] else "as they are",
        "backend": f"{', '.join(backend['used']) or 'none needed'} on {backend['device']}",
        "fallbacks": "; ".join(fallbacks) or "none",
        "passes over the data": report["passes"],
        "seconds": ", ".join(f"{stage} {_figure(spent)}" for stage, spent in report["seconds"].items()),
    }
    facts = [part for key, value in lines.items() for part in (element("dt", key), element("dd", value))]
    return element("section", element("h2", "How it was made"), element("dl", *facts, class_="plain"))


def _listed(title: str, texts: Sequence[str], warn: bool = True) -> Markup | None:
    if not texts:
        return None
    items = [element("li", text) for text in texts[:LISTED]]
    if len(texts) > LISTED:
        items.append(element("li", f"and {len(texts) - LISTED} more, in the JSON report"))
    return element("section", element("h2", title), element("ul", *items), class_="warn" if warn else None)


def _footer(report: Report) -> Markup:
    return element(
        "footer", f"fedlora_kernels {report['tool']['version']}. This page is complete in itself and loads nothing."
    )


def _chooser(chart: str, label: str, *more: Markup) -> Markup:
    return element(
        "div", element("label", label, for_=f"{chart}-of"), element("select", id=f"{chart}-of"), *more, class_="bar"
    )


def _chart(name: str, told: str) -> Markup:
    return element("figure", element("div", id=name, class_="chart", role="img", aria_label=told))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _figure(value: float | None, digits: int = 3) -> str:
    """A number in few digits, those of large ones not as powers of ten."""
    return f"{value:,.0f}" if value is not None and 1000.0 <= abs(value) < 1e7 else number(value, digits)
