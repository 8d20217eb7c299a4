"""Problems whose clients hold one factor in common, alone and as a batch of modules."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from method_problems import RANKS, Problem, product, standard

from fedlora_kernels.methods.contract import Group, Outcome

SCALE = (0.5, 3.0, 1.0, 2.0, 4.0)
EQUAL = (6,) * 5
OUTPUTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def common_A(m=37, n=29, ranks=RANKS, scale=SCALE, dtype=torch.float64, **fields) -> Problem:
    """Every A_k is the first r_k rows of one A."""
    problem = standard(m=m, n=n, ranks=ranks, scale=scale[: len(ranks)], dtype=dtype, **fields)
    widest = problem.A[ranks.index(max(ranks))]
    return replace(problem, A=[widest[:r].clone() for r in ranks])


def common_B(m=37, n=29, ranks=EQUAL, scale=SCALE, dtype=torch.float64, **fields) -> Problem:
    """Every s_k B_k is one and the same matrix; scales are powers of two, so that dividing by them is exact."""
    problem = standard(m=m, n=n, ranks=ranks, dtype=dtype, **fields)
    scale = [2.0 ** round(torch.tensor(s).log2().item()) for s in scale[: len(ranks)]]
    return replace(problem, B=[problem.B[0] / s for s in scale], scale=scale)


def batched(problems: Sequence[Problem], **fields) -> Group:
    """Problems of one shape as one group, module by module."""
    groups = [problem.group(**fields) for problem in problems]
    clients = range(len(groups[0].B))
    return replace(
        groups[0],
        modules=tuple(f"layers.{i}" for i in range(len(groups))),
        B=tuple(torch.cat([group.B[k] for group in groups]) for k in clients),
        A=tuple(torch.cat([group.A[k] for group in groups]) for k in clients),
        scale=torch.cat([group.scale for group in groups]),
        weight=torch.cat([group.weight for group in groups]),
    )


def without(problem: Problem, k: int, weight) -> Problem:
    """The problem where client ``k`` lacks the module; ``weight`` are the new weights."""
    B = [b[:, :0] if i == k else b for i, b in enumerate(problem.B)]
    A = [a[:0] if i == k else a for i, a in enumerate(problem.A)]
    scale = [0.0 if i == k else s for i, s in enumerate(problem.scale)]
    return Problem(B, A, scale, list(weight))


def products(outcome: Outcome) -> torch.Tensor:
    """Products of all modules of a group."""
    return torch.stack([product(cut(outcome, i)) for i in range(len(outcome.rank))])


def cut(outcome: Outcome, i: int) -> Outcome:
    return replace(outcome, B=outcome.B[i : i + 1], A=outcome.A[i : i + 1], rank=outcome.rank[i : i + 1])


def off_orthonormal(A: torch.Tensor) -> float:
    return float((A.double() @ A.double().T - torch.eye(A.shape[0], dtype=torch.float64)).abs().max())
