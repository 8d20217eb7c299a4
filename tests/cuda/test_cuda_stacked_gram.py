"""The Gram's way of stacked QR by itself: what it serves, R and its inverse, in any order of threads."""

import ctypes
from pathlib import Path

import pytest
import simulated
import torch
from frames import normal, same_bits, with_kappa

from fedlora_kernels.backends.contract import Info
from fedlora_kernels.backends.native.library import rows, table

SOURCE = Path(__file__).with_name("stacked_gram_check.cpp")


@pytest.fixture(scope="session")
def by_gram():
    """R, mixers (R^-1), rank, info, hard and ranks from Grams (N, R, R)."""
    if reason := simulated.missing():
        pytest.skip(reason)
    library = ctypes.CDLL(str(simulated.build(sources=[SOURCE])))
    library.fedlora_message.restype = ctypes.c_char_p

    def run(G):
        N, R, _ = G.shape
        triangle, mixers = torch.full((N, R, R), torch.nan), torch.full((N, R, R), torch.nan, dtype=torch.float64)
        codes = torch.full((5, N), 85, dtype=torch.int32)
        rank, info, notes, hard, ranks = codes
        status = library.check_stacked_gram(
            table([G]), table([triangle]), table([rows(code) for code in (rank, info, notes)]),
            *(ctypes.c_void_p(t.data_ptr()) for t in (mixers, hard, ranks)),
        )  # fmt: skip
        assert status == 0, library.fedlora_message()
        return triangle, mixers, rank.tolist(), info.tolist(), hard.tolist(), ranks.tolist()

    return run


def gram(X):
    return X.mT @ X


@pytest.mark.parametrize("R", [1, 7, 8, 17, 33, 66, 97])
@pytest.mark.parametrize(
    ("order", "shared"), [("forward", 232_448), ("reverse", 232_448), ("1", 101_376), ("2", 16_000)]
)
def test_well_conditioned_grams_are_served(by_gram, monkeypatch, R, order, shared):
    X = normal(3, 5 * R, R)
    X[1, :, R // 2] = 0
    expected = by_gram(gram(X))
    monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", order)
    monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", str(shared))
    found = by_gram(gram(X))
    assert all(same_bits(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
    triangle, mixers, rank, info, hard, ranks = found
    assert (rank, info, hard, ranks) == ([R, R - 1, R], [0, 0, 0], [0, 0, 0], [R, R, R])
    scale = gram(X).diagonal(dim1=1, dim2=2).amax()
    assert (gram(triangle.double()) - gram(X)).abs().max() <= 1e-6 * scale
    ones = torch.diag_embed((torch.arange(R) < torch.tensor(rank)[:, None]).double())
    assert (triangle.double() @ mixers - ones).abs().max() <= 1e-5
    assert (triangle.tril(-1) == 0).all()


def test_what_one_pass_cannot_serve_is_left_to_reflections(by_gram):
    X = torch.stack([normal(90, 21), with_kappa(90, 21, 1e2), with_kappa(90, 21, 1e5), normal(90, 21), normal(90, 21)])
    X[3, :, 20] = X[3, :, 4]
    X[4, 7, 7] = torch.nan
    triangle, _, rank, info, hard, ranks = by_gram(gram(X))
    assert hard == [0, 0, 1, 1, 0]
    assert ranks == [21, 21, 0, 0, -1]
    assert (rank[4], info[4]) == (0, Info.NONFINITE)
    assert triangle[4].isnan().all()
    assert rank[:4] == [21, 21, 85, 85]
