"""The backend of the native CUDA library (csrc/cuda), on the binding that it shares with the cpu library."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import (
    OPS,
    Blocks,
    Factors,
    Mixed,
    RawProduct,
    RawQR,
    RawRotation,
    RawSum,
    RawSVD,
    RuleSpec,
    Stack,
)
from fedlora_kernels.backends.cuda import build, product
from fedlora_kernels.backends.native import gram, procrustes, qr, sums, svd
from fedlora_kernels.backends.native.library import HEADERS, LIBRARIES, Library
from fedlora_kernels.errors import BackendError

__all__ = ["BACKEND", "CudaBackend"]

_LARGEST: Mapping[str, Mapping[str, int]] = {
    "core_svd": {"p": svd.LARGEST, "q": svd.LARGEST},
    "procrustes_rotation": {"r": svd.LARGEST},
    "rotate_factors": {},
    "align_factors": {"r": svd.LARGEST},
    "stacked_qr": {"R": qr.WIDEST},
    "weighted_sum": {},
    "mixed_sum": {},
    "product_svd": {},
    "update_gram": {},
}
"""The sizes of an operation that have an upper bound."""


class CudaBackend:
    """CUDA kernels on the current stream, float64 where accuracy needs it; results do not depend on batch, slot or stream, bit for bit.

    Args:
        library: the file; None for the one that came with the package or, without one, the one built at first use.
        headers: where fedlora.h may lie.
        device: type of the devices whose memory it takes; ``cpu`` for the simulated device of csrc/simt.
    """

    name = "cuda"
    bitwise = frozenset(OPS)

    def __init__(
        self,
        library: Path | None = None,
        headers: Sequence[Path] = HEADERS,
        device: str = "cuda",
    ) -> None:
        self._build = library is None
        self.library = Library(self.name, library or LIBRARIES / build.NAME, headers, device)

    def available(self) -> tuple[bool, str]:
        """Whether the library is here, fits this package and finds a GPU, and what it was built for (or why not)."""
        if self._build and not self.library.path.is_file() and torch.cuda.is_available():
            try:
                self.library.path = build.first_use()
            except BackendError as error:
                return False, f"{build.NAME} did not come with the package, and {error}"
        ok, reason = self.library.available()
        if not ok:
            return ok, reason
        devices = ctypes.c_int64()
        self.library.call("available", "fedlora_devices", ctypes.byref(devices))
        if not devices.value:
            return False, f"{reason}, but the driver offers no GPU"
        return True, reason

    def serves(self, op: str, dtype: torch.dtype, device: torch.device, sizes: Mapping[str, int]) -> tuple[bool, str]:
        """Of any size, but `core_svd`, `procrustes_rotation`, `align_factors` up to 512, `stacked_qr` up to R = 1024; on a GPU."""
        if op not in _LARGEST:
            return False, f"the cuda library has no {op}"
        if device.type != self.library.device:
            return False, f"the tensors are on {device}"
        if dtype not in svd.WORKING_DTYPE:
            return False, f"no kernel for {dtype}"
        for side, largest in _LARGEST[op].items():
            if sizes.get(side, 0) > largest:
                return False, f"a dimension of {sizes[side]} is above {largest}"
        return self.available()

    def core_svd(self, groups: Sequence[Tensor], *, max_sweeps: int = 0) -> list[RawSVD]:
        """SVD of each matrix; see `backends.native.svd.core_svd`."""
        return svd.core_svd(self.library, groups, max_sweeps=max_sweeps)

    def stacked_qr(self, groups: Sequence[Stack], want_q: bool) -> list[RawQR]:
        """Thin QR of each stacked matrix; see `Backend.stacked_qr`."""
        return qr.stacked_qr(self.library, groups, want_q)

    def weighted_sum(self, groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
        """Weighted sum of the blocks of each group; see `Backend.weighted_sum`."""
        return sums.weighted_sum(self.library, groups, dtype)

    def mixed_sum(self, groups: Sequence[Mixed], dtype: torch.dtype) -> list[RawSum]:
        """``sum_k X_k M_k`` of each group; see `Backend.mixed_sum`."""
        return sums.mixed_sum(self.library, groups, dtype)

    def product_svd(
        self, groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype
    ) -> list[RawProduct]:
        """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; see `Backend.product_svd`."""
        return product.product_svd(self.library, groups, rule, output, dtype)

    def update_gram(self, groups: Sequence[Factors]) -> list[Tensor]:
        """Inner products of the weighted updates; see `Backend.update_gram`."""
        return gram.update_gram(self.library, groups)

    def procrustes_rotation(
        self, source: Sequence[Tensor], target: Sequence[Tensor], special: bool, blend: float
    ) -> list[RawRotation]:
        """Rotation of every source onto its target; see `Backend.procrustes_rotation`."""
        return procrustes.procrustes_rotation(self.library, source, target, special, blend)

    def rotate_factors(
        self, B: Sequence[Tensor], A: Sequence[Tensor], Q: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """``(B Q, Q^T A)``; see `Backend.rotate_factors`."""
        return procrustes.rotate_factors(self.library, B, A, Q)

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
        return procrustes.align_factors(self.library, B, A, reference_B, reference_A, side, special, blend)


BACKEND = CudaBackend()
