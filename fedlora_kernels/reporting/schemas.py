"""JSON Schemas (draft 2020-12) of every report that is written: what a reader may rely on (docs/reports.md, JSON)."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from fedlora_kernels.errors import InputError

__all__ = ["REPORTS", "schema"]

REPORTS = ("aggregate", "resize", "inspect", "validate", "bench")
"""Commands with a report; that of ``resize`` is for several adapters, of one it is that of ``aggregate``."""


def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of the report that a command writes. InputError for an unknown one."""
    if name not in REPORTS:
        raise InputError(f"schema: no report {name!r}; one of {', '.join(REPORTS)} needed")
    text = (files("fedlora_kernels.reporting") / "schema" / f"{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
