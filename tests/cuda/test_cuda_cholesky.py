"""Pivoted Cholesky of the CUDA library: against the torch backend's, its remainder and rank, and its promises about bits."""

import math

import pytest
import torch
from guards import LAYOUTS, SCHEDULES, same_bits

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.backends.native.library import stream, table
from fedlora_kernels.backends.native.threads import thread_count
from fedlora_kernels.backends.torch.cholesky import pivoted_cholesky

SIZES = [(1, 1), (2, 2), (7, 3), (31, 31), (48, 48), (49, 49), (64, 20), (65, 65), (131, 50)]


def factors(cuda, *groups, widths=None):
    """Factors of any number of groups of Grams in one call, in memory full of NaN."""
    backend, device = cuda
    G = [g if g.device.type == device.type else g.to(device) for g in groups]
    width = widths or [torch.full((len(g),), g.shape[-1]) for g in G]
    width = [w.to(device).double()[:, None, None] for w in width]
    L = [torch.full(g.shape, torch.nan, dtype=torch.float64, device=device) for g in G]
    tables, n = (table(G), table(width), table(L)), len(G)
    backend.library.run("product_svd", "fedlora_cholesky", (tables[0], n), (*tables, n), device)
    return [factor.cpu() for factor in L]


def factor(cuda, G, width=None):
    return factors(cuda, G, widths=None if width is None else [width])[0]


def grams(N, R, rank, seed=0, decades=0):
    X = torch.randn(N, rank, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = X * torch.logspace(0, -decades, R, dtype=torch.float64)
    return X.mT @ X


def order_of(L, rank):
    """Rows in order of elimination: the pivot is the largest of its column, for no row has more left than it."""
    return L[:, :rank].abs().argmax(0).tolist()


@pytest.mark.parametrize(("R", "rank"), SIZES)
def test_remainder_rank_and_order(cuda, R, rank):
    G = grams(2, R, rank)
    L = factor(cuda, G)
    top = G.diagonal(dim1=-2, dim2=-1).amax(-1)
    assert ((L @ L.mT - G).abs().amax((-2, -1)) <= 4 * R * U64 * top).all()
    assert ((L != 0).any(-2).sum(-1) == rank).all()
    assert not L[:, :, rank:].any()
    for one, gram in zip(L, G, strict=True):
        order = order_of(one, rank)
        pivots = one[order, range(rank)]
        assert sorted(set(order)) == sorted(order)
        assert not one[order][:, :rank].triu(1).any()
        assert (pivots > 0).all()
        assert (pivots[1:] <= pivots[:-1] * (1 + R * U64)).all()
        assert pivots[0] == math.sqrt(gram.diagonal().max())


@pytest.mark.parametrize("R", [5, 33, 64, 100])
def test_agrees_with_the_torch_backend(cuda, R):
    G, width = grams(4, R, R, decades=2), torch.tensor([R, R, 3, R])
    G[1] = 0
    wanted = pivoted_cholesky(G.clone(), width)
    torch.testing.assert_close(factor(cuda, G, width), wanted, rtol=0, atol=1e-10 * G.max().item())


def test_the_first_of_equal_diagonals_is_the_pivot(cuda):
    G = torch.diag(torch.tensor([1.0, 4, 2, 4, 1], dtype=torch.float64))[None]
    wanted = torch.zeros(1, 5, 5, dtype=torch.float64)
    for k, i in enumerate((1, 3, 2, 0, 4)):
        wanted[0, i, k] = G[0, i, i].sqrt()
    assert torch.equal(factor(cuda, G), wanted)


def test_the_first_of_equal_diagonals_where_many_lanes_have_one(cuda):
    """Seventy times the same: columns come in order of rows, over panels and lanes."""
    assert torch.equal(factor(cuda, torch.eye(70, dtype=torch.float64)[None])[0], torch.eye(70, dtype=torch.float64))


@pytest.mark.parametrize("R", [8, 60])
def test_the_threshold_is_that_of_the_width(cuda, R):
    """A diagonal a little above and below width u times the largest."""
    for width in (1, 3, R):
        for factor_of, rank in ((1.001, 2), (0.999, 1)):
            G = torch.zeros(1, R, R, dtype=torch.float64)
            G[0, 2, 2], G[0, 5, 5] = 4, 4 * width * U64 * factor_of
            assert int((factor(cuda, G, torch.tensor([width])) != 0).sum()) == rank


@pytest.mark.parametrize("place", [0, 3, 59])
def test_nan_ends_the_elimination(cuda, place):
    G = grams(2, 60, 60)
    clean = factor(cuda, G[1:])
    G[0, place, place] = torch.nan
    L = factor(cuda, G)
    assert not L[0].any()
    assert same_bits(L[1:], clean)


def test_layouts_groups_and_slots_change_no_bit(cuda):
    G, other = grams(3, 53, 40, seed=1), grams(2, 7, 7, seed=2)
    wanted = factor(cuda, G)
    for layout in LAYOUTS.values():
        assert same_bits(factor(cuda, layout(G)), wanted)
    assert same_bits(factors(cuda, other, G.flip(0), other)[1].flip(0), wanted)
    assert same_bits(factor(cuda, G[1:2]), wanted[1:2])


def test_nothing_to_do(cuda):
    assert factors(cuda, torch.empty(0, 5, 5).double(), torch.empty(3, 0, 0).double())[1].shape == (3, 0, 0)


@pytest.mark.parametrize("room", [160 * 1024, 40 * 1024, 8 * 1024])
def test_where_numbers_lie_changes_no_bit(simt, monkeypatch, room):
    """In shared memory, beside it, and with the panel beside it as well."""
    cuda = (simt, torch.device("cpu"))
    G = grams(2, 90, 70)
    wanted = factor(cuda, G)
    monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", str(room))
    assert same_bits(factor(cuda, G), wanted)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_order_of_threads_changes_no_bit(simt, monkeypatch, schedule):
    cuda = (simt, torch.device("cpu"))
    G = grams(1, 67, 60)
    wanted = factor(cuda, G)
    monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
    assert same_bits(factor(cuda, G), wanted)


def test_what_is_refused(simt):
    G, width, L = torch.eye(3).double()[None], torch.ones(1, 1, 1).double(), torch.empty(1, 3, 3).double()
    call = simt.library.functions("product_svd").fedlora_cholesky

    def status(G=G, width=width, L=L, room=1 << 16):
        memory = torch.empty(room, dtype=torch.uint8)
        end = (memory.data_ptr(), room, thread_count(), stream(G.device))
        return call(table([G]), table([width]), table([L]), 1, *end)

    assert status() == 0
    assert status(G=G.float()) == status(L=L.float()) == 2
    assert status(L=L[:, :2]) == status(G=G[:, :, :2]) == status(width=width.expand(2, 1, 1)) == 1
    assert status(room=100) == 3
    assert call(None, table([width]), table([L]), 1, None, 0, 1, None) == 4
