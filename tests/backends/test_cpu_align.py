"""Rotations and rotated factors of the cpu library: what an answer must not depend on, to the bit."""

import math

import pytest
import torch
from frames import DTYPES, dtype_id, normal, orthogonal, same_bits

from fedlora_kernels.backends import cpu
from fedlora_kernels.backends.contract import Info
from fedlora_kernels.testing import U64, tolerance

BACKEND = cpu.BACKEND
pytestmark = pytest.mark.skipif(not BACKEND.available()[0], reason=BACKEND.available()[1])

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
RANKS = [1, 3, 4, 8, 9, 16, 17, 32, 33]


def frames(N, rows, r, dtype=torch.float64):
    """Pairs of every kind: plain ones, reflected ones, deficient ones, zero, equal ones."""
    X, Y = normal(N, rows, r), normal(N, rows, r, seed=1)
    for i in range(N):
        if i % 5 == 1:
            Y[i] = X[i] @ orthogonal(r, i, det=-1)
        if i % 5 == 2:
            Y[i, :, r // 2 :] = 0
        if i % 5 == 3:
            Y[i] = 0 if i % 2 else X[i]
    return X.to(dtype), Y.to(dtype)


def same_rotation(one, other):
    return all(same_bits(x.to(torch.int32) if x.dtype == torch.bool else x, y.to(torch.int32) if y.dtype == torch.bool else y)
               for x, y in zip(one, other, strict=True))  # fmt: skip


def part(rotation, i):
    return type(rotation)(*(field[i : i + 1] for field in rotation))


def align(B, A, B_ref, A_ref, side=(1.0, 0.0), special=True, blend=1.0):
    ((left, right, rotation),) = BACKEND.align_factors([B], [A], [B_ref], [A_ref], side, special, blend)
    return left, right, rotation


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("special", [False, True], ids=["O", "SO"])
def test_rotation_depends_on_its_matrix_alone(monkeypatch, r, blend, special):
    """Neither on the lanes beside it, nor on its place, nor on the threads."""
    X, Y = frames(21, 40, r)
    (whole,) = BACKEND.procrustes_rotation([X], [Y], special, blend)
    (turned,) = BACKEND.procrustes_rotation([X.flip(0)], [Y.flip(0)], special, blend)
    assert same_rotation(whole, type(turned)(*(field.flip(0) for field in turned)))
    for i in range(21):
        (alone,) = BACKEND.procrustes_rotation([X[i : i + 1]], [Y[i : i + 1]], special, blend)
        assert same_rotation(alone, part(whole, i)), i
    for threads in ("1", "3"):
        monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
        assert same_rotation(BACKEND.procrustes_rotation([X], [Y], special, blend)[0], whole)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_neighbours_of_a_bad_matrix_keep_every_bit(r, bad):
    X, Y = frames(11, 40, r)
    (clean,) = BACKEND.procrustes_rotation([X], [Y], True, 0.5)
    X[4, 39, r - 1] = bad
    (spoilt,) = BACKEND.procrustes_rotation([X], [Y], True, 0.5)
    assert spoilt.info.tolist() == [Info.NONFINITE if i == 4 else 0 for i in range(11)]
    assert all(same_rotation(part(spoilt, i), part(clean, i)) for i in range(11) if i != 4)


@pytest.mark.parametrize("r", [*RANKS, 64, 150])
def test_limits_without_refinement(r):
    """|H - H^T| is what the iteration leaves; nothing corrects it afterwards."""
    X, Y = frames(10, 3 * r, r)
    M = X.mT @ Y
    for special in (False, True):
        (raw,) = BACKEND.procrustes_rotation([X], [Y], special, 1.0)
        assert (raw.Q.mT @ raw.Q - torch.eye(r)).abs().max() <= tolerance("rotation")
        H = raw.Q.mT @ M
        noise = 8 * r * U64 * torch.linalg.norm(X, dim=(1, 2)) * torch.linalg.norm(Y, dim=(1, 2))
        limit = 64 * U64 * torch.linalg.norm(M, dim=(1, 2)) + 2 * noise
        assert (torch.linalg.norm(H - H.mT, dim=(1, 2)) <= limit).all()


@dtypes
@pytest.mark.parametrize("r", [3, 4, 8, 16, 33])
@pytest.mark.parametrize("side", [(1.0, 0.0), (0.5, 2.0)], ids=["A", "both"])
def test_alignment_depends_on_its_pair_alone(monkeypatch, dtype, r, side):
    """Alone chunks go over the threads, in a large batch tasks of many pairs do."""
    N = 140 if r < 33 else 9
    B, A = normal(N, 37, r).to(dtype), normal(N, r, 41, seed=1).to(dtype)
    B_ref, A_ref = normal(N, 37, r, seed=2).to(dtype), normal(N, r, 41, seed=3).to(dtype)
    A_ref[5], A_ref[6, r // 2 :] = 0, 0
    whole = {}
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
        whole[threads] = align(B, A, B_ref, A_ref, side, blend=0.5)
        for i in (0, 5, 6, N - 1):
            own = slice(i, i + 1)
            left, right, rotation = align(B[own], A[own], B_ref[own], A_ref[own], side, blend=0.5)
            assert same_bits(left, whole[threads][0][own])
            assert same_bits(right, whole[threads][1][own])
            assert same_rotation(rotation, part(whole[threads][2], i))
    for threads in ("2", "5"):
        assert all(same_bits(x, y) for x, y in zip(whole["1"][:2], whole[threads][:2], strict=True))
        assert same_rotation(whole["1"][2], whole[threads][2])


@dtypes
def test_alignment_is_rotation_and_rotated_factors(dtype):
    """One fused call answers what the three steps answer."""
    B, A, A_ref = (normal(9, *shape).to(dtype) for shape in ((5000, 8), (8, 37), (8, 37)))
    left, right, rotation = align(B, A, None, A_ref, special=False)
    (alone,) = BACKEND.procrustes_rotation([A.mT], [A_ref.mT], False, 1.0)
    assert (alone.Q - rotation.Q).abs().max() <= 1e-12
    ((BQ, QA),) = BACKEND.rotate_factors([B], [A], [rotation.Q])
    assert same_bits(left, BQ)
    assert same_bits(right, QA)


@dtypes
@pytest.mark.parametrize("view", ["plain", "turned", "strided", "offset"])
def test_answers_lie_as_their_factors(dtype, view):
    make = {
        "plain": lambda x: x,
        "turned": lambda x: x.mT.contiguous().mT,
        "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
        "offset": lambda x: torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape),
    }[view]
    B, A, A_ref = (normal(3, *shape).to(dtype) for shape in ((131, 8), (8, 67), (8, 67)))
    before = align(B, A, None, A_ref)
    left, right, _ = align(make(B), make(A), None, A_ref)
    # another layout is another order of additions in M
    for ours, plain in ((left, before[0]), (right, before[1])):
        limit = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            ours.double(), plain.double(), rtol=limit, atol=limit * float(plain.double().abs().max())
        )
    assert (left.stride(-1) > left.stride(-2)) == (view == "turned")
    assert (right.stride(-1) > right.stride(-2)) == (view == "turned")


