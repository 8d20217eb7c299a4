"""The backend of the native CPU library (csrc/cpu); one file per family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors, RawProduct, RawSum, RuleSpec
from fedlora_kernels.backends.cpu import product, ranges
from fedlora_kernels.backends.native import gram
from fedlora_kernels.backends.native.backend import NativeBackend
from fedlora_kernels.backends.native.library import HEADERS, LIBRARIES, Library
from fedlora_kernels.backends.torch import gram as torch_gram

__all__ = ["BACKEND", "CpuBackend"]


class CpuBackend(NativeBackend):
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
        super().__init__(Library(self.name, library, headers))

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

    def product_svd(
        self, groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype
    ) -> list[RawProduct]:
        """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; see `Backend.product_svd`."""
        return product.product_svd(self.library, groups, rule, output, dtype)

    def update_gram(self, groups: Sequence[Factors]) -> list[Tensor]:
        """Inner products of the weighted updates; see `Backend.update_gram`."""
        return torch_gram.update_gram(groups, gram=partial(gram.gram, self.library))


BACKEND = CpuBackend()
