"""raFLoRA: the sum of the updates with each rank segment weighted over the clients that have it (arXiv 2602.13486)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.linalg import update_gram
from fedlora_kernels.linalg.rules import Rank
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, register
from fedlora_kernels.methods.factors import GRAM_ERROR, joined, norms, ratio, zero_outcome
from fedlora_kernels.methods.products import stack_svd, svd_outcome
from fedlora_kernels.methods.segments import checked_levels, ranked_parts, segments

__all__ = ["RaFLoRA"]


@register
@dataclass(frozen=True)
class RaFLoRA(Method):
    """Truncated SVD of ``D' = sum_s sum_k p_ks s_k B_k[:, s] A_k[s]``, p_ks the weights over the clients that have segment s.

    D' is D where all ranks are equal; else it is another target on purpose, and ``error`` is the distance from D. The pair has
    rank r_max, the largest rank of the clients, of ``levels`` (None: the ranks that are there) and of the previous pair, or that of
    D' if it is smaller; half of the singular values are on each factor. A segment that nobody present has stays the product of the
    previous pair there, if there is one. A client receives the first r_k rows and columns, beyond the rank of D' random rows of A
    and zero columns of B (both our reading).
    """

    name: ClassVar[str] = "raflora"
    summary: ClassVar[str] = "SVD of the sum with each rank segment re-weighted over its owners"
    exact: ClassVar[str] = "no, the target is re-weighted on purpose"
    broadcast: ClassVar[str] = "prefix of the SVD pair"
    download: ClassVar[str] = "r_k(m+n)"
    reads_previous: ClassVar[str | None] = "pair"
    sorted_pair: ClassVar[bool] = True

    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", checked_levels(self.levels, self.name))

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group; D' = 0 answers p = 1, B = 0, A = e_1. WeightError for negative weights where ranks differ."""
        made = [_truncated(*run, self.name) for run in ranked_parts(group, previous, self.levels, self.name)]
        return made[0] if len(made) == 1 else joined(made)

    def client_rank(self, client_rank: int, rank: int) -> int:
        """A client receives its own rank."""
        return client_rank


class _Blocks(NamedTuple):
    """Views of factors; their coefficients in D' and in D, (N, I) on the host."""

    B: list[Tensor]
    A: list[Tensor]
    target: Tensor
    ideal: Tensor


def _truncated(group: Group, left: tuple[Tensor, Tensor] | None, top: int, method: str) -> Outcome:
    """The outcome of modules of one r_max ``top``; ``left`` is their previous pair."""
    blocks = _blocks(group, left, top, method) if top > 0 else None
    if blocks is None or not blocks.B:
        return zero_outcome(group)
    rank = max(group.trained) if any(group.starts) else top
    svd = stack_svd(group, blocks.B, blocks.A, blocks.target, Rank(rank), "balanced")
    outcome = svd_outcome(group, svd, "balanced")
    energy = svd.energy.cpu()
    if bool((blocks.target == blocks.ideal).all()):
        return dataclasses.replace(outcome, spectrum=None, energy=energy)
    unknown = torch.full((group.batch,), math.nan, dtype=torch.float64)
    error, bound, energy = _distance(group, blocks, outcome, energy) if group.measure else (unknown,) * 3
    # the spectrum is that of D', and a report would take it for D's
    return dataclasses.replace(outcome, error=error, error_bound=bound, energy=energy, spectrum=None)


def _blocks(group: Group, left: tuple[Tensor, Tensor] | None, top: int, method: str) -> _Blocks:
    cut = segments(group, top, method)
    B: list[Tensor] = []
    A: list[Tensor] = []
    target: list[Tensor] = []
    ideal: list[Tensor] = []
    for k, rank in enumerate(group.ranks):
        if bool((group.weight[:, k] == 0.0).all()):
            continue
        for s, (start, stop) in enumerate(cut.spans):
            if stop <= rank:
                B.append(group.B[k][:, :, start:stop])
                A.append(group.A[k][:, start:stop])
                target.append(cut.weight[:, k, s] * group.scale[:, k])
                ideal.append(group.weight[:, k] * group.scale[:, k])
    for s, (start, stop) in enumerate(cut.spans if left is not None else ()):
        assert left is not None
        if not bool(cut.owned[:, s].all()) and start < left[0].shape[2]:
            B.append(left[0][:, :, start:stop])
            A.append(left[1][:, start:stop])
            target.append((~cut.owned[:, s]).to(torch.float64))
            ideal.append(torch.zeros(group.batch, dtype=torch.float64))
    columns = [torch.stack(x, 1) if x else torch.zeros(group.batch, 0, dtype=torch.float64) for x in (target, ideal)]
    return _Blocks(B, A, *columns)


def _distance(group: Group, blocks: _Blocks, outcome: Outcome, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``|D - X|_F / |D|_F`` of the answer X, an upper bound of it, and ``|D|_F^2``; (N,) float64.

    With ``E = D - D'``, which is small block by block where the re-weighting is, and the tail ``T = D' - X`` of the SVD,
    whose norm is known (``energy`` is ``|D'|_F^2``): ``|D - X|^2 = |E|^2 + |T|^2 + 2 <E, T>``, the inner product no larger than
    ``|E| |T|``. So nothing cancels where either vanishes. Inner products come from float64 Grams, whose entries are known to
    18 u64 of the product of the factors' norms.
    """
    assert outcome.B is not None
    assert outcome.A is not None
    B, A = [*blocks.B, outcome.B], [*blocks.A, outcome.A]
    used = (blocks.target != 0.0) | (blocks.ideal != 0.0)
    read = torch.cat([used, torch.ones(group.batch, 1, dtype=torch.bool)], 1)
    gram = update_gram(B, A, weights=read.to(torch.float64), check=False, backend=group.backend).cpu()
    sizes = torch.stack([norms(b) * norms(a) for b, a in zip(B, A, strict=True)], 1).where(read, 0.0)
    none = torch.zeros(group.batch, 1, dtype=torch.float64)
    ideal = torch.cat([blocks.ideal, none], 1)
    change = torch.cat([blocks.ideal - blocks.target, none], 1)
    rest = torch.cat([blocks.target, none - 1.0], 1)

    whole, whole_error = _inner(gram, sizes, ideal, ideal)
    shift, shift_error = _inner(gram, sizes, change, change)
    cross, cross_error = _inner(gram, sizes, change, rest)
    shift = shift.clamp(min=0.0)
    most = (shift + shift_error).sqrt()
    tail, tail_bound = outcome.error * energy.sqrt(), outcome.error_bound * energy.sqrt()
    inner = cross.clamp(min=-shift.sqrt() * tail, max=shift.sqrt() * tail)
    gap = (shift + tail**2 + 2.0 * inner).clamp(min=0.0).sqrt()
    inner_bound = torch.minimum(cross + cross_error, most * tail_bound)
    upper = (most**2 + tail_bound**2 + 2.0 * inner_bound).clamp(min=0.0).sqrt()
    least = (whole - whole_error).clamp(min=0.0).sqrt()
    error = ratio(gap, whole.clamp(min=0.0).sqrt())
    return error, torch.maximum(error, ratio(upper, least)), whole.clamp(min=0.0)


def _inner(gram: Tensor, sizes: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``<sum_i x_i D_i, sum_j y_j D_j>`` and a bound of its error, (N,)."""
    value = torch.einsum("ni,nij,nj->n", x, gram, y)
    return value, GRAM_ERROR * (x.abs() * sizes).sum(1) * (y.abs() * sizes).sum(1)
