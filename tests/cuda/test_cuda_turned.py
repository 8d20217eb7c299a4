"""Rotated factors of the CUDA library: the product is kept, the identity keeps every bit, neighbours and layouts do not matter."""

import math

import pytest
import torch
from guards import DTYPES, LAYOUTS, SCHEDULES, Guards, dtype_id, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.testing import orthonormal, roundoff

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
SHAPES = [
    (3, 37, 5, 23),
    (2, 131, 16, 61),
    (1, 53, 64, 97),
    (2, 1, 1, 3),
    (2, 3, 7, 2),
    (1, 300, 33, 270),
    (1, 20, 70, 9),
]


def make(N, m, r, n, dtype=torch.float32, seed=0):
    made = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(N, *shape, generator=made, dtype=torch.float64).to(dtype) for shape in ((m, r), (r, n)))
    Q = torch.stack([orthonormal(r, r, seed + i) for i in range(N)]) if N else torch.zeros(0, r, r, dtype=torch.float64)
    return B, A, Q


def rotate(cuda, B, A, Q):
    backend, device = cuda
    ((left, right),) = backend.rotate_factors([B.to(device)], [A.to(device)], [Q.to(device)])
    return left.cpu(), right.cpu()


def check(answer, B, A, Q):
    """Each element within a few roundings of what is added up for it."""
    for ours, X, q in ((answer[0], B.double(), Q), (answer[1].mT, A.double().mT, Q)):
        unit = roundoff(ours.dtype)
        working = roundoff(torch.float64 if ours.dtype == torch.float64 else torch.float32)
        size = X.abs() @ q.abs()
        least = torch.finfo(ours.dtype).smallest_normal * unit * 2
        assert bool(
            (
                (ours.double() - X @ q).abs()
                <= unit * (X @ q).abs() + (X.shape[-1] + 2) * working * size * (1 + unit) + least
            ).all()
        )
    assert answer[0].dtype == B.dtype
    assert answer[1].dtype == A.dtype


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_turned(cuda, poisoned_empty, dtype, shape):
    given = make(*shape, dtype)
    check(rotate(cuda, *given), *given)


def test_each_factor_keeps_its_dtype(cuda):
    for first, second in (
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
    ):
        B, A, Q = make(2, 31, 5, 17, torch.float64)
        check(rotate(cuda, B.to(first), A.to(second), Q), B.to(first), A.to(second), Q)


@dtypes
@pytest.mark.parametrize("r", [5, 40])
def test_identity_keeps_every_bit(cuda, dtype, r):
    B, A, Q = make(3, 137, r, 23, dtype)
    B[0, 0, 0], A[0, 1, 1], B[0, :, 2], A[2] = -0.0, -0.0, -0.0, 0.0
    B[2, 3, 3] = torch.finfo(dtype).smallest_normal / 8
    A[2, 0, 0], A[2, 1, 1] = torch.finfo(dtype).max, -math.inf
    kind = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    B[2].view(kind)[5, 1] = -3  # a NaN with other bits than the usual one
    Q[0] = Q[2] = torch.eye(r)
    left, right = rotate(cuda, B, A, Q)
    for i in (0, 2):
        assert same_bits(left[i], B[i])
        assert same_bits(right[i], A[i])
    check((left[1:2], right[1:2]), B[1:2], A[1:2], Q[1:2])
    assert not torch.equal(left[1], B[1])


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(cuda, dtype, layout):
    B, A, Q = make(3, 133, 9, 37, dtype)
    wanted, change = rotate(cuda, B, A, Q), LAYOUTS[layout]
    assert all(same_bits(x, y) for x, y in zip(rotate(cuda, change(B), change(A), Q), wanted, strict=True))
    assert all(same_bits(x, y) for x, y in zip(rotate(cuda, B, A, change(Q)), wanted, strict=True))
    one = rotate(cuda, B[:1].expand(3, -1, -1), A, Q)
    assert same_bits(one[0], rotate(cuda, B[:1].repeat(3, 1, 1), A, Q)[0])


@dtypes
def test_a_pair_and_a_row_depend_on_themselves_alone(cuda, dtype):
    B, A, Q = make(5, 300, 12, 150, dtype)
    Q[3] = torch.eye(12)
    whole = rotate(cuda, B, A, Q)
    for i in range(5):
        own = slice(i, i + 1)
        alone = rotate(cuda, B[own], A[own], Q[own])
        assert all(same_bits(x, y[own]) for x, y in zip(alone, whole, strict=True))
    assert same_bits(rotate(cuda, B[:, 129:140], A[:, :, 5:6], Q)[0], whole[0][:, 129:140])


def test_groups_of_one_call(cuda):
    backend, device = cuda
    groups = [make(2, 31, 5, 17), make(0, 3, 2, 4), make(1, 7, 33, 11, torch.float64), make(2, 5, 0, 4)]
    answers = backend.rotate_factors(*([part.to(device) for part in parts] for parts in zip(*groups, strict=True)))
    for (left, right), pair in zip(answers, groups, strict=True):
        assert left.shape == pair[0].shape
        assert right.shape == pair[1].shape
        assert all(same_bits(x.cpu(), y) for x, y in zip((left, right), rotate(cuda, *pair), strict=True))


def test_many_tiles_to_a_block(simt):
    """Enough of them that a block takes several."""
    B, A, Q = make(66, 17000, 1, 3)
    found = rotate((simt, torch.device("cpu")), B, A, Q)
    check(found, B, A, Q)
    alone = rotate((simt, torch.device("cpu")), B[7:8], A[7:8], Q[7:8])
    assert same_bits(alone[0], found[0][7:8])


@dtypes
def test_no_order_of_threads_shows(simt, monkeypatch, dtype):
    given, answers = make(2, 200, 40, 37, dtype), []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(rotate((simt, torch.device("cpu")), *given))
    for answer in answers[1:]:
        assert all(same_bits(x, y) for x, y in zip(answer, answers[0], strict=True))


@dtypes
@pytest.mark.parametrize("by_columns", [False, True])
def test_nothing_beside_the_answers_is_written_and_inputs_stay(cuda, monkeypatch, dtype, by_columns):
    backend, device = cuda
    given = [part.to(device) for part in make(3, 133, 7, 39, dtype)]
    if by_columns:
        given[:2] = [LAYOUTS["turned"](part) for part in given[:2]]
    before = [part.clone() for part in given]
    guards = Guards(monkeypatch, backend.library)
    ((left, right),) = backend.rotate_factors(*([part] for part in given))
    check((left.cpu(), right.cpu()), *(part.cpu() for part in before))
    assert guards.hold()
    assert all(same_bits(x, y) for x, y in zip(given, before, strict=True))


def test_trouble_stays_with_its_matrix(cuda):
    B, A, Q = make(3, 31, 5, 17)
    clean = rotate(cuda, B, A, Q)
    B[1, 3, 3], Q[1, 0, 0] = math.nan, math.nan
    for ours, theirs in zip(rotate(cuda, B, A, Q), clean, strict=True):
        assert all(same_bits(ours[i], theirs[i]) for i in (0, 2))
        assert ours[1].isnan().any()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 150), st.integers(0, 40), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_pair(simt, shape, dtype, seed):
    given_pair = make(*shape, dtype, seed)
    check(rotate((simt, torch.device("cpu")), *given_pair), *given_pair)
