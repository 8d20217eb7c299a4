"""What ``fedlora env`` shows: one block to paste into a report of a problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from fedlora_kernels.reporting.tables import table
from fedlora_kernels.reporting.terminal import text

__all__ = ["env_tables"]


def env_tables(report: Mapping[str, Any]) -> RenderableType:
    """Return versions, processor, backends and variables of an environment report."""
    processor = report["processor"]
    lines = {
        "fedlora_kernels": report["tool"]["version"],
        "python": report["python"],
        "platform": report["platform"],
        "packages": ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version),
        "not installed": ", ".join(name for name, version in report["packages"].items() if not version),
        "compilers": ", ".join(f"{name}: {path or 'absent'}" for name, path in report["compilers"].items()),
        "processor": f"{processor['name']}, {processor['simd']} (torch: {processor['torch_simd']})",
        "threads": f"{processor['threads']} of torch, {processor['cores']} cores for this process",
        "gpus": ", ".join(report["gpus"]) or "none that torch can use",
        "variables": ", ".join(f"{name}={value}" for name, value in report["variables"].items()) or "no FEDLORA_ set",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        if value:
            grid.add_row(text(name, "bold"), text(value))
    rows = table(
        "Backends, in the order of auto", "backend", "", "why", "self-test", ">error", ">limit", "ran", "left out"
    )
    for backend in report["backends"]:
        on, passed = backend["on"], backend["passed"]
        rows.add_row(
            text(backend["name"]),
            text("on" if on else "off", "green" if on else "yellow"),
            text(backend["reason"]),
            text(("passed" if passed else f"FAILED: {backend['failure']}") if on else "-", "" if passed else "red"),
            text(f"{backend['error']:.1e}" if on else "-"),
            text(f"{backend['limit']:.0e}" if on else "-"),
            text(", ".join(backend["tested"]) if on else ""),
            text("; ".join(reason.split(":")[0] for reason in backend["left_out"]) if on else ""),
        )
    return Group(grid, rows)
