"""What the product of factor means misses of the weighted sum of the updates, as a stack of blocks without cancellation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.methods.contract import Group
from fedlora_kernels.methods.factors import norms

__all__ = ["Gap", "mean_gap"]


class Gap(NamedTuple):
    """``D - Bbar Abar = sum_i L_i R_i``: ``L`` (N, I, m, r), ``R`` (N, I, r, n) float64; ``live`` (N, I) on the host.

    Blocks that are not live are zero.
    """

    L: Tensor
    R: Tensor
    live: Tensor

    def lefts(self) -> list[Tensor]:
        """The blocks L_i."""
        return list(self.L.unbind(1))

    def rights(self) -> list[Tensor]:
        """The blocks R_i."""
        return list(self.R.unbind(1))


def mean_gap(group: Group, mean_B: Tensor) -> Gap:
    """Blocks of ``D - Bbar Abar`` for clients of one rank, where ``mean_B`` is ``Bbar = sum_k w_k s_k B_k``.

    With v = sum_k w_k over the owners, B_k folded and K the last owner of nonzero weight,

        D - Bbar Abar = sum_{k<K} w_k (B_k - Bbar)(A_k - A_K) + (1 - v) Bbar A_K

    for any real weights: rank (K-1) r where v = 1, which is where the weights are normalised over the owners, else K r. The
    last term takes the place of client K's own block, which is zero. A block whose left factor is rounding noise of Bbar,
    or whose right factor is zero, is not live: equal A, or equal B, leave no block at all.
    """
    keep = [k for k, rank in enumerate(group.ranks) if rank > 0]
    scale = group.scale.to(group.device)[:, :, None, None]
    weight = group.weight[:, keep]
    last = ((weight != 0.0) * torch.arange(1, len(keep) + 1)).argmax(1)
    module = torch.arange(group.batch)

    folded = torch.stack([group.B[k].to(torch.float64) * scale[:, k] for k in keep], 1)
    R = torch.stack([group.A[k].to(torch.float64) for k in keep], 1)
    anchor = R[module, last].clone()
    R -= anchor[:, None]
    noise = 2 * (len(keep) + 2) * U64 * (weight.abs() * _block_norms(folded)).sum(1)
    L = folded.sub_(mean_B[:, None])
    live = (weight != 0.0) & ~(_block_norms(L) <= noise[:, None]) & (_block_norms(R) != 0.0)
    L *= weight.to(group.device)[:, :, None, None]

    rest = 1.0 - weight.sum(1)
    rest[rest.abs() <= len(keep) * U64] = 0.0  # the rounding of normalised weights
    L[module, last] = mean_B * rest.to(group.device)[:, None, None]
    R[module, last] = anchor
    live[module, last] = (rest != 0.0) & (norms(mean_B) != 0.0) & (norms(anchor) != 0.0)

    dead = ~live.to(group.device)[:, :, None, None]
    return Gap(L.masked_fill_(dead, 0.0), R.masked_fill_(dead, 0.0), live)


def _block_norms(x: Tensor) -> Tensor:
    """Frobenius norm of each block of (N, I, p, q), (N, I) on the host."""
    return norms(x.flatten(0, 1)).reshape(x.shape[:2])
