"""SVDs of small and middle-sized matrices by the native library (docs/numerics.md, Core SVD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RawSVD
from fedlora_kernels.backends.cpu.answers import ANSWERS
from fedlora_kernels.backends.cpu.library import Library, table
from fedlora_kernels.backends.cpu.threads import thread_count
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
        groups: CPU tensors ``(N, p, q)`` of any strides; float64, float32, float16 or bfloat16.
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
    inputs = [_working_copy(group) for group in groups]
    results = [_empty(group) for group in inputs]
    tables = [table(inputs), *(table(tensors) for tensors in zip(*results, strict=True))]
    threads = thread_count()
    memory, *scratch = library.workspace("core_svd", "fedlora_core_svd_workspace", tables[0], len(inputs), threads)
    library.call("core_svd", "fedlora_core_svd", *tables, len(inputs), max_sweeps, *scratch, threads, None)
    del memory
    return results


def svd(library: Library, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U, S, Vh, info`` of float64 matrices (N, p, q): those of the library, or torch's where they are larger."""
    if max(C.shape[1:]) > LARGEST:
        return torch_svd(C)
    (raw,) = core_svd(library, [C])
    return raw.U, raw.S, raw.Vh, raw.info


def _working_copy(group: Tensor) -> Tensor:
    """The input as the library takes it: itself, or in float32 if it is a half."""
    if group.dim() != 3 or group.dtype not in WORKING_DTYPE or group.device.type != "cpu":
        raise BackendError(
            f"backend 'cpu', core_svd: found {group.dtype} {tuple(group.shape)} on {group.device}; "
            "needs (N, p, q) on the CPU in float64, float32, float16 or bfloat16"
        )
    if max(group.shape[1:]) > LARGEST:
        raise BackendError(
            f"backend 'cpu', core_svd: found matrices {tuple(group.shape[1:])}; serves dimensions up to {LARGEST}. "
            "Use backend='auto'"
        )
    return group.detach().to(WORKING_DTYPE[group.dtype])


def _empty(C: Tensor) -> RawSVD:
    N, p, q = C.shape
    k = min(p, q)
    return RawSVD(
        U=ANSWERS.empty((N, p, k), C.dtype),
        S=ANSWERS.empty((N, k), C.dtype),
        Vh=ANSWERS.empty((N, k, q), C.dtype),
        info=torch.zeros(N, dtype=torch.int32),
        notes=torch.zeros(N, dtype=torch.int32),
    )
