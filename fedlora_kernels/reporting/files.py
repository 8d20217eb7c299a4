"""Reports in files: the ending of the name says as what, and everything wrong with it is said before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora_kernels.reporting.json import check_target, write_json, write_text

__all__ = ["check_report", "write_report"]


def check_report(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` if a report can be written there: FILE.json, or FILE.html where plotly is installed. InputError otherwise."""
    target = check_target(path, suffixes=(".json", ".html"))
    if target.suffix.lower() == ".html":
        from fedlora_kernels.reporting.html import check_plotly

        check_plotly(f"--report {target}")
    return target


def write_report(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write a report as JSON or as a page, by the ending of ``path``, beside its place and then there in one step."""
    if Path(path).suffix.lower() == ".html":
        from fedlora_kernels.reporting.html import html_page

        write_text(path, html_page(report))
    else:
        write_json(path, report)
