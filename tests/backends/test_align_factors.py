"""`align_factors` of every backend: the rotation of its sides, the product kept, trouble marked."""

import math

import pytest
import torch
from frames import DTYPES, dtype_id, every_backend, normal, orthogonal, rotation2, same_bits

from fedlora_kernels import backends as registry
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.testing import U64, roundoff, tolerance

backends = every_backend("align_factors")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
sides = pytest.mark.parametrize("side", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)], ids=["A", "B", "both"])


def align(backend, B, A, reference_B, reference_A, side=(1.0, 0.0), special=True, blend=1.0):
    sizes = {"m": B.shape[1], "n": A.shape[2], "r": A.shape[1], "N": A.shape[0]}
    references = [None if part is None else [part] for part in (reference_B, reference_A)]
    ((left, right, rotation),) = backend([B], [A], *references, side, special, blend, dtype=B.dtype, **sizes)
    return left, right, rotation


def make_pair(N=2, m=37, r=5, n=23, dtype=torch.float64, seed=0):
    return normal(N, m, r, seed=seed).to(dtype), normal(N, r, n, seed=seed + 1).to(dtype)


def turned(B, A, G):
    """The pair in another gauge: ``(B G^T, G A)``, so that aligning gives back (B, A) with Q = G."""
    return B @ G.T, G @ A


def check_product(left, right, B, A):
    lost = left.double() @ right.double() - B.double() @ A.double()
    size = torch.linalg.norm(B.double(), dim=(1, 2)) * torch.linalg.norm(A.double(), dim=(1, 2))
    assert left.dtype == B.dtype
    assert right.dtype == A.dtype
    assert (torch.linalg.norm(lost, dim=(1, 2)) <= tolerance("rotated", dtype=B.dtype) * size).all()


@backends
@dtypes
@sides
@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("special", [False, True], ids=["O", "SO"])
def test_rotates_by_the_rotation_of_its_sides(backend, dtype, side, special, blend):
    B, A = make_pair(dtype=dtype)
    B_ref, A_ref = make_pair(dtype=dtype, seed=5)
    left, right, rotation = align(backend, B, A, B_ref, A_ref, side, special, blend)
    check_product(left, right, B, A)
    source = torch.cat([side[0] ** 0.5 * A.double().mT, side[1] ** 0.5 * B.double()], dim=1)
    target = torch.cat([side[0] ** 0.5 * A_ref.double().mT, side[1] ** 0.5 * B_ref.double()], dim=1)
    oracle = registry.get("reference")
    (expected,) = oracle.procrustes_rotation([source], [target], special, blend)
    assert (rotation.Q - expected.Q).abs().max() <= 1e-12
    assert torch.allclose(rotation.singular_values, expected.singular_values, rtol=1e-12)
    assert torch.equal(rotation.unique, expected.unique)
    size = sum(
        weight * torch.linalg.norm(part.double(), dim=(1, 2)) * torch.linalg.norm(reference.double(), dim=(1, 2))
        for weight, part, reference in zip(side, (A, B), (A_ref, B_ref), strict=True)
    )
    s = rotation.singular_values
    gap = s[:, -2] + s[:, -1] * (torch.linalg.det(source.mT @ target).sign() if special else 1)
    assert torch.allclose(rotation.condition, 2 * size / gap, rtol=1e-10)
    for ours, exact in ((left, B.double() @ rotation.Q), (right, rotation.Q.mT @ A.double())):
        assert torch.linalg.norm(ours.double() - exact) <= 4 * roundoff(dtype) * torch.linalg.norm(exact)


@backends
@sides
def test_gauge_of_the_reference_is_undone(backend, side):
    B_ref, A_ref = make_pair(1, 37, 6, 29)
    G = orthogonal(6, 3, det=1)
    left, right, rotation = align(backend, *turned(B_ref, A_ref, G), B_ref, A_ref, side)
    assert (rotation.Q[0] - G).abs().max() <= 1e-13
    assert (right - A_ref).abs().max() <= 1e-12
    assert (left - B_ref).abs().max() <= 1e-12


@backends
@sides
def test_turned_client_turns_the_answer(backend, side):
    B, A = make_pair(1)
    B_ref, A_ref = make_pair(1, seed=9)
    P = orthogonal(5, 2, det=1)
    left, right, plain = align(backend, B, A, B_ref, A_ref, side)
    left_P, right_P, other = align(backend, *turned(B, A, P), B_ref, A_ref, side)
    assert (other.Q[0] - P @ plain.Q[0]).abs().max() <= 1e-12
    assert (left_P - left).abs().max() <= 1e-12
    assert (right_P - right).abs().max() <= 1e-12


@backends
@sides
def test_aligning_twice_gives_the_identity(backend, side):
    B, A = make_pair()
    references = make_pair(seed=9)
    left, right, _ = align(backend, B, A, *references, side)
    again = align(backend, left, right, *references, side)[2]
    assert (again.Q - torch.eye(5)).abs().max() <= 1e-12


