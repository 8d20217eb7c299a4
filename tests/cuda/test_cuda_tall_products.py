"""Products with the Q of tall stacks: any small matrix, any dtype, ranks and matrices that are passed over."""

import ctypes
from pathlib import Path

import pytest
import simulated
import torch
from frames import DTYPES, dtype_id, normal, same_bits

from fedlora_kernels.backends.native.library import rows, table

SOURCE = Path(__file__).with_name("tall_products_check.cpp")
UNTOUCHED = 7.0


@pytest.fixture(scope="session")
def products():
    """R of one batch of stacks, and Q C for every C that is given (None: Q itself)."""
    if reason := simulated.missing():
        pytest.skip(reason)
    library = ctypes.CDLL(str(simulated.build(sources=[SOURCE])))
    library.fedlora_message.restype = ctypes.c_char_p

    def run(blocks, small, dtypes, active=None, ranks=None, triangular=None, scale=None):
        N, m, _ = blocks[0].shape
        R = sum(block.shape[-1] for block in blocks)
        k = min(m, R)
        triangle = torch.full((N, k, R), UNTOUCHED, dtype=torch.float64)
        outs = [
            torch.full((N, m, k if C is None else C.shape[-1]), UNTOUCHED, dtype=dtype)
            for C, dtype in zip(small, dtypes, strict=True)
        ]
        given = [torch.empty(N, 0, 0, dtype=torch.float64) if C is None else C for C in small]
        flags = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in (active, ranks, triangular)]
        addresses = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in flags]
        scale = torch.empty(N, 0, 0, dtype=torch.float64) if scale is None else rows(scale)
        status = library.check_tall_products(
            table(blocks), ctypes.c_int64(len(blocks)), table([scale]), table([triangle]), addresses[0],
            table(given), table(outs), ctypes.c_int64(len(outs)), *addresses[1:],
        )  # fmt: skip
        assert status == 0, library.fedlora_message()
        return triangle, outs

    return run


# one leaf, fewer rows than columns, and several leaves
SIZES = pytest.mark.parametrize(("m", "R"), [(29, 5), (7, 19), (2100, 9), (1300, 41)])


@SIZES
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_q_times_a_small_matrix_is_rounded_once(products, m, R, dtype):
    X, C = normal(2, m, R), normal(2, min(m, R), 21, seed=1)
    triangle, (Q, exact, rounded) = products([X], [None, C, C], [torch.float64, torch.float64, dtype])
    assert (Q @ triangle - X).abs().max() <= 1e-13
    assert (exact - Q @ C).abs().max() <= 1e-13
    assert same_bits(rounded, exact.float().to(dtype) if dtype.itemsize < 4 else exact.to(dtype))


@SIZES
def test_zeros_below_the_diagonal_may_be_said_or_not(products, m, R):
    X, C = normal(3, m, R), normal(3, min(m, R), min(m, R), seed=1)
    C[:2] = C[:2].triu()
    _, (plain,) = products([X], [C], [torch.float64])
    _, (told,) = products([X], [C], [torch.float64], triangular=[1, 0, 0])
    assert (told - plain).abs().max() <= 1e-14
    assert same_bits(told[1:], plain[1:])


@SIZES
def test_inactive_matrices_and_columns_beyond_the_rank_are_not_touched(products, m, R):
    X, C = normal(5, m, R), normal(5, min(m, R), 37, seed=1)
    whole, (exact,) = products([X], [C], [torch.float64])
    X[3] = torch.nan
    active, ranks = [1, 1, 7, 0, 1], [37, 0, 1, 37, 18]
    triangle, (found,) = products([X], [C], [torch.float64], active=active, ranks=ranks)
    for i, there in enumerate(active):
        rank = ranks[i] if there else 0
        assert same_bits(triangle[i], whole[i] if there else torch.full_like(whole[i], UNTOUCHED))
        assert same_bits(found[i, :, :rank], exact[i, :, :rank])
        assert (found[i, :, rank:] == UNTOUCHED).all()


def test_answers_by_columns_and_blocks_turned(products):
    """As the second pass has them: A^T of blocks r x n, and V^T written as rows."""
    A = [normal(2, 3, 1300), normal(2, 8, 1300, seed=1)]
    scale = normal(2, 11, seed=2)
    plain, (V,) = products([block.mT.contiguous() for block in A], [None], [torch.float64], scale=scale)
    turned, (W,) = products([block.mT for block in A], [None], [torch.float64], scale=scale)
    assert same_bits(turned, plain)
    assert same_bits(W, V)


@pytest.mark.parametrize("shared", [16_000, 60_000])
def test_bits_do_not_depend_on_where_numbers_lie(products, monkeypatch, shared):
    X, C = normal(2, 1300, 41), normal(2, 41, 37, seed=1)
    expected = products([X], [C, None], [torch.float32, torch.float64])
    monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", str(shared))
    found = products([X], [C, None], [torch.float32, torch.float64])
    assert all(same_bits(a, b) for a, b in zip(found[1], expected[1], strict=True))
