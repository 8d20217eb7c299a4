"""Zero-padding: factor means of mixed ranks."""

from dataclasses import replace

import pytest
import torch
from method_problems import distance, product, standard


def padded(p):
    r = max(b.shape[1] for b in p.B)
    B, A = [], []
    for b, a in zip(p.B, p.A, strict=True):
        extra = r - b.shape[1]
        B.append(torch.cat([b, b.new_zeros(b.shape[0], extra)], 1))
        A.append(torch.cat([a, a.new_zeros(extra, a.shape[1])], 0))
    return replace(p, B=B, A=A)


def test_factors_are_the_means_of_the_padded_pairs():
    p = standard()
    outcome = p.run("zero_pad")
    full = padded(p)
    B = sum(w * s * b for w, s, b in zip(p.weight, p.scale, full.B, strict=True))
    A = sum(w * a for w, a in zip(p.weight, full.A, strict=True))
    assert distance(outcome.B[0], B) < 1e-14
    assert distance(outcome.A[0], A) < 1e-14
    assert int(outcome.rank[0]) == 12


def test_equal_ranks_are_fedit_bitwise():
    p = standard(ranks=(5, 5, 5))
    for factor in ("B", "A"):
        assert torch.equal(getattr(p.run("zero_pad"), factor), getattr(p.run("fedit"), factor))


def test_a_column_is_shrunk_by_the_weight_of_its_owners():
    p = standard(scale=(1.0,) * 5)
    outcome = p.run("zero_pad")
    last = slice(8, 12)  # owned by the rank-12 client alone, whose weight is a third
    assert distance(outcome.B[0, :, last], p.B[4][:, last] / 3) < 1e-14
    assert distance(outcome.A[0, last], p.A[4][last] / 3) < 1e-14


def test_drift_is_the_distance_to_the_sum_of_the_updates():
    p = standard()
    outcome = p.run("zero_pad")
    assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), p.dense()), rel=1e-10)


def test_a_gauge_change_must_change_the_product():
    p = standard()
    assert distance(product(p.gauged().run("zero_pad")), product(p.run("zero_pad"))) > 0.05
