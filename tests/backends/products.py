"""What the tests of product_svd and update_gram share: problems as raw backend calls."""

import torch

from fedlora_kernels.backends.contract import Factors, RawProduct, RuleCode, RuleSpec

ALL = RuleSpec(RuleCode.ENERGY, 1.0)
U64 = 2.0**-53


def energy(tau, cap=0):
    return RuleSpec(RuleCode.ENERGY, tau, cap)


def factors(*problems, cap=None):
    """Equally shaped `LoRAProblem`s with the same weights of zero, as one group; those blocks are dropped as the API does."""
    first = problems[0]
    kept = [k for k in range(len(first.B)) if first.weights[k] != 0]
    m, n = (first.B[0].shape[0], first.A[0].shape[1]) if first.B else (0, 0)
    return Factors(
        tuple(torch.stack([problem.B[k] for problem in problems]) for k in kept),
        tuple(torch.stack([problem.A[k] for problem in problems]) for k in kept),
        torch.stack([problem.weights[kept] for problem in problems]),
        m,
        n,
        min(m, n, sum(first.ranks), cap or m),
    )


def row(raw, i=0):
    """Matrix i of a raw record."""
    return type(raw)(*(field[i] for field in raw))


def product(backend, problem, rule=ALL, output="usv", dtype=None):
    """Result of one problem, without batch dimension."""
    dtype = dtype or (problem.B[0].dtype if problem.B else torch.float32)
    group = factors(problem, cap=rule.cap)
    return row(call(backend, [group], rule, output, dtype)[0])


def call(backend, groups, rule=ALL, output="usv", dtype=torch.float32):
    sizes = {
        "m": max(group.m for group in groups),
        "n": max(group.n for group in groups),
        "R": max(group.width for group in groups),
        "N": max(group.batch for group in groups),
        "K": max(len(group.B) for group in groups),
    }
    return backend(groups, rule, output, dtype, dtype=dtype, **sizes)


def matrix(result, output="usv"):
    """What left and right stand for, in float64."""
    left, right = result.left.double(), result.right.double()
    return left * result.S @ right if output == "usv" else left @ right


def is_blank(result: RawProduct):
    return not (result.left.any() or result.right.any() or result.S.any() or result.rank)
