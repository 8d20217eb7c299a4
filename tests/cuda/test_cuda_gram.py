"""Grams of the CUDA library: float64 sums of exact products, whatever lies around the stacks in memory, in the batch or in the call."""

import ctypes
import math

import numpy as np
import pytest
import torch
from guards import DTYPES, LAYOUTS, SCHEDULES, dtype_id, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import draw, grams, whole

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.backends.native.library import counts, stream, table
from fedlora_kernels.backends.torch.chunks import pow2

RANKS = [(1,), (3,), (7,), (8, 8), (16, 1), (16, 16), (5, 0, 28), (64,), (65,), (48, 32), (60, 70), (0,)]
CPU = torch.device("cpu")
orders = pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])


def check(G, X):
    """Within a few roundings of float64 of ``sum |x_i| |x_j|``, whatever the number of rows; the truth is of 80 bits."""
    S = whole(X)
    exact = S.numpy().astype(np.longdouble)
    error = np.abs(G.numpy() - np.matmul(exact.transpose(0, 2, 1), exact)).astype(np.float64)
    assert G.dtype == torch.float64
    assert bool((torch.from_numpy(error) <= 16.0 * U64 * (S.abs().mT @ S.abs())).all())
    assert same_bits(G, G.mT.contiguous())


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("m", [0, 1, 33, 270])
@orders
def test_gram_is_that_of_the_stack(cuda, ranks, m, by_columns):
    for dtype in (torch.float32, torch.bfloat16):
        X = draw(m, ranks, [dtype], by_columns=by_columns)
        check(grams(cuda, X)[0], X)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [(8, 8), (5, 4, 2), (64, 24)], ids=str)
def test_layouts_change_no_bit(cuda, dtype, layout, ranks):
    X = draw(301, ranks, [dtype])
    (wanted,) = grams(cuda, X)
    check(wanted, X)
    assert same_bits(grams(cuda, [LAYOUTS[layout](x) for x in X])[0], wanted)
    assert same_bits(grams(cuda, [LAYOUTS[layout](X[0]), *X[1:]])[0], wanted)


