"""An output that is one file, with its report beside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fedlora_kernels.adapters.kohya import FILE_SUFFIX, is_factor
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.own_report import own_report
from fedlora_kernels.adapters.safetensors import SafetensorsFile
from fedlora_kernels.errors import FedLoRAError, InputError

__all__ = ["check_file", "names_file", "place_file", "report_beside"]

WEIGHTS = "adapter_model.safetensors"
REPORT = "report.json"


def names_file(path: str | os.PathLike[str]) -> bool:
    """Whether an output of this name is one file: it ends in ``.safetensors`` and no folder is there."""
    return Path(path).suffix.lower() == FILE_SUFFIX and not os.path.isdir(path)


def report_beside(out: str | os.PathLike[str]) -> Path:
    """Where the report of an output file is: ``OUT.report.json``."""
    return Path(f"{os.fspath(out)}.{REPORT}")


def check_file(out: Path, overwrite: bool) -> None:
    """Raise InputError where an output file would replace something: without ``overwrite`` anything, with it what is no LoRA file."""
    where, report = printable(out), report_beside(out)
    if os.path.lexists(out) and not _is_adapter(out):
        raise InputError(f"output {where} is no LoRA file; name another one")
    if os.path.lexists(report) and own_report(report) is None:
        raise InputError(f"output {where}: {printable(report)} was not written here; name another output")
    if not overwrite and os.path.lexists(out):
        raise InputError(f"output {where} exists; replace it with overwrite (--overwrite), or name another file")
    if not overwrite and os.path.lexists(report):
        raise InputError(f"output {where}: {printable(report)} exists; replace it with overwrite (--overwrite)")


def place_file(folder: Path, out: Path) -> None:
    """Move the tensors and the report of a finished folder to ``out`` and beside it.

    The old report goes first and the new one comes last: a report beside an adapter is never that of another one.
    """
    beside = sorted(set(os.listdir(folder)) - {WEIGHTS, REPORT})
    if beside:
        raise InputError(f"output {printable(out)}: one file cannot hold {printable(beside[0])!r}; name a folder")
    report = report_beside(out)
    report.unlink(missing_ok=True)
    os.replace(folder / WEIGHTS, out)
    if (folder / REPORT).exists():
        os.replace(folder / REPORT, report)


def _is_adapter(path: Path) -> bool:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    try:
        with SafetensorsFile(path) as file:
            return any(is_factor(key) for key in file.tensors)
    except FedLoRAError:
        return False
