"""`product_svd` and `update_gram` of every backend over all families of LoRA factors and their variants."""

import functools
import itertools

import pytest
import torch
from frames import DTYPES, every_backend
from products import ALL, energy, factors, product

from fedlora_kernels.backends.contract import RuleCode, RuleSpec
from fedlora_kernels.testing import LORA, check_gram, check_product, exact_svd

SHAPES = ((37, 29, (4, 4, 4, 4)), (41, 23, (5, 3, 8)), (9, 17, (10, 10)), (23, 31, (6,)))
MORE = (
    (29, 61, (7, 7)),
    (13, 47, (9, 8)),
    (16, 40, (8, 8)),
    (11, 31, (11, 11)),
    (7, 19, (20, 20)),
    (1, 23, (1, 1)),
    (17, 19, (1,)),
)
RULES = ((ALL, "usv"), (energy(0.9), "left"), (RuleSpec(RuleCode.RANK, 3.0), "balanced"))
LAPACK = ("torch", "reference")


@functools.cache
def problem_of(name, shape, dtype):
    m, n, ranks = shape
    if "cancelling" in name:
        ranks = (ranks[0],) * (2 * max(1, len(ranks) // 2))
    problem = LORA[name](m, n, (ranks[0],) * len(ranks) if "identical" in name else ranks, 0).to(dtype)
    finite = all(torch.isfinite(block).all() for block in problem.B + problem.A)
    return (problem, functools.cache(lambda: exact_svd(problem))) if finite else None


def judge(backend, name, shape, dtype, rules):
    found = problem_of(name, shape, dtype)
    if found is None:
        return
    problem, exact = found
    for rule, output in rules:
        result = product(backend, problem, rule, output)
        checks = check_product(result, exact(), rule, output, sum(problem.ranks), lapack=backend.name in LAPACK)
        failed = [check for check in checks if not check.passed]
        assert not failed, f"{name} {shape} {rule} {output}: {failed}"


@every_backend("product_svd")
@pytest.mark.parametrize("name", LORA)
def test_products(backend, name):
    number = list(LORA).index(name)
    judge(backend, name, SHAPES[number % len(SHAPES)], DTYPES[number // 3 % len(DTYPES)], RULES)


@pytest.mark.full
@every_backend("product_svd")
@pytest.mark.parametrize("name", LORA)
def test_products_full(backend, name):
    for dtype, shape in itertools.product(DTYPES, (*SHAPES, *MORE)):
        judge(backend, name, shape, dtype, RULES)


@every_backend("update_gram")
@pytest.mark.parametrize("name", LORA)
def test_grams(backend, name):
    number = list(LORA).index(name)
    found = problem_of(name, SHAPES[number % len(SHAPES)], DTYPES[number // 3 % len(DTYPES)])
    if found is None:
        return
    problem = found[0]
    kept = [k for k in range(len(problem.B)) if problem.weights[k] != 0]
    whole = type(problem)(tuple(problem.B[k] for k in kept), tuple(problem.A[k] for k in kept), problem.weights[kept])
    G = backend([factors(whole)], dtype=whole.B[0].dtype)[0][0]
    failed = [check for check in check_gram(whole, G) if not check.passed]
    assert not failed, f"{name}: {failed}"
