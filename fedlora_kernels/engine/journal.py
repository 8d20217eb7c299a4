"""What a run that may be ended at any moment has done so far, for the one that goes on.

A line for each slab holds the rows of the report, and how far each file had come, with a checksum of what was appended. A line is
written when all that it tells of is on the disc; its own checksum covers the lines before it. So the last whole line is the truth, and
a broken one is seen: one without an end was being written, anything else is damage, and then nothing of what was kept is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_kernels.adapters.folder import KeptFolder
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.safetensors import disc_errors
from fedlora_kernels.backends import Choice, Fallback

__all__ = ["Journal"]

NAME = "journal"
FORMAT = 1
END = {"end": True}
DIGITS = 32
CHUNK = 4 << 20


class _DamagedError(Exception):
    pass


class Journal:
    """The journal of a kept folder, which holds the lock. What it tells is checked on opening, what it does not tell of is removed.

    ``warning`` says what was found damaged, None where nothing was. Failures of the disc raise RunError.
    """

    def __init__(self, folder: KeptFolder, key: str) -> None:
        self._folder, self._path = folder, folder.place / NAME
        self._records: list[dict[str, Any]] = []
        self._marks: dict[str, list[dict[str, Any]]] = {}
        self._slabs: list[Sequence[Mapping[str, Any]]] = []
        self._compared: list[Any] = []
        self._chain, self._end, self._ended = "", 0, False
        self.warning: str | None = None
        with disc_errors(folder.place):
            try:
                self._read(key)
                self._check_files()
            except _DamagedError as error:
                if not self._ended:
                    self.warning = f"{printable(folder.place)} is damaged ({error}); nothing of it is used"
                self._records, self._marks = [], {}
            self._remove_strangers()
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._begin(key)
            except BaseException:
                self.close()
                raise
        folder.keep = bool(self._records)

    @property
    def done(self) -> list[list[dict[str, Any]]]:
        """The rows of the report, slab by slab."""
        return [rows for record in self._records for rows in record["slabs"]]

    @property
    def compared(self) -> list[dict[str, Any]]:
        """What the comparison of clients added, slab by slab."""
        return [part for record in self._records for part in record["compared"]]

    @property
    def seen(self) -> list[Choice | Fallback]:
        """Backends chosen and passed by so far."""
        entries = self._records[-1]["seen"] if self._records else []
        return [Choice(*entry) if len(entry) == 2 else Fallback(*entry) for entry in entries]

    def marks(self, path: str) -> list[dict[str, Any]]:
        """The marks of a file, by its path within the output, oldest first."""
        return self._marks.get(path, [])

    def places(self, name: str) -> list[str]:
        """Folders within the output that hold a file of that name, as they were begun."""
        return [os.path.dirname(path) for path in self._marks if os.path.basename(path) == name]

    def aside(self, path: str) -> Path:
        """Where a file of the output stays as marked while it is rewritten."""
        return self._folder.place / "marked" / path

    def append(
        self,
        rows: Sequence[Mapping[str, Any]],
        compared: Any,
        files: Mapping[str, Mapping[str, Any]] | None,
        seen: Iterable[Choice | Fallback],
    ) -> None:
        """Note a slab that is done: its rows, what its comparison adds, and the backends so far.

        ``files`` are the marks of the files that grew, which are durable; None where some of its pairs are not written yet: the
        slab is then noted with the next one.
        """
        self._slabs.append(rows)
        self._compared.append(compared)
        if files is None:
            return
        told = {"slabs": self._slabs, "compared": self._compared, "files": files, "seen": list(map(list, list(seen)))}
        with disc_errors(self._path):
            self._write(told)
        self._slabs, self._compared = [], []
        self._folder.keep = True

    def finish(self) -> None:
        """Note that the output goes to its place now: from here on, files that are gone are no damage."""
        with disc_errors(self._path):
            self._write(END)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self, key: str) -> None:
        """Go on after the last whole line; where no slab is told of, from the start."""
        if not self._records:
            self._chain, self._end = "", 0
        os.ftruncate(self._fd, self._end)
        os.lseek(self._fd, self._end, os.SEEK_SET)
        if not self._records:
            self._write({"format": FORMAT, "key": key})

    def _write(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        self._chain = _link(self._chain, text)
        line = memoryview(b"%s %s\n" % (self._chain.encode(), text))
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)

    def _read(self, key: str) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        *lines, torn = content.split(b"\n")
        for number, line in enumerate(lines):
            chain, text = line[:DIGITS].decode("latin-1"), line[DIGITS + 1 :]
            if _link(self._chain, text) != chain:
                raise _DamagedError(f"line {number + 1} of its {NAME}")
            record = json.loads(text)
            if number == 0:
                if record != {"format": FORMAT, "key": key}:
                    raise _DamagedError(f"its {NAME} is of another run")
            elif record == END:
                self._ended = True
            else:
                self._records.append(record)
                for path, mark in record["files"].items():
                    self._marks.setdefault(path, []).append(mark)
            self._chain = chain
        self._end = len(content) - len(torn)

    def _check_files(self) -> None:
        for path, marks in self._marks.items():
            place = self._folder.path / path
            if self.aside(path).exists():
                os.replace(self.aside(path), place)
            for mark in marks:
                begin, end = (mark["begin"] + mark[side] for side in ("start", "end"))
                if _checksum(place, begin, end) != mark["checksum"]:
                    raise _DamagedError(f"bytes {begin} to {end} of {path}")

    def _remove_strangers(self) -> None:
        """Remove what was begun after the last line, and all that came of it."""
        known = {str(self._folder.path / path) for path in self._marks}
        for root, _, names in os.walk(self._folder.path):
            for name in names:
                if os.path.join(root, name) not in known:
                    os.unlink(os.path.join(root, name))
        if (marked := self._folder.place / "marked").exists():
            shutil.rmtree(marked)


def _link(chain: str, text: bytes) -> str:
    return hashlib.blake2b(chain.encode() + text, digest_size=DIGITS // 2).hexdigest()


def _checksum(path: Path, begin: int, end: int) -> int | None:
    """Checksum of a range of a file; None where the file ends before."""
    found = 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        while begin < end:
            content = os.pread(fd, min(CHUNK, end - begin), begin)
            if not content:
                return None
            found = zlib.crc32(content, found)
            begin += len(content)
    finally:
        os.close(fd)
    return found
