"""Safetensors files, read with pread and written as a stream.

Never mapped: a file that someone truncates under a memory map kills the process that reads it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedlora_kernels.adapters.model import TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError, InputError, LimitError, RunError

__all__ = ["SafetensorsFile", "SafetensorsWriter", "disc_errors", "open_file", "parse_json"]

HEADER_CAP = 100_000_000
CHUNK = 1 << 30
MOST_BUFFERS = 1024
"""Buffers that one call of the system takes (IOV_MAX)."""
LARGEST = 1 << 63
ENTRY = {"dtype", "shape", "data_offsets"}
W = TypeVar("W", bound="SafetensorsWriter")
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
            self._pread(buffer, self._offsets[key], f"tensor {printable(key)!r}")
        return target if out is None or target is out else out.copy_(target)

    def read_stacks(self, stacks: Iterable[tuple[Sequence[str], Tensor]]) -> None:
        """Read tensors of one shape and dtype into ``out`` (N, *shape), contiguous, in the order of their N keys, for each stack.

        What lies side by side in the file is read at once, into places that need not. Raises FormatError as `read`.
        """
        places: list[tuple[int, memoryview, str]] = []
        for keys, out in stacks:
            if len(keys) != len(out) or not out.is_contiguous() or out.device.type != "cpu":
                raise ValueError(f"out must be a contiguous tensor of {len(keys)} matrices on the host")
            shape, dtype = tuple(out.shape[1:]), out.dtype
            buffer = _memory(out)
            size = len(buffer) // max(len(keys), 1)
            for i, key in enumerate(keys):
                spec = self.tensors[key]
                if spec.shape != shape or spec.dtype != dtype:
                    raise ValueError(f"out must hold {spec.dtype} tensors of shape {spec.shape}")
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
        if size <= CHUNK and os.preadv(self._fd, [buffer for _, buffer, _ in run], begin) == size:
            return
        for offset, buffer, key in run:  # cut short: once more, to go on or to say where the file ends
            self._pread(buffer, offset, f"tensor {printable(key)!r}")

    def _pread(self, buffer: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(self._fd, [buffer[done : done + CHUNK]], offset + done)
            if got == 0:
                raise FormatError(
                    f"{self._where}: {what} ends after {done} of {len(buffer)} bytes; the file is truncated"
                )
            done += got

    def _read_header(self) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str]]:
        size = os.fstat(self._fd).st_size
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
        begin = 8 + length
        specs: dict[str, TensorSpec] = {}
        ranges: list[tuple[int, int, str]] = []
        for key, entry in entries.items():
            spec, start, end = _check_entry(key, entry, self._where)
            specs[key] = spec
            ranges.append((start, end, key))
        _check_coverage(ranges, size - begin, self._where)
        return specs, {key: begin + start for start, _, key in ranges}, metadata


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor: the header's space is reserved at the start and filled on closing.

    Args:
        path: the file; must not exist.
        entries: for each tensor that may come, its dtype and an upper bound of its shape. Those not added are left out.
        metadata: strings for ``__metadata__``; more can be given on closing.
        spare: bytes kept free for metadata given on closing.

    Failures of the disc raise RunError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        spare: int = 8192,
    ) -> None:
        self.path = os.fspath(path)
        self._entries = dict(entries)
        self._metadata = {"format": "pt", **(metadata or {})}
        self._written: dict[str, dict[str, Any]] = {}
        self._position = 0
        self._reserved = self._bound() + spare
        self._reserved += -self._reserved % 8
        with disc_errors(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.lseek(self._fd, 8 + self._reserved, os.SEEK_SET)

    def announce(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announce a tensor after the start; its entry takes from ``spare``."""
        self._entries[key] = (dtype, shape)

    def add(self, key: str, tensor: Tensor) -> None:
        """Append a tensor. It must be announced in ``entries``, of that dtype and of no larger shape, and come once."""
        dtype, bound = self._entries[key]
        shape = tuple(tensor.shape)
        fits = len(shape) == len(bound) and all(size <= limit for size, limit in zip(shape, bound, strict=True))
        if key in self._written or tensor.dtype != dtype or not fits:
            raise ValueError(
                f"{key}: {tensor.dtype} {shape} does not fit the announced {dtype} {bound}, or came before"
            )
        data = tensor.detach().to("cpu").contiguous().reshape(-1)
        size = data.numel() * dtype.itemsize
        if size:
            with disc_errors(self.path):
                _write_all(self._fd, data.view(torch.uint8).numpy().data)
        self._written[key] = _entry(dtype, shape, self._position, self._position + size)
        self._position += size

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Fill in the header, make it durable and close. Idempotent."""
        if self._fd < 0:
            return
        header = _dump({"__metadata__": {**self._metadata, **(metadata or {})}, **self._written})
        if len(header) > self._reserved:
            raise InputError(f"{self.path}: metadata of {len(header)} bytes; {self._reserved} were reserved")
        with disc_errors(self.path):
            text = struct.pack("<Q", self._reserved) + header.ljust(self._reserved)
            os.lseek(self._fd, 0, os.SEEK_SET)
            _write_all(self._fd, memoryview(text))
            os.fsync(self._fd)
        self.abandon()

    def abandon(self) -> None:
        """Close without a header: the file is not readable. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self: W) -> W:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _bound(self) -> int:
        total = sum(TensorSpec("", shape, dtype).nbytes for dtype, shape in self._entries.values())
        entries = {key: _entry(dtype, shape, total, total) for key, (dtype, shape) in self._entries.items()}
        return len(_dump({"__metadata__": self._metadata, **entries}))


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


def _refused(where: str, key: str, text: str) -> FormatError:
    return FormatError(f"{where}: tensor {printable(key)!r}: {text}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < LARGEST for value in values)


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


def _entry(dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _write_all(fd: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        done += os.write(fd, buffer[done : done + CHUNK])
