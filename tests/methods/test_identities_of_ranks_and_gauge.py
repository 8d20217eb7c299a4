"""Identities across methods: equal ranks, a client alone, mixed ranks, and what a gauge of each client changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import Problem, distance, product, standard

from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Outcome

EXACT = ("florist", "flora", "flexlora", "fedex", "fedmomentum", "norm_clip")
EQUAL_RANK_MEANS = ("fedit", "fedrot", "lora_fair")
MEANS = ("zero_pad", "prelort", "raflora")
EQUAL_RANKS_ONLY = ("fedex", "fedmomentum", *EQUAL_RANK_MEANS)


def equal_ranks(rank=6, clients=5) -> Problem:
    return standard(m=41, n=31, ranks=(rank,) * clients, scale=(2.0, 0.5, 3.0, 1.0, 4.0)[:clients])


def total(outcome: Outcome) -> torch.Tensor:
    """What a client's weight gains: the common pair and the residual."""
    made = product(outcome)
    if outcome.residual is not None:
        B, A, rank = outcome.residual
        p = int(rank[0])
        made = made + B[0, :, :p].double() @ A[0, :p].double()
    return made


def run(problem: Problem, method: str) -> torch.Tensor:
    return total(problem.run(method, rule=Energy(1.0) if method == "florist" else None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_ranks_make_prelort_zero_padding_and_fedit_one(dtype):
    problem = replace(equal_ranks(), **{f: [x.to(dtype) for x in getattr(equal_ranks(), f)] for f in ("B", "A")})
    fedit = problem.run("fedit")
    for method in ("prelort", "zero_pad"):
        outcome = problem.run(method)
        assert torch.equal(outcome.B, fedit.B)
        assert torch.equal(outcome.A, fedit.A)


def test_equal_norms_and_ranks_make_hetlora_prelort_with_uniform_weights():
    problem = equal_ranks()
    problem = replace(problem, B=[b / d.norm() for b, d in zip(problem.B, problem.updates(), strict=True)])
    uniform = replace(problem, weight=[0.2] * 5).run("prelort")
    assert distance(product(problem.run("hetlora", plan=np.full(5, 0.2))), product(uniform)) < 1e-14


@pytest.mark.parametrize("method", [*EXACT, *EQUAL_RANK_MEANS, *MEANS])
def test_one_client_returns_its_update(method):
    problem = standard(m=41, n=31, ranks=(7,), scale=(3.0,))
    assert distance(run(problem, method), problem.dense()) < 1e-12


def test_equal_ranks_give_raflora_the_target_of_the_exact_methods():
    problem = standard(m=9, n=31, ranks=(9,) * 3)
    assert distance(run(problem, "raflora"), problem.dense()) < 1e-12


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_mixed_ranks_part_raflora_from_prelort_and_both_from_the_sum(seed):
    problem = standard(m=41, n=31, seed=seed)
    raflora, prelort, D = run(problem, "raflora"), run(problem, "prelort"), problem.dense()
    assert distance(raflora, prelort) > 0.1
    assert distance(raflora, D) > 0.1
    assert distance(prelort, D) > 0.1


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("seed", [5, 6])
def test_a_gauge_of_each_client_changes_no_exact_method(method, seed):
    problem = equal_ranks() if method in EQUAL_RANKS_ONLY else standard()
    assert distance(run(problem.gauged(seed), method), run(problem, method)) < 1e-11


@pytest.mark.parametrize("method", [*MEANS, "fedit"])
def test_a_gauge_of_each_client_must_change_means_of_factors(method):
    """A guard: were these unmoved, the test above would test nothing."""
    problem = equal_ranks() if method == "fedit" else standard()
    assert distance(run(problem.gauged(), method), run(problem, method)) > 0.05


def test_a_gauge_must_change_the_pair_of_fedex_if_not_the_sum():
    problem = equal_ranks()
    assert distance(product(problem.gauged().run("fedex")), product(problem.run("fedex"))) > 0.05
