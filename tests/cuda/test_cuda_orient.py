"""The sign rule of the CUDA library: what the cpu library answers, to the bit."""

import ctypes
import math

import pytest
import torch
from guards import LAYOUTS, SCHEDULES, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.backends.native.library import rows, stream, table

WINDOW = 1 - 2.0**-20
DTYPES = [torch.float64, torch.float32]


def orient(cuda, X):
    """X turned, and the signs."""
    backend, device = cuda
    X = X.to(device)
    signs = torch.full((len(X), X.shape[2]), math.nan, dtype=torch.float64, device=device)
    tables = table([X]), table([rows(signs)])
    backend.library.call("orient", "fedlora_orient", *tables, 1, 1, stream(device))
    return X.cpu(), signs.cpu()


def wanted(X):
    """The rule, in the arithmetic of X; NaN is not compared."""
    size = torch.where(X.isnan(), -1.0, X.abs())
    bar = size.amax(1, keepdim=True).clamp(min=0) * WINDOW if X.shape[1] else size
    first = (size >= bar).to(torch.int8).argmax(1, keepdim=True) if X.shape[1] else None
    decides = X.gather(1, first)[:, 0] if first is not None else torch.zeros(len(X), X.shape[2])
    return torch.where(decides < 0, -1.0, 1.0).double()


def check(X, before, signs):
    assert torch.equal(signs, wanted(before))
    turned = torch.where(signs[:, None, :] < 0, -before, before)
    assert torch.equal(X.nan_to_num(0.5), turned.nan_to_num(0.5))


def draw(N, p, q, dtype, seed=0):
    """Columns with equal, nearly equal, zero and negative elements."""
    made = torch.Generator().manual_seed(seed)
    X = torch.randint(-2, 3, (N, p, q), generator=made).double()
    X *= 1 - torch.randint(0, 3, (N, p, q), generator=made) * 2.0**-21
    return X.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 37, 5), (2, 700, 19), (1, 2, 70), (2, 0, 3), (2, 3, 0), (0, 3, 2)])
@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_columns_turn_by_the_rule(cuda, dtype, shape, layout):
    before = draw(*shape, dtype)
    X, signs = orient(cuda, LAYOUTS.get(layout, torch.clone)(before))
    check(X, before, signs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_nan_and_infinity(cuda, dtype):
    X = torch.zeros(1, 5, 6, dtype=dtype)
    X[0, :, 1] = -0.0
    X[0, 2, 2] = -math.inf
    X[0, 0, 3], X[0, 1, 3] = math.nan, -1.0
    X[0, :, 4] = math.nan
    X[0, 3, 5] = -1e-310 if dtype == torch.float64 else -1e-42
    turned, signs = orient(cuda, X.clone())
    assert signs.tolist() == [[1, 1, -1, -1, 1, -1]]
    check(turned, X, signs)


def test_a_column_does_not_depend_on_its_neighbours(cuda):
    X = draw(5, 300, 11, torch.float32)
    whole, signs = orient(cuda, X.clone())
    for i in range(5):
        alone, own = orient(cuda, X[i : i + 1, :, 3:4].clone())
        assert same_bits(alone[0, :, 0], whole[i, :, 3])
        assert own[0, 0] == signs[i, 3]


def test_nothing_else_is_written(cuda):
    room = torch.full((2, 30, 20), 7.0)
    room[:, 3:25, 5:16] = draw(2, 22, 11, torch.float32)
    backend, device = cuda
    there = room.to(device)
    before = there.clone()
    X, signs = there[:, 3:25, 5:16], torch.zeros(2, 11, dtype=torch.float64, device=device)
    tables = table([X]), table([rows(signs)])
    backend.library.call("orient", "fedlora_orient", *tables, 1, 1, stream(device))
    check(X.cpu(), before[:, 3:25, 5:16].cpu(), signs.cpu())
    X.copy_(before[:, 3:25, 5:16])
    assert torch.equal(there, before)


def test_no_order_of_threads_shows(simt, monkeypatch):
    before, answers = draw(2, 700, 19, torch.float32), []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(orient((simt, torch.device("cpu")), before.clone())[0])
    assert all(same_bits(X, answers[0]) for X in answers[1:])


def test_what_does_not_fit_is_refused(simt):
    X, signs = torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.float64)
    function = simt.library.functions("orient").fedlora_orient
    assert function(table([X]), table([rows(signs)]), 1, 1, None) == 1
    assert function(table([X.half()]), table([rows(signs[:, :2])]), 1, 1, None) == 2
    assert function(None, ctypes.pointer(table([X])[0]), 1, 1, None) == 4


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 3),
    p=st.integers(0, 400),
    q=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shapes(simt, N, p, q, dtype, seed):
    before = draw(N, p, q, dtype, seed)
    X, signs = orient((simt, torch.device("cpu")), before.clone())
    check(X, before, signs)
