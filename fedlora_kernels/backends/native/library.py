"""The native libraries: loading one, and the C ABI that they share (csrc/include/fedlora.h) for ctypes.

A library is loaded at first use and after torch, so that both share one OpenMP runtime. One that is missing or was built
from another header is not there, with the reason; importing this module never fails.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.native.threads import thread_count
from fedlora_kernels.errors import BackendError
from fedlora_kernels.memory import Reserve

__all__ = [
    "DTYPE_CODE",
    "HEADERS",
    "LIBRARIES",
    "Library",
    "abi_stamp",
    "counts",
    "current",
    "numbers",
    "rows",
    "stream",
    "table",
]

_PACKAGE = Path(__file__).resolve().parents[2]
LIBRARIES = _PACKAGE / "_lib"
HEADERS = tuple(root / "include" / "fedlora.h" for root in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"))
_REBUILD = "rebuild it with `pip install --force-reinstall fedlora-kernels`, in a checkout `python setup.py build_ext --inplace`"

DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.int32: 2, torch.bfloat16: 3, torch.float16: 4, torch.bool: 5}
_STATUS_TEXT = {
    1: "descriptors do not fit each other, or a size is not served",
    2: "a dtype that the op does not take",
    3: "the workspace is too small",
    4: "a bad argument",
}
_DEVICE_ERROR = 6


class Block(ctypes.Structure):
    """`fedlora_block`: one descriptor for a batch of equally shaped matrices."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("data", "rows", "cols", "row_stride", "col_stride", "dtype", "batch", "batch_stride")
    ]


class Library:
    """One library file, loaded when it is first asked for.

    Args:
        name: of the backend that it serves.
        path: of the file.
        headers: where fedlora.h may lie; the first that exists counts.
        device: type of the devices whose memory it takes.
    """

    def __init__(self, name: str, path: Path, headers: Sequence[Path] = HEADERS, device: str = "cpu") -> None:
        self.name = name
        self.path = path
        self.device = device
        self._headers = tuple(headers)
        self._lock = threading.Lock()
        self._loaded: ctypes.CDLL | None = None
        self._reason = ""
        self._answers = Reserve()

    def available(self) -> tuple[bool, str]:
        """Whether the library is here and fits this package, and which instruction sets it runs (or why not)."""
        loaded = self._load()
        if loaded is None:
            return False, self._reason
        return True, f"{self.path.name}, {loaded.fedlora_isa().decode()}"

    def functions(self, op: str) -> ctypes.CDLL:
        """The C functions, for ``op``; BackendError where there is no library."""
        loaded = self._load()
        if loaded is None:
            raise BackendError(f"backend {self.name!r}, {op}: {self._reason}")
        return loaded

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for an answer, in memory that is used again where that saves time."""
        if device.type == "cpu" and self.device == "cpu":
            return self._answers.empty(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def run(self, op: str, function: str, sizes: Sequence[Any], arguments: Sequence[Any], device: torch.device) -> None:
        """One call of a C function with scratch memory, `status` that must be fine; BackendError where it is not."""
        self.require(op, self.status(op, function, sizes, arguments, device))

    def status(
        self, op: str, function: str, sizes: Sequence[Any], arguments: Sequence[Any], device: torch.device
    ) -> int:
        """What a C function returns, given the scratch memory that its workspace query answers for ``sizes``.

        Threads and, on a GPU, its current stream are added. BackendError where the query is refused.
        """
        memory = torch.empty(self.scratch(op, function, sizes, device), dtype=torch.uint8, device=device)
        with current(device):
            called = self._function(op, function)
            return int(called(*arguments, memory.data_ptr(), memory.numel(), thread_count(), stream(device)))

    def scratch(self, op: str, function: str, sizes: Sequence[Any], device: torch.device) -> int:
        """Bytes of scratch memory that a C function takes on this device; BackendError where the query is refused."""
        needed = ctypes.c_int64()
        with current(device):
            self.call(op, f"{function}_workspace", *sizes, thread_count(), ctypes.byref(needed))
        return needed.value

    def call(self, op: str, function: str, *arguments: Any) -> None:
        """One call of a C function; BackendError where it refuses."""
        self.require(op, self._function(op, function)(*arguments))

    def require(self, op: str, status: int) -> None:
        """BackendError for the status of a call that was refused."""
        if not status:
            return
        if status == _DEVICE_ERROR:
            text = f"the device failed: {self.functions(op).fedlora_message().decode()}"
        else:
            text = f"the library refused the call: {_STATUS_TEXT.get(status, status)}"
        raise BackendError(f"backend {self.name!r}, {op}: {text}")

    def is_loaded(self) -> bool:
        """Whether it was asked for and found."""
        return self._loaded is not None

    def _function(self, op: str, function: str) -> Any:
        try:
            return getattr(self.functions(op), function)
        except AttributeError as error:
            raise BackendError(f"backend {self.name!r}, {op}: {self.path.name} has no {function}") from error

    def _load(self) -> ctypes.CDLL | None:
        with self._lock:
            if self._loaded is None and not self._reason:
                try:
                    self._loaded = _open(self.path, self._headers)
                except BackendError as error:
                    self._reason = str(error)
            return self._loaded


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it a GPU is the current one, which the library asks for its limits and launches on; nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream(device: torch.device) -> int | None:
    """The current stream of a GPU, which the kernels run on; None on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def abi_stamp(header: Path) -> int:
    """The number that `fedlora_abi()` of a library built from this header answers."""
    return int.from_bytes(hashlib.sha256(header.read_bytes()).digest()[:8], "big")


