"""What ``fedlora env`` shows: one block to paste into a report of a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from fedlora_kernels.reporting.tables import table
from fedlora_kernels.reporting.terminal import text

__all__ = ["env_tables"]

WIDTH = 120
"""Columns of the block, in a pipe too: it is made to be pasted."""


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
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, value in lines.items():
        if value:
            grid.add_row(text(name, "bold"), text(value))
    problems = [text(f"problem: {problem}", "red") for problem in report["problems"]]
    return Constrain(Group(grid, _backends(report["backends"]), *problems), WIDTH)


def _backends(backends: Sequence[Mapping[str, Any]]) -> Table:
    rows = table("Backends, in the order of auto", "backend", "", "self-test", ">error", ">limit", "details")
    for backend in backends:
        on, passed = backend["on"], backend["passed"]
        rows.add_row(
            text(backend["name"]),
            text("on" if on else "off", "green" if on else "yellow"),
            text(("passed" if passed else "FAILED") if on else "-", "" if passed else "red"),
            text(f"{backend['error']:.1e}" if on else "-"),
            text(f"{backend['limit']:.0e}" if on else "-"),
            _details(backend),
        )
    return rows


def _details(backend: Mapping[str, Any]) -> Text:
    lines = {"": backend["reason"]}
    if backend["on"]:
        lines["failure: "] = backend["failure"]
        lines["ran: "] = ", ".join(backend["tested"])
        lines["left out: "] = ", ".join(reason.split(":")[0] for reason in backend["left_out"])
    return Text("\n").join(text(f"{name}{value}") for name, value in lines.items() if value)
