"""SVDs of small and middle-sized matrices by the native library (docs/numerics.md, Core SVD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RawSVD
from fedlora_kernels.backends.native.library import Library, table
from fedlora_kernels.backends.torch.svd import svd as torch_svd
from fedlora_kernels.errors import BackendError

__all__ = ["LARGEST", "WORKING_DTYPE", "core_svd", "svd"]

LARGEST = 512
WORKING_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def core_svd(library: Library, groups: Sequence[Tensor], *, max_sweeps: int = 0) -> list[RawSVD]:
    """SVD of each matrix of ``(N, p, q)``, p and q at most 512.

    Args:
        library: where the kernels are.
        groups: tensors ``(N, p, q)`` of any strides where the library takes memory; float64, float32, float16 or bfloat16.
        max_sweeps: guard of the iteration; 0 takes the library's own.

    Returns:
        One record per group in the input dtype, half inputs in float32. Info NONFINITE (outputs NaN),
        NOT_CONVERGED and OVERFLOW per matrix; note ZERO for a zero matrix.

    Raises:
        BackendError: the library is absent, or does not serve the tensors.
        InputError: FEDLORA_NUM_THREADS is no number of threads.
    """
    library.functions("core_svd")
    if not groups:
        return []
    inputs = [_working_copy(library, group) for group in groups]
    results = [_empty(library, group) for group in inputs]
    tables = [table(inputs), *(table(tensors) for tensors in zip(*results, strict=True))]
    arguments = (*tables, len(inputs), max_sweeps)
    library.run("core_svd", "fedlora_core_svd", (tables[0], len(inputs)), arguments, inputs[0].device)
    return results


def svd(library: Library, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U, S, Vh, info`` of float64 matrices (N, p, q): those of the library, or torch's where they are larger."""
    if max(C.shape[1:]) > LARGEST:
        return torch_svd(C)
    (raw,) = core_svd(library, [C])
    return raw.U, raw.S, raw.Vh, raw.info


def _working_copy(library: Library, group: Tensor) -> Tensor:
    """The input as the library takes it: itself, or in float32 if it is a half."""
    if group.dim() != 3 or group.dtype not in WORKING_DTYPE or group.device.type != library.device:
        raise BackendError(
            f"backend {library.name!r}, core_svd: found {group.dtype} {tuple(group.shape)} on {group.device}; "
            f"needs (N, p, q) on {library.device} in float64, float32, float16 or bfloat16"
        )
    if max(group.shape[1:]) > LARGEST:
        raise BackendError(
            f"backend {library.name!r}, core_svd: found matrices {tuple(group.shape[1:])}; serves dimensions up to {LARGEST}. "
            "Use backend='auto'"
        )
    return group.detach().to(WORKING_DTYPE[group.dtype])


def _empty(library: Library, C: Tensor) -> RawSVD:
    N, p, q = C.shape
    k = min(p, q)
    U, S, Vh = (library.empty(shape, C.dtype, C.device) for shape in ((N, p, k), (N, k), (N, k, q)))
    info, notes = (torch.zeros(N, dtype=torch.int32, device=C.device) for _ in range(2))
    return RawSVD(U, S, Vh, info, notes)
