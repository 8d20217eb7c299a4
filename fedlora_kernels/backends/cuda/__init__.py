"""The backend of the native CUDA library (csrc/cuda), on the binding that it shares with the cpu library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import OPS, Factors, RawProduct, RuleSpec
from fedlora_kernels.backends.cuda import build, product
from fedlora_kernels.backends.native import gram
from fedlora_kernels.backends.native.backend import NativeBackend
from fedlora_kernels.backends.native.library import HEADERS, LIBRARIES, Library
from fedlora_kernels.errors import BackendError

__all__ = ["BACKEND", "CudaBackend"]


class CudaBackend(NativeBackend):
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
        super().__init__(Library(self.name, library or LIBRARIES / build.NAME, headers, device))

    def available(self) -> tuple[bool, str]:
        """Whether the library is here, fits this package and finds a GPU, and what it was built for (or why not)."""
        if self._build and not self.library.path.is_file() and torch.cuda.is_available():
            try:
                self.library.path = build.first_use()
            except BackendError as error:
                return False, f"{build.NAME} did not come with the package, and {error}"
        ok, reason = super().available()
        if not ok:
            return ok, reason
        devices = ctypes.c_int64()
        self.library.call("available", "fedlora_devices", ctypes.byref(devices))
        if not devices.value:
            return False, f"{reason}, but the driver offers no GPU"
        return True, reason

    def product_svd(
        self, groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype
    ) -> list[RawProduct]:
        """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; see `Backend.product_svd`."""
        return product.product_svd(self.library, groups, rule, output, dtype)

    def update_gram(self, groups: Sequence[Factors]) -> list[Tensor]:
        """Inner products of the weighted updates; see `Backend.update_gram`."""
        return gram.update_gram(self.library, groups)


BACKEND = CudaBackend()
