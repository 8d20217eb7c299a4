"""What the backends of the native libraries share: the operations that are one call of the C ABI, and what is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Blocks, Mixed, RawQR, RawRotation, RawSum, RawSVD, Stack
from fedlora_kernels.backends.native import procrustes, qr, sums, svd
from fedlora_kernels.backends.native.library import Library

__all__ = ["NativeBackend"]

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


class NativeBackend:
    """Operations on one native library; see `Backend`."""

    name: str

    def __init__(self, library: Library) -> None:
        self.library = library

    def available(self) -> tuple[bool, str]:
        """Whether the library is here and fits this package, and which instruction sets it has (or why not)."""
        return self.library.available()

    def serves(self, op: str, dtype: torch.dtype, device: torch.device, sizes: Mapping[str, int]) -> tuple[bool, str]:
        """Where the library takes memory; any size, but SVDs and rotations up to 512 and `stacked_qr` up to R = 1024."""
        if op not in _LARGEST:
            return False, f"the {self.name} library has no {op}"
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
