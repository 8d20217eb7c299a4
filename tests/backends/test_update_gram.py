"""`update_gram` of every backend: inner products of the clients' updates."""

import dataclasses

import pytest
import torch
from frames import DTYPES, dtype_id, every_backend, same_bits
from products import factors

from fedlora_kernels.backends.contract import Factors
from fedlora_kernels.testing import FAMILIES, LoRAProblem, assert_close, tolerance
from fedlora_kernels.testing.factors import gaussian, random_column_gauge

backends = every_backend("update_gram")
RANKS = (5, 3, 0, 8)


def gram(backend, *groups):
    return backend(list(groups), dtype=torch.float32)


def dense(problem):
    """Inner products of the dense weighted updates, and the products of the factor norms that bound their errors."""
    D = torch.stack(
        [w * (b.double() @ a.double()) for w, b, a in zip(problem.weights, problem.B, problem.A, strict=True)]
    )
    sizes = torch.stack(
        [
            abs(w) * (b.double().norm(dim=0) * a.double().norm(dim=1)).sum()
            for w, b, a in zip(problem.weights, problem.B, problem.A, strict=True)
        ]
    )
    return D.flatten(1) @ D.flatten(1).mT, sizes[:, None] * sizes


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_dense_updates(backend, family, dtype):
    ranks = (5, 5, 5, 5) if "cancelling" in family or "identical" in family else (5, 3, 1, 8)
    problem = FAMILIES[family](43, 31, ranks, 1).to(dtype)
    if not all(torch.isfinite(block).all() for block in problem.B + problem.A):
        pytest.skip(f"{family} leaves the range of {dtype}")
    expected, scale = dense(problem)
    found = gram(backend, factors(problem))[0][0]
    assert found.dtype == torch.float64
    assert ((found - expected).abs() <= tolerance("gram") * scale).all()


@backends
def test_symmetric_batched_and_several_groups(backend):
    problems = [gaussian(43, 31, RANKS, seed).to(torch.float32) for seed in range(3)]
    other = gaussian(7, 11, (2, 9), 3)
    found, last = gram(backend, factors(*problems), factors(other))
    assert found.shape == (3, 4, 4)
    assert torch.equal(found, found.mT)
    for i, problem in enumerate(problems):
        expected, scale = dense(problem)
        assert ((found[i] - expected).abs() <= tolerance("gram") * scale).all()
        if backend.bitwise:
            assert same_bits(found[i], gram(backend, factors(problem))[0][0])
    assert_close(last[0], dense(other)[0], 1e-13)
    assert (found[:, 2] == 0).all()


@backends
@pytest.mark.parametrize("where", ["B", "A"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bad_client_spoils_its_own_row_and_column(backend, dtype, value, where):
    problems = [gaussian(43, 31, (5, 3, 8), seed).to(dtype) for seed in range(3)]
    group = factors(*problems)
    clean = gram(backend, group)[0]
    getattr(group, where)[1][2, 1, 2] = value
    found = gram(backend, group)[0]
    expected = clean.clone()
    expected[2, 1] = expected[2, :, 1] = torch.nan
    assert torch.equal(found.isnan(), expected.isnan())
    assert_close(found.nan_to_num(0.0), expected.nan_to_num(0.0), 1e-14)


@backends
def test_many_narrow_clients(backend):
    """Wider than one tile of clients."""
    problem = gaussian(13, 17, (23,) * 70, 1)
    if backend.name == "reference":
        problem = LoRAProblem(problem.B[:9], problem.A[:9], problem.weights[:9])
    expected, scale = dense(problem)
    assert ((gram(backend, factors(problem))[0][0] - expected).abs() <= tolerance("gram") * scale).all()


@backends
@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("clients", [0, 2])
def test_nothing_to_do(backend, clients, size):
    group = Factors(
        (torch.ones(size, 7, 3),) * clients,
        (torch.ones(size, 3, 5),) * clients,
        torch.ones(size, clients, dtype=torch.float64),
        7,
        5,
        5,
    )
    found = gram(backend, group)[0]
    assert found.shape == (size, clients, clients)
    assert found.dtype == torch.float64


@backends
@pytest.mark.parametrize(("m", "n", "rank"), [(0, 5, 3), (5, 0, 3), (5, 7, 0)])
def test_empty_factors_have_no_inner_product(backend, m, n, rank):
    group = Factors(
        (torch.ones(1, m, rank),), (torch.ones(1, rank, n),), torch.ones(1, 1, dtype=torch.float64), m, n, 0
    )
    assert gram(backend, group)[0].tolist() == [[[0.0]]]


@backends
@pytest.mark.parametrize(("big", "small"), [(1e200, 1e-190), (1e-200, 1e180)])
def test_float64_that_overflows_when_squared(backend, big, small):
    base = gaussian(19, 13, (4, 3), 1)
    problem = LoRAProblem(tuple(b * big for b in base.B), tuple(a * small for a in base.A), base.weights)
    factor = (big * small) ** 2
    assert_close(gram(backend, factors(problem))[0] / factor, gram(backend, factors(base))[0], 1e-13)


@backends
@pytest.mark.parametrize("exponent", [300, 900])
def test_opposite_gauges_at_the_ends_of_float64(backend, exponent):
    t, base = 2.0**exponent, gaussian(19, 13, (4, 3), 1)
    up = torch.tensor([t, 1 / t, 1.0, t], dtype=torch.float64)
    (B_0, B_1), (A_0, A_1), (w_0, w_1) = base.B, base.A, base.weights.tolist()
    weights = torch.tensor([w_0, w_1 / t], dtype=torch.float64)
    wild = LoRAProblem((B_0 * up, B_1 * t), (A_0 / up[:, None], A_1), weights)
    found, expected = (gram(backend, factors(problem))[0] for problem in (wild, base))
    assert_close(found, expected, 1e-14)


@backends
def test_weights_act_as_numbers(backend):
    base = gaussian(19, 13, (4, 3), 1)
    heavy = dataclasses.replace(base, weights=torch.tensor([-2.0, 0.5], dtype=torch.float64))
    unit = dataclasses.replace(base, weights=torch.ones(2, dtype=torch.float64))
    found, plain = gram(backend, factors(heavy))[0][0], gram(backend, factors(unit))[0][0]
    assert_close(found, plain * torch.tensor([[4.0, -1.0], [-1.0, 0.25]]), 1e-14)


@backends
def test_gauges_cancel_and_inputs_stay(backend, poisoned_empty):
    problem = random_column_gauge(19, 13, (4, 3), 1, decades=6.0)
    group = factors(problem)
    before = [x.clone() for x in (*group.B, *group.A)]
    expected, scale = dense(problem)
    assert ((gram(backend, group)[0][0] - expected).abs() <= tolerance("gram") * scale).all()
    assert all(same_bits(x, y) for x, y in zip(before, (*group.B, *group.A), strict=True))