@pytest.mark.parametrize("start", [8, 4, 2, 1])
@pytest.mark.parametrize("ranks", [(8, 24), (5, 8, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@orders
def test_rows_that_begin_anywhere_change_no_bit(cuda, dtype, ranks, start, by_columns):
    """Addresses and strides that are multiples of 16, 8, 4 or fewer bytes, whether the ranks are or not."""
    X = draw(70, ranks, [dtype], by_columns=by_columns)
    away = []
    for x in X:
        y = x.mT if by_columns else x
        width = -(-y.shape[2] // 8) * 8 + start
        room = torch.full((2, y.shape[1] + 1, width), math.nan).to(dtype)
        z = room[:, 1:, start : start + y.shape[2]]
        z.copy_(y)
        away.append(z.mT if by_columns else z)
    assert same_bits(grams(cuda, away)[0], grams(cuda, X)[0])


@orders
def test_blocks_of_several_dtypes(cuda, by_columns):
    X = draw(100, (5, 9, 4, 30), DTYPES, by_columns=by_columns)
    check(grams(cuda, X)[0], X)
    check(grams(cuda, [X[0], LAYOUTS["turned"](X[1]), X[2]])[0], X[:3])


def test_one_matrix_for_all_and_one_number_for_all_rows(cuda):
    X = [x[:1].expand(3, -1, -1) for x in draw(40, (3, 8), [torch.float32])]
    check(grams(cuda, X)[0], X)
    X = [x[:, :1].expand(-1, 40, -1) for x in draw(1, (3, 8), [torch.float32])]
    check(grams(cuda, X)[0], X)


@pytest.mark.parametrize(("m", "ranks"), [(9000, (5,)), (4700, (17,)), (2500, (33,)), (2500, (60, 7)), (4500, (200,))])
def test_many_rows_of_small_integers_are_exact(cuda, m, ranks):
    """Leaves and runs of them."""
    X = [(3 * x).round() for x in draw(m, ranks, [torch.bfloat16], batch=1)]
    S = whole(X)
    assert torch.equal(grams(cuda, X)[0], S.mT @ S)


@pytest.mark.parametrize(("m", "ranks"), [(9000, (5,)), (4700, (17,)), (2500, (33,)), (2300, (60, 7))])
def test_a_gram_does_not_depend_on_batch_slot_or_what_else_is_in_the_call(cuda, m, ranks):
    """So many small stacks beside it that blocks do whole runs instead of leaves."""
    X = draw(m, ranks, [torch.float32], batch=2)
    crowd = draw(1, (1,), [torch.float32], batch=1)[0].expand(1300, -1, -1)
    together = grams(cuda, X)[0]
    for i in range(2):
        assert same_bits(grams(cuda, [x[i : i + 1] for x in X])[0], together[i : i + 1])
    assert same_bits(grams(cuda, [x.flip(0) for x in X])[0], together.flip(0))
    assert same_bits(grams(cuda, [crowd], X)[1], together)
    other = draw(50, (20, 80), [torch.float64])
    (alone,) = grams(cuda, other)
    for found in (grams(cuda, X, other), grams(cuda, other, X)[::-1]):
        assert same_bits(found[0], together)
        assert same_bits(found[1], alone)


@orders
def test_no_order_of_threads_shows(simt, monkeypatch, by_columns):
    X = draw(300, (16, 7, 60), [torch.float16], by_columns=by_columns)
    answers = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(grams((simt, CPU), X)[0])
    assert all(same_bits(answer, answers[0]) for answer in answers[1:])


@pytest.mark.parametrize("ranks", [(3, 4), (20, 13), (60, 30)], ids=str)
@orders
def test_columns_are_scaled_exactly(cuda, ranks, by_columns):
    """Float64 columns whose squares are out of range."""
    X = [(3 * x).round() for x in draw(140, ranks, [torch.float64])]
    stack = whole(X)
    e = (torch.arange(stack.shape[-1] * 2).reshape(2, -1) * 977) % 1990 - 980
    far = list(torch.split(stack * pow2(e)[:, None], ranks, -1))
    far = [LAYOUTS["turned"](x) if by_columns else x.contiguous() for x in far]
    assert torch.equal(grams(cuda, far, e=e)[0], stack.mT @ stack)


def test_columns_sixty_orders_apart_keep_their_digits(cuda):
    X = [x * torch.logspace(-30, 30, x.shape[-1], dtype=torch.float64) for x in draw(300, (20, 14), [torch.float64])]
    X = [x.float() for x in X]
    check(grams(cuda, X)[0], X)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@orders
def test_what_is_not_finite_reaches_its_own_row_and_column(cuda, dtype, value, by_columns):
    X = draw(300, (4, 13, 60), [dtype], by_columns=by_columns)
    (clean,) = grams(cuda, X)
    X[1][1, 299, 12] = value
    X[2][1, 0, 59] = value
    (G,) = grams(cuda, X)
    bad = torch.zeros(77, dtype=torch.bool)
    bad[[16, 76]] = True
    touched = bad[:, None] | bad
    assert same_bits(G[0], clean[0])
    assert same_bits(G[1][~touched], clean[1][~touched])
    assert not G[1].diagonal()[bad].isfinite().any()


def test_every_number_is_seen(cuda):
    """One NaN at a time, at the corners of strips and tiles."""
    X = torch.zeros(12, 67, 70)
    rows, columns = (0, 66, 66, 0, 63, 64, 15, 16, 31, 32, 65, 7), (0, 69, 0, 69, 63, 64, 15, 16, 32, 31, 7, 65)
    places = list(zip(rows, columns, strict=True))
    for i, (row, column) in enumerate(places):
        X[i, row, column] = math.nan
    for stack in (X, LAYOUTS["turned"](X)):
        G = grams(cuda, [stack])[0]
        for i, (_, column) in enumerate(places):
            assert G[i].diagonal().isnan().nonzero().flatten().tolist() == [column]


@pytest.mark.parametrize("ranks", [(3, 6), (40,), (50, 60)], ids=str)
def test_nothing_beside_is_written_and_no_memory_need_be_clean(cuda, ranks):
    backend, device = cuda
    X = [x.to(device) for x in draw(300, ranks, [torch.float32])]
    before, R = [x.clone() for x in X], sum(ranks)
    (wanted,) = grams(cuda, X)
    library = backend.library.functions("update_gram")
    blocks, numbers, needed = table(X), counts([len(X)]), ctypes.c_int64()
    for fill in (0, 127, 255):
        room = torch.full((2, R + 4, 2 * R + 4), -77.0, dtype=torch.float64, device=device)
        G = room[:, 2 : R + 2, 1 : 2 * R + 1 : 2]
        out, scale = table([G]), table([torch.empty(2, 0, R, dtype=torch.float64, device=device)])
        assert library.fedlora_gram_workspace(blocks, numbers, out, 1, 1, ctypes.byref(needed)) == 0
        memory = torch.full((needed.value + 64,), fill, dtype=torch.uint8, device=device)
        call = (blocks, numbers, scale, out, 1, memory.data_ptr(), needed.value, 1, stream(device))
        assert library.fedlora_gram(*call) == 0
        assert bool((memory[needed.value :] == fill).all())
        assert same_bits(G.cpu(), wanted)
        G.fill_(-77.0)
        assert bool((room == -77.0).all())
    assert all(same_bits(x, y) for x, y in zip(X, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_do(cuda, shape):
    N, m, R = shape
    (G,) = grams(cuda, [torch.ones(N, m, R)])
    assert torch.equal(G, torch.zeros(N, R, R, dtype=torch.float64))


def test_what_does_not_fit_is_refused(simt):
    library, X = simt.library.functions("update_gram"), torch.ones(2, 5, 3)
    memory = torch.empty(1 << 20, dtype=torch.uint8)

    def call(x=X, G=(2, 3, 3), dtype=torch.float64, scale=(2, 0, 3), kind=torch.float64, bytes_=1 << 20, numbers=1):
        factors, out = torch.empty(scale, dtype=kind), torch.empty(G, dtype=dtype)
        tables = table([x]), counts([numbers]), table([factors]), table([out])
        return library.fedlora_gram(*tables, 1, memory.data_ptr(), bytes_, 1, None)

    assert call() == 0
    assert call(x=X.int()) == 2
    assert call(dtype=torch.float32) == 2
    assert call(scale=(2, 1, 3), kind=torch.float32) == 2
    assert call(G=(2, 4, 4)) == 1
    assert call(G=(2, 3, 4)) == 1
    assert call(G=(3, 3, 3)) == 1
    assert call(scale=(2, 1, 4)) == 1
    assert call(numbers=-1) == 1
    assert call(bytes_=64) == 3
    assert library.fedlora_gram(None, counts([1]), None, None, 1, None, 0, 1, None) == 4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 400),
    ranks=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    batch=st.integers(0, 3),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2),
    by_columns=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shapes_agree(simt, m, ranks, batch, dtypes, by_columns, seed):
    X = draw(m, ranks, dtypes, batch, seed, by_columns)
    check(grams((simt, CPU), X)[0], X)
