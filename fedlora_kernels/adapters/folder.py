"""An output folder or file that appears complete or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.output_file import check_file, names_file, place_file
from fedlora_kernels.adapters.own_report import own_report
from fedlora_kernels.adapters.safetensors import disc_errors
from fedlora_kernels.errors import InputError, RunError

__all__ = ["OUR_FILES", "OUR_FOLDERS", "KeptFolder", "OutputFolder", "check_inputs", "check_out"]

OUR_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "report.json",
    "report.html",
    "fedlora_state.safetensors",
    "README.md",
)
OUR_FOLDERS = ("clients", "residual")
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def check_out(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Return the absolute path of an output that can be written, before any work is done for it: a folder, or ``FILE.safetensors``.

    Raises InputError where it exists (unless ``overwrite`` and it holds only files written here, or is a LoRA file), is a link or
    another file, or where the folder around it is missing or cannot be written: a mistyped path makes no folders.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise InputError(f"output {printable(text)!r} is not a path")
    out = Path(os.path.abspath(text))
    where = printable(out)
    if not out.name:
        raise InputError(f"output {where} is no folder that can be replaced; name a new one")
    _check_around(out)
    if out.is_symlink():
        raise InputError(f"output {where} is a symbolic link; name what it leads to")
    if names_file(out):
        check_file(out, overwrite)
    elif os.path.lexists(out):
        _check_replaceable(out, overwrite)
    return out


def check_inputs(out: str | os.PathLike[str], inputs: Mapping[str, Any]) -> None:
    """Raise InputError where the output is a folder or file that is read, holds one, or is a file of such a folder.

    ``inputs`` are paths by what messages call them; anything else is in memory and passed over.
    """
    place = os.path.realpath(out)
    for who, source in inputs.items():
        if not isinstance(source, (str, os.PathLike)) or not os.path.exists(source):
            continue
        read = os.path.realpath(source)
        if os.path.commonpath([place, read]) == place or (os.path.dirname(place) == read and os.path.isfile(place)):
            raise InputError(f"{who}: the output {printable(place)} would replace it; name another one")


class OutputFolder:
    """Context manager: write into ``path``, then `commit` puts everything in place in one step.

    ``path`` is a temporary folder beside the output, on the same file system; leaving the block without `commit` removes
    it. A killed run leaves only that folder, never half an output; the next committed run for the same output sweeps it.
    Raises InputError as `check_out`, RunError for failures of the disc.
    """

    def __init__(self, out: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.out = check_out(out, overwrite)
        self._overwrite = overwrite
        self._stem = f".{_short(self.out.name)}.partial-"
        self.path = self.out.with_name(f"{self._stem}{os.getpid()}-{secrets.token_hex(4)}")
        self._lock = -1

    def __enter__(self) -> OutputFolder:
        with disc_errors(self.out):
            try:
                self.path.mkdir()
                self._lock = _lock(self.path)
            except BaseException:
                shutil.rmtree(self.path, ignore_errors=True)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # after an exchange this is the old output: an interrupt while it was being deleted must not leave the rest
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def commit(self) -> None:
        """Make everything durable and put it in place of the output; then remove the old one and what killed runs left."""
        check_out(self.out, self._overwrite)
        with disc_errors(self.path):
            _sync_tree(self.path)
        old = self._swap()
        with disc_errors(self.out.parent):
            _sync(self.out.parent)
        if old is not None:
            try:
                shutil.rmtree(old)
            except OSError as error:
                raise RunError(
                    f"{printable(self.out)} is complete, but the old one could not be deleted from {printable(old)}: "
                    f"{error.strerror or error}; delete it by hand"
                ) from error
        self._sweep()

    def _swap(self) -> Path | None:
        """Put the new folder in place, or its file; return where the old folder is now, or what is left of the new one."""
        with disc_errors(self.out):
            if names_file(self.out):
                place_file(self.path, self.out)
                return self.path
            if not self.out.exists():
                os.rename(self.path, self.out)
                return None
            if _exchange(self.path, self.out):
                return self.path
        return self._swap_aside()

    def _swap_aside(self) -> Path:
        """Replace in two renames, where the system cannot exchange."""
        aside = self.out.with_name(f".{_short(self.out.name)}.old-{os.getpid()}-{secrets.token_hex(4)}")
        with disc_errors(self.out):
            os.rename(self.out, aside)
        try:
            os.rename(self.path, self.out)
        except OSError as error:
            self._put_back(aside, error)
        with suppress(OSError):
            os.rename(aside, self.path)
            return self.path
        return aside

    def _put_back(self, aside: Path, error: OSError) -> None:
        text = f"{printable(self.out)} could not be replaced: {error.strerror or error}"
        try:
            os.rename(aside, self.out)
        except OSError:
            raise RunError(f"{text}; the old one is at {printable(aside)}") from error
        raise RunError(f"{text}; the old one is in place again") from error

    def _sweep(self) -> None:
        """Remove what killed runs left: their process is gone and nobody holds the lock."""
        pattern = re.compile(re.escape(self._stem) + r"([0-9]+)-[0-9a-f]{8}")
        for entry in sorted(os.listdir(self.out.parent)):
            match = pattern.fullmatch(entry)
            if match and not _alive(int(match[1])):
                _remove_stale(self.out.with_name(entry))

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class KeptFolder(OutputFolder):
    """An output in the making that outlives its run: ``OUT.partial-<key>``, which the next run of the same key finds again.

    ``place`` is that folder, ``path`` within it is what will be the output. It is removed where ``keep`` is false or the input was
    wrong, which no second run of the same key can mend. Raises InputError where another run is at work on it.
    """

    def __init__(self, out: str | os.PathLike[str], key: str, overwrite: bool = False) -> None:
        super().__init__(out, overwrite)
        self._prefix = f"{_short(self.out.name)}.partial-"
        self.place = self.out.with_name(f"{self._prefix}{key[:16]}")
        self._whole = False
        self.path = self.place / "out"
        self.keep = False

    def __enter__(self) -> KeptFolder:
        with disc_errors(self.place):
            while self._lock < 0:
                self.place.mkdir(exist_ok=True)
                self._lock = self._locked()
            try:
                self.path.mkdir(exist_ok=True)
            except BaseException:
                self._unlock()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self.keep or (isinstance(error, InputError) and not self._whole):
            shutil.rmtree(self.place, ignore_errors=True)
        self._unlock()

    def commit(self) -> None:
        """Put the output in place, as `OutputFolder.commit`; where that is refused, it is kept: nothing is wrong with its input."""
        self._whole = True
        super().commit()

    def others(self) -> list[Path]:
        """What runs of other keys for the same output have kept."""
        pattern = re.compile(re.escape(self._prefix) + "[0-9a-f]{16}")
        names = sorted(name for name in os.listdir(self.out.parent) if pattern.fullmatch(name))
        return [self.out.with_name(name) for name in names if name != self.place.name]

    def _swap(self) -> Path | None:
        old = super()._swap()
        self.keep = False
        return old

    def _locked(self) -> int:
        """The lock on the folder; -1 where its owner has removed it meanwhile."""
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.lexists(self.place) and os.path.samestat(os.fstat(fd), os.lstat(self.place)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise InputError(
                f"output {printable(self.out)}: another run is at work on {printable(self.place)}; wait for its end"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return -1


def _check_around(out: Path) -> None:
    where, around = printable(out), out.parent
    if not os.path.isdir(around):
        found = "is no folder" if os.path.lexists(around) else "does not exist"
        raise InputError(f"output {where}: {printable(around)} {found}; create it or choose another place")
    if not os.access(around, os.W_OK | os.X_OK):
        raise InputError(
            f"output {where}: {printable(around)} is not a folder that can be written; choose another place"
        )
    if len(os.fsencode(out.name)) > (longest := os.pathconf(around, "PC_NAME_MAX")):
        raise InputError(f"output {where}: a name of at most {longest} bytes is needed; choose a shorter one")


def _short(name: str) -> str:
    """The beginning of a name, in bytes: with what stands around it, it must still be a file name."""
    return os.fsencode(name)[:160].decode(errors="ignore")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    where = printable(out)
    if not out.is_dir():
        raise InputError(f"output {where} is a file; name a folder")
    stranger = _stranger(out)
    if stranger is not None:
        raise InputError(
            f"output {where} holds {printable(stranger)!r}, which was not written here; name another folder"
        )
    if not overwrite:
        raise InputError(f"output {where} exists; replace it with overwrite (--overwrite), or name another folder")


def _stranger(folder: Path, prefix: str = "") -> str | None:
    """Return the first entry that is no file of ours, by its path within the output."""
    adapters = frozenset() if prefix else _adapters(folder / "report.json")
    for entry in sorted(os.scandir(folder), key=lambda item: item.name):
        name = f"{prefix}{entry.name}"
        found: str | None = None
        if entry.is_dir(follow_symlinks=False):
            if entry.name == "clients" and not prefix:
                found = _stranger_among_clients(Path(entry.path))
            else:
                ours = entry.name == "residual" or entry.name in adapters
                found = _stranger(Path(entry.path), f"{name}/") if ours else name
        elif entry.name not in OUR_FILES or not entry.is_file(follow_symlinks=False):
            found = name
        if found is not None:
            return found
    return None


def _adapters(report: Path) -> frozenset[str]:
    """The folders of adapters that a report of ours names: without one, a folder of adapters is somebody's collection."""
    rows = (own_report(report) or {}).get("adapters")
    if not isinstance(rows, list):
        return frozenset()
    return frozenset(str(row["folder"]) for row in rows if isinstance(row, dict) and "folder" in row)


def _stranger_among_clients(folder: Path) -> str | None:
    for entry in sorted(os.scandir(folder), key=lambda item: item.name):
        name = f"clients/{entry.name}"
        if not entry.is_dir(follow_symlinks=False):
            return name
        found = _stranger(Path(entry.path), f"{name}/")
        if found is not None:
            return found
    return None


def _exchange(new: Path, old: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(old))


def _lock(folder: Path) -> int:
    """Hold a lock on the folder while we live, where the file system has locks."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _remove_stale(folder: Path) -> None:
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(folder).st_mode):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(fd)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
