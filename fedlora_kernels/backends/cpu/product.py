"""Truncated SVDs of stacked products: one pass in one call of the native library, the rest by way of the torch backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors, Mixed, RawProduct, RuleSpec
from fedlora_kernels.backends.native.gram import gram
from fedlora_kernels.backends.native.library import Library, counts, rows, table
from fedlora_kernels.backends.native.qr import tall_qr
from fedlora_kernels.backends.native.sums import mix
from fedlora_kernels.backends.native.svd import LARGEST, svd
from fedlora_kernels.backends.native.threads import thread_count
from fedlora_kernels.backends.torch import backtransform, product
from fedlora_kernels.backends.torch.certificate import Spectrum

__all__ = ["STAGES", "cholesky", "product_svd", "write_left", "write_right"]

STAGES = ("grams", "cores", "left factors", "right factors")
"""What a call spends its time on: Cholesky, core SVD and rank are the cores, signs belong to the left factors."""

_OP = "product_svd"
_OUTPUT = {"usv": 0, "left": 1, "balanced": 2}
_VALUES = ("energy", "error", "error_bound", "rho", "sigma_err", "energy_abs")
_FIRST = ("energy_abs", "norm", "floor")
_CODES = ("rank", "numerical_rank", "passes", "info", "notes")


def product_svd(
    library: Library,
    groups: Sequence[Factors],
    rule: RuleSpec,
    output: str,
    dtype: torch.dtype,
    *,
    seconds: Tensor | None = None,
) -> list[RawProduct]:
    """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; see `Backend.product_svd`.

    ``seconds``, as many float64 as there are `STAGES`, takes up what the threads spend on each stage of the library's call.

    Stacks of up to 512 columns go through the library's one pass, all groups in one call: no bit of theirs depends on the batch,
    the slot or the number of threads. What needs a second pass or the dense route, and wider stacks, are the torch backend's with
    the library's QR and core SVD, one matrix at a time: they do not depend on the batch, but torch's matrix products between
    them may round otherwise with another number of threads or another layout of the blocks in memory.
    """
    library.functions(_OP)
    native = [i for i, group in enumerate(groups) if _one_pass(group)]
    found = dict(zip(native, _native(library, [groups[i] for i in native], rule, output, dtype, seconds), strict=True))
    kernels = _kernels(library)
    others = [group for i, group in enumerate(groups) if i not in found]
    rest = iter(product.product_svd(others, rule, output, dtype, kernels=kernels))
    return [found[i] if i in found else next(rest) for i in range(len(groups))]


def _kernels(library: Library) -> product.Kernels:
    return product.Kernels(
        gram=partial(gram, library),
        cholesky=partial(cholesky, library),
        svd=partial(svd, library),
        qr=partial(tall_qr, library),
        write_left=partial(write_left, library),
        write_right=partial(write_right, library),
        alone=True,
    )


def _one_pass(group: Factors) -> bool:
    R = group.width
    return 0 < R <= LARGEST and 2 * min(group.m, group.n) > R and group.batch > 0 and group.p_max > 0


def _native(
    library: Library,
    groups: Sequence[Factors],
    rule: RuleSpec,
    output: str,
    dtype: torch.dtype,
    seconds: Tensor | None,
) -> list[RawProduct]:
    """One pass over all groups in one call, and a second one where it is needed."""
    if not groups:
        return []
    lefts = [_zeros((group.batch, group.m, group.p_max), dtype) for group in groups]
    rights = [_zeros((group.batch, group.p_max, group.n), dtype) for group in groups]
    S = [torch.empty(group.batch, group.p_max, dtype=torch.float64) for group in groups]
    values = [torch.empty(len(_VALUES) + len(_FIRST), group.batch, dtype=torch.float64) for group in groups]
    codes = [torch.empty(len(_CODES) + 1, group.batch, dtype=torch.int32) for group in groups]
    balance = [torch.empty(group.batch, group.width, dtype=torch.float64) for group in groups]
    factors = [
        table([block for group in groups for block in group.B]),
        table([block for group in groups for block in group.A]),
        counts([len(group.B) for group in groups]),
    ]
    left, right = table(lefts), table(rights)
    arguments = (
        *factors,
        table([group.weights[None] for group in groups]),
        left,
        table([rows(x) for x in S]),
        right,
        table([x.mT[..., None] for x in values]),
        table([x.mT[..., None] for x in codes]),
        table([rows(x) for x in balance]),
        len(groups),
        int(rule.code),
        rule.value,
        rule.cap,
        _OUTPUT[output],
        None if seconds is None else seconds.data_ptr(),
    )
    library.run(_OP, "fedlora_product_svd", (*factors, left, right, len(groups)), arguments, torch.device("cpu"))
    raws = []
    for g, group in enumerate(groups):
        facts = dict(zip(_VALUES, values[g], strict=False)) | dict(zip(_CODES, codes[g], strict=False))
        facts |= {name: facts[name].long() for name in ("rank", "numerical_rank")}
        raw = RawProduct(left=lefts[g], S=S[g], right=rights[g], **facts)
        for i in codes[g][-1].nonzero().flatten().tolist():
            first = dict(zip(_FIRST, values[g][len(_VALUES) :, i : i + 1], strict=True))
            _again(library, group, i, balance[g], first, rule, output, raw)
        raws.append(raw)
    return raws


def _again(
    library: Library,
    group: Factors,
    i: int,
    balance: Tensor,
    first: dict[str, Tensor],
    rule: RuleSpec,
    output: str,
    raw: RawProduct,
) -> None:
    """Matrix i by a second pass; ``first`` is what the first one leaves of its spectrum."""
    one = slice(i, i + 1)
    problem = product.load_problem(group, one)
    spectrum = Spectrum(S=raw.S[one], energy=raw.energy[one], e=problem.e, passes=1, width=group.width, **first)
    here = RawProduct(*(field[one] for field in raw))
    product.second_pass(problem, balance[one], spectrum, rule, product.POWERS[output], here, _kernels(library))


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Zeros of which only those pages cost time that are touched later: most rules keep far fewer columns than there is room for."""
    line = 64
    memory = np.zeros(math.prod(shape) * dtype.itemsize + line, dtype=np.uint8)
    start = -memory.ctypes.data % line
    return torch.from_numpy(memory[start : memory.size - line + start]).view(dtype).view(shape)


def cholesky(library: Library, G: Tensor, width: Tensor) -> Tensor:
    """Factor of every Gram as `backends.torch.cholesky.pivoted_cholesky`; G (N, R, R) float64 is only read."""
    L, width = torch.empty(G.shape, dtype=torch.float64), width.double()
    tables = [table([G]), table([width[:, None, None]]), table([L])]
    library.run(_OP, "fedlora_cholesky", (tables[0], 1), (*tables, 1), G.device)
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
