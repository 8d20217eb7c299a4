"""HetLoRA on the client: self-pruning of the rank by the size of its tail (arXiv 2401.06432)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedlora_kernels.errors import InputError
from fedlora_kernels.training.pairs import Pairs, prefix, top_rank

__all__ = ["cut_pairs", "kept_rank", "pruned_rank", "tail_penalty"]


def tail_penalty(pairs: Pairs, gamma: float = 0.99) -> Tensor:
    """``sum |B_tail|_F |A_tail|_F`` over all modules, to be added to the loss; the tail are the rank indices above gamma r.

    r is the client's rank, the largest of the pairs; rank 1 has no tail. The value before and after local training decides in
    `pruned_rank`. One decision for the whole client, from the sum over its modules, is our reading.
    """
    kept = kept_rank(top_rank(pairs), gamma)
    norm = torch.linalg.vector_norm
    terms = [norm(B[:, kept:]) * norm(A[kept:]) for B, A in pairs.values()]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def pruned_rank(rank: int, before: float | Tensor, after: float | Tensor, gamma: float = 0.99) -> int:
    """The client's next rank: ``floor(gamma r)``, at least 1, if the tail is smaller ``after`` training than ``before``; else r."""
    first, last = (float(x.detach() if isinstance(x, Tensor) else x) for x in (before, after))
    return kept_rank(rank, gamma) if last < first else rank


def kept_rank(rank: int, gamma: float = 0.99) -> int:
    """``floor(gamma r)``, at least 1 (0 for r = 0). InputError unless 0 < gamma <= 1."""
    if not 0.0 < gamma <= 1.0:
        raise InputError(f"hetlora: gamma is {gamma}; 0 < gamma <= 1 is needed")
    # 0.29 * 100 is 28.999999999999996
    return min(rank, max(1, math.floor(round(gamma * rank, 9))))


def cut_pairs(pairs: Pairs, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs cut to ``rank``, as new leaves to train on: copies, with the ``requires_grad`` of what was given.

    A scale that depends on the rank (alpha / r) must be kept at its old value, or the update changes with the cut.
    """
    if rank < 1:
        raise InputError(f"hetlora: rank is {rank}; at least 1 is needed")

    def leaf(given: Tensor, part: Tensor) -> Tensor:
        return part.detach().clone(memory_format=torch.contiguous_format).requires_grad_(given.requires_grad)

    cut = prefix(pairs, rank)
    return {name: (leaf(B, cut[name][0]), leaf(A, cut[name][1])) for name, (B, A) in pairs.items()}