@backends
@sides
def test_client_and_reference_swapped(backend, side):
    pair, references = make_pair(), make_pair(seed=9)
    there, back = align(backend, *pair, *references, side)[2], align(backend, *references, *pair, side)[2]
    assert (there.Q - back.Q.mT).abs().max() <= 1e-12


@backends
@sides
@dtypes
def test_blend_zero_keeps_every_bit(backend, side, dtype):
    B, A = make_pair(dtype=dtype)
    B[0, 0, 0], A[0, 0, 0] = -0.0, -0.0
    left, right, rotation = align(backend, B, A, *make_pair(dtype=dtype, seed=9), side, blend=0.0)
    assert same_bits(left, B)
    assert same_bits(right, A)
    assert same_bits(rotation.Q, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))


@backends
@dtypes
def test_zero_reference_or_client_keeps_every_bit(backend, dtype):
    B, A = make_pair(dtype=dtype)
    B_ref, A_ref = make_pair(dtype=dtype, seed=9)
    for pair, references, side in (
        ((B, A), (0 * B_ref, A_ref), (0.0, 1.0)),
        ((B, A), (B_ref, 0 * A_ref), (1.0, 0.0)),
        ((0 * B, A), (B_ref, A_ref), (0.0, 1.0)),
        ((B, 0 * A), (B_ref, A_ref), (1.0, 0.0)),
        ((B, A), (0 * B_ref, 0 * A_ref), (0.5, 0.5)),
    ):
        left, right, rotation = align(backend, *pair, *references, side)
        assert same_bits(left, pair[0])
        assert same_bits(right, pair[1])
        assert rotation.unique.tolist() == [False, False]
        assert rotation.notes.tolist() == [Note.ILL_CONDITIONED] * 2


@backends
def test_rank_one_pairs_stay_as_they_are_in_so(backend):
    B, A = make_pair(2, 37, 1, 23)
    left, right, rotation = align(backend, B, A, None, -A)
    assert same_bits(left, B)
    assert same_bits(right, A)
    assert rotation.unique.tolist() == [True, True]
    left, right, rotation = align(backend, B, A, None, -A, special=False)
    assert torch.equal(left, -B)
    assert torch.equal(right, -A)


@backends
def test_a_reference_without_weight_may_be_absent_or_wrong(backend):
    B, A = make_pair()
    B_ref, A_ref = make_pair(seed=9)
    nan = torch.full_like(B_ref, torch.nan)
    answers = [align(backend, B, A, other, A_ref, (1.0, 0.0)) for other in (B_ref, None, nan)]
    for left, right, rotation in answers[1:]:
        assert torch.equal(left, answers[0][0])
        assert torch.equal(right, answers[0][1])
        assert rotation.info.tolist() == [0, 0]
    left, _, _ = align(backend, B, A, B_ref, None, (0.0, 1.0))
    assert left.isfinite().all()


@backends
@dtypes
def test_powers_of_two_keep_every_bit_of_the_rotation(backend, dtype):
    B, A = make_pair(dtype=dtype)
    B_ref, A_ref = make_pair(dtype=dtype, seed=9)
    plain = align(backend, B, A, B_ref, A_ref, blend=0.5)[2]
    scaled = align(backend, B, 4 * A, B_ref, 8 * A_ref, blend=0.5)[2]
    assert same_bits(scaled.Q, plain.Q)
    both = align(backend, B, A, B_ref, A_ref, (0.5, 0.25))[2]
    assert same_bits(align(backend, 2 * B, 2 * A, 4 * B_ref, 4 * A_ref, (0.5, 0.25))[2].Q, both.Q)


@backends
@pytest.mark.parametrize("scale", [2.0**400, 2.0**-400])
def test_sides_of_very_different_size(backend, scale):
    B, A = make_pair()
    B_ref, A_ref = make_pair(seed=9)
    mixed = align(backend, scale * B, A, scale * B_ref, A_ref, (0.5, 0.5))[2]
    only = align(backend, B, A, B_ref, A_ref, (0.0, 1.0) if scale > 1 else (1.0, 0.0))[2]
    assert (mixed.Q - only.Q).abs().max() <= 1e-13
    assert mixed.info.tolist() == [0, 0]


@backends
def test_half_turn_halfway(backend):
    A_ref = torch.cat([torch.eye(4), torch.zeros(4, 3)], dim=1).double()[None]
    G = torch.block_diag(-torch.eye(2), rotation2(0.7)).double()
    B = normal(1, 11, 4)
    left, right, rotation = align(backend, B, G @ A_ref, None, A_ref, blend=0.5)
    assert (rotation.Q[0] - torch.block_diag(torch.eye(2), rotation2(0.35))).abs().max() <= 1e-13
    check_product(left, right, B, G @ A_ref)