@dtypes
def test_fresh_and_used_memory_give_the_same_bits(poisoned_empty, dtype):
    """Scratch and answers hold NaN before the call."""
    B, A, B_ref, A_ref = (normal(7, *shape).to(dtype) for shape in ((67, 5), (5, 41), (67, 5), (5, 41)))
    first = align(B, A, B_ref, A_ref, (1.0, 0.5), blend=0.5)
    align(normal(3, 2100, 9), normal(3, 9, 50), normal(3, 2100, 9, seed=1), normal(3, 9, 50, seed=1), (1.0, 1.0))
    again = align(B, A, B_ref, A_ref, (1.0, 0.5), blend=0.5)
    assert same_bits(first[0], again[0])
    assert same_bits(first[1], again[1])
    assert same_rotation(first[2], again[2])


@pytest.mark.parametrize("alpha", [1e-300, 1.0, 1e300])
def test_weights_of_any_size(alpha):
    B, A, B_ref, A_ref = (normal(2, *shape) for shape in ((37, 5), (5, 23), (37, 5), (5, 23)))
    plain = align(B, A, B_ref, A_ref, (1.0, 0.0))[2]
    weighed = align(B, A, B_ref, A_ref, (alpha, 0.0))[2]
    assert (weighed.Q - plain.Q).abs().max() <= 1e-13
    assert weighed.info.tolist() == [0, 0]
    assert torch.allclose(weighed.singular_values, alpha * plain.singular_values, rtol=1e-13)
    assert torch.allclose(weighed.condition, plain.condition, rtol=1e-13)


def test_one_reference_for_all_pairs():
    B, A, A_ref = normal(5, 37, 4).float(), normal(5, 4, 29).float(), normal(1, 4, 29, seed=3).float()
    shared, own = align(B, A, None, A_ref.expand(5, 4, 29)), align(B, A, None, A_ref.repeat(5, 1, 1))
    assert same_bits(shared[0], own[0])
    assert same_rotation(shared[2], own[2])


@pytest.mark.parametrize("shape", [(600_000, 4), (300_000, 16), (290_000, 12)])
def test_answers_written_past_the_caches(shape):
    """Large ones are; their bits are those of small ones."""
    B, A = normal(1, *shape).float(), normal(1, shape[1], 33).float()
    Q = orthogonal(shape[1], 3)[None]
    ((left, _),) = BACKEND.rotate_factors([B], [A], [Q])
    ((start, _),) = BACKEND.rotate_factors([B[:, :999]], [A], [Q])
    assert same_bits(left[:, :992], start[:, :992])
    assert torch.linalg.norm(left.double() - B.double() @ Q) <= 2.0**-23 * torch.linalg.norm(B)
