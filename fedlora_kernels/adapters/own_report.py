"""Reports that were written here, told from anybody else's files: only these may be replaced."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

__all__ = ["own_report"]

LARGEST = 1 << 30


def own_report(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The JSON report at ``path`` if it was written here; None for anything else, links and files of no report included."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            return None
        report: dict[str, Any] = json.loads(Path(path).read_bytes())
        return report if report["tool"]["name"] == "fedlora_kernels" else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
