"""`stacked_qr` of every backend over the whole gallery, cut into blocks, and over what clients add to it."""

import itertools

import pytest
import torch
from frames import DTYPES, every_backend

from fedlora_kernels.backends.contract import Stack
from fedlora_kernels.testing import STACKS, check_qr

backends = every_backend("stacked_qr")
SHAPES = ((29, (5, 3)), (13, (9, 8)), (16, (8, 8)), (67, (5, 7, 1)))
MORE = ((1, (1,)), (1, (3, 2)), (2, (2,)), (5, (16, 16)), (19, (7, 12)), (83, (16, 16)), (211, (32, 31)))


def judge(backend, name, shape, dtype, want_q, seed=0):
    m, ranks = shape
    problem = STACKS[name](m, ranks, seed, dtype)
    kept = [k for k in range(len(ranks)) if problem.weights[k] != 0]  # the API removes clients of weight 0
    if not kept:
        return
    X = torch.cat([problem.weights[k] * problem.blocks[k].double() for k in kept], 1)
    if not torch.isfinite(X.norm(dim=0).to(torch.float64 if dtype == torch.float64 else torch.float32)).all():
        return
    stack = Stack(tuple(problem.blocks[k][None] for k in kept), problem.weights[kept][None], m)
    (raw,) = backend([stack], want_q, dtype=dtype, m=m, R=stack.width, K=len(kept), N=1)
    row = type(raw)(*(field if field is None else field[0] for field in raw))
    failed = [check for check in check_qr(X, row, rank=problem.rank) if not check.passed]
    assert not failed, f"{name} {shape}: {failed}"


@backends
@pytest.mark.parametrize("name", STACKS)
def test_stacks(backend, name):
    number = list(STACKS).index(name)
    judge(backend, name, SHAPES[number % len(SHAPES)], DTYPES[number // 2 % len(DTYPES)], number % 3 > 0)


@pytest.mark.full
@backends
@pytest.mark.parametrize("name", STACKS)
def test_stacks_full(backend, name):
    for dtype, want_q, (seed, shape) in itertools.product(DTYPES, (False, True), enumerate((*SHAPES, *MORE))):
        judge(backend, name, shape, dtype, want_q, seed)
