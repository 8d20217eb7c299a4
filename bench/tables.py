"""The README's speed tables, from the newest committed figures: ``python bench/tables.py`` prints them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = "methods-epyc-2core.json"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def two_digits(value: float) -> str:
    """A number to two significant digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def load(name: str) -> dict[str, Any]:
    """Figures and machine of one file under results/."""
    figures: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return figures


def small_svd() -> str:
    """Batched small SVD: our time, the peer's, their ratio and the orthogonality of both."""
    head = ("dtype", "r", "batch", "us per matrix", "`torch.linalg.svd`", "ratio", "orthogonality, ours and torch")
    rows = [
        (
            row["dtype"],
            str(row["r"]),
            str(row["batch"]),
            two_digits(row["ours_us"]),
            two_digits(row["torch_us"]),
            f"{row['ratio']:.1f}",
            f"{row['ours_orthogonality']:.0e}, {row['torch_orthogonality']:.0e}",
        )
        for row in load("small-svd-epyc-2core.json")["rows"]
    ]
    return markdown(head, rows)


def product() -> str:
    """Truncated SVD of stacked factors: each route's time as a multiple of ours, worst error of a singular value."""
    head = ("m = n", "R", "route", "ms per layer", "times ours", "worst error of a kept singular value")
    rows = [
        (
            str(row["m"]),
            str(row["R"]),
            row["route"],
            two_digits(row["ms_per_module"]),
            two_digits(row["times_ours"]),
            f"{row['sigma_error']:.0e}",
        )
        for row in load("product-epyc-2core.json")["rows"]
        if "ms_per_module" in row  # the others tell the stages of ours
    ]
    return markdown(head, rows)


def methods() -> str:
    """Every method from files to files: seconds, as multiples of the floor, and how many times slower the plain loop is."""
    head = (
        "method",
        "ranks",
        "seconds",
        "times the floor",
        "loop / ours",
        "loop's work / ours",
        "product's error, ours and loop",
    )
    rows = [
        (
            f"`{row['method']}`",
            row["ranks"],
            two_digits(row["ours_s"]),
            f"{row['times_floor']:.1f}",
            two_digits(row["ratio"]),
            two_digits(row["work_ratio"]),
            "" if row["ours_distance"] is None else f"{row['ours_distance']:.0e}, {row['theirs_distance']:.0e}",
        )
        for row in load(METHODS)["rows"]
    ]
    return markdown(head, rows)


def resized() -> str:
    """One adapter cut to smaller ranks: seconds of a module by each route, its rank, the accuracy of its spectrum."""
    head = ("route", "seconds per module", "times faster", "rank kept", "worst error of a kept singular value")
    rows = [
        (
            row["route"],
            two_digits(row["seconds"]),
            two_digits(row["times_faster"]),
            str(row["p"]),
            f"{row['sigma_error']:.0e}",
        )
        for row in load("resize-epyc-2core.json")["rows"]
    ]
    return markdown(head, rows)


if __name__ == "__main__":
    tables = [small_svd(), product(), resized()]
    if (RESULTS / METHODS).exists():
        tables.append(methods())
    print(*tables, sep="\n\n")
