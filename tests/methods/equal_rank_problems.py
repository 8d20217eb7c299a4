"""Clients of one rank for methods of factor means and residuals, and what pair and residual amount to together."""

from dataclasses import replace

import torch
from method_problems import Problem, normalised, product, standard

from fedlora_kernels.methods.contract import Group, Outcome

SCALES = (1.0, 4.0, 2.0, 0.5)


def unequal(m=37, n=29, r=6, **fields) -> Problem:
    """Four clients of rank r, of unequal counts and scales."""
    return standard(m=m, n=n, ranks=(r,) * 4, scale=SCALES, **fields)


EQUAL_RANKS = {
    "tall": unequal,
    "wide": lambda: unequal(m=23, n=41),
    "stack_wider_than_matrix": lambda: unequal(m=13, n=11),
    "m_is_rank": lambda: unequal(m=6, n=29),
    "n_is_rank": lambda: unequal(m=29, n=6),
    "n_below_rank": lambda: unequal(m=29, n=5),
    "rank_one": lambda: unequal(m=7, n=5, r=1),
    "row": lambda: unequal(m=1, n=17, r=2),
    "column": lambda: unequal(m=17, n=1, r=2),
    "one_client": lambda: standard(m=37, n=29, ranks=(5,)),
    "duplicates": lambda: unequal().permuted([0, 1, 2, 3, 2]),
    "one_zero_client": lambda: with_zero_client(unequal(), 2),
    "gauge_imbalanced": lambda: with_gauges(unequal(), (1e4, 1.0, 1e-4, 1e4)),
    "unnormalised": lambda: replace(unequal(), weight=[0.7, -0.2, 1.1, 0.4]),
    "sum_zero": lambda: replace(unequal(), weight=[0.5, -0.5, 0.25, -0.25]),
    "missing_zero": lambda: without_client(unequal(), 1),
    "missing_renormalize": lambda: without_client(replace(unequal(), weight=[0.2, 0.0, 0.3, 0.5]), 1),
    "missing_last": lambda: without_client(unequal(), 3),
}


def with_zero_client(problem: Problem, k: int) -> Problem:
    return replace(problem, B=[torch.zeros_like(b) if i == k else b for i, b in enumerate(problem.B)])


def with_gauges(problem: Problem, factors) -> Problem:
    B = [b * t for b, t in zip(problem.B, factors, strict=True)]
    return replace(problem, B=B, A=[a / t for a, t in zip(problem.A, factors, strict=True)])


def without_client(problem: Problem, k: int) -> Problem:
    """Client k lacks the module; its weight stays, as under missing="zero", unless it is 0."""
    B = [b[:, :0] if i == k else b for i, b in enumerate(problem.B)]
    return replace(problem, B=B, A=[a[:0] if i == k else a for i, a in enumerate(problem.A)])


def split(problem: Problem, k: int) -> Problem:
    """Client k as two of half its weight."""
    order = [*range(len(problem.B)), k]
    halves = [w / 2 if i == k else w for i, w in enumerate(problem.weight)]
    return replace(problem.permuted(order), weight=[*halves, halves[k]])


def identical(copies: int) -> Problem:
    one = standard(m=37, n=29, ranks=(6,), scale=(3.0,))
    return Problem(one.B * copies, one.A * copies, one.scale * copies, normalised([1, 2, 4, 8][:copies]))


def common_factor(factor: str) -> Problem:
    """All clients hold the same ``factor``, "A" or "B"; the scale lies on B, so a common B needs equal scales."""
    problem = replace(unequal(), scale=[2.0] * 4)
    return replace(problem, **{factor: [getattr(problem, factor)[0]] * 4})


def batch_of(problems, **fields) -> Group:
    """One group of several problems of one shape."""
    groups = [problem.group(**fields) for problem in problems]
    return replace(
        groups[0],
        modules=tuple(f"layers.{i}.q_proj" for i in range(len(groups))),
        B=tuple(torch.cat(blocks) for blocks in zip(*(group.B for group in groups), strict=True)),
        A=tuple(torch.cat(blocks) for blocks in zip(*(group.A for group in groups), strict=True)),
        scale=torch.cat([group.scale for group in groups]),
        weight=torch.cat([group.weight for group in groups]),
    )


def residual(outcome: Outcome, i: int = 0) -> torch.Tensor:
    pair = outcome.residual
    p = int(pair.rank[i])
    return pair.B[i, :, :p].double() @ pair.A[i, :p].double()


def total(outcome: Outcome) -> torch.Tensor:
    return product(outcome) + residual(outcome)
