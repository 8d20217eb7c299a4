"""FedSVD: B is averaged, and the pair is re-factored so that A has orthonormal rows again (arXiv 2505.12805)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_kernels.backends.contract import U64, Note
from fedlora_kernels.linalg import core_svd, stacked_qr
from fedlora_kernels.methods.common import common_A, flagged, summed, summed_norms
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, register
from fedlora_kernels.methods.factors import chunked, pair_outcome, require_equal_ranks, zero_outcome

__all__ = ["FedSVD"]


@register
@dataclass(frozen=True)
class FedSVD(Method):
    """SVD of ``D = Bbar A`` with ``Bbar = sum_k w_k s_k B_k`` and the frozen A: ``B = U diag(S)``, ``A = V^T``, every round.

    The rank stays r, what the clients trained, though never above n. Where S_i = 0 the column of B is zero and the row of A still one
    of an orthonormal set, within the rows of the frozen A where they reach: which one is our choice, as is the floor below which S_i
    counts as 0.
    """

    name: ClassVar[str] = "fedsvd"
    summary: ClassVar[str] = "weighted mean of B, then the SVD of its product with the frozen A"
    exact: ClassVar[str] = "yes"
    broadcast: ClassVar[str] = "re-orthogonalised pair"
    download: ClassVar[str] = "r(m+n)"
    equal_ranks: ClassVar[bool] = True
    frozen: ClassVar[str | None] = "A"
    sorted_pair: ClassVar[bool] = True

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        return chunked(group, _refactored, times=4) if any(group.ranks) else zero_outcome(group)


def _refactored(group: Group) -> Outcome:
    """With ``A^T = Q R`` and the SVD of the core ``Bbar R^T = U diag(S) W^T``: ``B = Bbar R^T W`` and ``A = (Q W)^T``.

    Unit vectors stand behind the columns of A^T, so that Q is complete where A is deficient; W is complete in any case.
    """
    A = common_A(group)
    r, p = A.shape[1], min(A.shape[1:])
    q = min(p, max(group.trained))
    weight = group.weight * group.scale
    mean_B = summed(group, group.B, weight, r)
    units = torch.eye(group.n, p, dtype=torch.float64, device=group.device).expand(group.batch, group.n, p)
    frame = stacked_qr([A.mT, units], mode="reduced", check=False, backend=group.backend)
    Q, R = frame.Q[:, :, :p], frame.R[:, :p, :r]
    core = mean_B @ R.mT
    triangle = stacked_qr([core], check=False, backend=group.backend)
    svd = core_svd(pad(triangle.R, (0, 0, 0, p - triangle.R.shape[1])), check=False, backend=group.backend)
    sizes = summed_norms(group.B, weight, r).to(group.device)
    kept = svd.S > _floor(sizes, A, len(group.B))[:, None]
    kept[:, q:] = False
    B = (core @ svd.Vh.mT) * kept[:, None, :]
    alive = kept.any(1).cpu()

    def gap(rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S = svd.S.cpu()
        whole = torch.where(alive, S.norm(dim=1), 1.0)
        dropped = torch.where(alive, (S * ~kept.cpu()).norm(dim=1), 0.0)
        terms = (sizes * A.norm(dim=2)).sum(1).cpu()
        arithmetic = torch.where(alive, (len(group.B) + 64 * r + 256) * U64 * terms + rounding, 0.0)
        return dropped / whole, (dropped + arithmetic) / whole, torch.where(alive, whole * whole, 0.0)

    outcome = flagged(pair_outcome(group, B[:, :, :q], (svd.Vh @ Q.mT)[:, :q], gap), group, group.A)
    assert outcome.info is not None
    deficient = (~kept[:, :q].all(1) & torch.isfinite(svd.S).all(1)).cpu() * int(Note.RANK_DEFICIENT)
    trouble = frame.info | triangle.info | svd.info
    return dataclasses.replace(
        outcome,
        info=outcome.info | trouble.cpu().to(torch.int32),
        notes=outcome.notes | deficient.to(torch.int32),
    )


def _floor(sizes: Tensor, A: Tensor, K: int) -> Tensor:
    """Below this, (N,), a singular value of ``Bbar A`` may be rounding noise of the sum, whose terms measure ``sizes`` (N, r).

    Columns and rows are balanced first, as any factor between them cancels: |B'|_2 |A'|_2 (docs/numerics.md, One pass).
    """
    rows = A.norm(dim=2)
    ratio = torch.where((sizes > 0.0) & (rows > 0.0), sizes / rows, 0.0).sqrt()
    balanced = A * ratio[:, :, None]
    gram = balanced @ balanced.mT
    norm = torch.minimum(gram.abs().sum(2).amax(1), gram.flatten(1).norm(dim=1))
    floor: Tensor = 4 * (K + A.shape[1]) * U64 * ((sizes * rows).sum(1) * norm).sqrt()
    return floor
