"""Grams of client blocks in float64, straight from any dtype, never from a concatenation (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors
from fedlora_kernels.backends.torch.chunks import column_exponents, exponent, load, scale_pow2, slices

__all__ = ["gram", "update_gram"]

_TILE = 1024
_NARROW = 16


Gram = Callable[[Sequence[Tensor], "Tensor | None"], Tensor]


def gram(blocks: Sequence[Tensor], e: Tensor | None) -> Tensor:
    """``X^T X`` (N, R, R) float64 of the stack ``X = [X_1 | ... | X_K] 2^-e``, blocks (N, m, r_k), e (N, R) or None."""
    N, m, _ = blocks[0].shape
    R = sum(block.shape[-1] for block in blocks)
    G = torch.zeros(N, R, R, dtype=torch.float64, device=blocks[0].device)
    panel = max(_NARROW, -(-R // 4))
    starts = range(0, R, panel)
    for rows in slices(m, 8 * N * R):
        X = load(blocks, rows, e)
        for j in starts:
            # The upper triangle, in panels: five eighths of the work.
            G[:, j : j + panel, j:].baddbmm_(X[..., j : j + panel].mT, X[..., j:])
    for j in starts:
        G[:, j + panel :, j : j + panel] = G[:, j : j + panel, j + panel :].mT
    return G


def update_gram(groups: Sequence[Factors], *, gram: Gram = gram) -> list[Tensor]:
    """Inner products (N, K, K) of the weighted updates; see `Backend.update_gram`. ``gram`` keeps the contract of `gram`."""
    return [_update_gram(group, gram) for group in groups]


def _update_gram(group: Factors, gram: Gram) -> Tensor:
    N, K = group.weights.shape
    device = group.B[0].device if K else torch.device("cpu")
    out = torch.zeros(N, K, K, dtype=torch.float64, device=device)
    if not K:
        return out
    weights = group.weights.to(device)
    for part in slices(N, 8 * 4 * min(_TILE, group.width) ** 2):
        B, A = [block[part] for block in group.B], [block[part].mT for block in group.A]
        e_B, e_A, e = _exponents(B, A)
        e_w = exponent(weights[part])
        w, e = scale_pow2(weights[part], -e_w), e + e_w
        G = _inner_products(B, A, e_B, e_A, gram) * w[:, :, None] * w[:, None, :]
        # Squares of finite numbers stay finite here, and what is not finite reaches the square of its own client.
        good = torch.isfinite(G.diagonal(dim1=-2, dim2=-1))
        G.masked_fill_(~(good[:, :, None] & good[:, None, :]), torch.nan)
        out[part] = scale_pow2((G + G.mT) / 2, e[:, :, None] + e[:, None, :])
    return out


def _exponents(B: Sequence[Tensor], A: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Exponents (N, R) of the columns of B and of A, and (N, K) of the clients: what the columns leave of their updates."""
    e = torch.zeros(B[0].shape[0], len(B), dtype=torch.int64, device=B[0].device)
    e_B, e_A = column_exponents(B), column_exponents(A)
    if e_B is None and e_A is None:
        return None, None, e
    ranks = torch.tensor([block.shape[-1] for block in B])
    owner = torch.arange(len(B)).repeat_interleave(ranks).to(e.device)
    e_B, e_A = (torch.zeros_like(e)[:, owner] if x is None else x for x in (e_B, e_A))
    e = e.scatter_reduce(-1, owner.expand_as(e_B), e_B + e_A, "amax", include_self=False)
    # A takes over the gauge of every column: the lighter ones of a client stay as light as they are.
    return e_B, e[:, owner] - e_B, e


def _inner_products(
    B: Sequence[Tensor], A: Sequence[Tensor], e_B: Tensor | None, e_A: Tensor | None, gram: Gram
) -> Tensor:
    """Inner products of the unweighted updates, in tiles of clients so that no Gram is wider than a tile."""
    G = torch.empty(B[0].shape[0], len(B), len(B), dtype=torch.float64, device=B[0].device)
    tiles = list(_tiles([block.shape[-1] for block in B]))
    for i, first in enumerate(tiles):
        B_1, A_1 = _tile(B, e_B, first), _tile(A, e_A, first)
        for second in tiles[i:]:
            if second is first:
                H = gram(*B_1) * gram(*A_1)
            else:
                H = _cross_gram(*B_1, *_tile(B, e_B, second)) * _cross_gram(*A_1, *_tile(A, e_A, second))
            part = _sum_blocks(H, B[first], B[second])
            G[:, first, second] = part
            if second is not first:
                G[:, second, first] = part.mT
    return G


def _tiles(ranks: Sequence[int]) -> Iterator[slice]:
    start, width = 0, 0
    for k, rank in enumerate(ranks):
        if width + rank > _TILE and k > start:
            yield slice(start, k)
            start, width = k, 0
        width += rank
    yield slice(start, len(ranks))


def _tile(blocks: Sequence[Tensor], e: Tensor | None, clients: slice) -> tuple[Sequence[Tensor], Tensor | None]:
    """Blocks and column exponents of some clients."""
    start, width = (sum(block.shape[-1] for block in part) for part in (blocks[: clients.start], blocks[clients]))
    return blocks[clients], None if e is None else e[:, start : start + width]


def _cross_gram(
    first: Sequence[Tensor], e_first: Tensor | None, second: Sequence[Tensor], e_second: Tensor | None
) -> Tensor:
    N, m, _ = first[0].shape
    P, Q = (sum(block.shape[-1] for block in blocks) for blocks in (first, second))
    G = torch.zeros(N, P, Q, dtype=torch.float64, device=first[0].device)
    for rows in slices(m, 8 * N * (P + Q)):
        G.baddbmm_(load(first, rows, e_first).mT, load(second, rows, e_second))
    return G


def _sum_blocks(H: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Sum each r_i x r_j block of H (N, P, Q); blocks do not mix, so one client's NaN stays its own."""
    for dim, blocks in ((1, first), (2, second)):
        ranks = torch.tensor([block.shape[-1] for block in blocks])
        owner = torch.repeat_interleave(torch.arange(len(blocks)), ranks).to(H.device)
        shape = list(H.shape)
        shape[dim] = len(blocks)
        H = H.new_zeros(shape).index_add_(dim, owner, H)
    return H
