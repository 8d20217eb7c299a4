"""The written part of an aggregation's page: what was combined, at which rank, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_kernels.reporting.markup import Markup, element, table
from fedlora_kernels.reporting.pieces import (
    alike_section,
    chart,
    figure,
    footer,
    header,
    layer_section,
    listed,
    page_body,
    percent,
    section,
    spectra_section,
    sum_tiles,
)
from fedlora_kernels.reporting.tables import size, span

__all__ = ["aggregate_sections"]

WORST = 10
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
        header("resize" if resized else "aggregate", title, settings, _aggregate_tiles(report, used)),
        listed("Warnings", report["warnings"]),
        None if resized else _clients(report),
        layer_section("Rank by layer and module", "Where the update needs directions: each cell is one module.", data),
        spectra_section(data),
        _lost(report["modules"]),
        alike_section(report, data),
        _modules(report["modules"]),
        _run(report),
        listed("Notes", report["notes"], warn=False),
        footer(report),
    ]
    return f"{title} — {about}", page_body(parts)


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
        ("Energy kept", "unknown" if error is None else percent(max(0.0, 1.0 - error * error)), "share of |D|²"),
        (
            "Error",
            "unknown" if error is None else figure(error),
            "not measured" if bound is None else f"of |D|, certified at most {figure(bound)}",
        ),
    ]
    return tiles + sum_tiles(report.get("comparison"))


def _clients(report: Report) -> Markup:
    comparison = report.get("comparison") or {"clients": []}
    place = {name: i for i, name in enumerate(comparison["clients"])}

    def compared(key: str, name: str) -> str:
        return figure(comparison[key][place[name]]) if name in place else "-"

    rows = [
        (
            client["name"],
            element("span", client["status"], class_=f"tag {client['status']}"),
            figure(client["weight"], 4),
            span(client["rank_min"], client["rank_max"]),
            size(client["bytes"]),
            compared("norms", client["name"]) if place else figure(client["norm"]),
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
    return section("Clients", told, table("Clients", columns, rows))


def _reason(client: Report) -> str:
    scaled = f"scaled by {figure(client['factor'])}" if client["factor"] != 1.0 else ""
    return ". ".join(filter(None, [scaled, client["reason"]])) or "-"


def _lost(modules: Sequence[Report]) -> Markup:
    known = [module for module in modules if module["error"] is not None]
    if not known:
        told = "The distance from the weighted sum was not measured, or there is no common adapter to measure."
        return section("What was lost", told)
    worst = sorted(known, key=lambda module: -module["error"])[:WORST]
    rows = [
        (
            module["name"],
            percent(module["error"] ** 2),
            figure(module["error"]),
            figure(module["error_bound"]),
            module["rank"],
            module["stacked_rank"],
        )
        for module in worst
    ]
    columns = ("module", ">energy lost", ">error", ">at most", ">rank", ">stacked")
    return section(
        "What was lost",
        "Share of each module's energy |D|² that the result does not hold; the error is |D - BA| / |D|.",
        chart("lost", f"Energy lost in each of {len(modules)} modules"),
        element(
            "details",
            element("summary", f"The {len(worst)} that lose most"),
            table("Modules that lose most", columns, rows),
        ),
    )


def _modules(modules: Sequence[Report]) -> Markup:
    rows = [
        (
            module["name"],
            f"{module['m']} × {module['n']}",
            module["stacked_rank"],
            module["rank"],
            figure(None if module["energy"] is None else math.sqrt(max(0.0, module["energy"]))),
            figure(module["error"]),
            figure(module["error_bound"]),
            ", ".join(module["notes"]) or "-",
        )
        for module in modules
    ]
    columns = ("module", ">m × n", ">stacked", ">rank", ">|D|", ">error", ">at most", "notes")
    shown = element("details", element("summary", f"All {len(modules)} modules"), table("Modules", columns, rows))
    return element("section", element("h2", "Modules"), shown)


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
        "seconds": ", ".join(f"{stage} {figure(spent)}" for stage, spent in report["seconds"].items()),
    }
    facts = [part for key, value in lines.items() for part in (element("dt", key), element("dd", value))]
    return element("section", element("h2", "How it was made"), element("dl", *facts, class_="plain"))
