"""Reports as JSON: strict (NaN and infinities become null), written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_kernels.adapters.own_report import own_report
from fedlora_kernels.errors import InputError

__all__ = ["check_target", "plain", "write_json", "write_text"]

PAGE = b'<meta name="generator" content="fedlora_kernels '
HEAD = 1 << 10
"""Bytes at the beginning of a page that hold its generator."""


def check_target(path: str | os.PathLike[str], flag: str = "--report", suffixes: Sequence[str] = (".json",)) -> Path:
    """Return ``path``, given by that flag, if a report can be written there, in place of nothing but an older one.

    InputError otherwise; nothing is created.
    """
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise InputError(f"{flag} {target}: give a name that ends in {' or '.join(suffixes)}")
    if target.is_dir():
        raise InputError(f"{flag} {target}: a folder is there; give the name of a file")
    if not target.parent.is_dir():
        raise InputError(f"{flag} {target}: there is no folder {target.parent}; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {target}: the folder {target.parent} cannot be written; choose another one")
    if not _replaceable(target):
        raise InputError(f"{flag} {target}: a file is there that is no report written here; give another name")
    return target


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write ``content`` as strict JSON, as `write_text` does."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=True) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` beside ``path`` and move it into place in one step. OSError where the system refuses."""
    target = Path(path)
    # a name of its own: one made of the target's may be too long where the target's is not
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".fedlora-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def plain(value: Any) -> Any:
    """Return ``value`` with tuples as lists, arrays and scalars as numbers, and NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def _replaceable(target: Path) -> bool:
    """Whether nothing is lost with what is there: nothing, an empty file, or a report of ours."""
    if not os.path.lexists(target):
        return True
    if target.is_symlink() or not target.is_file():
        return False
    try:
        with open(target, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    return not head or PAGE in head or own_report(target) is not None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
