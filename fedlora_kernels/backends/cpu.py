"""The native CPU library, `libfedlora_cpu.so`: loading it, and calling it through its C ABI (csrc/include/fedlora.h).

The library is loaded at first use and after torch, so that both share one OpenMP runtime. A library that is missing or
was built from another header leaves the backend unavailable, with the reason; importing this module never fails.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import (
    Blocks,
    Factors,
    Mixed,
    RawProduct,
    RawRotation,
    RawSum,
    RawSVD,
    RuleSpec,
)
from fedlora_kernels.backends.torch import backtransform, gram, procrustes
from fedlora_kernels.backends.torch.product import Kernels, product_svd
from fedlora_kernels.backends.torch.svd import svd
from fedlora_kernels.errors import BackendError, InputError

__all__ = ["BACKEND", "CpuBackend", "abi_stamp", "thread_count"]

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY = _PACKAGE / "_lib" / "libfedlora_cpu.so"
_HEADERS = tuple(root / "include" / "fedlora.h" for root in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"))
_REBUILD = "rebuild it with `pip install --force-reinstall fedlora-kernels`, in a checkout `python setup.py build_ext --inplace`"

_LARGEST = 512
_WIDEST = 1024
"""Columns of a stack whose Gram the library forms; that of a wider one fills the caches, and BLAS is as fast."""
_SIDES: Mapping[str, tuple[str, ...]] = {
    "core_svd": ("p", "q"),
    "procrustes_rotation": ("r",),
    "align_factors": ("r",),
    "weighted_sum": (),
    "mixed_sum": (),
    "product_svd": (),
    "update_gram": (),
}
"""The sizes of an operation that have an upper bound."""
_MOST_THREADS = 1024
_DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.int32: 2, torch.bfloat16: 3, torch.float16: 4}
_WORKING_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_STATUS_TEXT = {
    1: "descriptors do not fit each other, or a size is not served",
    2: "a dtype that the op does not take",
    3: "the workspace is too small",
    4: "a bad argument",
}


class _Block(ctypes.Structure):
    """`fedlora_block`: one descriptor for a batch of equally shaped matrices."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("data", "rows", "cols", "row_stride", "col_stride", "dtype", "batch", "batch_stride")
    ]


