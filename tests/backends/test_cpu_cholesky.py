"""Pivoted Cholesky of the cpu library: against the torch backend's, its remainder and rank, and its promises about bits."""

import pytest
import torch

from fedlora_kernels.backends import cpu
from fedlora_kernels.backends.native import product
from fedlora_kernels.backends.torch.cholesky import pivoted_cholesky

BACKEND = cpu.BACKEND
U64 = 2.0**-53
pytestmark = pytest.mark.skipif(not BACKEND.available()[0], reason=BACKEND.available()[1])


def factor(G, width=None):
    N, R, _ = G.shape
    return product.cholesky(BACKEND.library, G, torch.full((N,), R) if width is None else width)


def grams(N, R, rank, seed=0, decades=0):
    X = torch.randn(N, rank, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = X * torch.logspace(0, -decades, R, dtype=torch.float64)
    return X.mT @ X


def order_of(L):
    """Rows in order of elimination: the pivot of a column is its largest entry among rows not yet eliminated."""
    order = []
    for column in L.mT:
        if column.any():
            order.append(
                next(
                    i
                    for i in (column != 0).nonzero().flatten().tolist()
                    if i not in order and pivotal(L, i, len(order))
                )
            )
    return order


def pivotal(L, i, k):
    """Whether row i ends with column k: rows of L are lower trapezoidal in the order of elimination."""
    return bool(L[i, k] > 0) and not L[i, k + 1 :].any()


@pytest.mark.parametrize(("R", "rank"), [(1, 1), (2, 2), (7, 3), (64, 64), (65, 20), (97, 97), (131, 50), (256, 256)])
def test_remainder_rank_and_triangle(R, rank):
    G = grams(3, R, rank)
    L = factor(G)
    top = G.diagonal(dim1=-2, dim2=-1).amax(-1)
    assert ((L @ L.mT - G).abs().amax((-2, -1)) <= 4 * R * U64 * top).all()
    assert ((L != 0).any(-2).sum(-1) == rank).all()
    for i in range(3):
        order = order_of(L[i])
        assert len(order) == len(set(order)) == rank
        diagonal = L[i, order, range(rank)]
        assert (diagonal > 0).all()
        assert (diagonal[1:] <= diagonal[:-1] * (1 + R * U64)).all()


@pytest.mark.parametrize("R", [5, 33, 64, 100])
def test_agrees_with_the_torch_backend(R):
    G, width = grams(4, R, R, decades=2), torch.tensor([R, R, 3, R])
    G[1] = 0
    torch.testing.assert_close(
        factor(G, width), pivoted_cholesky(G.clone(), width), rtol=0, atol=1e-10 * G.max().item()
    )


def test_the_first_of_equal_diagonals_is_the_pivot():
    G = torch.diag(torch.tensor([1.0, 4, 2, 4, 1], dtype=torch.float64))[None]
    wanted = torch.zeros(1, 5, 5, dtype=torch.float64)
    for k, i in enumerate((1, 3, 2, 0, 4)):
        wanted[0, i, k] = G[0, i, i].sqrt()
    assert torch.equal(factor(G), wanted)
    assert torch.equal(factor(G), pivoted_cholesky(G.clone(), torch.tensor([5])))


def test_the_threshold_is_that_of_the_width():
    R, drop = 8, 2.0**-53
    G = torch.diag_embed(torch.tensor([[1.0] + [5 * drop] * (R - 1)] * 2, dtype=torch.float64))
    L = factor(G, torch.tensor([4, 6]))
    assert (L != 0).any(-2).sum(-1).tolist() == [R, 1]
    # The remainder of what equals the threshold is dropped.
    assert (factor(G, torch.tensor([5, 5])) != 0).any(-2).sum(-1).tolist() == [1, 1]


def test_duplicate_columns_have_no_factor_of_their_own():
    X = torch.randn(2, 90, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    X = torch.cat([X, X, -X], -1)
    G = X.mT @ X
    L = factor(G)
    assert ((L != 0).any(-2).sum(-1) == 10).all()
    assert (L @ L.mT - G).abs().max() <= 120 * U64 * G.max()


@pytest.mark.parametrize("place", [(4, 4), (4, 7)])
def test_nan_ends_and_harms_no_neighbour(place):
    G = grams(3, 40, 40)
    clean = factor(G)
    G[1, place[0], place[1]] = G[1, place[1], place[0]] = torch.nan
    L = factor(G)
    assert torch.equal(L[[0, 2]], clean[[0, 2]])
    if place[0] == place[1]:
        assert not L[1].any()


def test_a_matrix_alone_at_any_slot_and_with_any_threads(monkeypatch):
    G = torch.cat([grams(5, 70, 70), grams(5, 70, 11, seed=1), torch.zeros(1, 70, 70, dtype=torch.float64)])
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
        results.append(factor(G))
    assert all(torch.equal(results[0], other) for other in results)
    for i in range(len(G)):
        assert torch.equal(factor(G[i : i + 1])[0], results[0][i])


def test_poisoned_memory_and_views(poisoned_empty):
    G = grams(3, 41, 41)
    L = factor(G)
    assert L.isfinite().all()
    before = G.clone()
    assert torch.equal(factor(G.mT.contiguous().mT), L)
    assert torch.equal(factor(torch.nn.functional.pad(G, (1, 2, 3, 4))[:, 3:44, 1:42]), L)
    assert torch.equal(G, before)


def test_nothing():
    for shape in ((0, 5, 5), (3, 0, 0), (0, 0, 0)):
        assert factor(torch.empty(shape, dtype=torch.float64)).shape == shape
