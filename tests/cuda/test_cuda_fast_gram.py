"""Fast Grams of the CUDA library: halves on their own tensor cores, with float32 sums of 64 rows and no more."""

import math

import pytest
import torch
from guards import LAYOUTS, SCHEDULES, dtype_id, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import draw, grams, whole

from fedlora_kernels.backends.native.library import counts, table

HALVES = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
U32 = 2.0**-24
orders = pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
halves = pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)


def fast(cuda, *stacks, e=None):
    return grams(cuda, *stacks, e=e, function="fedlora_fast_gram")


def check(G, X, limit=64.0):
    """Within what float32 sums of 64 rows may lose."""
    S = whole(X)
    assert bool(((G - S.mT @ S).abs() <= limit * U32 * (S.abs().mT @ S.abs())).all())
    assert same_bits(G, G.mT.contiguous())


@pytest.mark.parametrize("ranks", [(1,), (7,), (8, 8), (5, 0, 28), (33,), (64,), (65,), (60, 70)], ids=str)
@pytest.mark.parametrize("m", [0, 1, 33, 270])
@orders
@halves
def test_gram_is_that_of_the_stack(cuda, ranks, m, by_columns, dtype):
    X = draw(m, ranks, [dtype], by_columns=by_columns)
    check(fast(cuda, X)[0], X)


@pytest.mark.parametrize("ranks", [(20,), (40,)], ids=str)
@halves
def test_no_more_than_64_rows_are_added_up_in_float32(cuda, ranks, dtype):
    """Rows of ones and of small numbers that only a sum of few ones still feels."""
    m, small = 4096, 2.0**-8
    X = [torch.ones(1, m, *ranks, dtype=torch.float64)]
    X[0][:, 1::2] = small
    X = [x.to(dtype) for x in X]
    S = whole(X)
    # 32 + 32 2^-16 is a float32, and so is every part of it; 2048 + 2048 2^-16 would lose what comes late
    assert torch.equal(fast(cuda, X)[0], S.mT @ S)
    noise = draw(m, ranks, [dtype], batch=1)
    S = whole(noise)
    error = (fast(cuda, noise)[0] - S.mT @ S).abs() / (S.norm(dim=1)[:, :, None] * S.norm(dim=1)[:, None, :])
    assert float(error.max()) <= 2e-7


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [(8, 8), (5, 4, 2), (64, 24)], ids=str)
@halves
def test_layouts_change_no_bit(cuda, dtype, layout, ranks):
    X = draw(301, ranks, [dtype])
    (wanted,) = fast(cuda, X)
    assert same_bits(fast(cuda, [LAYOUTS[layout](x) for x in X])[0], wanted)


@pytest.mark.parametrize(("m", "ranks"), [(2500, (5, 9)), (2500, (33,)), (1100, (60, 50))])
def test_many_rows_of_small_integers_are_exact(cuda, m, ranks):
    X = [(3 * x).round() for x in draw(m, ranks, [torch.bfloat16], batch=1)]
    S = whole(X)
    assert torch.equal(fast(cuda, X)[0], S.mT @ S)


def test_a_gram_does_not_depend_on_batch_slot_or_the_rest_of_the_call(cuda):
    stacks = [
        draw(1100, (9,), [torch.float16], 2),
        draw(70, (80,), [torch.bfloat16], 3),
        draw(9, (3, 4), [torch.float16], 2),
    ]
    together = fast(cuda, *stacks)
    for X, found in zip(stacks, together, strict=True):
        for i in range(len(found)):
            assert same_bits(fast(cuda, [x[i : i + 1] for x in X])[0], found[i : i + 1])
    assert all(same_bits(a, b) for a, b in zip(fast(cuda, *stacks[::-1])[::-1], together, strict=True))


def test_no_order_of_threads_shows(simt, monkeypatch):
    stacks = [draw(300, (9, 20), [torch.float16]), draw(70, (80,), [torch.bfloat16])]
    answers = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(fast((simt, CPU), *stacks))
    assert all(same_bits(a, b) for answer in answers[1:] for a, b in zip(answer, answers[0], strict=True))


@pytest.mark.parametrize("ranks", [(5, 9), (40, 30)], ids=str)
def test_columns_are_scaled(cuda, ranks):
    X = [(3 * x).round() for x in draw(140, ranks, [torch.bfloat16])]
    e = (torch.arange(sum(ranks) * 2).reshape(2, -1) * 7) % 30 - 15
    S = whole(X) * torch.exp2(-e.double())[:, None]
    assert torch.equal(fast(cuda, X, e=e)[0], S.mT @ S)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@halves
def test_what_is_not_finite_reaches_its_own_row_and_column(cuda, dtype, value):
    X = draw(300, (4, 13, 60), [dtype])
    (clean,) = fast(cuda, X)
    X[1][1, 299, 12] = value
    (G,) = fast(cuda, X)
    others = torch.arange(77) != 16
    assert same_bits(G[0], clean[0])
    assert same_bits(G[1][others][:, others], clean[1][others][:, others])
    assert not G[1, 16, 16].isfinite()


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64], [torch.bfloat16, torch.float16]], ids=str)
def test_other_dtypes_are_refused(simt, dtypes):
    X, G, memory = (
        draw(9, (3, 2), dtypes),
        torch.empty(2, 5, 5, dtype=torch.float64),
        torch.empty(1 << 16, dtype=torch.uint8),
    )
    scale = torch.empty(2, 0, 5, dtype=torch.float64)
    call = simt.library.functions("test").fedlora_fast_gram
    assert call(table(X), counts([2]), table([scale]), table([G]), 1, memory.data_ptr(), 1 << 16, 1, None) == 2


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 400),
    ranks=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    batch=st.integers(0, 3),
    dtype=st.sampled_from(HALVES),
    by_columns=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shapes_agree(simt, m, ranks, batch, dtype, by_columns, seed):
    X = draw(m, ranks, [dtype], batch, seed, by_columns)
    check(fast((simt, CPU), X)[0], X)