class CpuBackend:
    """SIMD kernels, one small matrix per vector lane; results do not depend on batch, slot or threads, bit for bit.

    Procrustes, `product_svd` and `update_gram` are the torch backend's with kernels of the library for the steps that have one:
    no promise of bits there.
    """

    name = "cpu"
    bitwise = frozenset({"core_svd", "mixed_sum", "weighted_sum"})

    def __init__(self, library: Path = _LIBRARY, headers: Sequence[Path] = _HEADERS) -> None:
        self._path = library
        self._headers = tuple(headers)
        self._lock = threading.Lock()
        self._library: ctypes.CDLL | None = None
        self._reason = ""

    def available(self) -> tuple[bool, str]:
        """Whether the library is here and fits this package, and which instruction set it runs (or why not)."""
        library = self._load()
        if library is None:
            return False, self._reason
        return True, f"{self._path.name}, {library.fedlora_isa().decode()}"

    def serves(self, op: str, dtype: torch.dtype, device: torch.device, sizes: Mapping[str, int]) -> tuple[bool, str]:
        """`core_svd`, `procrustes_rotation` and `align_factors` up to 512 x 512, all else of any size; on the CPU."""
        if op not in _SIDES:
            return False, f"the cpu library has no {op}"
        if device.type != "cpu":
            return False, f"the tensors are on {device}"
        if dtype not in _WORKING_DTYPE:
            return False, f"no kernel for {dtype}"
        largest = max((sizes.get(side, 0) for side in _SIDES[op]), default=0)
        if largest > _LARGEST:
            return False, f"a dimension of {largest} is above {_LARGEST}"
        return self.available()

    def core_svd(self, groups: Sequence[Tensor], *, max_sweeps: int = 0) -> list[RawSVD]:
        """SVD of each matrix of ``(N, p, q)``, p and q at most 512, by one-sided Jacobi (docs/numerics.md, Core SVD).

        Args:
            groups: CPU tensors ``(N, p, q)`` of any strides; float64, float32, float16 or bfloat16.
            max_sweeps: guard of the iteration; 0 takes the library's own.

        Returns:
            One record per group in the input dtype, half inputs in float32. Info NONFINITE (outputs NaN),
            NOT_CONVERGED and OVERFLOW per matrix; note ZERO for a zero matrix.

        Raises:
            BackendError: the library is absent, or does not serve the tensors.
            InputError: FEDLORA_NUM_THREADS is no number of threads.
        """
        library = self._needed("core_svd")
        inputs = [_working_copy(group) for group in groups]
        results = [_empty_svd(group) for group in inputs]
        tables = [_table(inputs)]
        for field in ("U", "S", "Vh", "info", "notes"):
            tables.append(_table([_rows(getattr(result, field)) for result in results]))
        threads = thread_count()
        needed = ctypes.c_int64()
        status = library.fedlora_core_svd_workspace(tables[0], len(inputs), threads, ctypes.byref(needed))
        _check("core_svd", status)
        workspace = torch.empty(needed.value, dtype=torch.uint8)
        status = library.fedlora_core_svd(
            *tables, len(inputs), max_sweeps, workspace.data_ptr(), workspace.numel(), threads, None
        )
        _check("core_svd", status)
        return results

    def weighted_sum(self, groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
        """Weighted sum of the blocks of each group in one pass over them; see `Backend.weighted_sum`.

        Raises BackendError where the library is absent or does not take a dtype, InputError as `core_svd`.
        """
        library = self._needed("weighted_sum")
        results = [_about(torch.empty(group.batch, group.p, group.q, dtype=dtype)) for group in groups]
        blocks = _table([block for group in groups for block in group.blocks])
        counts = _counts([len(group.blocks) for group in groups])
        weights = _table([group.weights[None] for group in groups])
        tables = [_table([_rows(getattr(result, field)) for result in results]) for field in RawSum._fields]
        needed = ctypes.c_int64()
        _check("weighted_sum", library.fedlora_weighted_sum_workspace(tables[0], len(groups), ctypes.byref(needed)))
        workspace = torch.empty(needed.value, dtype=torch.uint8)
        status = library.fedlora_weighted_sum(
            blocks, counts, weights, *tables, len(groups), workspace.data_ptr(), workspace.numel(), thread_count(), None
        )
        _check("weighted_sum", status)
        return results

    def mixed_sum(self, groups: Sequence[Mixed], dtype: torch.dtype) -> list[RawSum]:
        """``sum_k X_k M_k`` of each group in one pass over the blocks; see `Backend.mixed_sum`.

        Raises BackendError where the library is absent or does not take a dtype, InputError as `core_svd`.
        """
        return self._mix(groups, [group.empty(dtype) for group in groups])

    def _mix(self, groups: Sequence[Mixed], sums: Sequence[Tensor]) -> list[RawSum]:
        """The sums of these groups, written to ``sums``, which may be views."""
        library = self._needed("mixed_sum")
        results = [_about(out) for out in sums]
        blocks = _table([block for group in groups for block in group.blocks])
        mixers = _table([mixer for group in groups for mixer in group.mixers])
        counts = _counts([len(group.blocks) for group in groups])
        tables = [_table([_rows(getattr(result, field)) for result in results]) for field in RawSum._fields]
        threads, needed = thread_count(), ctypes.c_int64()
        status = library.fedlora_mixed_sum_workspace(
            mixers, counts, tables[0], len(groups), threads, ctypes.byref(needed)
        )
        _check("mixed_sum", status)
        workspace = torch.empty(needed.value, dtype=torch.uint8)
        status = library.fedlora_mixed_sum(
            blocks, mixers, counts, *tables, len(groups), workspace.data_ptr(), workspace.numel(), threads, None
        )
        _check("mixed_sum", status)
        return results

    def product_svd(
        self, groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype
    ) -> list[RawProduct]:
        """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; see `Backend.product_svd`."""
        kernels = Kernels(
            gram=self._gram,
            cholesky=self._cholesky,
            svd=self._core_svd,
            write_left=self._write_left,
            write_right=self._write_right,
        )
        return product_svd(groups, rule, output, dtype, kernels=kernels)

    def update_gram(self, groups: Sequence[Factors]) -> list[Tensor]:
        """Inner products of the weighted updates; see `Backend.update_gram`."""
        return gram.update_gram(groups, gram=self._gram)

    def procrustes_rotation(
        self, source: Sequence[Tensor], target: Sequence[Tensor], special: bool, blend: float
    ) -> list[RawRotation]:
        """Rotation of every source onto its target; see `Backend.procrustes_rotation`."""
        return procrustes.procrustes_rotation(source, target, special, blend, svd=self._svd, cross=self._cross_products)

    def align_factors(
        self,
        B: Sequence[Tensor],
        A: Sequence[Tensor],
        reference_B: Sequence[Tensor] | None,
        reference_A: Sequence[Tensor] | None,
        side: tuple[float, float],
        special: bool,
        blend: float,
    ) -> list[tuple[Tensor, Tensor, RawRotation]]:
        """Every pair rotated towards its reference; see `Backend.align_factors`."""
        return procrustes.align_factors(
            B, A, reference_B, reference_A, side, special, blend, svd=self._svd, cross=self._cross_products
        )

    def _core_svd(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._svd(C) if max(C.shape[1:]) <= _LARGEST else svd(C)

    def _cholesky(self, G: Tensor, width: Tensor) -> Tensor:
        """Factor of every Gram as `backends.torch.cholesky.pivoted_cholesky`; G (N, R, R) float64 is only read."""
        library = self._needed("product_svd")
        L, width = torch.empty(G.shape, dtype=torch.float64), width.double()
        tables = [_table([G]), _table([width[:, None, None]]), _table([L])]
        threads, needed = thread_count(), ctypes.c_int64()
        _check("product_svd", library.fedlora_cholesky_workspace(tables[0], 1, threads, ctypes.byref(needed)))
        workspace = torch.empty(needed.value, dtype=torch.uint8)
        status = library.fedlora_cholesky(*tables, 1, workspace.data_ptr(), workspace.numel(), threads, None)
        _check("product_svd", status)
        return L

    def _svd(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (raw,) = self.core_svd([C])
        return raw.U, raw.S, raw.Vh, raw.info

    def _cross_products(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> list[procrustes.Cross]:
        """``X^T Y`` of every source and its target, each read once; sources with one target in a row read it once."""
        pairs = list(zip(source, target, strict=True))
        if any(x.dtype == torch.float64 for pair in pairs for x in pair):  # squares of float64 may leave its range
            return procrustes.cross_products(source, target)
        library = self._needed("procrustes_rotation")
        runs = [list(run) for _, run in itertools.groupby(pairs, key=lambda pair: _place(pair[1]))]
        products = [torch.empty(len(X), X.shape[-1], Y.shape[-1], dtype=torch.float64) for X, Y in pairs]
        squares = [torch.empty(len(run[0][1]), len(run) + 1, dtype=torch.float64) for run in runs]
        blocks, targets = _table([X for X, _ in pairs]), _table([run[0][1] for run in runs])
        counts, threads, needed = _counts([len(run) for run in runs]), thread_count(), ctypes.c_int64()
        status = library.fedlora_cross_products_workspace(
            blocks, counts, targets, len(runs), threads, ctypes.byref(needed)
        )
        _check("procrustes_rotation", status)
        workspace = torch.empty(needed.value, dtype=torch.uint8)
        tables = _table(products), _table([_rows(table) for table in squares])
        status = library.fedlora_cross_products(
            blocks, counts, targets, *tables, len(runs), workspace.data_ptr(), workspace.numel(), threads, None
        )
        _check("procrustes_rotation", status)
        rest = iter(products)
        return [cross for table in squares for cross in _crosses(itertools.islice(rest, table.shape[1] - 1), table)]

    def _gram(self, blocks: Sequence[Tensor], e: Tensor | None) -> Tensor:
        """``X^T X`` of the stack of the blocks, each read once; torch's where columns are scaled, or for wide stacks."""
        R = sum(block.shape[-1] for block in blocks)
        if e is not None or R > _WIDEST:
            return gram.gram(blocks, e)
        library = self._needed("update_gram")
        G = torch.empty(len(blocks[0]), R, R, dtype=torch.float64)
        tables = _table(blocks), _counts([len(blocks)]), _table([G])
        threads, needed = thread_count(), ctypes.c_int64()
        _check("update_gram", library.fedlora_gram_workspace(*tables, 1, threads, ctypes.byref(needed)))
        workspace = torch.empty(needed.value, dtype=torch.uint8)
        status = library.fedlora_gram(*tables, 1, workspace.data_ptr(), workspace.numel(), threads, None)
        _check("update_gram", status)
        return G

    def _write_left(self, blocks: Sequence[Tensor], e: Tensor | None, K: Tensor, out: Tensor) -> Tensor:
        """``[X_1 | ... | X_K] K`` to the first columns of out, and the signs that were applied; see `write_left`."""
        if e is not None:
            return backtransform.write_left(blocks, e, K, out)
        # A half has too few bits to tell which element is the largest.
        half = out.dtype not in (torch.float32, torch.float64)
        left = out[..., : K.shape[-1]]
        X = torch.empty(left.shape, dtype=torch.float32) if half else left
        self._mix([_mixed(blocks, K)], [X])
        signs = torch.empty(len(X), X.shape[-1], dtype=torch.float64)
        library = self._needed("product_svd")
        _check("product_svd", library.fedlora_orient(_table([X]), _table([_rows(signs)]), 1, thread_count(), None))
        if half:
            left.copy_(X)
        return signs

    def _write_right(self, blocks: Sequence[Tensor], e: Tensor | None, K: Tensor, out: Tensor) -> None:
        """``([X_1 | ... | X_K] K)^T`` to the first rows of out; see `write_right`."""
        if e is not None:
            return backtransform.write_right(blocks, e, K, out)
        self._mix([_mixed(blocks, K)], [out[:, : K.shape[-1]].mT])
        return None

    def _needed(self, op: str) -> ctypes.CDLL:
        library = self._load()
        if library is None:
            raise BackendError(f"backend 'cpu', {op}: {self._reason}")
        return library

    def _load(self) -> ctypes.CDLL | None:
        with self._lock:
            if self._library is None and not self._reason:
                try:
                    self._library = _open(self._path, self._headers)
                except BackendError as error:
                    self._reason = str(error)
            return self._library


def abi_stamp(header: Path) -> int:
    """The number that `fedlora_abi()` of a library built from this header answers."""
    return int.from_bytes(hashlib.sha256(header.read_bytes()).digest()[:8], "big")


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
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    table, count, address = ctypes.POINTER(_Block), ctypes.c_int64, ctypes.c_void_p
    library.fedlora_isa.restype = ctypes.c_char_p
    library.fedlora_core_svd_workspace.argtypes = [table, count, count, ctypes.POINTER(ctypes.c_int64)]
    library.fedlora_core_svd.argtypes = [*[table] * 6, count, count, address, count, count, address]
    library.fedlora_weighted_sum_workspace.argtypes = [table, count, ctypes.POINTER(count)]
    counts = ctypes.POINTER(count)
    library.fedlora_weighted_sum.argtypes = [table, counts, *[table] * 6, count, address, count, count, address]
    library.fedlora_mixed_sum_workspace.argtypes = [table, counts, table, count, count, counts]
    library.fedlora_mixed_sum.argtypes = [*[table] * 2, counts, *[table] * 5, count, address, count, count, address]
    library.fedlora_gram_workspace.argtypes = [table, counts, table, count, count, counts]
    library.fedlora_gram.argtypes = [table, counts, table, count, address, count, count, address]
    library.fedlora_orient.argtypes = [table, table, count, count, address]
    library.fedlora_cross_products_workspace.argtypes = [table, counts, table, count, count, counts]
    library.fedlora_cholesky_workspace.argtypes = [table, count, count, counts]
    library.fedlora_cholesky.argtypes = [*[table] * 3, count, address, count, count, address]
    library.fedlora_cross_products.argtypes = [table, counts, *[table] * 3, count, address, count, count, address]


def _working_copy(group: Tensor) -> Tensor:
    """The input as the library takes it: itself, or in float32 if it is a half."""
    if group.dim() != 3 or group.dtype not in _WORKING_DTYPE or group.device.type != "cpu":
        raise BackendError(
            f"backend 'cpu', core_svd: found {group.dtype} {tuple(group.shape)} on {group.device}; "
            "needs (N, p, q) on the CPU in float64, float32, float16 or bfloat16"
        )
    if max(group.shape[1:]) > _LARGEST:
        raise BackendError(
            f"backend 'cpu', core_svd: found matrices {tuple(group.shape[1:])}; serves dimensions up to {_LARGEST}. "
            "Use backend='auto'"
        )
    return group.detach().to(_WORKING_DTYPE[group.dtype])


def _empty_svd(C: Tensor) -> RawSVD:
    N, p, q = C.shape
    k = min(p, q)
    return RawSVD(
        U=torch.empty(N, p, k, dtype=C.dtype),
        S=torch.empty(N, k, dtype=C.dtype),
        Vh=torch.empty(N, k, q, dtype=C.dtype),
        info=torch.zeros(N, dtype=torch.int32),
        notes=torch.zeros(N, dtype=torch.int32),
    )


def _about(sums: Tensor) -> RawSum:
    """``sums`` (N, p, q), to be filled, and room for what is said of it."""
    N = len(sums)
    return RawSum(
        sum=sums,
        norm=torch.empty(N, dtype=torch.float64),
        rounding=torch.empty(N, dtype=torch.float64),
        info=torch.empty(N, dtype=torch.int32),
        notes=torch.empty(N, dtype=torch.int32),
    )


def _mixed(blocks: Sequence[Tensor], K: Tensor) -> Mixed:
    """The product of the stacked blocks with K (N, R, p)."""
    return Mixed(tuple(blocks), torch.split(K, [block.shape[-1] for block in blocks], dim=1))


def _rows(t: Tensor) -> Tensor:
    """(N, k) and (N,) as matrices of one row."""
    if t.dim() == 1:
        return t[:, None, None]
    return t[:, None, :] if t.dim() == 2 else t


def _table(groups: Sequence[Tensor]) -> ctypes.Array[_Block]:
    table = (_Block * max(len(groups), 1))()
    for i, t in enumerate(groups):
        batch_stride, row_stride, col_stride = t.stride()
        table[i] = _Block(
            t.data_ptr(), t.shape[1], t.shape[2], row_stride, col_stride, _DTYPE_CODE[t.dtype], t.shape[0], batch_stride
        )
    return table


def _crosses(products: Iterable[Tensor], squares: Tensor) -> list[procrustes.Cross]:
    """Products that were not scaled; ``squares`` (N, K + 1) of their sources and of the target are finite where those are."""
    norms, finite = squares.sqrt(), torch.isfinite(squares)
    sizes, both = norms[:, :-1] * norms[:, -1:], finite[:, :-1] & finite[:, -1:]
    exponent = torch.zeros(len(squares), dtype=torch.int64)
    return [procrustes.Cross(M, sizes[:, k], exponent, both[:, k]) for k, M in enumerate(products)]


def _place(t: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in memory."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def _counts(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * max(len(numbers), 1))(*numbers)


def _check(op: str, status: int) -> None:
    if status:
        raise BackendError(f"backend 'cpu', {op}: the library refused the call: {_STATUS_TEXT.get(status, status)}")


_forked = False


def _after_fork() -> None:
    # A child that opens a parallel region of two threads after its parent had one hangs in the OpenMP runtime.
    global _forked  # noqa: PLW0603
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def thread_count() -> int:
    """Return FEDLORA_NUM_THREADS, else torch's; 1 in a forked child. InputError where the variable is no such number."""
    if _forked:
        return 1
    setting = os.environ.get("FEDLORA_NUM_THREADS", "").strip()
    if not setting:
        return torch.get_num_threads()
    if not (setting.isascii() and setting.isdigit() and 1 <= int(setting) <= _MOST_THREADS):
        raise InputError(
            f"FEDLORA_NUM_THREADS={setting!r}: needs a whole number from 1 to {_MOST_THREADS}; correct or unset it"
        )
    return int(setting)


BACKEND = CpuBackend()
