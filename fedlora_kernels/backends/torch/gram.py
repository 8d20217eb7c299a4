"""Grams of client blocks in float64, straight from any dtype, never from a concatenation (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Factors
from fedlora_kernels.backends.torch.chunks import finite, load, load_exponent, scale_pow2, slices

__all__ = ["gram", "update_gram"]

_TILE = 1024


def gram(blocks: Sequence[Tensor], e: Tensor | None) -> Tensor:
    """``X^T X`` (N, R, R) float64 of the stack ``X = [X_1 | ... | X_K] 2^-e``, blocks (N, m, r_k)."""
    N, m, _ = blocks[0].shape
    R = sum(block.shape[-1] for block in blocks)
    G = torch.zeros(N, R, R, dtype=torch.float64, device=blocks[0].device)
    for rows in slices(m, 8 * N * R):
        X = load(blocks, rows, e)
        G.baddbmm_(X.mT, X)
    return G


def update_gram(groups: Sequence[Factors]) -> list[Tensor]:
    """Inner products (N, K, K) of the weighted updates; see `Backend.update_gram`."""
    return [_update_gram(group) for group in groups]


def _update_gram(group: Factors) -> Tensor:
    N, K = group.weights.shape
    device = group.B[0].device if K else torch.device("cpu")
    out = torch.zeros(N, K, K, dtype=torch.float64, device=device)
    if not K:
        return out
    weights = group.weights.to(device)
    for part in slices(N, 8 * 4 * min(_TILE, group.width) ** 2):
        B, A = [block[part] for block in group.B], [block[part].mT for block in group.A]
        e_B, e_A = load_exponent(B), load_exponent(A)
        G = _inner_products(B, A, e_B, e_A) * weights[part, :, None] * weights[part, None, :]
        good = torch.stack([finite(b) & finite(a) for b, a in zip(B, A, strict=True)], -1)
        G.masked_fill_(~(good[:, :, None] & good[:, None, :]), torch.nan)
        G = (G + G.mT) / 2
        for e in (e_B, e_A):
            G = G if e is None else scale_pow2(G, 2 * e)
        out[part] = G
    return out


def _inner_products(B: Sequence[Tensor], A: Sequence[Tensor], e_B: Tensor | None, e_A: Tensor | None) -> Tensor:
    """Inner products of the unweighted updates, in tiles of clients so that no Gram is wider than a tile."""
    G = torch.empty(B[0].shape[0], len(B), len(B), dtype=torch.float64, device=B[0].device)
    tiles = list(_tiles([block.shape[-1] for block in B]))
    for i, first in enumerate(tiles):
        for second in tiles[i:]:
            if second is first:
                H = gram(B[first], e_B) * gram(A[first], e_A)
            else:
                H = _cross_gram(B[first], B[second], e_B) * _cross_gram(A[first], A[second], e_A)
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


def _cross_gram(first: Sequence[Tensor], second: Sequence[Tensor], e: Tensor | None) -> Tensor:
    N, m, _ = first[0].shape
    P, Q = (sum(block.shape[-1] for block in blocks) for blocks in (first, second))
    G = torch.zeros(N, P, Q, dtype=torch.float64, device=first[0].device)
    for rows in slices(m, 8 * N * (P + Q)):
        G.baddbmm_(load(first, rows, e).mT, load(second, rows, e))
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
