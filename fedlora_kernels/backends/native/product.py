"""Truncated SVDs of stacked products by a native library, and its kernels for what the torch backend does around them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors, Mixed, RawProduct, RuleSpec
from fedlora_kernels.backends.native.gram import gram
from fedlora_kernels.backends.native.library import Library, counts, current, rows, stream, table
from fedlora_kernels.backends.native.qr import tall_qr
from fedlora_kernels.backends.native.sums import mix
from fedlora_kernels.backends.native.svd import LARGEST, svd
from fedlora_kernels.backends.native.threads import thread_count
from fedlora_kernels.backends.torch import backtransform, product

__all__ = ["Problem", "cholesky", "is_served", "kernels", "scratch", "solve", "write_left", "write_right"]

_OP = "product_svd"
_OUTPUT = {"usv": 0, "left": 1, "balanced": 2}
_VALUES = ("energy", "error", "error_bound", "rho", "sigma_err", "energy_abs")
_FIRST = ("energy_abs", "norm", "floor")
_CODES = ("rank", "numerical_rank", "passes", "info", "notes")


def is_served(group: Factors) -> bool:
    """Whether fedlora_product_svd takes such updates: there are some, and they are not better formed."""
    R = group.width
    return 0 < R <= LARGEST and 2 * min(group.m, group.n) > R and group.batch > 0 and group.p_max > 0


class Problem(NamedTuple):
    """Equally shaped updates with room for all that is said of them; left and right are zero.

    ``values`` (N, 9), ``codes`` (N, 6) and ``balance`` (N, R) are those of fedlora_product_svd.
    """

    B: Sequence[Tensor]
    A: Sequence[Tensor]
    weights: Tensor
    left: Tensor
    right: Tensor
    S: Tensor
    values: Tensor
    codes: Tensor
    balance: Tensor

    @classmethod
    def of(cls, group: Factors, left: Tensor, right: Tensor) -> Problem:
        """Room for the answers of a group beside its factors."""
        N, p = group.batch, group.p_max
        S = torch.empty(N, p, dtype=torch.float64, device=left.device)
        values = S.new_empty(len(_VALUES) + len(_FIRST), N).mT
        codes = torch.empty(len(_CODES) + 1, N, dtype=torch.int32, device=left.device).mT
        balance = S.new_empty(N, group.width)
        return cls(group.B, group.A, group.weights, left, right, S, values, codes, balance)

    def part(self, some: slice) -> Problem:
        """Some of the updates."""
        B, A = ([block[some] for block in side] for side in (self.B, self.A))
        return Problem(B, A, *(field[some] for field in self[2:]))

    def answer(self) -> RawProduct:
        """What was found."""
        facts = dict(zip(_VALUES, self.values.mT, strict=False)) | dict(zip(_CODES, self.codes.mT, strict=False))
        facts |= {name: facts[name].long() for name in ("rank", "numerical_rank")}
        return RawProduct(left=self.left, S=self.S, right=self.right, **facts)

    def doubtful(self) -> Tensor:
        """Whether each update needs a second pass (N,)."""
        return self.codes[:, -1] != 0

    def first(self, i: int) -> dict[str, Tensor]:
        """What one pass leaves of spectrum i beside its values, in the scale of the pass."""
        return dict(zip(_FIRST, self.values[i, len(_VALUES) :, None], strict=True))


def scratch(library: Library, problems: Sequence[Problem]) -> int:
    """Bytes of scratch memory that one call over these problems takes."""
    if not problems:
        return 0
    return library.scratch(_OP, "fedlora_product_svd", _sizes(problems), problems[0].left.device)


def solve(
    library: Library, problems: Sequence[Problem], rule: RuleSpec, output: str, seconds: Tensor | None = None
) -> None:
    """Fill the rooms of these problems in one call."""
    if not problems:
        return
    sizes = _sizes(problems)
    *factors, left, right, _ = sizes
    arguments = (
        *factors,
        table([problem.weights[None] for problem in problems]),
        left,
        table([rows(problem.S) for problem in problems]),
        right,
        table([problem.values[..., None] for problem in problems]),
        table([problem.codes[..., None] for problem in problems]),
        table([rows(problem.balance) for problem in problems]),
        len(problems),
        int(rule.code),
        rule.value,
        rule.cap,
        _OUTPUT[output],
        None if seconds is None else seconds.data_ptr(),
    )
    library.run(_OP, "fedlora_product_svd", sizes, arguments, problems[0].left.device)


def _sizes(problems: Sequence[Problem]) -> tuple[Any, ...]:
    return (
        table([block for problem in problems for block in problem.B]),
        table([block for problem in problems for block in problem.A]),
        counts([len(problem.B) for problem in problems]),
        table([problem.left for problem in problems]),
        table([problem.right for problem in problems]),
        len(problems),
    )


def kernels(library: Library) -> product.Kernels:
    """The library's own for the steps of the torch backend, one matrix at a time."""
    return product.Kernels(
        gram=partial(gram, library),
        cholesky=partial(cholesky, library),
        svd=partial(svd, library),
        qr=partial(tall_qr, library),
        write_left=partial(write_left, library),
        write_right=partial(write_right, library),
        alone=True,
    )


def cholesky(library: Library, G: Tensor, width: Tensor) -> Tensor:
    """Factor of every Gram as `backends.torch.cholesky.pivoted_cholesky`; G (N, R, R) float64 is only read."""
    L, width = torch.empty(G.shape, dtype=torch.float64, device=G.device), width.double()
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
    X = torch.empty(left.shape, dtype=torch.float32, device=out.device) if half else left
    mix(library, [_mixed(blocks, K)], [X])
    signs = torch.empty(len(X), X.shape[-1], dtype=torch.float64, device=out.device)
    with current(out.device):
        library.call(_OP, "fedlora_orient", table([X]), table([rows(signs)]), 1, thread_count(), stream(out.device))
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
