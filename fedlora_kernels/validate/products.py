"""Calls of `product_svd` and `update_gram` over all families of LoRA factors, through every route."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fedlora_kernels import linalg
from fedlora_kernels.backends.contract import Note
from fedlora_kernels.linalg import RankRule
from fedlora_kernels.testing import LORA, Exact, LoRAProblem, check_gram, check_product, exact_svd, householder_svd
from fedlora_kernels.validate.calls import DTYPES, LAPACK, Call, Form, Verdict, row_of, size_class, to_device

__all__ = ["product_svd_calls", "update_gram_calls"]

OUTPUTS = ("usv", "left", "balanced")
QUICK_SHAPES = ((37, 29, (4, 4, 4, 4)), (41, 23, (5, 3, 8)), (9, 17, (10, 10)), (150, 121, (24, 24)))
FULL_SHAPES = (
    *QUICK_SHAPES,
    (53, 37, (5, 3, 8, 1)),  # tall
    (29, 61, (7, 7)),  # wide
    (13, 47, (9, 8)),  # q < R < 2q
    (16, 40, (8, 8)),  # R = q
    (11, 31, (11, 11)),  # R = 2q: dense
    (7, 19, (20, 20)),  # R > 2q
    (17, 19, (1,)),  # R = 1
    (1, 23, (1, 1)),  # vectors
    (31, 43, (6,)),  # one client
    (997, 5, (2, 2)),  # m much larger than n
    (3, 1009, (1, 1)),
    (64, 64, (16, 16)),
    (331, 257, (64, 64)),
    (700, 555, (128, 128)),
)
LARGE = (
    "gaussian",
    "signed_weights",
    "shared_subspace",
    "column_gauge",
    "spectrum_geometric",
    "spectrum_half_rank",
    "identical_clients",
)
"""Families for sizes where extended precision would take too long: those that Householder resolves in float64."""
EXACT_SIZE = 70


def wishes(form: Form, R: int, large: bool) -> list[tuple[RankRule, str]]:
    """Rules and outputs to run: three in the quick form, all of them where that costs little."""
    quick: list[tuple[RankRule, str]] = [
        (linalg.Energy(1.0), "usv"),
        (linalg.Energy(0.9), "left"),
        (linalg.Rank(3), "balanced"),
    ]
    if not form.full or large:
        return quick
    thresholds: list[RankRule] = [linalg.Energy(tau) for tau in (1e-12, 0.9, 0.999, 0.999999, 1 - 1e-12, 1.0)]
    ranks: list[RankRule] = [linalg.Rank(1), linalg.Rank(R), linalg.Rank(R + 5), linalg.Energy(1.0).capped(2)]
    rest: list[RankRule] = [linalg.Frobenius(0.95), linalg.SingularValueRatio(10.0), linalg.SingularValueSum(0.9)]
    rules = [*thresholds, *ranks, *rest]
    return [(rule, OUTPUTS[i % 3]) for i, rule in enumerate(rules)] + [
        (linalg.Energy(1.0), output) for output in OUTPUTS
    ]


def product_svd_calls(form: Form) -> Iterator[Call]:
    """All families on every shape; the route (one pass, two passes, dense) is what the certificate of each answer says."""
    for number, (m, n, ranks) in enumerate(FULL_SHAPES if form.full else QUICK_SHAPES):
        large = min(m, n) > EXACT_SIZE
        for shift, dtype in enumerate(DTYPES):
            names = LARGE if large else tuple(LORA)
            # a quick run takes a third of the families for each shape and dtype, every one with two dtypes or more
            sample = names if form.full or large else names[(number + shift) % 3 :: 3]
            groups, left_out = _problems(form, m, n, ranks, dtype, sample)
            for problems in groups:
                exact = functools.cache(functools.partial(_exact, tuple(problems.values()), large))
                for rule, output in wishes(form, sum(ranks), large):
                    yield _product_call(problems, exact, rule, output, left_out)


def _exact(problems: Sequence[LoRAProblem], large: bool, i: int) -> Exact:
    return householder_svd(problems[i]) if large else exact_svd(problems[i])


def _ranks_for(name: str, ranks: Sequence[int]) -> tuple[int, ...]:
    """Families of twins need equal ranks, pairs an even number of clients."""
    if "cancelling" in name:
        return (ranks[0],) * (2 * max(1, len(ranks) // 2))
    return (ranks[0],) * len(ranks) if "identical" in name else tuple(ranks)


def _problems(
    form: Form, m: int, n: int, ranks: Sequence[int], dtype: torch.dtype, names: Iterable[str]
) -> tuple[list[dict[str, LoRAProblem]], tuple[str, ...]]:
    """Problems by name, those of one set of ranks together, and the names of those that leave the range of the dtype."""
    groups: dict[tuple[int, ...], dict[str, LoRAProblem]] = {}
    left_out = []
    for name in names:
        problem = LORA[name](m, n, _ranks_for(name, ranks), form.seed).to(dtype)
        if all(torch.isfinite(block).all() for block in problem.B + problem.A):
            groups.setdefault(problem.ranks, {})[name] = problem
        else:
            left_out.append(name)
    return list(groups.values()), tuple(left_out)


def _batch(problems: Mapping[str, LoRAProblem]) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    given = list(problems.values())
    clients = range(len(given[0].B))
    B = [torch.stack([problem.B[k] for problem in given]) for k in clients]
    A = [torch.stack([problem.A[k] for problem in given]) for k in clients]
    return B, A, torch.stack([problem.weights for problem in given])


def _sizes(problems: Mapping[str, LoRAProblem]) -> dict[str, int]:
    first = next(iter(problems.values()))
    m, n = first.B[0].shape[0], first.A[0].shape[1]
    return {"m": m, "n": n, "R": sum(first.ranks), "K": len(first.ranks), "N": len(problems)}


def _product_call(
    problems: Mapping[str, LoRAProblem], exact: Any, rule: RankRule, output: str, left_out: tuple[str, ...]
) -> Call:
    B, A, weights = _batch(problems)
    sizes, dtype, spec = _sizes(problems), B[0].dtype, rule.spec()
    shape = f"{sizes['m']} x {sizes['n']}, R {sizes['R']}"
    width = size_class("R", sizes["R"], (32,))
    cases = tuple(f"{name} {shape}, {rule}, {output}" for name in problems)

    def run(backend: str, device: torch.device) -> Any:
        given_B, given_A = to_device(B, device), to_device(A, device)
        result = linalg.product_svd(
            given_B, given_A, weights=weights, rule=rule, output=output, backend=backend, check=False
        )
        return to_device(result, torch.device("cpu"))

    def judge(backend: str, result: Any) -> Iterable[Verdict]:
        for i, case in enumerate(cases):
            row = row_of(result, i)
            checks = check_product(row, exact(i), spec, output, sizes["R"], lapack=backend in LAPACK)
            yield Verdict(case, checks, f"{_route(row)}, {width}", output)

    return Call("product_svd", width, dtype, sizes, cases, run, judge, left_out)


def _route(row: Any) -> str:
    if int(row.notes) & Note.DENSE:
        return "dense"
    return "two passes" if int(row.certificate.passes) == 2 else "one pass"


def update_gram_calls(form: Form) -> Iterator[Call]:
    """Inner products of all families, a few shapes."""
    shapes = ((37, 29, (4, 4, 4, 4)), (41, 23, (5, 3, 8)), (9, 17, (10, 10)), (300, 211, (32, 32, 32)))
    for m, n, ranks in FULL_SHAPES[4:] if form.full else shapes:
        for dtype in DTYPES:
            groups, left_out = _problems(form, m, n, ranks, dtype, LORA)
            for problems in groups:
                yield _gram_call(problems, left_out)


def _gram_call(problems: Mapping[str, LoRAProblem], left_out: tuple[str, ...]) -> Call:
    B, A, weights = _batch(problems)
    sizes = _sizes(problems)
    cases = tuple(f"{name} {sizes['m']} x {sizes['n']}, R {sizes['R']}" for name in problems)

    def run(backend: str, device: torch.device) -> Any:
        given_B, given_A = to_device(B, device), to_device(A, device)
        G = linalg.update_gram(given_B, given_A, weights=weights, backend=backend, check=False)
        return to_device(G, torch.device("cpu"))

    def judge(_: str, result: Any) -> Iterable[Verdict]:
        for i, (case, problem) in enumerate(zip(cases, problems.values(), strict=True)):
            yield Verdict(case, check_gram(problem, result[i]))

    regime = size_class("R", sizes["R"], (32, 128))
    return Call("update_gram", regime, B[0].dtype, sizes, cases, run, judge, left_out)
