"""FedSA-LoRA: A is averaged, B and the task heads stay on their client (arXiv 2410.01463)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedlora_kernels.backends.contract import Note
from fedlora_kernels.linalg import weighted_sum
from fedlora_kernels.methods.contract import Group, Method, Outcome, Pair, Previous, register
from fedlora_kernels.methods.factors import require_equal_ranks

__all__ = ["FedSALoRA"]


@register
@dataclass(frozen=True)
class FedSALoRA(Method):
    """Client k gets its own pair ``(s_k B_k, Abar)`` with ``Abar = sum_k w_k A_k``; there is no common one.

    Weights of another sum than 1, and those of clients that lack a module, are used as they are: Abar shrinks with their sum.
    """

    name: ClassVar[str] = "fedsa"
    summary: ClassVar[str] = "weighted mean of A, every client keeps its B"
    exact: ClassVar[str] = "not applicable (personal B)"
    broadcast: ClassVar[str] = "mean A"
    download: ClassVar[str] = "r n"
    streams: ClassVar[bool] = True
    equal_ranks: ClassVar[bool] = True
    own_extras: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("personal",)

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        return _personal(group)

    def broadcast_rank(self, ranks: Sequence[int], rank: int, residual: int) -> float:
        """A alone is sent."""
        return rank / 2


def _personal(group: Group) -> Outcome:
    options: dict[str, Any] = {"dtype": group.dtype, "check": False, "backend": group.backend}
    owners = [k for k, rank in enumerate(group.ranks) if rank > 0]
    A = weighted_sum([group.A[k] for k in owners], weights=group.weight[:, owners], **options)
    rank = torch.full((group.batch,), max(group.ranks), dtype=torch.int64)
    info, zero = A.info.cpu(), torch.full((group.batch,), int(Note.ZERO), dtype=torch.int32)
    personal: list[Pair | None] = [None] * len(group.ranks)
    for k in owners:
        B = weighted_sum([group.B[k]], weights=group.scale[:, k : k + 1], **options)
        personal[k] = Pair(B.sum, A.sum, rank)
        info |= B.info.cpu()
        zero &= B.notes.cpu()
    unknown = torch.full((group.batch,), math.nan, dtype=torch.float64)
    return Outcome(
        B=None,
        A=None,
        rank=None,
        error=unknown,
        error_bound=unknown,
        notes=zero | A.notes.cpu() & int(Note.ZERO),
        info=info,
        personal=tuple(personal),
    )
