"""CLAIR: clients share a low-dimensional subspace of their updates; the contaminated are flagged (arXiv 2605.21217).

The abstract of the paper says: matrix-valued updates, a low-rank plus block-sparse decomposition, recovery of the shared
subspace, flags for contaminated clients, and a refinement that averages off the subspace and keeps the client's own inside
it. Everything else is our reading of it, and no released implementation is known to compare with: the program and its solver,
that columns are shared (``side``), normalisation, ``lam``, the gap rule, weights, flags of the whole model, and what a client
or a newcomer receives.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_kernels.backends.contract import U64, Info
from fedlora_kernels.errors import InputError, WeightError
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Census, Group, Memory, Method, Outcome, Pair, Previous, Survey, register
from fedlora_kernels.methods.factors import cast, chunked, chunks, owned, stack_error, zero_outcome
from fedlora_kernels.methods.products import stack_svd, svd_outcome
from fedlora_kernels.methods.shared_subspace import Refined, Refinement, Subspace, shared_subspace

__all__ = ["Clair", "Contamination", "largest_gap"]


class Contamination(NamedTuple):
    """Decided for the whole model: ``flags`` (K,) bool and ``scores`` (K,) of the clients.

    ``steps`` is the most that the solver took in a module, ``unconverged`` counts the modules that stopped at ``max_iter``.
    """

    flags: np.ndarray
    scores: np.ndarray
    steps: int
    unconverged: int


@register
@dataclass(frozen=True)
class Clair(Method):
    """A personal pair per client, ``P D_k + (I - P) M``, and the common mean M; flagged clients keep their input.

    Per module, with X_k = D_k / |D_k|_F: ``(L, S) = argmin |L|_* + lam sum |S_k|_F, L + S = [X_1 | ... | X_K]``. P projects on
    the first singular vectors of L, a client's score is |S_k|_F / |X_k|_F, M the weighted mean of the clients not flagged.
    Nothing of size m x n is formed: the program is solved in the span of the factors, which is exact.

    Half or more contaminated clients, colluders of one subspace, and outliers of rank one while lam > 1, go unnoticed, or
    benign clients are flagged in their place. Clients that share nothing leave L = 0: all receive M. The factors themselves
    count, not their product alone, since a flagged client receives its own.

    Attributes:
        shared_rank: dimension of the shared subspace, at most; None: the median of r_k, rounded down.
        lam: weight of the blocks; None: by a rule from the shared rank and the number of clients.
        normalise: divide updates by their norms; without, large benign clients look contaminated.
        gap_min: the least gap between the scores of benign and flagged clients.
        tol: the solver stops at |X - L - S|_F <= tol |X|_F.
        max_iter: the solver stops after as many steps.
        side: "left", clients share a column space of D_k; "right", a row space.
        scope: "model", scores are averaged over the modules; "matrix", each module has its own flags, in one pass.
        out_rank: of a personal pair: "client", what the client trained, "exact", or a number.
    """

    name: ClassVar[str] = "clair"
    summary: ClassVar[str] = "own update inside the shared subspace, mean outside; contaminated clients are flagged"
    exact: ClassVar[str] = "not applicable (personal pair)"
    broadcast: ClassVar[str] = "refined own pair"
    download: ClassVar[str] = "r_k(m+n)"
    needs_decision: ClassVar[bool] = True
    columnwise: ClassVar[bool] = False
    gives: ClassVar[tuple[str, ...]] = ("common", "personal")

    shared_rank: int | None = None
    lam: float | None = None
    normalise: bool = True
    gap_min: float = 0.15
    tol: float = 1e-7
    max_iter: int = 500
    side: Literal["left", "right"] = "left"
    scope: Literal["model", "matrix"] = "model"
    out_rank: int | str = "client"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.shared_rank is not None and not _count(self.shared_rank, 0):
            raise InputError(f"clair: shared_rank is {self.shared_rank!r}; None or an integer >= 0 is needed")
        if self.lam is not None and not (_real(self.lam) and self.lam > 0.0):
            raise InputError(f"clair: lam is {self.lam!r}; None or a number > 0 is needed")
        if not isinstance(self.normalise, bool):
            raise InputError(f"clair: normalise is {self.normalise!r}; True or False is needed")
        for name in ("gap_min", "tol"):
            if not (_real(value := getattr(self, name)) and value >= 0.0):
                raise InputError(f"clair: {name} is {value!r}; a number >= 0 is needed")
        if not _count(self.max_iter, 1):
            raise InputError(f"clair: max_iter is {self.max_iter!r}; an integer >= 1 is needed")
        for name, choices in {"side": ("left", "right"), "scope": ("model", "matrix")}.items():
            if (found := getattr(self, name)) not in choices:
                raise InputError(f"clair: {name} is {found!r}; {' or '.join(map(repr, choices))} is needed")
        if self.out_rank not in ("client", "exact") and not _count(self.out_rank, 1):
            raise InputError(f"clair: out_rank is {self.out_rank!r}; 'client', 'exact' or an integer >= 1 is needed")

    def surveys(self, memory: Memory | None) -> bool:
        """Flags of the whole model need all modules first."""
        return self.scope == "model"

    def survey(self, group: Group) -> Survey | None:
        """Scores of the clients in each module; carried is the ``basis`` of the shared subspace, orthonormal columns in float64."""
        if self.scope == "matrix":
            return None
        group = _present(group)
        found = [self._solve(group.part(*bounds)) for bounds in chunks(group, times=4)]
        stats = {
            name: torch.cat([getattr(part, name) for part in found]).numpy()
            for name in ("scores", "steps", "converged")
        }
        carry = [
            {"basis": basis[:, :rank]}
            for part in found
            for basis, rank in zip(part.basis, part.rank.tolist(), strict=True)
        ]
        return Survey(stats, tuple(carry))

    def decide(self, stats: Mapping[str, np.ndarray], census: Census) -> Contamination | None:
        """Flag clients by their scores, averaged over the modules that know one; a client of no score has 0."""
        if self.scope == "matrix":
            return None
        known = ~np.isnan(stats["scores"])
        scores = np.where(known, stats["scores"], 0.0).sum(0) / np.maximum(known.sum(0), 1)
        flags = largest_gap(np.where(known.any(0), scores, np.nan), self.gap_min)
        return Contamination(flags, scores, int(stats["steps"].max(initial=0)), int((~stats["converged"]).sum()))

    def combine(self, group: Group, plan: Contamination | None, previous: Previous | None) -> Outcome:
        """Combine one group. WeightError where the weights of the clients not flagged sum to 0."""
        return chunked(_present(group), lambda part: self._combine(part, plan), times=4)

    def describe(self, plan: Contamination | None, clients: Sequence[str]) -> dict[str, Any]:
        """Flags and scores by client; none where each module has its own."""
        if plan is None:
            return {}
        return {
            "flags": dict(zip(clients, plan.flags.tolist(), strict=True)),
            "scores": dict(zip(clients, plan.scores.tolist(), strict=True)),
            "steps": plan.steps,
            "unconverged": plan.unconverged,
        }

    def own_rank(self, trained: int, held: int) -> int:
        """What a client trained: a personal pair is an SVD, or what the client sent."""
        return trained

    def broadcast_rank(self, ranks: Sequence[int], rank: int, residual: int) -> float:
        """The mean rank of the personal pairs."""
        own = [self._cap(r) or rank for r in ranks if r > 0]
        return sum(own) / max(len(own), 1)

    def _cap(self, client_rank: int) -> int | None:
        """Largest rank of a personal pair; None: any."""
        if self.out_rank == "client":
            return client_rank
        return None if self.out_rank == "exact" else int(self.out_rank)

    def _solve(self, group: Group) -> Subspace:
        return shared_subspace(group, self.side, self.shared_rank, self.lam, self.normalise, self.tol, self.max_iter)

    def _combine(self, group: Group, plan: Contamination | None) -> Outcome:
        subspace = _carried(group) if plan is not None and group.carry else self._solve(group)
        flags = largest_gap(subspace.scores.numpy(), self.gap_min) if plan is None else plan.flags
        flagged, present = torch.from_numpy(flags).expand(group.weight.shape), group.weight != 0.0
        share = _share(group, flagged)
        outcome = _common(group, share)
        info = torch.zeros_like(outcome.notes) if outcome.info is None else outcome.info
        error = torch.full_like(share, math.nan)
        personal: list[Pair | None] = [None] * len(group.B)
        owners = [k for k, rank in enumerate(group.ranks) if rank > 0]
        refinement = Refinement(group, present & ~flagged, share, subspace, self.side) if owners else None
        for k in owners:
            keeps, benign = flagged[:, k] & present[:, k], ~flagged[:, k] & present[:, k]
            refined = refinement.pair(k, self._cap(group.trained[k])) if refinement and bool(benign.any()) else None
            personal[k], trouble = _personal(group, k, keeps, benign, refined)
            info = info | trouble
            error[keeps, k] = 0.0
            if refined is not None:
                error[benign, k] = refined.error[benign]
        return replace(outcome, info=info, personal=tuple(personal), personal_error=error)


def largest_gap(scores: np.ndarray, gap_min: float) -> np.ndarray:
    """Flag the clients above the largest gap of ``scores`` (..., K), if it is at least ``gap_min``; (..., K) bool.

    Only gaps that leave more than half of the clients below are looked at; of equal ones the lowest counts. A client of score
    NaN is neither counted nor flagged.
    """
    K = scores.shape[-1]
    if K < 2:
        return np.zeros(scores.shape, dtype=bool)
    ordered = np.sort(scores, axis=-1)  # NaN last
    counted = (~np.isnan(scores)).sum(-1, keepdims=True)
    below = np.arange(1, K)
    gaps = np.where((below > counted // 2) & (below < counted), np.diff(ordered, axis=-1), -np.inf)
    widest = gaps.argmax(-1)[..., None]
    cut = np.take_along_axis(ordered, widest, -1)
    flags: np.ndarray = (np.take_along_axis(gaps, widest, -1) >= gap_min) & (scores > cut)
    return flags


def _present(group: Group) -> Group:
    """The group without the factors of clients of weight 0."""
    there = (group.weight != 0.0).any(0).tolist()
    B = tuple(block if here else block[:, :, :0] for block, here in zip(group.B, there, strict=True))
    A = tuple(block if here else block[:, :0] for block, here in zip(group.A, there, strict=True))
    return replace(group, B=B, A=A)


def _carried(group: Group) -> Subspace:
    """The subspace as `survey` left it; its scores are in the plan."""
    bases = [carry["basis"] for carry in group.carry]
    rank = torch.tensor([basis.shape[1] for basis in bases], dtype=torch.int64)
    widest = int(rank.max())
    basis = torch.stack([pad(basis, (0, widest - basis.shape[1])) for basis in bases])
    return Subspace(torch.full_like(group.weight, math.nan), basis, rank, torch.zeros_like(rank), rank >= 0)


def _share(group: Group, flagged: Tensor) -> Tensor:
    """Weights v_k of the mean M, (N, K): those of the clients not flagged, of sum 1, and unchanged where that is their sum."""
    weight = torch.where(flagged, 0.0, group.weight)
    total = weight.sum(1, keepdim=True)
    nobody = (weight == 0.0).all(1)
    if bool((lost := (total[:, 0] == 0.0) & ~nobody).any()):
        name = group.modules[int(lost.nonzero()[0, 0])]
        raise WeightError(
            f"module {name!r}: the weights of the clients that clair does not flag sum to 0; weights of a positive sum are needed"
        )
    as_they_are = nobody[:, None] | ((total - 1.0).abs() <= weight.shape[1] * U64)
    return torch.where(as_they_are, weight, weight / total)


def _common(group: Group, share: Tensor) -> Outcome:
    """M as a pair of its numerical rank; ``error`` is its distance from D, which those flagged make."""
    B, A, folded = owned(group, share)
    if not B:
        return zero_outcome(group)
    outcome = svd_outcome(group, stack_svd(group, B, A, folded, Energy(1.0), "left"), "left")
    assert outcome.spectrum is not None
    error, bound, energy = outcome.error, outcome.error_bound, outcome.spectrum.energy
    moved = (share != group.weight).any(1)
    if bool(moved.any()):
        gap = far = full = torch.full_like(error, math.nan)
        if group.measure:
            gap, far, full = stack_error(group, B, A, owned(group, group.weight - share)[2], bound * energy.sqrt())
        error, bound = torch.where(moved, gap, error), torch.where(moved, far, bound)
        energy = torch.where(moved, full, energy)
    return replace(outcome, error=error, error_bound=bound, energy=energy, spectrum=None)


def _personal(group: Group, k: int, keeps: Tensor, benign: Tensor, refined: Refined | None) -> tuple[Pair, Tensor]:
    """Client k's pair, and trouble with it, (N,) int32: its own where it ``keeps`` (N,) that, the refined one where ``benign``.

    Rank 0 where it is neither, since it is absent. A refined update of zero is answered by rank 1, B = 0, A = e_1.
    """
    own, new = (where.to(group.device)[:, None, None] for where in (keeps, benign))
    B = torch.where(own, group.B[k].to(torch.float64) * group.scale[:, k].to(group.device)[:, None, None], 0.0)
    A = torch.where(own, group.A[k].to(torch.float64), 0.0)
    rank = torch.where(keeps, group.ranks[k], 0)
    trouble = torch.zeros(group.batch, dtype=torch.int32)
    if refined is not None:
        unit = torch.zeros_like(refined.A)
        unit[:, 0, 0] = 1.0
        refined_A = torch.where((refined.rank == 0).to(group.device)[:, None, None], unit, refined.A)
        widest = max(B.shape[2], refined.B.shape[2])
        B = torch.where(new, _widened(refined.B, 2, widest), _widened(B, 2, widest))
        A = torch.where(new, _widened(refined_A, 1, widest), _widened(A, 1, widest))
        rank = torch.where(benign, refined.rank.clamp(min=1), rank)
        trouble = torch.where(benign, refined.info, 0)
    widest = max(int(rank.max()), 1)
    B, A = B[:, :, :widest], A[:, :widest]
    left, lost_B, _ = cast(B, group.dtype)
    right, lost_A, _ = cast(A, group.dtype)
    finite = (torch.isfinite(B).flatten(1).all(1) & torch.isfinite(A).flatten(1).all(1)).cpu()
    trouble = trouble | (~finite * int(Info.NONFINITE)) | ((lost_B | lost_A) * int(Info.OVERFLOW))
    return Pair(left, right, rank), trouble.to(torch.int32)


def _widened(x: Tensor, axis: int, size: int) -> Tensor:
    """``x`` (N, m, p) or (N, p, n) with zeros appended along ``axis`` up to ``size``."""
    more = size - x.shape[axis]
    return pad(x, (0, more) if axis == 2 else (0, 0, 0, more))


def _real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
