"""Low-rank plus block-sparse splitting against its definition, one matrix at a time."""

import pytest
import torch
from clair_problems import dense_split, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import distance

from fedlora_kernels.methods.low_rank_sparse import block_norms, low_rank_plus_sparse


def mixture(seed, q, widths, shared=2, noise=0.1, bad=1):
    """Blocks of one column space, the first ``bad`` of them of none."""
    made = torch.Generator().manual_seed(seed)
    U = randn(made, q, shared)
    blocks = [
        randn(made, q, w) if k < bad else U @ randn(made, shared, w) + noise * randn(made, q, w)
        for k, w in enumerate(widths)
    ]
    return torch.cat([block / block.norm() for block in blocks], 1)


def split(X, widths, lam, tol=1e-7, max_iter=500):
    return low_rank_plus_sparse(X, widths, torch.tensor(lam, dtype=torch.float64), tol, max_iter)


@pytest.mark.parametrize("q", [5, 17, 40])
@pytest.mark.parametrize("tol", [1e-7, 1e-9])
def test_every_matrix_of_a_batch_is_split_as_alone_and_as_defined(q, tol):
    widths, lam = [3, 5, 2, 4, 4, 6], [0.8, 0.9, 1.1, 1.4, 0.7]
    X = torch.stack([mixture(seed, q, widths, noise=noise) for seed, noise in enumerate((0.0, 0.05, 0.2, 0.5, 1.0))])
    found = split(X, widths, lam, tol)
    assert len(set(found.steps.tolist())) > 2, "all stop together: leaving the batch is not tested"
    for i, weight in enumerate(lam):
        L, S, steps = dense_split(X[i], widths, weight, tol)
        assert int(found.steps[i]) == steps
        assert distance(found.low_rank[i], L) < 1e-9
        assert float((found.sparse[i] - S).norm()) < 1e-9 * float(X[i].norm())


@given(
    seed=st.integers(0, 10**6),
    q=st.integers(1, 12),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    lam=st.floats(0.3, 2.5),
    noise=st.floats(0.0, 2.0),
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_any_matrix_is_split_as_defined(seed, q, widths, lam, noise):
    X = mixture(seed, q, widths, noise=noise)
    found = split(X[None], widths, [lam])
    L, S, steps = dense_split(X, widths, lam)
    assert int(found.steps[0]) == steps
    assert float((found.low_rank[0] - L).norm()) < 1e-9 * float(X.norm())
    assert float((found.sparse[0] - S).norm()) < 1e-9 * float(X.norm())


def test_the_answer_is_optimal():
    # a subgradient certificate: Y in lam * unit balls per block and in the unit spectral ball, tight on L and S
    widths, lam = [4, 4, 4, 4, 4, 4], 1.3
    X = mixture(3, 20, widths, noise=0.3)
    found = split(X[None], widths, [lam], tol=1e-10, max_iter=2000)
    L, S = found.low_rank[0], found.sparse[0]
    assert distance(L + S, X) < 1e-9
    U, s, Vh = torch.linalg.svd(L, full_matrices=False)
    r = int((s > 1e-8).sum())
    Y = torch.cat([lam * b / b.norm() if float(b.norm()) > 1e-9 else b * 0 for b in S.split(widths, 1)], 1)
    zero = torch.cat([torch.full_like(b, float(b.norm()) <= 1e-9) for b in S.split(widths, 1)], 1).bool()
    assert not zero.any(), "every block has a part of its own here"
    polar = U[:, :r] @ Vh[:r]
    assert float((U[:, :r].T @ (Y - polar)).norm()) < 1e-4
    assert float(((Y - polar) @ Vh[:r].T).norm()) < 1e-4
    assert float(torch.linalg.matrix_norm(Y - polar, 2)) < 1.0


@pytest.mark.parametrize("size", [1e-150, 1e-9, 1e9, 1e150])
def test_the_size_of_a_matrix_is_no_matter(size):
    widths = [3, 3, 4, 4]
    X = mixture(1, 9, widths)[None]
    one, other = split(X, widths, [0.9]), split(X * size, widths, [0.9])
    assert torch.equal(one.steps, other.steps)
    assert distance(other.low_rank / size, one.low_rank) < 1e-12
    assert distance(other.sparse / size, one.sparse) < 1e-12


def test_zero_needs_no_step_and_harms_no_neighbour():
    widths = [3, 3, 4]
    X = mixture(2, 7, widths)
    found = split(torch.stack([torch.zeros_like(X), X]), widths, [0.9, 0.9])
    alone = split(X[None], widths, [0.9])
    assert found.steps.tolist() == [0, int(alone.steps[0])]
    assert found.converged.tolist() == [True, True]
    assert not found.low_rank[0].any()
    assert not found.sparse[0].any()
    assert torch.equal(found.low_rank[1], alone.low_rank[0])


def test_a_zero_block_stays_zero():
    widths = [3, 3, 4, 2]
    X = mixture(2, 7, widths)
    X[:, 3:6] = 0.0
    found = split(X[None], widths, [0.9])
    assert not found.low_rank[0, :, 3:6].any()
    assert not found.sparse[0, :, 3:6].any()


def test_at_the_last_step_what_is_there_is_answered():
    widths = [3, 3, 4]
    X = torch.stack([mixture(2, 7, widths), torch.zeros(7, 10, dtype=torch.float64)])
    found = split(X, widths, [0.9, 0.9], max_iter=3)
    L, S, steps = dense_split(X[0], widths, 0.9, max_iter=3)
    assert found.steps.tolist() == [steps, 0] == [3, 0]
    assert found.converged.tolist() == [False, True]
    assert distance(found.low_rank[0], L) < 1e-12
    assert distance(found.sparse[0], S) < 1e-12


def test_the_penalty_stops_growing():
    # at 1.02 per step it reaches 1e7 times the first after 815 steps; tol = 0 is never reached by a mixture
    widths = [2, 3]
    X = mixture(4, 4, widths, noise=1.0)
    found = split(X[None], widths, [0.8], tol=0.0, max_iter=900)
    assert int(found.steps[0]) == 900 or bool(found.converged[0])
    assert distance(found.low_rank[0] + found.sparse[0], X) < 1e-12


def test_no_matrix_at_all():
    found = split(torch.zeros(0, 4, 6, dtype=torch.float64), [2, 4], [])
    assert found.low_rank.shape == (0, 4, 6)
    assert found.steps.shape == (0,)


def test_norms_of_blocks():
    X = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    norms = block_norms(X, [1, 3])
    assert norms.shape == (2, 2)
    assert float(norms[1, 1]) == pytest.approx(float(X[1, :, 1:].norm()), rel=1e-15)
