"""The subspace that clients share, found and put to use without any matrix of the size of a module.

With thin QR ``[s_1 B_1 | ... | s_K B_K] = Q [R_1 | ... | R_K]`` and ``A_k^T = V_k T_k``, the matrix of all updates is
``[D_1 | ... | D_K] = Q [R_1 T_1^T | ... | R_K T_K^T] blockdiag(V_k)^T``. Shrinking singular values and shrinking blocks both
commute with Q and V_k, so every step of the splitting is that of the small core, to rounding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.linalg import core_svd, product_svd, stacked_qr
from fedlora_kernels.linalg.rules import Energy, Rank
from fedlora_kernels.methods.contract import Group
from fedlora_kernels.methods.low_rank_sparse import Split, block_norms, low_rank_plus_sparse

__all__ = ["Refined", "Refinement", "Subspace", "default_lam", "shared_subspace"]

LEAST_VALUE = 1e-6
"""Singular values of L below this share of the largest span nothing."""


class Subspace(NamedTuple):
    """What clients share in each of N modules.

    ``scores`` (N, K) float64, |S_k|_F / |X_k|_F, NaN where client k is absent or the module has none; ``basis`` (N, d, c)
    float64, orthonormal in its first ``rank`` (N,) columns and zero beyond, d = m ("left") or n ("right"). ``steps`` (N,)
    int64 and ``converged`` (N,) bool of the solver. All but the basis on the host.
    """

    scores: Tensor
    basis: Tensor
    rank: Tensor
    steps: Tensor
    converged: Tensor


def default_lam(shared_rank: int, clients: int) -> float:
    """Weight of a block: ``min(max(1.5 b, min(2 b, 0.9)), 0.7 sqrt(shared_rank))`` with ``b = sqrt(shared_rank / clients)``.

    Above the norm of the polar factor of L in a benign block, b on average, or L would vanish; as far as can be below 1, where
    outliers of rank one begin to hide in L.
    """
    shared_rank = max(shared_rank, 1)
    b = math.sqrt(shared_rank / clients)
    return min(max(1.5 * b, min(2.0 * b, 0.9)), 0.7 * math.sqrt(shared_rank))


def shared_subspace(
    group: Group,
    side: str,
    shared_rank: int | None,
    lam: float | None,
    normalise: bool,
    tol: float,
    max_iter: int,
) -> Subspace:
    """Split the updates of the clients present into shared and own; None: the median of their ranks, `default_lam`.

    Up to two clients are not split: L is all of X, and there are no scores. A module with a factor that is not finite has none
    either, and no basis.
    """
    owners = [k for k, rank in enumerate(group.ranks) if rank > 0]
    present = (group.weight != 0.0)[:, owners]
    shared, weight = _settings(group, owners, present, shared_rank, lam)
    scores = torch.full(group.weight.shape, torch.nan, dtype=torch.float64)
    if not owners:
        basis = torch.zeros(group.batch, group.m if side == "left" else group.n, 0, dtype=torch.float64)
        none = torch.zeros(group.batch, dtype=torch.int64)
        return Subspace(scores, basis, none, none, none == 0)
    Q, X, widths = _core(group, owners, present, side)
    finite = torch.isfinite(X).flatten(1).all(1)
    X = torch.where(finite[:, None, None], X, 0.0)
    if normalise:
        size = block_norms(X, widths)
        X = X / torch.where(size > 0.0, size, 1.0).repeat_interleave(torch.tensor(widths, device=X.device), 1)[:, None]
    split = _split(X, widths, weight, present.sum(1) > 2, tol, max_iter)
    size, own = block_norms(X, widths), block_norms(split.sparse, widths)
    known = present & (present.sum(1, keepdim=True) > 2) & finite.cpu()[:, None]
    scores[:, owners] = torch.where(known, torch.where(size > 0.0, own / size, 0.0).cpu(), torch.nan)
    svd = core_svd(split.low_rank, check=False, backend=group.backend)
    rank = torch.minimum((svd.S > LEAST_VALUE * svd.S[:, :1]).sum(1).cpu(), shared)
    columns = int(rank.max())
    counts = torch.arange(columns) < rank[:, None]
    basis = torch.where(counts.to(Q.device)[:, None], Q @ svd.U[:, :, :columns], 0.0)
    return Subspace(scores, basis, rank, split.steps, split.converged)


def _settings(
    group: Group, owners: Sequence[int], present: Tensor, shared_rank: int | None, lam: float | None
) -> tuple[Tensor, Tensor]:
    """Shared rank (N,) int64 and weight of the blocks (N,) float64 of each module."""
    ranks, weights = [], []
    for there in present.tolist():
        own = [group.ranks[k] for k, here in zip(owners, there, strict=True) if here]
        rank = shared_rank if shared_rank is not None else int(statistics.median(own or [1]))
        ranks.append(rank)
        weights.append(lam if lam is not None else default_lam(rank, max(len(own), 1)))
    return torch.tensor(ranks, dtype=torch.int64), torch.tensor(weights, dtype=torch.float64)


def _core(group: Group, owners: Sequence[int], present: Tensor, side: str) -> tuple[Tensor, Tensor, list[int]]:
    """Q (N, d, q), the blocks ``R_k T_k^T`` (N, q, p) side by side, and their widths. Absent clients are zero, unread."""
    lefts = [group.B[k].to(torch.float64) for k in owners]
    rights = [group.A[k].to(torch.float64).mT for k in owners]
    if side == "right":
        lefts, rights = rights, lefts
    here = present.to(torch.float64)
    stack = stacked_qr(lefts, weights=group.scale[:, owners] * here, mode="reduced", check=False, backend=group.backend)
    blocks = []
    for i, left in enumerate(stack.R.split([block.shape[2] for block in lefts], 2)):
        right = stacked_qr([rights[i]], weights=here[:, i : i + 1], check=False, backend=group.backend).R
        blocks.append(left @ right.mT)
    return stack.Q, torch.cat(blocks, 2), [block.shape[2] for block in blocks]


def _split(X: Tensor, widths: Sequence[int], lam: Tensor, chosen: Tensor, tol: float, max_iter: int) -> Split:
    """Split the ``chosen`` (N,) modules; of the others all is shared."""
    low_rank, sparse = X.clone(), torch.zeros_like(X)
    steps, converged = torch.zeros(X.shape[0], dtype=torch.int64), torch.ones(X.shape[0], dtype=torch.bool)
    if bool(chosen.any()):
        rows = chosen.to(X.device)
        split = low_rank_plus_sparse(X[rows], widths, lam[chosen], tol, max_iter)
        low_rank[rows], sparse[rows], steps[chosen], converged[chosen] = split
    return Split(low_rank, sparse, steps, converged)


class Refined(NamedTuple):
    """One client's pairs of N modules: ``B`` (N, m, p), ``A`` (N, p, n) float64, ``rank`` (N,) of them.

    ``error`` (N,) float64 is what a cap took away, relative; ``info`` (N,). All but the pair on the host.
    """

    B: Tensor
    A: Tensor
    rank: Tensor
    error: Tensor
    info: Tensor


class Refinement:
    """``P D_k + (I - P) M`` for side "left", ``D_k P + M (I - P)`` for "right", for one client after another, as a pair.

    Both stacks are brought into orthonormal coordinates once, those of the shared subspace first: there P keeps the first rows
    of a core, and what is decomposed for each client is as small as the core.

    Args:
        group: N modules.
        benign: (N, K) bool, the clients that are refined; the others are not read.
        share: (N, K), their weights in M; 0 for the others.
        subspace: that of P.
        side: where P stands.
    """

    def __init__(self, group: Group, benign: Tensor, share: Tensor, subspace: Subspace, side: str) -> None:
        self._backend = group.backend
        self._owners = owners = [k for k, rank in enumerate(group.ranks) if rank > 0]
        self._read = benign[:, owners].to(torch.float64)
        self._share = share[:, owners]
        stacks = [
            ([group.B[k].to(torch.float64) for k in owners], self._read * group.scale[:, owners]),
            ([group.A[k].to(torch.float64).mT for k in owners], self._read),
        ]
        own = 0 if side == "left" else 1
        blocks, weights = stacks[own]
        whole = torch.ones(group.batch, 1, dtype=torch.float64)
        stacks[own] = [subspace.basis.to(group.device), *blocks], torch.cat([whole, weights], 1)
        (self._left, left), (self._right, right) = (self._coordinates(*stack) for stack in stacks)
        self._inner, self._outer = [left, right], [left, right]
        core = self._inner[own][1:]
        inside = (torch.arange(core[0].shape[1]) < subspace.rank[:, None]).to(group.device)[:, :, None]
        self._inner[own] = [torch.where(inside, block, 0.0) for block in core]
        self._outer[own] = [torch.where(inside, 0.0, block) for block in core]

    def pair(self, k: int, cap: int | None) -> Refined:
        """The pair of client ``k``, which owns the modules, of the rank of the product or at most ``cap``."""
        i = self._owners.index(k)
        svd = product_svd(
            [*self._outer[0], self._inner[0][i]],
            [block.mT for block in (*self._outer[1], self._inner[1][i])],
            weights=torch.cat([self._share, self._read[:, i : i + 1]], 1),
            rule=Energy(1.0) if cap is None else Rank(cap),
            output="left",
            check=False,
            backend=self._backend,
        )
        rank = svd.rank.cpu()
        p = max(int(rank.max()), 1)
        B, A = self._left @ svd.left[:, :, :p], svd.right[:, :p] @ self._right.mT
        return Refined(B, A, rank, svd.error.cpu(), svd.info.cpu())

    def _coordinates(self, blocks: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Orthonormal columns (N, d, q) and the coordinates (N, q, r_k) of each weighted block in them."""
        stack = stacked_qr(list(blocks), weights=weights, mode="reduced", check=False, backend=self._backend)
        return stack.Q, list(stack.R.split([block.shape[2] for block in blocks], 2))
