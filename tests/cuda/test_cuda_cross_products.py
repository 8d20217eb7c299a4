"""Products of many blocks with one matrix by the CUDA library: sums of exact products, and what the blocks weigh."""

import ctypes
import math

import numpy as np
import pytest
import torch
from guards import DTYPES, LAYOUTS, SCHEDULES, dtype_id, same_answer, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import moved

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.backends.native.library import counts, rows, stream, table

CPU = torch.device("cpu")
SIDES = [(1, 1), (3, 7), (16, 16), (17, 5), (8, 32), (33, 2), (64, 64), (65, 3), (5, 130)]
orders = pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])


def draw(p, q, dtype, batch=2, seed=0, by_columns=False):
    made = torch.Generator().manual_seed(seed + p + 7 * q)
    x = torch.randn(batch, p, q, generator=made, dtype=torch.float64).to(dtype)
    return LAYOUTS["turned"](x) if by_columns else x


def products(cuda, *groups):
    """(products, size, exponent) of every block of every group ``(blocks, Y)``, in one call."""
    backend, device = cuda
    there = [([moved(x, device) for x in X], moved(Y, device)) for X, Y in groups]
    pairs = [(x, Y) for X, Y in there for x in X]
    M = [torch.full((len(Y), x.shape[-1], Y.shape[-1]), math.nan, dtype=torch.float64, device=device) for x, Y in pairs]
    size = [torch.full((len(Y),), math.nan, dtype=torch.float64, device=device) for _, Y in pairs]
    exponent = [torch.full((len(Y),), -7, dtype=torch.int32, device=device) for _, Y in pairs]
    X, Y, n = table([x for x, _ in pairs]), table([Y for _, Y in there]), len(there)
    numbers = counts([len(X) for X, _ in there])
    answers = [table([rows(t) for t in part]) for part in (M, size, exponent)]
    backend.library.run("test", "fedlora_cross_products", (X, numbers, Y, n), (X, numbers, Y, *answers, n), device)
    return [tuple(t.cpu() for t in answer) for answer in zip(M, size, exponent, strict=True)]


