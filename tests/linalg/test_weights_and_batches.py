"""Whatever the ranks, leading dimensions and weights: a call answers as the dense model does, one matrix at a time."""

import itertools

import torch
from call_problems import assert_near, clients, dense_update
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.linalg import Ragged, product_svd, stacked_qr, update_gram

WEIGHT = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.25, -3.0])


@st.composite
def problems(draw):
    """Blocks with zero, negative and shared weights; blocks of weight zero everywhere hold NaN."""
    ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    m, n = draw(st.sampled_from([(7, 11), (11, 5), (1, 7), (3, 2)]))
    B, A = clients(ranks=ranks, batch=batch, m=m, n=n)
    shared = draw(st.booleans())
    count = len(ranks) if shared else len(ranks) * max(1, torch.Size(batch).numel())
    flat = draw(st.lists(WEIGHT, min_size=count, max_size=count))
    weights = torch.tensor(flat, dtype=torch.float64)
    if not shared:
        weights = weights[: len(ranks) * torch.Size(batch).numel()].reshape(*batch, len(ranks))
    return B, A, weights


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_calls_agree_with_the_dense_model(problem):
    B, A, weights = problem
    wanted = dense_update(B, A, weights)
    terms = [dense_update(B[k : k + 1], A[k : k + 1], weights[..., k : k + 1]) for k in range(len(B))]
    D = torch.stack(terms, -3).flatten(-2)
    X = torch.cat([weights[..., k, None, None] * B[k] for k in range(len(B))], -1)
    live = weights.expand(*wanted.shape[:-2], len(B)) != 0
    for k, block in itertools.product(range(len(B)), (B, A)):
        block[k] = torch.where(live[..., k, None, None], block[k], float("nan"))
    result = product_svd(B, A, weights=weights, output="balanced")
    assert_near(result.left @ result.right, wanted)
    assert_near(result.energy, (wanted**2).sum((-2, -1)))
    assert_near(update_gram(B, A, weights=weights), D @ D.mT)
    qr = stacked_qr(B, weights=weights, mode="reduced")
    assert_near(qr.Q @ qr.R, X)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch=st.lists(problems(), min_size=1, max_size=3))
def test_a_ragged_batch_is_its_problems_one_by_one(batch):
    B, A, w = (Ragged([problem[i] for problem in batch]) for i in range(3))
    for (b, a, weights), result, gram in zip(
        batch, product_svd(B, A, weights=w, output="left"), update_gram(B, A, weights=w), strict=True
    ):
        assert_near(result.left @ result.right, dense_update(b, a, weights))
        assert_near(gram, update_gram(b, a, weights=weights))
