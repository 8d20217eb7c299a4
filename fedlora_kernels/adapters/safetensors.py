"""Safetensors files, read with pread.

Never mapped: a file that someone truncates under a memory map kills the process that reads it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.adapters.model import TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError, LimitError, RunError

__all__ = ["CHUNK", "DTYPES", "SafetensorsFile", "disc_errors", "open_file", "parse_json", "read_json"]

HEADER_CAP = 100_000_000
CHUNK = 1 << 30
MOST_BUFFERS = 1024
"""Buffers that one call of the system takes (IOV_MAX)."""
LARGEST = 1 << 63
ENTRY = {"dtype", "shape", "data_offsets"}
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Stamp(NamedTuple):
    """What tells that a file is written again while it is read."""

    size: int
    modified: int


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object. FormatError for anything else, duplicate keys and NaN included."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"key {printable(twice)!r} occurs twice")
        return made

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: broken JSON ({printable(error)}); one JSON object needed") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: a JSON {type(value).__name__}; one JSON object needed")
    return value


class SafetensorsFile:
    """A safetensors file as a source of tensors: the header is read and checked on opening, tensors on demand.

    FormatError, naming the file, where the header breaks a rule of the format: length, JSON, dtypes, shapes that do not
    give the byte ranges, ranges that overlap, leave holes or run past the end.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._where = printable(self.path)
        self._fd = open_file(self.path, self._where)
        self._opened = self._stamp()
        try:
            self.tensors, self._offsets, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, key: str, out: Tensor | None = None) -> Tensor:
        """Return tensor ``key`` in its stored dtype, into ``out`` (contiguous, same shape and dtype) if given.

        Raises FormatError where the file has become shorter than its header says.
        """
        spec = self.tensors[key]
        target = torch.empty(spec.shape, dtype=spec.dtype) if out is None or out.device.type != "cpu" else out
        if tuple(target.shape) != spec.shape or target.dtype != spec.dtype or not target.is_contiguous():
            raise ValueError(f"out must be a contiguous {spec.dtype} tensor of shape {spec.shape}")
        if spec.nbytes:
            buffer = _memory(target)
            self._pread(buffer, self._offsets[key], _tensor(key))
        return target if out is None or target is out else out.copy_(target)

    def read_stacks(self, stacks: Iterable[tuple[Sequence[str], Tensor]]) -> None:
        """Read tensors of one size and dtype into ``out`` (N, *any shape of that size), contiguous, for each stack of N keys.

        What lies side by side in the file is read at once, into places that need not. Raises FormatError as `read`.
        """
        places: list[tuple[int, memoryview, str]] = []
        for keys, out in stacks:
            if len(keys) != len(out) or not out.is_contiguous() or out.device.type != "cpu":
                raise ValueError(f"out must be a contiguous tensor of {len(keys)} matrices on the host")
            dtype = out.dtype
            buffer = _memory(out)
            size = len(buffer) // max(len(keys), 1)
            for i, key in enumerate(keys):
                spec = self.tensors[key]
                if spec.nbytes != size or spec.dtype != dtype:
                    raise ValueError(f"out must hold {spec.dtype} tensors of the size of {spec.shape}")
                places.append((self._offsets[key], buffer[i * size : (i + 1) * size], key))
        places.sort(key=_offset)
        run: list[tuple[int, memoryview, str]] = []
        end = -1
        for place in places:
            if place[0] != end or len(run) == MOST_BUFFERS:
                self._read_run(run)
                run = []
            run.append(place)
            end = place[0] + len(place[1])
        self._read_run(run)

    def place(self, key: str) -> tuple[int, int]:
        """The descriptor of the open file and the byte of it where tensor ``key`` begins, for who reads by itself."""
        return self._fd, self._offsets[key]

    def read_rows(self, key: str, start: int, out: Tensor) -> None:
        """Read rows of tensor ``key`` from ``start`` on into ``out`` (rows, ...), contiguous, of its dtype, on the host."""
        spec = self.tensors[key]
        fits = tuple(out.shape[1:]) == spec.shape[1:] and 0 <= start <= spec.shape[0] - len(out)
        if not fits or out.dtype != spec.dtype or not out.is_contiguous():
            raise ValueError(f"out must hold contiguous rows of a {spec.dtype} tensor of shape {spec.shape}")
        self._pread(_memory(out), self._offsets[key] + start * (spec.nbytes // spec.shape[0]), _tensor(key))

    def check_unchanged(self) -> None:
        """Raise FormatError where somebody wrote into the file since it was opened: what was read may be of both versions."""
        if self._stamp() != self._opened:
            raise FormatError(
                f"{self._where}: changed while it was being read; a file that nobody writes needed. Run again when it is complete"
            )

    def fingerprint(self) -> str:
        """What tells this content from another without reading all of it: a hash of size, time of change and header."""
        header = bytearray(self._begin)
        self._pread(memoryview(header), 0, "the header")
        return hashlib.blake2b(repr(self._opened).encode() + header, digest_size=16).hexdigest()

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _read_run(self, run: Sequence[tuple[int, memoryview, str]]) -> None:
        """Read tensors that lie side by side in the file."""
        if not run:
            return
        begin, size = run[0][0], sum(len(buffer) for _, buffer, _ in run)
        if size <= CHUNK and self._preadv([buffer for _, buffer, _ in run], begin, _tensor(run[0][2])) == size:
            return
        for offset, buffer, key in run:  # cut short: once more, to go on or to say where the file ends
            self._pread(buffer, offset, _tensor(key))

    def _stamp(self) -> _Stamp:
        found = os.fstat(self._fd)
        return _Stamp(found.st_size, found.st_mtime_ns)

    def _preadv(self, buffers: Sequence[memoryview], offset: int, what: str) -> int:
        try:
            return os.preadv(self._fd, buffers, offset)
        except OSError as error:
            raise RunError(
                f"{self._where}: {what} cannot be read: {error.strerror or error}; look after the disc, or copy the file anew"
            ) from error

    def _pread(self, buffer: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(buffer):
            got = self._preadv([buffer[done : done + CHUNK]], offset + done, what)
            if got == 0:
                raise FormatError(
                    f"{self._where}: {what} ends after {done} of {len(buffer)} bytes; the file is truncated"
                )
            done += got

    def _read_header(self) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str]]:
        size = self._opened.size
        if size < 8:
            raise FormatError(f"{self._where}: {size} bytes; a safetensors file needs at least 8")
        prefix = bytearray(8)
        self._pread(memoryview(prefix), 0, "the header length")
        (length,) = struct.unpack("<Q", prefix)
        if length > HEADER_CAP:
            raise FormatError(
                f"{self._where}: header of {length} bytes; at most {HEADER_CAP}. Is this a safetensors file?"
            )
        if 8 + length > size:
            raise FormatError(f"{self._where}: header of {length} bytes in a file of {size}; the file is truncated")
        text = bytearray(length)
        self._pread(memoryview(text), 8, "the header")
        if text[:1] != b"{":
            raise FormatError(f"{self._where}: the header does not begin with {{; not a safetensors file")
        entries = parse_json(bytes(text), self._where)
        metadata = _check_metadata(entries.pop("__metadata__", {}), self._where)
        self._begin = begin = 8 + length
        specs: dict[str, TensorSpec] = {}
        ranges: list[tuple[int, int, str]] = []
        for key, entry in entries.items():
            spec, start, end = _check_entry(key, entry, self._where)
            specs[key] = spec
            ranges.append((start, end, key))
        _check_coverage(ranges, size - begin, self._where)
        return specs, {key: begin + start for start, _, key in ranges}, metadata


@contextmanager
def disc_errors(path: object) -> Iterator[None]:
    """Turn an OSError of writing ``path`` into a RunError with a plain text."""
    try:
        yield
    except OSError as error:
        remedy = "; free some space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise RunError(f"{printable(path)}: cannot be written: {error.strerror or error}{remedy}") from error


def open_file(path: str | os.PathLike[str], where: str) -> int:
    """Open a regular file for reading and return its descriptor. FormatError, beginning with ``where``, for anything else."""
    try:
        # O_NONBLOCK: a pipe put in the file's place must not hang the open.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise LimitError(f"{where}: too many open files; raise the limit with ulimit -n") from None
        raise FormatError(f"{where}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{where}: not a regular file")
    return fd


def read_json(path: str | os.PathLike[str], cap: int) -> dict[str, Any]:
    """Read a file that holds one JSON object of at most ``cap`` bytes. FormatError, naming the file, for anything else."""
    where = printable(os.fspath(path))
    try:
        with os.fdopen(open_file(path, where), "rb") as file:
            # never more than there is: the buffer of a read is made before it
            text = file.read(min(os.fstat(file.fileno()).st_size, cap) + 1)
    except OSError as error:
        raise FormatError(f"{where}: cannot be read: {error.strerror}") from None
    if len(text) > cap:
        raise FormatError(f"{where}: more than {cap} bytes; a smaller file needed")
    return parse_json(text, where)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, to be written."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _offset(place: tuple[int, memoryview, str]) -> int:
    return place[0]


def _check_metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{where}: __metadata__ must map strings to strings")
    if any("\ud800" <= char <= "\udfff" for item in value.items() for text in item for char in text):
        raise FormatError(f"{where}: __metadata__ holds half a surrogate pair, which is no text")
    return value


def _check_entry(key: str, entry: Any, where: str) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or entry.keys() != ENTRY:
        raise _refused(where, key, "the header entry must hold dtype, shape and data_offsets and nothing else")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise _refused(where, key, f"dtype {printable(name)!r} is not known; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > 64:
        raise _refused(where, key, f"shape {printable(shape)} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _refused(where, key, f"data_offsets {printable(offsets)} are not two byte positions")
    spec = TensorSpec(key, tuple(shape), DTYPES[name])
    start, end = offsets
    if end - start != spec.nbytes:
        raise _refused(where, key, f"{end - start} bytes; {name} {list(shape)} needs {spec.nbytes}")
    return spec, start, end


def _tensor(key: str) -> str:
    return f"tensor {printable(key)!r}"


def _refused(where: str, key: str, text: str) -> FormatError:
    return FormatError(f"{where}: tensor {printable(key)!r}: {text}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_size, values))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _check_coverage(ranges: list[tuple[int, int, str]], size: int, where: str) -> None:
    position = 0
    for start, end, key in sorted(ranges):
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            raise FormatError(f"{where}: tensor {printable(key)!r} at byte {start} {what}; {position} expected")
        position = end
    if position != size:
        raise FormatError(
            f"{where}: tensors take {position} bytes, the file holds {size}; truncated or not safetensors"
        )
