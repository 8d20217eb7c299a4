"""Reports in files: the ending of the name says as what, and everything wrong with it is said before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora_kernels.adapters.reader import WEIGHTS_NAME
from fedlora_kernels.errors import InputError
from fedlora_kernels.reporting.json import check_target, write_json, write_text

__all__ = ["check_report", "write_report"]

SUFFIXES = (".json", ".html")
IN_OUT = ("report.json", "report.html")


def check_report(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Return ``path`` if a report can be written there: FILE.json, or FILE.html where plotly is installed. InputError otherwise.

    In the folder ``out``, which need not be there yet, only the names of reports are free: what holds others is never replaced.
    """
    target = Path(path)
    if out is None or not target.resolve().is_relative_to(Path(out).resolve()):
        check_target(target, suffixes=SUFFIXES)
        _check_free(target, out)
    elif target.resolve().parent != Path(out).resolve() or target.name not in IN_OUT:
        raise InputError(
            f"--report {target}: within {out} only {' and '.join(IN_OUT)} have a place; name a file outside"
        )
    elif target.parent.is_dir():
        check_target(target, suffixes=SUFFIXES)
    if target.suffix.lower() == ".html":
        from fedlora_kernels.reporting.html import check_plotly

        check_plotly(f"--report {target}")
    return target


def _check_free(target: Path, out: str | os.PathLike[str] | None) -> None:
    """Raise InputError where the report there tells of an adapter beside it, which a next round may read."""
    beside = WEIGHTS_NAME if target.name in IN_OUT else target.name.removesuffix(".report.json")
    holder = target.parent / beside
    if (
        target.exists()
        and holder != target
        and holder.is_file()
        and (out is None or holder.resolve() != Path(out).resolve())
    ):
        raise InputError(f"--report {target}: belongs to {holder}; give another name")


def write_report(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write a report as JSON or as a page, by the ending of ``path``, beside its place and then there in one step."""
    if Path(path).suffix.lower() == ".html":
        from fedlora_kernels.reporting.html import html_page

        write_text(path, html_page(report))
    else:
        write_json(path, report)