@backends
@dtypes
@sides
@pytest.mark.parametrize("where", ["B", "A", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_pair_is_marked_and_alone(backend, dtype, side, where, bad):
    parts = {
        "B": normal(3, 31, 4),
        "A": normal(3, 4, 17),
        "B_ref": normal(3, 31, 4, seed=3),
        "A_ref": normal(3, 4, 17, seed=3),
    }
    parts = {name: part.to(dtype) for name, part in parts.items()}
    clean = align(backend, *parts.values(), side, blend=0.5)
    if where == "reference":
        where = "A_ref" if side[0] else "B_ref"
    parts[where][1, 2, 3] = bad
    left, right, rotation = align(backend, *parts.values(), side, blend=0.5)
    assert rotation.info.tolist() == [0, Info.NONFINITE, 0]
    for part in (left[1], right[1], rotation.Q[1], rotation.singular_values[1], rotation.condition[1]):
        assert part.isnan().all()
    assert rotation.unique.tolist() == [True, False, True]
    others = [0, 2]
    atol = 0 if backend.bitwise else 4 * roundoff(dtype)
    for ours, theirs in zip((left, right, rotation.Q), (clean[0], clean[1], clean[2].Q), strict=True):
        torch.testing.assert_close(ours[others], theirs[others], rtol=atol, atol=atol)


@backends
def test_overflow_of_the_output_is_marked(backend):
    G = orthogonal(4, 3, det=1)
    B = torch.full((2, 3, 4), 60000.0).half()
    B[1] = 1
    A_ref = normal(2, 4, 9)
    A = (G @ A_ref).half()
    left, right, rotation = align(backend, B, A, None, A_ref.half())
    assert not left[0].isfinite().all()
    assert rotation.info.tolist() == [Info.OVERFLOW, 0]
    assert right.isfinite().all()


@backends
@pytest.mark.parametrize(("N", "m", "r", "n"), [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
@sides
def test_empty(backend, N, m, r, n, side):
    B, A = torch.zeros(N, m, r), torch.zeros(N, r, n)
    left, right, rotation = align(backend, B, A, B, A, side, blend=0.5)
    assert left.shape == (N, m, r)
    assert right.shape == (N, r, n)
    assert torch.equal(rotation.Q, torch.eye(r, dtype=torch.float64).expand(N, r, r))
    assert rotation.info.tolist() == [0] * N


@backends
def test_ragged_groups(backend):
    assert backend([], [], [], [], (1.0, 0.0), True, 1.0) == []
    pairs = [make_pair(2, 31, 5, 17), make_pair(1, 7, 3, 11)]
    references = [make_pair(2, 31, 5, 17, seed=9), make_pair(1, 7, 3, 11, seed=9)]
    B, A = zip(*pairs, strict=True)
    B_ref, A_ref = zip(*references, strict=True)
    out = backend(B, A, B_ref, A_ref, (0.5, 0.5), True, 1.0, m=31, n=17, r=5, N=2)
    for (left, right, rotation), pair, reference in zip(out, pairs, references, strict=True):
        check_product(left, right, *pair)
        alone = align(backend, *pair, *reference, (0.5, 0.5))[2]
        assert (rotation.Q - alone.Q).abs().max() <= 1e-13


@backends
def test_inputs_untouched_and_every_element_written(backend, poisoned_empty):
    parts = [*make_pair(3, 31, 5, 17, torch.float32), *make_pair(3, 31, 5, 17, torch.float32, seed=9)]
    before = [part.clone() for part in parts]
    left, right, rotation = align(backend, *parts, (0.5, 0.5), blend=0.5)
    assert all(same_bits(part, copy) for part, copy in zip(parts, before, strict=True))
    for part in (left, right, rotation.Q, rotation.singular_values, rotation.condition):
        assert part.isfinite().all()
    assert (rotation.info == 0).all()


@backends
@dtypes
def test_copies_of_one_pair_agree_after_alignment(backend, dtype):
    base_B, base_A = make_pair(1, 41, 6, 29)
    gauges = [orthogonal(6, seed, det=1) for seed in range(5)]
    B, A = (torch.cat(parts).to(dtype) for parts in zip(*(turned(base_B, base_A, G) for G in gauges), strict=True))
    any_reference = normal(1, 6, 29, seed=77).to(dtype).expand(5, 6, 29)
    left, right, _ = align(backend, B, A, None, any_reference)
    mean = left.double().mean(0) @ right.double().mean(0)
    product = (base_B @ base_A)[0]
    # the copies differ by the rounding of their gauges, which the rotation amplifies by its condition
    assert torch.linalg.norm(mean - product) <= (512 * roundoff(dtype) + 64 * U64) * torch.linalg.norm(product)
