"""What robust rules look at: inner products of updates from their factors, and distances made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import VARIANTS, Problem, standard

from fedlora_kernels.methods.factors import client_gram
from fedlora_kernels.methods.robust import NOISE, ascending, near_twins, scaled, squared_distances

BACKENDS = ["reference", "torch", "auto"]


def gram(problem, backend="torch"):
    return client_gram(problem.group(backend=backend))[0].numpy()


def dense_gram(problem):
    flat = torch.stack([d.flatten() for d in problem.updates()])
    return (flat @ flat.T).numpy()


def nearby(relative, dtype=torch.float32):
    """Two clients of one update, the second off by a relative change of its factors."""
    p = standard(m=43, n=29, ranks=(5,), dtype=torch.float64)
    made = torch.Generator().manual_seed(9)
    noise = torch.randn(p.B[0].shape, generator=made, dtype=torch.float64)
    B = [p.B[0].to(dtype), (p.B[0] + relative * noise).to(dtype)]
    return Problem(B, [p.A[0].to(dtype)] * 2, [2.0, 2.0], [0.5, 0.5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gram_equals_the_dense_gram(variant, backend):
    problem = VARIANTS[variant]()
    G, dense = gram(problem, backend), dense_gram(problem)
    root = np.sqrt(np.diag(dense))
    assert (np.abs(G - dense) <= 1e-12 * np.outer(root, root)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gram_is_symmetric_and_positive_semidefinite(variant, backend):
    G = gram(VARIANTS[variant](), backend)
    assert np.array_equal(G, G.T)
    values = np.linalg.eigvalsh(G)
    assert values[0] >= -1e-12 * values[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_of_narrow_factors_is_that_of_the_upcast_ones(dtype):
    problem = standard(scale=(1.0,) * 5, dtype=dtype)
    dense = dense_gram(problem)
    root = np.sqrt(np.diag(dense))
    assert (np.abs(gram(problem) - dense) <= 1e-12 * np.outer(root, root)).all()


def test_gram_follows_the_scale_and_not_the_weights():
    problem = standard()
    doubled = replace(problem, scale=[2.0 * problem.scale[0], *problem.scale[1:]], weight=[0.2] * 5)
    factor = np.array([2.0, 1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(gram(doubled), gram(problem) * np.outer(factor, factor), rtol=1e-14)


@pytest.mark.parametrize("variant", ["standard", "duplicates", "one_zero_client"])
def test_distances_are_those_of_dense_updates(variant):
    problem = VARIANTS[variant]()
    G = gram(problem)
    updates = torch.stack([d.flatten() for d in problem.updates()])
    dense = (torch.cdist(updates, updates, compute_mode="donot_use_mm_for_euclid_dist") ** 2).numpy()
    squares = np.diag(G)
    assert (np.abs(squared_distances(G) - dense) <= 1e-13 * np.add.outer(squares, squares)).all()


@pytest.mark.parametrize("relative", [1e-4, 1e-5])
def test_distances_of_nearly_equal_float32_clients_keep_their_digits(relative):
    problem = nearby(relative)
    one, two = problem.updates()
    dense = float(((one - two) ** 2).sum())
    assert squared_distances(gram(problem))[0, 1] == pytest.approx(dense, rel=1e-3 if relative < 1e-4 else 1e-5)
    if relative == 1e-4:  # what the test is for: in float32 the same expression is lost
        narrow = gram(problem).astype(np.float32)
        lost = narrow[0, 0] + narrow[1, 1] - np.float32(2) * narrow[0, 1]
        assert abs(float(lost) - dense) > 0.1 * dense


def test_distances_are_never_negative_and_zero_to_oneself():
    G = np.array([[1.0, 1.0 + 1e-15, 0.3], [1.0 + 1e-15, 1.0, 0.3], [0.3, 0.3, 2.0]])
    distances = squared_distances(G)
    assert (distances >= 0.0).all()
    assert (np.diag(distances) == 0.0).all()
    assert distances[0, 1] == 0.0
    assert distances[0, 2] == pytest.approx(2.4)


def test_near_twins_are_the_pairs_whose_distance_is_rounding():
    p = standard(m=31, n=23, ranks=(4, 4, 4))
    copies = Problem([*p.B, p.B[1]], [*p.A, p.A[1]], [*p.scale, p.scale[1]], [0.25] * 4)
    assert near_twins(gram(copies)) == [(1, 3)]
    assert near_twins(gram(copies.gauged())) == [(1, 3)]
    assert near_twins(gram(p)) == []
    assert near_twins(gram(nearby(1e-4))) == []
    assert near_twins(gram(nearby(1e-8, torch.float64))) == [(0, 1)]


def test_near_twins_stand_at_a_thousand_roundings():
    def pair(share):
        return np.array([[1.0, 1.0 - share], [1.0 - share, 1.0]])

    assert near_twins(pair(0.99 * NOISE)) == [(0, 1)]
    assert near_twins(pair(1.01 * NOISE)) == []
    assert pytest.approx(1e3 * 2.0**-53) == NOISE


def test_zero_updates_and_updates_near_the_limits_of_float64_are_no_false_twins():
    assert near_twins(np.zeros((3, 3))) == []
    assert near_twins(np.diag([1.7e308, 1.7e308, 1e-300])) == []
    assert near_twins(np.full((2, 2), 1.7e308)) == [(0, 1)]


@pytest.mark.parametrize("top", [5e-324, 1e-300, 1.0, 3.0, 1.7e308])
def test_scaling_is_by_a_power_of_two(top):
    G = np.diag([top, top / 4])
    unit_gram, unit = scaled(G)
    assert np.frexp(unit)[0] == 0.5
    assert 0.25 <= unit_gram[0, 0] < 4.0
    assert np.array_equal(unit_gram * unit * unit, G)


def test_scaling_zero_is_zero():
    unit_gram, unit = scaled(np.zeros((2, 2)))
    assert unit == 1.0
    assert not unit_gram.any()


def test_order_ties_go_to_the_lowest_index():
    assert ascending(np.array([3.0, 1.0, 2.0, 1.0]), np.zeros(4)).tolist() == [1, 3, 2, 0]
    assert ascending(np.array([2.0 + 1e-15, 2.0, 5.0, 1.0]), np.full(4, 1e-14)).tolist() == [3, 0, 1, 2]
    assert ascending(np.zeros(3), np.zeros(3)).tolist() == [0, 1, 2]
    assert ascending(np.zeros(0), np.zeros(0)).tolist() == []


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_order_without_noise_is_a_stable_sort(values):
    value = np.array(values, np.float64)
    assert ascending(value, np.zeros(len(value))).tolist() == np.argsort(value, kind="stable").tolist()
