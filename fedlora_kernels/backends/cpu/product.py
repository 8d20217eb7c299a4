"""Truncated SVDs of stacked products: the torch backend's pipeline with kernels of the native library for its steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors, Mixed, RawProduct, RuleSpec
from fedlora_kernels.backends.cpu.gram import gram
from fedlora_kernels.backends.cpu.library import Library, rows, table
from fedlora_kernels.backends.cpu.sums import mix
from fedlora_kernels.backends.cpu.svd import svd
from fedlora_kernels.backends.cpu.threads import thread_count
from fedlora_kernels.backends.torch import backtransform, product

__all__ = ["cholesky", "product_svd", "write_left", "write_right"]

_OP = "product_svd"


def product_svd(
    library: Library, groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype
) -> list[RawProduct]:
    """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; see `Backend.product_svd`."""
    kernels = product.Kernels(
        gram=partial(gram, library),
        cholesky=partial(cholesky, library),
        svd=partial(svd, library),
        write_left=partial(write_left, library),
        write_right=partial(write_right, library),
    )
    return product.product_svd(groups, rule, output, dtype, kernels=kernels)


def cholesky(library: Library, G: Tensor, width: Tensor) -> Tensor:
    """Factor of every Gram as `backends.torch.cholesky.pivoted_cholesky`; G (N, R, R) float64 is only read."""
    L, width = torch.empty(G.shape, dtype=torch.float64), width.double()
    tables = [table([G]), table([width[:, None, None]]), table([L])]
    threads = thread_count()
    memory, *scratch = library.workspace(_OP, "fedlora_cholesky_workspace", tables[0], 1, threads)
    library.call(_OP, "fedlora_cholesky", *tables, 1, *scratch, threads, None)
    del memory
    return L


def write_left(library: Library, blocks: Sequence[Tensor], e: Tensor | None, K: Tensor, out: Tensor) -> Tensor:
    """``[X_1 | ... | X_K] K`` to the first columns of out, and the signs that were applied."""
    if e is not None:
        return backtransform.write_left(blocks, e, K, out)
    # A half has too few bits to tell which element is the largest.
    half = out.dtype not in (torch.float32, torch.float64)
    left = out[..., : K.shape[-1]]
    X = torch.empty(left.shape, dtype=torch.float32) if half else left
    mix(library, [_mixed(blocks, K)], [X])
    signs = torch.empty(len(X), X.shape[-1], dtype=torch.float64)
    library.call(_OP, "fedlora_orient", table([X]), table([rows(signs)]), 1, thread_count(), None)
    if half:
        left.copy_(X)
    return signs


def write_right(library: Library, blocks: Sequence[Tensor], e: Tensor | None, K: Tensor, out: Tensor) -> None:
    """``([X_1 | ... | X_K] K)^T`` to the first rows of out."""
    if e is not None:
        return backtransform.write_right(blocks, e, K, out)
    mix(library, [_mixed(blocks, K)], [out[:, : K.shape[-1]].mT])
    return None


def _mixed(blocks: Sequence[Tensor], K: Tensor) -> Mixed:
    """The product of the stacked blocks with K (N, R, p)."""
    return Mixed(tuple(blocks), torch.split(K, [block.shape[-1] for block in blocks], dim=1))
