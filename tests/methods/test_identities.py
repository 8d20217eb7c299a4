"""Identities between methods (docs/algorithms.md, Identities between methods), on the dense float64 model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_problems import COUNTS, Problem, distance, normalised, product, standard

from fedlora_kernels.linalg.rules import Energy

ALL = Energy(1.0)
EXACT = ("florist", "flora")
MEANS = ("fedit", "zero_pad", "hetlora")
EVERY = EXACT + MEANS


def run(problem: Problem, method: str) -> torch.Tensor:
    """Product of a method; HetLoRA's weights from the norms of this one module."""
    plan = None
    if method == "hetlora":
        norms = np.array([float(d.norm()) for d in problem.updates()])
        plan = norms / norms.sum() if norms.any() else np.array(problem.weight)
    return product(problem.run(method, plan=plan, rule=ALL if method == "florist" else None))


def equal_ranks() -> Problem:
    return standard(m=41, n=31, ranks=(6, 6, 6, 6, 6), scale=(2.0,) * 5)


def test_exact_methods_agree_with_the_dense_sum():
    problem = standard()
    for method in EXACT:
        assert distance(run(problem, method), problem.dense()) < 1e-12


def test_equal_ranks_make_zero_padding_and_fedit_one():
    problem = equal_ranks()
    assert distance(run(problem, "zero_pad"), run(problem, "fedit")) == 0.0


def test_equal_norms_make_hetlora_the_uniform_mean():
    problem = equal_ranks()
    B = [b / d.norm() for b, d in zip(problem.B, problem.updates(), strict=True)]
    problem = replace(problem, B=B)
    uniform = replace(problem, weight=[0.2] * 5)
    assert distance(run(problem, "hetlora"), run(uniform, "fedit")) < 1e-14


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_common_factor_makes_means_exact(factor):
    problem = replace(equal_ranks(), **{factor: [getattr(equal_ranks(), factor)[0]] * 5})
    for method in (*EXACT, "fedit", "zero_pad"):
        assert distance(run(problem, method), problem.dense()) < 1e-12


@pytest.mark.parametrize("method", EVERY)
def test_one_client_returns_its_update(method):
    problem = standard(ranks=(7,))
    assert distance(run(problem, method), problem.dense()) < 1e-12


@pytest.mark.parametrize("method", EVERY)
def test_identical_clients_return_that_update(method):
    one = standard(ranks=(7,))
    many = Problem(one.B * 4, one.A * 4, one.scale * 4, normalised(COUNTS[:4]))
    assert distance(run(many, method), one.dense()) < 1e-12


@pytest.mark.parametrize("method", ["florist", "flora", "fedit", "zero_pad"])
def test_splitting_a_client_changes_nothing(method):
    problem = equal_ranks()
    order = [0, 1, 1, 2, 3, 4]
    split = replace(problem.permuted(order), weight=[problem.weight[k] / (2 if k == 1 else 1) for k in order])
    assert distance(run(split, method), run(problem, method)) < 1e-12


def test_splitting_a_client_changes_hetlora():
    problem = equal_ranks()
    order = [0, 1, 1, 2, 3, 4]
    split = replace(problem.permuted(order), weight=[problem.weight[k] / (2 if k == 1 else 1) for k in order])
    assert distance(run(split, "hetlora"), run(problem, "hetlora")) > 1e-3


@pytest.mark.parametrize("method", EXACT)
def test_two_levels_equal_one(method):
    problem = standard()
    parts = []
    for chosen in ([0, 2], [1, 3, 4]):
        mass = sum(problem.weight[k] for k in chosen)
        part = problem.permuted(chosen)
        outcome = replace(part, weight=[w / mass for w in part.weight]).run(
            method, rule=ALL if method == "florist" else None
        )
        parts.append((outcome.B[0], outcome.A[0], mass))
    top = Problem([b for b, _, _ in parts], [a for _, a, _ in parts], [1.0, 1.0], [mass for _, _, mass in parts])
    assert distance(run(top, method), problem.dense()) < 1e-12


@pytest.mark.parametrize("method", EVERY)
def test_a_gauge_changes_means_and_nothing_else(method):
    problem = equal_ranks()
    moved = distance(run(problem.gauged(), method), run(problem, method))
    assert moved < 1e-12 if method in EXACT else moved > 0.05


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("c", [0.3, 7.0])
def test_scaling_every_update_scales_the_output(method, c):
    problem = equal_ranks()
    scaled = replace(problem, scale=[c * s for s in problem.scale])
    assert distance(run(scaled, method), c * run(problem, method)) < 1e-12


@pytest.mark.parametrize("method", EXACT)
def test_unequal_scales_are_in_the_sum(method):
    problem = standard(scale=(0.5, 3.0, 1.0, 2.0, 4.0))
    assert distance(run(problem, method), problem.dense()) < 1e-12


def test_rotated_copies_fool_the_mean_of_factors():
    one = standard(m=41, n=31, ranks=(6,), scale=(2.0,))
    made = torch.Generator().manual_seed(2)
    turns = [torch.linalg.qr(torch.randn(6, 6, generator=made, dtype=torch.float64))[0] for _ in range(5)]
    problem = Problem([one.B[0] @ q for q in turns], [q.T @ one.A[0] for q in turns], [2.0] * 5, normalised(COUNTS))
    for method in EXACT:
        assert distance(run(problem, method), one.dense()) < 1e-12
    assert distance(run(problem, "fedit"), one.dense()) > 0.3
