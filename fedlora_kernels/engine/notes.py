"""What is worth knowing of the modules of a run, in sentences for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.backends.contract import Note
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.underflow import UNDERFLOW
from fedlora_kernels.linalg.rules import RankRule

__all__ = ["module_notes"]

CANCELLED = 1e-6
"""Cancellation from which on a module is named."""


def module_notes(rows: Sequence[Mapping[str, Any]], cohort: Cohort, rule: RankRule | None) -> list[str]:
    """Modules that some clients lack, pairs that are far off, updates that cancel, modules without room."""
    notes = []
    lacking = [name for name, owned in zip(cohort.modules, cohort.owns, strict=True) if not owned.all()]
    if lacking:
        how = "are the means over their owners" if cohort.missing == "renormalize" else "count missing updates as zero"
        notes.append(f"modules that some clients lack ({len(lacking)}, {printable(lacking[0])!r} first) {how}")
    far = [row["name"] for row in rows if row["error"] is not None and row["error"] > 1.0]
    if far:
        notes.append(
            f"farther from the weighted sum than nothing at all: {len(far)} modules, {printable(far[0])!r} first"
        )
    tiny = [row["name"] for row in rows if UNDERFLOW in row["notes"]]
    if tiny:
        notes.append(
            f"float16 has no numbers small enough for {len(tiny)} modules, {printable(tiny[0])!r} first: more than 1 % of their update "
            "may be lost. Use bfloat16 or a wider dtype"
        )
    gone = [row["name"] for row in rows if row["cancellation"] is not None and row["cancellation"] < CANCELLED]
    if gone:
        notes.append(
            f"updates cancel to less than {math.sqrt(CANCELLED):g} of what they add up to in {len(gone)} modules, "
            f"{printable(gone[0])!r} first: what is left is as good as the last digits of the adapters"
        )
    empty = [row["name"] for row in rows if row["rank"] and row["singular_values"] == [] and not _is_zero(row)]
    if empty:
        notes.append(
            f"{rule} keeps nothing of {len(empty)} modules, {printable(empty[0])!r} first; they are written as zero"
        )
    small = [row["name"] for row in rows if row["rank"] == 0 and not _is_zero(row)]
    if small:
        notes.append(
            f"{rule} leaves no room for {len(small)} modules, {printable(small[0])!r} first; they are left out"
        )
    return notes


def _is_zero(row: Mapping[str, Any]) -> bool:
    """Whether the sum itself is zero."""
    return Note.ZERO.name in row["notes"]