def check(answer, X, Y):
    """Within a few roundings of float64 of ``sum |x_i| |y_j|``, whatever the number of rows; the truth is of 80 bits."""
    M, size, exponent = answer
    x, y = (t.double().numpy().astype(np.longdouble) for t in (X, Y))
    back = np.ldexp(np.longdouble(1.0), exponent.numpy())
    error = np.abs(M.numpy().astype(np.longdouble) * back[:, None, None] - np.matmul(x.transpose(0, 2, 1), y))
    bound = np.matmul(np.abs(x).transpose(0, 2, 1), np.abs(y))
    assert bool((error <= 16 * U64 * bound).all())
    length = np.sqrt((x * x).sum((1, 2))) * np.sqrt((y * y).sum((1, 2)))
    assert bool((np.abs(size.numpy() * back - length) <= 64 * U64 * length).all())
    if torch.float64 not in (X.dtype, Y.dtype):
        assert not exponent.any()


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("p", [1, 33, 270])
@orders
def test_products_are_sums_of_exact_products(cuda, sides, p, by_columns):
    for dtype in (torch.float32, torch.bfloat16):
        X, Y = (draw(p, q, dtype, seed=k, by_columns=by_columns) for k, q in enumerate(sides))
        check(products(cuda, ([X], Y))[0], X, Y)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("y_dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("x_layout", "y_layout"), [("offset", "turned"), ("strided", "offset"), ("both", "strided")])
def test_dtypes_meet_and_layouts_change_no_bit(cuda, x_dtype, y_dtype, x_layout, y_layout):
    X, Y = draw(150, 9, x_dtype), draw(150, 20, y_dtype, seed=1)
    (wanted,) = products(cuda, ([X], Y))
    check(wanted, X, Y)
    assert same_answer(products(cuda, ([LAYOUTS[x_layout](X)], LAYOUTS[y_layout](Y)))[0], wanted)
    assert same_answer(products(cuda, ([LAYOUTS["turned"](X)], Y))[0], wanted)


@pytest.mark.parametrize(("p", "sides"), [(3000, (5, 16)), (3000, (17, 9)), (1400, (40, 70))])
def test_many_rows_of_small_integers_are_exact(cuda, p, sides):
    X, Y = ((3 * draw(p, q, torch.bfloat16, seed=k)).round() for k, q in enumerate(sides))
    M, _, exponent = products(cuda, ([X], Y))[0]
    assert torch.equal(M, X.double().mT @ Y.double())
    assert not exponent.any()


def test_a_product_does_not_depend_on_batch_slot_or_the_rest_of_the_call(cuda):
    Y, other = draw(1300, 12, torch.float32, 3), draw(50, 70, torch.float64)
    X = [draw(1300, q, torch.float32, 3, seed=q) for q in (12, 0, 40)]
    Z = [draw(50, q, dtype, seed=q) for q, dtype in ((3, torch.float64), (9, torch.float16))]
    together = products(cuda, (X, Y), (Z, other))
    for k, x in enumerate(X):
        for i in range(3):
            alone = products(cuda, ([x[i : i + 1]], Y[i : i + 1]))[0]
            assert same_answer(alone, tuple(t[i : i + 1] for t in together[k]))
    assert all(same_answer(a, b) for a, b in zip(products(cuda, (Z, other)), together[3:], strict=True))
    again = products(cuda, (Z[::-1], other), (X, Y))
    assert all(same_answer(a, b) for a, b in zip(again, [together[4], together[3], *together[:3]], strict=True))


@pytest.mark.parametrize(
    ("x_size", "y_size"), [(300, 300), (-300, -300), (300, -300), (1023, 1000), (-1074, -1060), (0, 5)]
)
def test_float64_of_any_size_stays_in_range(cuda, x_size, y_size):
    X, Y = (3 * draw(40, 6, torch.float64)).round(), (3 * draw(40, 9, torch.float64, seed=1)).round()
    X, Y = X.clamp(-1, 1) if x_size > 1000 else X, Y.clamp(-1, 1)
    far = [torch.ldexp(t, torch.tensor(e - e // 2)) * 2.0 ** (e // 2) for t, e in ((X, x_size), (Y, y_size))]
    M, size, exponent = products(cuda, ([far[0]], far[1]))[0]
    check((M, size, exponent), *far)
    assert bool(M.isfinite().all())
    wanted = [
        math.frexp(float(x.abs().max()))[1] + math.frexp(float(y.abs().max()))[1] for x, y in zip(*far, strict=True)
    ]
    assert exponent.tolist() == wanted


@pytest.mark.parametrize("row", [0, 2500, 4999])
def test_tall_float64_is_looked_at_in_pieces(cuda, row):
    X, Y = draw(5000, 3, torch.float64, batch=1), draw(5000, 4, torch.float64, batch=1)
    X[0, row, 2] = 2.0**700
    answer = products(cuda, ([X], Y))[0]
    check(answer, X, Y)
    assert answer[2].tolist() == [701 + math.frexp(float(Y.abs().max()))[1]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_shows_in_the_size(cuda, dtype, value, where):
    X, Y = draw(270, 9, dtype, 3), draw(270, 70, dtype, 3, seed=1)
    (clean,) = products(cuda, ([X], Y))
    (X, Y)[where][1, 269, 8] = value
    (found,) = products(cuda, ([X], Y))
    assert found[1].isfinite().tolist() == [True, False, True]
    for i in (0, 2):
        assert same_answer([t[i] for t in found], [t[i] for t in clean])


def test_no_order_of_threads_shows(simt, monkeypatch):
    groups = [([draw(140, 9, torch.float16), draw(140, 40, torch.float64)], draw(140, 20, torch.float16, seed=1))]
    answers = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(products((simt, CPU), *groups))
    assert all(same_answer(a, b) for answer in answers[1:] for a, b in zip(answer, answers[0], strict=True))


@pytest.mark.parametrize(("p", "q", "r", "batch"), [(0, 3, 4, 2), (5, 0, 4, 2), (5, 3, 0, 2), (5, 3, 4, 0)])
def test_nothing_to_do(cuda, p, q, r, batch):
    M, size, exponent = products(cuda, ([torch.ones(batch, p, q)], torch.ones(batch, p, r)))[0]
    assert torch.equal(M, torch.zeros(batch, q, r, dtype=torch.float64))
    assert size.tolist() == [0.0] * batch
    assert exponent.tolist() == [0] * batch
    assert products(cuda, ([], torch.ones(2, 5, 3))) == []


@pytest.mark.parametrize("sides", [(3, 6), (40, 9), (70, 66)], ids=str)
def test_nothing_beside_is_written_and_no_memory_need_be_clean(cuda, sides):
    backend, device = cuda
    X, Y = (draw(300, q, torch.float64, seed=k).to(device) for k, q in enumerate(sides))
    before = X.clone(), Y.clone()
    (wanted,) = products(cuda, ([X], Y))
    library, needed = backend.library.functions("test"), ctypes.c_int64()
    tables = table([X]), counts([1]), table([Y])
    assert library.fedlora_cross_products_workspace(*tables, 1, 1, ctypes.byref(needed)) == 0
    for fill in (0, 127, 255):
        room = torch.full((2, sides[0] + 2, 2 * sides[1] + 2), -77.0, dtype=torch.float64, device=device)
        M = room[:, 1:-1, 1:-1:2]
        beside = (
            torch.full((2, 3), -77.0, dtype=torch.float64, device=device),
            torch.full((2, 3), -77, dtype=torch.int32, device=device),
        )
        answers = M, beside[0][:, 1], beside[1][:, 1]
        memory = torch.full((needed.value + 64,), fill, dtype=torch.uint8, device=device)
        call = (*tables, *(table([rows(t)]) for t in answers), 1, memory.data_ptr(), needed.value, 1, stream(device))
        assert library.fedlora_cross_products(*call) == 0
        assert same_answer([t.cpu() for t in answers], wanted)
        assert bool((memory[needed.value :] == fill).all())
        for t in answers:
            t.fill_(-77)
        assert all(bool((t == -77).all()) for t in (room, *beside))
    assert same_bits(X, before[0])
    assert same_bits(Y, before[1])


def test_what_does_not_fit_is_refused(simt):
    library, memory = simt.library.functions("test"), torch.empty(1 << 20, dtype=torch.uint8)

    def call(
        x=(2, 5, 3),
        y=(2, 5, 4),
        M=(2, 3, 4),
        size=2,
        dtypes=(torch.float32, torch.float32, torch.float64),
        bytes_=1 << 20,
        count=1,
    ):
        X, Y, out = (torch.ones(shape).to(dtype) for shape, dtype in zip((x, y, M), dtypes, strict=True))
        found = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.int32)
        tables = table([X]), counts([count]), table([Y]), table([out]), *(table([rows(t)]) for t in found)
        return library.fedlora_cross_products(*tables, 1, memory.data_ptr(), bytes_, 1, None)

    assert call() == 0
    assert call(x=(2, 6, 3)) == 1
    assert call(x=(1, 5, 3)) == 1
    assert call(M=(2, 4, 4)) == 1
    assert call(M=(2, 3, 3)) == 1
    assert call(size=3) == 1
    assert call(count=-1) == 1
    assert call(dtypes=(torch.int32, torch.float32, torch.float64)) == 2
    assert call(dtypes=(torch.float32, torch.bool, torch.float64)) == 2
    assert call(dtypes=(torch.float32, torch.float32, torch.float32)) == 2
    assert call(bytes_=64) == 3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    p=st.integers(1, 300),
    sides=st.lists(st.integers(0, 70), min_size=2, max_size=4),
    batch=st.integers(0, 2),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    by_columns=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shapes_agree(simt, p, sides, batch, dtypes, by_columns, seed):
    Y, *X = (draw(p, q, dtypes[k % len(dtypes)], batch, seed + k, by_columns and k > 0) for k, q in enumerate(sides))
    for answer, x in zip(products((simt, CPU), (X, Y)), X, strict=True):
        check(answer, x, Y)
