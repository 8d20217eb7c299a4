"""The demonstration's table and picture, from plain records."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedlora_kernels.demo.data import ATTRIBUTION

__all__ = ["Row", "draw_spectra", "energy_rank", "results_table", "write_results"]


LEGEND = (
    "Accuracy in per cent on held-out sentences; * the client's own domain. rank and kB: LoRA factors of one download, all "
    "modules. error: |D - B A|_F / |D|_F as reported; check: the same against the dense float64 sum of what PEFT applies. "
    "ms: reading, aggregating and writing."
)


WIDTH = 102
"""The table needs this much; a narrower terminal wraps its lines, which reads better than cells cut short."""


@dataclass(frozen=True)
class Row:
    """One line of the table. ``accuracy`` by domain, fractions; None where a column does not apply."""

    name: str
    accuracy: Mapping[str, float]
    own: str | None = None
    rank: int | None = None
    nbytes: int | None = None
    error: float | None = None
    dense_error: float | None = None
    seconds: float | None = None

    @property
    def mean(self) -> float:
        """Mean accuracy over the domains."""
        return math.fsum(self.accuracy.values()) / len(self.accuracy)


def write_results(out: Path, rows: Sequence[Row], report: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Print the table with its notes and write it to ``out``: results.txt, results.json, spectra.svg."""
    with (out / "results.txt").open("w", encoding="utf-8") as file:
        for stream in (file, sys.stdout):
            console = Console(file=stream, highlight=False)
            console.width = max(console.width, WIDTH)
            console.print(results_table(rows))
            for note in (LEGEND, *notes, ATTRIBUTION):
                console.print(note)
    content = {"rows": [dataclasses.asdict(row) for row in rows], "notes": [LEGEND, *notes], "attribution": ATTRIBUTION}
    (out / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw_spectra(report, rows, out / "spectra.svg")
    print(f"Adapters, results and spectra.svg are in {out}", file=sys.stderr)


def results_table(rows: Sequence[Row]) -> Table:
    """Return the table: accuracy in per cent by domain, total rank and size of what is sent, errors, seconds."""
    domains = list(rows[0].accuracy)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("adapter", no_wrap=True)
    for heading in (*domains, "mean", "rank", "kB", "error", "check", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = max(row.mean for row in rows)
    for row in rows:
        cells = [f"{100 * row.accuracy[d]:.1f}" + ("*" if d == row.own else " ") for d in domains]
        mean = f"{100 * row.mean:.1f}"
        table.add_row(
            row.name,
            *cells,
            f"[bold]{mean}[/bold]" if row.mean == best else mean,
            "" if row.rank is None else str(row.rank),
            "" if row.nbytes is None else f"{row.nbytes / 1000:.0f}",
            _error(row.error),
            _error(row.dense_error),
            "" if row.seconds is None else f"{1000 * row.seconds:.0f}",
        )
    return table


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def energy_rank(singular_values: Sequence[float], tau: float) -> int:
    """Return the smallest p whose first p squared singular values hold the fraction ``tau`` of all."""
    squares = [s * s for s in singular_values]
    total = math.fsum(squares)
    return next((p for p in range(1, len(squares)) if math.fsum(squares[:p]) >= (tau - 1e-12) * total), len(squares))


def draw_spectra(report: Mapping[str, Any], rows: Sequence[Row], path: Path, *, tau: float = 0.9) -> None:
    """Draw spectra by kind of module, with the rank that holds ``tau`` of the energy, and accuracy against size sent.

    ``report`` is the report of an aggregation at Energy(1.0); ``path`` ends in .svg or .png.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds = sorted({module["name"].rpartition(".")[2] for module in report["modules"]})
    style = {
        "svg.hashsalt": "fedlora",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(5 * (len(kinds) + 1), 4.8), layout="constrained")
        axes = figure.subplots(1, len(kinds) + 1)
        for axis, kind in zip(axes, kinds, strict=False):
            _spectra(axis, [m for m in report["modules"] if m["name"].rpartition(".")[2] == kind], kind, tau)
        for axis in axes[1 : len(kinds)]:
            axis.sharey(axes[0])
        _trade(axes[-1], [row for row in rows if row.nbytes is not None])
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _spectra(axis: Any, modules: Sequence[Mapping[str, Any]], kind: str, tau: float) -> None:
    import matplotlib as mpl

    colours = mpl.colormaps["viridis"].resampled(len(modules) + 1)
    for position, module in enumerate(modules):
        values = [s for s in module["singular_values"] if s > 0]
        rank = energy_rank(values, tau)
        axis.semilogy(range(1, len(values) + 1), values, color=colours(position), label=f"{_layer(module)}:  {rank}")
        axis.plot(rank, values[rank - 1], "o", color=colours(position), markeredgecolor="black", markersize=7, zorder=3)
    axis.set(xlim=(0, max(sum(m["ranks"]) for m in modules) + 1), xlabel="number of the singular value")
    axis.set_title(f"{kind}: spectrum of the aggregated update")
    axis.set_ylabel("singular value")
    axis.grid(visible=True, axis="y", color="0.9", linewidth=0.6)
    title = f"layer:  rank that holds {100 * tau:.0f} %\nof the energy (dots)"
    axis.legend(title=title, frameon=False, fontsize=9, title_fontsize=9, loc="upper right")


def _layer(module: Mapping[str, Any]) -> str:
    name: str = module["name"]
    return next((part for part in name.split(".") if part.isdigit()), name)


def _trade(axis: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    for row in rows:
        common = row.own is None
        colour, marker, offset = ("tab:red", "D", 8) if common else ("0.45", "o", -15)
        place = (row.nbytes / 1000 if row.nbytes else 0.0, 100 * row.mean)
        axis.plot(*place, marker, color=colour, markersize=8)
        label = f"{row.name}, rank {row.rank}" if common else row.own
        axis.annotate(label, place, (0, offset), textcoords="offset points", ha="center", fontsize=9, color=colour)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="kB of LoRA factors", ylabel="accuracy, mean over the domains, %")
    axis.set_title("aggregates (red), clients' own adapters (grey)")
    axis.margins(0.2)
    axis.grid(visible=True, color="0.9", linewidth=0.6)
