"""HetLoRA: weights from the norms of whole updates."""

import numpy as np
import pytest
import torch
from method_problems import distance, product, standard

from fedlora_kernels.methods.contract import Census, make_method


def census(gram, weight):
    L, K, _ = gram.shape
    return Census(
        modules=tuple(f"layers.{i}" for i in range(L)),
        gram=None,
        squares=np.einsum("lkk->lk", gram),
        clients=tuple(f"c{k}" for k in range(K)),
        ranks=np.full((L, K), 4),
        weight=np.asarray(weight, np.float64),
        shapes=np.full((L, 2), 7),
    )


def test_weights_are_shares_of_the_norm_over_all_modules():
    gram = np.zeros((2, 3, 3))
    gram[0] = np.diag([9.0, 0.0, 1.0])
    gram[1] = np.diag([16.0, 4.0, 0.0])
    plan = make_method("hetlora", {}).decide({}, census(gram, [0.2, 0.3, 0.5]))
    np.testing.assert_allclose(plan, np.array([5.0, 2.0, 1.0]) / 8.0, rtol=1e-15)


def test_all_norms_zero_fall_back_to_the_sample_weights():
    plan = make_method("hetlora", {}).decide({}, census(np.zeros((2, 3, 3)), [0.2, 0.3, 0.5]))
    np.testing.assert_array_equal(plan, [0.2, 0.3, 0.5])


def test_factors_are_padded_means_with_the_plan():
    p = standard()
    plan = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    outcome = p.run("hetlora", plan=plan)
    B = torch.zeros(48, 12, dtype=torch.float64)
    A = torch.zeros(12, 40, dtype=torch.float64)
    for q, s, b, a in zip(plan, p.scale, p.B, p.A, strict=True):
        B[:, : b.shape[1]] += q * s * b
        A[: a.shape[0]] += q * a
    assert distance(outcome.B[0], B) < 1e-14
    assert distance(outcome.A[0], A) < 1e-14


def test_error_is_measured_against_the_sample_weighted_sum():
    p = standard()
    outcome = p.run("hetlora", plan=np.array([0.4, 0.1, 0.1, 0.1, 0.3]))
    assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), p.dense()), rel=1e-10)


def test_equal_norms_are_fedit_with_uniform_weights():
    p = standard(ranks=(5, 5, 5), counts=(1, 1, 1))
    outcome = p.run("hetlora", plan=np.full(3, 1 / 3))
    assert torch.equal(outcome.B, p.run("fedit").B)


def test_owners_alone_share_a_module_that_others_lack():
    p = standard(ranks=(4, 6))
    plan = np.array([0.2, 0.3, 0.5])
    absent = type(p)([*p.B, p.B[0][:, :0]], [*p.A, p.A[0][:0]], [*p.scale, 0.0], [0.4, 0.6, 0.0])
    outcome = absent.run("hetlora", plan=plan)
    assert distance(outcome.A[0], p.run("hetlora", plan=np.array([0.4, 0.6])).A[0]) < 1e-14


def test_a_client_receives_no_more_than_its_own_rank():
    method = make_method("hetlora", {})
    assert [method.client_rank(r, 12) for r in (4, 12, 16)] == [4, 12, 12]
