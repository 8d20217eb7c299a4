"""The backend of the native CPU library (csrc/cpu); one file per family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import (
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
from fedlora_kernels.backends.cpu import product, ranges
from fedlora_kernels.backends.native import gram, procrustes, qr, sums, svd
from fedlora_kernels.backends.native.library import HEADERS, LIBRARIES, Library
from fedlora_kernels.backends.torch import gram as torch_gram

__all__ = ["BACKEND", "CpuBackend"]

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


class CpuBackend:
    """SIMD kernels, one small matrix per vector lane; results do not depend on batch, slot or threads, bit for bit.

    Where `product_svd` needs a second pass or the dense route, torch multiplies matrices between the library's decompositions:
    there bits may depend on the number of threads and on the layout of the blocks in memory, never on the batch.
    `update_gram` is the torch backend's with kernels of the library for the steps that have one: no promise of bits there.
    """

    name = "cpu"
    bitwise = frozenset(
        {
            "align_factors",
            "core_svd",
            "mixed_sum",
            "procrustes_rotation",
            "product_svd",
            "rotate_factors",
            "stacked_qr",
            "weighted_sum",
        }
    )

    def __init__(self, library: Path = LIBRARIES / "libfedlora_cpu.so", headers: Sequence[Path] = HEADERS) -> None:
        self.library = Library(self.name, library, headers)

    def available(self) -> tuple[bool, str]:
        """Whether the library is here and fits this package, and which instruction set it runs (or why not)."""
        return self.library.available()

    def serves(self, op: str, dtype: torch.dtype, device: torch.device, sizes: Mapping[str, int]) -> tuple[bool, str]:
        """Of any size, but `core_svd`, `procrustes_rotation`, `align_factors` up to 512, `stacked_qr` up to R = 1024; on the CPU."""
        if op not in _LARGEST:
            return False, f"the cpu library has no {op}"
        if device.type != "cpu":
            return False, f"the tensors are on {device}"
        if dtype not in svd.WORKING_DTYPE:
            return False, f"no kernel for {dtype}"
        for side, largest in _LARGEST[op].items():
            if sizes.get(side, 0) > largest:
                return False, f"a dimension of {sizes[side]} is above {largest}"
        return self.available()

    def core_svd(self, groups: Sequence[Tensor], *, max_sweeps: int = 0) -> list[RawSVD]:
        """SVD of each matrix; see `backends.cpu.svd.core_svd`."""
        return svd.core_svd(self.library, groups, max_sweeps=max_sweeps)

    def stacked_qr(self, groups: Sequence[Stack], want_q: bool) -> list[RawQR]:
        """Thin QR of each stacked matrix; see `Backend.stacked_qr`."""
        return qr.stacked_qr(self.library, groups, want_q)

    def weighted_sum(self, groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
        """Weighted sum of the blocks of each group; see `Backend.weighted_sum`."""
        return sums.weighted_sum(self.library, groups, dtype)

    def read_sum(
        self,
        groups: Sequence[tuple[ranges.Ranges, Tensor]],
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
    ) -> list[RawSum] | None:
        """Weighted sums of matrices in files; see `backends.cpu.ranges.read_sum`."""
        return ranges.read_sum(self.library, groups, shapes, dtype)

    def read_turned(
        self,
        factors: tuple[ranges.Ranges, ranges.Ranges],
        weights: tuple[Tensor, Tensor],
        reference: ranges.Ranges,
        side: Literal["B", "A"],
        special: bool,
        blend: float,
        dtype: torch.dtype,
    ) -> tuple[RawSum, RawSum] | None:
        """Sums of rotated pairs in files; see `backends.cpu.ranges.read_turned`."""
        return ranges.read_turned(self.library, factors, weights, reference, side, special, blend, dtype)

    def read_alike(self, matrices: Sequence[ranges.Ranges]) -> bool:
        """Whether matrices in files are the same; see `backends.cpu.ranges.read_alike`."""
        return ranges.read_alike(self.library, matrices)

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
        return torch_gram.update_gram(groups, gram=partial(gram.gram, self.library))

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


BACKEND = CpuBackend()
