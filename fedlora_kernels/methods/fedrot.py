"""FedRot-LoRA: the mean of factors after every client's pair is rotated towards the last broadcast (arXiv 2602.23638)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Info
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.linalg import Ragged, WeightedSum, mixed_sum, procrustes_rotation
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, Sums, Turn, register
from fedlora_kernels.methods.factors import (
    drift,
    joined,
    mean_outcome,
    mean_sums,
    norms,
    require_equal_ranks,
    share,
    sums_outcome,
)

__all__ = ["FedRot"]

_CHOICES = {"first": ("A", "B"), "group": ("SO", "O"), "weights": ("samples", "uniform")}


@register
@dataclass(frozen=True)
class FedRot(Method):
    """``(B_k, A_k) -> (s_k B_k Q_k, Q_k^T A_k)``, then the mean of each factor; the products do not change.

    Q_k turns A_k towards the A broadcast last (A-rounds) or s_k B_k towards the B (B-rounds), in turns; round 0 has nothing to
    turn to. ``lam`` is the part of the way: Q_k is the polar factor of ``(1 - lam) I + lam R_k``, R_k the best rotation.
    Ours: the default of ``lam``, and that of several best rotations the one closest to the identity is taken, so that a
    factor or a reference of zero leaves the client as it is. The authors' code may answer a reflection there; ``group="O"``
    allows reflections, for ``lam = 1`` only.

    Attributes:
        lam: soft rotation, 0 (FedIT) to 1 (the best rotation).
        first: the factor that round 1 aligns; odd rounds are its rounds.
        group: "SO", rotations, or "O", reflections too.
        weights: "samples", those of the clients, or "uniform", 1/K of the paper's formulas.
    """

    name: ClassVar[str] = "fedrot"
    summary: ClassVar[str] = "factor means after rotating each pair towards the last broadcast"
    exact: ClassVar[str] = "no (smaller error than FedIT when clients are rotated)"
    broadcast: ClassVar[str] = "mean of aligned pairs"
    download: ClassVar[str] = "r(m+n)"
    equal_ranks: ClassVar[bool] = True
    reads_previous: ClassVar[str | None] = "pair"
    needs_previous: ClassVar[bool] = True
    needs_round: ClassVar[bool] = True

    lam: float = 0.5
    first: Literal["A", "B"] = "A"
    group: Literal["SO", "O"] = "SO"
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self) -> None:
        """Check the options."""
        if isinstance(self.lam, bool) or not isinstance(self.lam, (int, float)) or not 0.0 <= self.lam <= 1.0:
            raise InputError(f"fedrot: lam is {self.lam!r}; 0 <= lam <= 1 is needed")
        for name, choices in _CHOICES.items():
            if (found := getattr(self, name)) not in choices:
                needed = " or ".join(map(repr, choices))
                raise InputError(f"fedrot: {name} is {found!r}; {needed} is needed")
        if self.group == "O" and self.lam != 1.0:
            raise InputError(
                f"fedrot: group is 'O' with lam {self.lam!r}; a reflection has no half way: 'SO' or lam 1 is needed"
            )

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. MismatchError where ranks differ, or the previous pair has another."""
        require_equal_ranks(group, self.name)
        weight = self._weight(group)
        if not self._turns(group):
            return mean_outcome(group, weight)
        keep = [k for k, owned in enumerate(group.ranks) if owned > 0 and bool((group.weight[:, k] != 0.0).any())]
        turns, info = self._rotations(group, keep, _reference(group, previous, self.aligned_factor(group.round)))
        parts = []
        for rows, still in _runs(group, turns):
            part = group.part(rows.start, rows.stop)
            own = {k: Q[rows] for k, Q in turns.items()}
            parts.append(mean_outcome(part, weight) if still else _turned_mean(part, weight, own))
        outcome = joined(parts)
        assert outcome.info is not None
        return dataclasses.replace(outcome, info=outcome.info | info)

    def sums(self, group: Group, plan: Any) -> Sums | None:
        """The means of the turned pairs. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        plain = mean_sums(group, self._weight(group))
        if not self._turns(group):
            return plain
        side = self.aligned_factor(group.round)
        if side == "B" and not bool((group.scale[group.weight != 0.0] > 0.0).all()):
            return None  # the reference has another sign for some
        return dataclasses.replace(plain, turn=Turn(side, special=self.group == "SO", blend=self.lam))

    def _weight(self, group: Group) -> Tensor | None:
        """Weights (K,) in place of the group's, if any."""
        count = len(group.B)
        return torch.full((count,), 1.0 / max(1, count), dtype=torch.float64) if self.weights == "uniform" else None

    def _turns(self, group: Group) -> bool:
        """Whether there is anything to turn to, and by."""
        rank = max(group.ranks, default=0)
        return not (group.round == 0 or self.lam == 0.0 or rank == 0 or (rank == 1 and self.group == "SO"))

    def aligned_factor(self, round: int) -> Literal["A", "B"]:  # noqa: A002
        """The factor, "A" or "B", that is turned towards the reference in this round."""
        return self.first if round % 2 else ("B" if self.first == "A" else "A")

    def _rotations(self, group: Group, keep: Sequence[int], reference: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Rotation (N, r, r) of each of the clients ``keep``, float64; (N,) int32, where one failed."""
        by_A = self.aligned_factor(group.round) == "A"
        sources = [group.A[k].mT if by_A else group.B[k] for k in keep]
        targets = [reference if by_A else _signed(reference, group.scale[:, k]) for k in keep]
        rotations = procrustes_rotation(
            Ragged(sources),
            Ragged(targets),
            special=self.group == "SO",
            blend=self.lam,
            check=False,
            backend=group.backend,
        )
        info = torch.zeros(group.batch, dtype=torch.int32)
        for rotation in rotations:
            info |= (rotation.info & int(Info.NOT_CONVERGED)).cpu()
        return {k: rotation.Q for k, rotation in zip(keep, rotations, strict=True)}, info


def _runs(group: Group, turns: Mapping[int, Tensor]) -> list[tuple[slice, bool]]:
    """Modules in a row that are alike in this: whether nobody turns, so that they get the bits of plain means. At least one run."""
    still = torch.ones(group.batch, dtype=torch.bool)
    for k, Q in turns.items():
        one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        still &= (Q == one).flatten(1).all(1).cpu() | (group.weight[:, k] == 0.0)
    flags, counts = torch.unique_consecutive(still, return_counts=True)
    stops = counts.cumsum(0).tolist()
    runs = [(slice(start, stop), flag) for start, stop, flag in zip([0, *stops], stops, flags.tolist(), strict=False)]
    return runs or [(slice(0, 0), True)]


def _turned_mean(group: Group, given: Tensor | None, turns: Mapping[int, Tensor]) -> Outcome:
    """Outcome of the factor means over the pairs turned by ``turns`` (N, r, r), with weights ``given`` as in `mean_outcome`."""
    weight = group.weight if given is None else share(group, given)

    def gap(part: Group, rows: slice, rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = {k: Q[rows] for k, Q in turns.items()}
        B, A = _turned_sums(part, weight[rows], own, torch.float64)
        return drift(_turned(part, own), weight[rows], B.sum, A.sum, rounding + _moved(part, own))

    return sums_outcome(group, *_turned_sums(group, weight, turns, group.dtype), gap)


def _turned_sums(
    group: Group, weight: Tensor, turns: Mapping[int, Tensor], dtype: torch.dtype
) -> tuple[WeightedSum, WeightedSum]:
    """``sum_k p_k s_k B_k Q_k`` and ``sum_k p_k Q_k^T A_k`` in one pass over the factors, ``weight`` being p, (N, K)."""
    options: dict[str, Any] = {"dtype": dtype, "check": False, "backend": group.backend}
    mixers_B = [_weighted(Q, weight[:, k] * group.scale[:, k]) for k, Q in turns.items()]
    mixers_A = [_weighted(Q.mT, weight[:, k]) for k, Q in turns.items()]
    B = mixed_sum([group.B[k] for k in turns], mixers_B, **options)
    return B, mixed_sum([group.A[k] for k in turns], mixers_A, side="left", **options)


def _weighted(Q: Tensor, weight: Tensor) -> Tensor:
    """``weight Q``; zero where the weight is, whatever Q holds there."""
    w = weight.to(Q.device)[:, None, None]
    return torch.where(w == 0.0, 0.0, w * Q)


def _turned(group: Group, turns: Mapping[int, Tensor]) -> Group:
    """The group with the pairs themselves turned, in float64."""
    B, A = list(group.B), list(group.A)
    for k, Q in turns.items():
        B[k], A[k] = B[k].to(torch.float64) @ Q, Q.mT @ A[k].to(torch.float64)
    return dataclasses.replace(group, B=tuple(B), A=tuple(A))


def _moved(group: Group, turns: Mapping[int, Tensor]) -> Tensor:
    """How far turning in float64 can move D, (N,) float64."""
    total = torch.zeros(group.batch, dtype=torch.float64)
    for k in turns:
        r = group.ranks[k]
        folded = (group.weight[:, k] * group.scale[:, k]).abs()
        size = torch.where(folded > 0.0, norms(group.B[k]) * norms(group.A[k]) * folded, 0.0)
        # each of four products with Q or w Q, two here and two in the means, misses (r + 3) r^(1/2) u64 at most, and Q^T Q the
        # identity by 16 u64 per entry
        total += (4 * (r + 3) * r**0.5 + 16 * r) * U64 * size
    return total


def _reference(group: Group, previous: Previous | None, side: str) -> Tensor:
    """The factor to turn to, its r directions as columns, on the device of the group. MismatchError where r is another."""
    pair = None if previous is None else (previous.A if side == "A" else previous.B)
    if pair is None:
        raise InputError(f"fedrot: round {group.round} has no previous pair; the pair broadcast last is needed")
    reference = (pair.mT if side == "A" else pair).to(group.device)
    rank, found = max(group.ranks), reference.shape[-1]
    if found != rank:
        raise MismatchError(
            f"module {group.modules[0]!r}: the previous pair has rank {found}, the clients have rank {rank}; "
            "method 'fedrot' needs one rank. Give the pair that was broadcast last"
        )
    return reference


def _signed(reference: Tensor, scale: Tensor) -> Tensor:
    """The reference (N, rows, r) for a B whose scale (N,) is not folded in yet: a rotation sees only its sign."""
    return reference if bool((scale > 0.0).all()) else reference * scale.sign().to(reference)[:, None, None]