def table(groups: Sequence[Tensor]) -> ctypes.Array[Block]:
    """Descriptors of tensors (N, p, q) of any strides; (N, k) and (N,) are matrices of one row."""
    return (Block * max(len(groups), 1))(*[_block(t) for t in groups])


def _block(t: Tensor) -> Block:
    shape, stride = t.shape, t.stride()
    code, missing = DTYPE_CODE[t.dtype], 3 - len(shape)
    if missing == 0:
        return Block(t.data_ptr(), shape[1], shape[2], stride[1], stride[2], code, shape[0], stride[0])
    cols, col_stride = (shape[1], stride[1]) if missing == 1 else (1, 1)
    return Block(t.data_ptr(), 1, cols, cols, col_stride, code, shape[0], stride[0])


def rows(t: Tensor) -> Tensor:
    """(N, k) and (N,) as matrices of one row."""
    if t.dim() == 1:
        return t[:, None, None]
    return t[:, None, :] if t.dim() == 2 else t


def counts(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """An array of int64."""
    return (ctypes.c_int64 * max(len(numbers), 1))(*numbers)


def numbers(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    """An array of float64."""
    return (ctypes.c_double * max(len(values), 1))(*values)


def _open(path: Path, headers: Sequence[Path]) -> ctypes.CDLL:
    """The library with its argument types declared; BackendError where it is missing, broken or of another ABI."""
    if not path.is_file():
        raise BackendError(f"{path} is missing: it was not built, or not for this platform; to have it, {_REBUILD}")
    header = next((header for header in headers if header.is_file()), None)
    if header is None:
        raise BackendError(f"fedlora.h is missing beside the package, so {path} cannot be trusted; {_REBUILD}")
    try:
        library = ctypes.CDLL(str(path))
        library.fedlora_abi.restype = ctypes.c_uint64
        stamp = library.fedlora_abi()
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot be loaded ({error}); {_REBUILD}") from error
    if stamp != abi_stamp(header):
        raise BackendError(
            f"{path} has ABI {stamp:016x}, but this package needs {abi_stamp(header):016x}: it is stale; {_REBUILD}"
        )
    library.fedlora_isa.restype = ctypes.c_char_p
    for name, types in _SIGNATURES.items():
        if hasattr(library, name):  # some functions are the CPU's alone, some those of CUDA
            getattr(library, name).argtypes = types
    if hasattr(library, "fedlora_message"):
        library.fedlora_message.restype = ctypes.c_char_p
    return library


_TABLE, _COUNT, _NUMBER, _ADDRESS = ctypes.POINTER(Block), ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_COUNTS = ctypes.POINTER(_COUNT)
_NUMBERS = ctypes.POINTER(_NUMBER)
_SCRATCH = [_ADDRESS, _COUNT]
_END = [_COUNT, _ADDRESS]  # threads, stream

_SIGNATURES: dict[str, list[Any]] = {
    "fedlora_calibrate": [_COUNT, _COUNT, ctypes.POINTER(ctypes.c_double), *_END],
    "fedlora_core_svd_workspace": [_TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_core_svd": [*[_TABLE] * 6, _COUNT, _COUNT, *_SCRATCH, *_END],
    "fedlora_weighted_sum_workspace": [_COUNTS, _TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_weighted_sum": [_TABLE, _COUNTS, *[_TABLE] * 6, _COUNT, *_SCRATCH, *_END],
    "fedlora_read_sum_workspace": [_TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_read_sum": [_ADDRESS, _COUNTS, *[_TABLE] * 6, _COUNT, *_SCRATCH, *_END],
    "fedlora_read_alike_workspace": [_COUNT, _COUNTS],
    "fedlora_read_alike": [_ADDRESS, _COUNTS, _COUNT, _ADDRESS, *_SCRATCH, *_END],
    "fedlora_read_turned_workspace": [_ADDRESS, _ADDRESS, _COUNT, _COUNT, _TABLE, _COUNT, _COUNTS],
    "fedlora_read_turned": [
        *[_ADDRESS] * 2,
        *[_COUNT] * 2,
        *[_TABLE] * 6,
        _NUMBER,
        _COUNT,
        _NUMBER,
        _ADDRESS,
        *_SCRATCH,
        *_END,
    ],
    "fedlora_mixed_sum_workspace": [_TABLE, _COUNTS, _TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_mixed_sum": [*[_TABLE] * 2, _COUNTS, *[_TABLE] * 5, _COUNT, *_SCRATCH, *_END],
    "fedlora_gram_workspace": [_TABLE, _COUNTS, _TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_gram": [_TABLE, _COUNTS, _TABLE, _TABLE, _COUNT, *_SCRATCH, *_END],
    "fedlora_fast_gram_workspace": [_TABLE, _COUNTS, _TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_fast_gram": [_TABLE, _COUNTS, _TABLE, _TABLE, _COUNT, *_SCRATCH, *_END],
    "fedlora_update_gram_workspace": [_TABLE, _TABLE, _COUNTS, _TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_update_gram": [_TABLE, _TABLE, _COUNTS, _TABLE, _TABLE, _COUNT, *_SCRATCH, *_END],
    "fedlora_devices": [_COUNTS],
    "fedlora_orient": [_TABLE, _TABLE, _COUNT, *_END],
    "fedlora_cross_products_workspace": [_TABLE, _COUNTS, _TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_cross_products": [_TABLE, _COUNTS, *[_TABLE] * 4, _COUNT, *_SCRATCH, *_END],
    "fedlora_polar_workspace": [_TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_polar": [*[_TABLE] * 3, _NUMBERS, _TABLE, _COUNT, _COUNT, _NUMBER, *_SCRATCH, *_END],
    "fedlora_turned_workspace": [*[_TABLE] * 3, _COUNT, _COUNT, _COUNTS],
    "fedlora_turned": [*[_TABLE] * 3, _COUNT, *_SCRATCH, *_END],
    "fedlora_align_factors_workspace": [*[_TABLE] * 4, _NUMBER, _NUMBER, *[_TABLE] * 3, _COUNT, _COUNT, _COUNTS],
    "fedlora_align_factors": [
        *[_TABLE] * 4,
        _NUMBER,
        _NUMBER,
        *[_TABLE] * 3,
        _COUNT,
        _COUNT,
        _NUMBER,
        *_SCRATCH,
        *_END,
    ],
    "fedlora_stacked_qr_workspace": [_TABLE, _COUNTS, *[_TABLE] * 6, _COUNT, _COUNT, _COUNTS],
    "fedlora_stacked_qr": [_TABLE, _COUNTS, *[_TABLE] * 6, _COUNT, *_SCRATCH, *_END],
    "fedlora_tall_qr_workspace": [_TABLE, _COUNTS, *[_TABLE] * 3, _COUNT, _COUNT, _COUNTS],
    "fedlora_tall_qr": [_TABLE, _COUNTS, *[_TABLE] * 3, _COUNT, *_SCRATCH, *_END],
    "fedlora_cholesky_workspace": [_TABLE, _COUNT, _COUNT, _COUNTS],
    "fedlora_cholesky": [*[_TABLE] * 3, _COUNT, *_SCRATCH, *_END],
    "fedlora_product_svd_workspace": [*[_TABLE] * 2, _COUNTS, *[_TABLE] * 2, _COUNT, _COUNT, _COUNTS],
    "fedlora_product_svd": [
        *[_TABLE] * 2,
        _COUNTS,
        *[_TABLE] * 7,
        _COUNT,
        _COUNT,
        _NUMBER,
        _COUNT,
        _COUNT,
        _ADDRESS,
        *_SCRATCH,
        *_END,
    ],
}
