"""PreLort on the client: one loss at several prefixes of the same pairs (arXiv 2606.15963)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Generator, Tensor

from fedlora_kernels.errors import InputError
from fedlora_kernels.training.pairs import Pairs, prefix, top_rank

__all__ = ["nested_levels", "nested_loss"]


def nested_loss(
    loss: Callable[[Pairs], Tensor],
    pairs: Pairs,
    levels: Iterable[int],
    a_r: Mapping[int, float] | None = None,
    mode: Literal["sum", "sample"] = "sum",
    generator: Generator | None = None,
) -> Tensor:
    """``sum_r a_r loss(pairs cut to rank r)`` over the levels up to the client's rank, or the loss of one of them at random.

    ``loss`` takes pairs and returns a scalar; it may run any model, `torch.func.functional_call` included, and apply any scale
    that does not depend on r: alpha / r of the prefix would change what the shared rows mean from level to level. With G_r
    the gradient with respect to the weight at prefix r and s the scale, column j of B then receives
    ``sum_{r >= j} a_r s G_r A[j]^T`` and row j of A ``sum_{r >= j} a_r s B[:, j]^T G_r``.

    Args:
        loss: differentiable function of the pairs.
        pairs: what the client trains, (B, A) of each module by name; the client's rank is the largest of them.
        levels: ranks of the federation, in any order; the client's own is one of them, larger ones are ignored.
        a_r: weight of each level used, >= 0; None is uniform, with sum 1.
        mode: "sum" for all levels, or "sample" for one per call, drawn with probability a_r: the same in expectation where
            the weights sum to 1, at the cost of one level.
        generator: of torch on the CPU, which draws for "sample"; None is torch's own.

    Returns:
        The loss, a scalar.

    Raises:
        InputError: no pair, or one of rank 0; a level below 1; a level without weight, a weight that is negative or not
            finite, none above 0; an unknown mode.

    Training at several prefixes is the paper's; weights, sum or sampling, and the fixed scale are our reading.
    """
    ranks = nested_levels(pairs, levels)
    weights = _weights(ranks, a_r)
    if mode == "sample":
        drawn = torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator)
        return loss(prefix(pairs, ranks[int(drawn)]))
    if mode != "sum":
        raise InputError(f"nested_loss: mode is {mode!r}; 'sum' or 'sample' is needed")
    terms = [weight * loss(prefix(pairs, rank)) for rank, weight in zip(ranks, weights, strict=True) if weight > 0.0]
    return torch.stack(terms).sum()


def nested_levels(pairs: Pairs, levels: Iterable[int]) -> list[int]:
    """The prefixes that a client trains: the levels below its rank and its rank, ascending. InputError for a level below 1."""
    top = top_rank(pairs)
    if top < 1:
        raise InputError("nested_loss: the largest rank of the pairs is 0; a pair of rank >= 1 is needed")
    given = set(levels)
    if given and min(given) < 1:
        raise InputError(f"nested_loss: levels hold {min(given)}; ranks >= 1 are needed")
    return sorted({level for level in given if level < top} | {top})


def _weights(ranks: list[int], a_r: Mapping[int, float] | None) -> list[float]:
    if a_r is None:
        return [1.0 / len(ranks)] * len(ranks)
    if absent := [rank for rank in ranks if rank not in a_r]:
        raise InputError(f"nested_loss: a_r has no weight for rank {absent[0]}; one for each of {ranks} is needed")
    weights = [float(a_r[rank]) for rank in ranks]
    if not all(math.isfinite(weight) and weight >= 0.0 for weight in weights) or max(weights) == 0.0:
        raise InputError(
            f"nested_loss: a_r is {weights} for ranks {ranks}; finite weights >= 0, one above 0, are needed"
        )
    return weights
