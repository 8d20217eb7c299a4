"""Pairs aligned by the CUDA library: the rotation of the reference, the product kept, trouble marked, and no bit that depends on others."""

import math

import pytest
import torch
from guards import DTYPES, LAYOUTS, SCHEDULES, Guards, dtype_id, home, same_answer, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.testing import orthonormal, roundoff, tolerance

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
sides = pytest.mark.parametrize("side", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)], ids=["A", "B", "both"])
SHAPES = [
    (2, 37, 5, 23),
    (2, 131, 8, 300),
    (1, 53, 16, 97),
    (1, 257, 27, 129),
    (1, 130, 32, 40),
    (2, 3, 7, 2),
    (2, 1, 1, 3),
]


def make(N=2, m=37, r=5, n=23, dtype=torch.float64, seed=0):
    """A pair and its reference."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(N, *shape, generator=made, dtype=torch.float64).to(dtype) for shape in ((m, r), (r, n)) * 2]


def align(cuda, B, A, B_ref, A_ref, side=(1.0, 0.0), special=True, blend=1.0):
    backend, device = cuda
    parts = [None if part is None else [part.to(device)] for part in (B, A, B_ref, A_ref)]
    ((left, right, rotation),) = backend.align_factors(*parts, side, special, blend)
    return left.cpu(), right.cpu(), home(rotation)


def same(one, other):
    return same_answer((*one[:2], *one[2]), (*other[:2], *other[2]))


def part(answer, own):
    return answer[0][own], answer[1][own], type(answer[2])(*(field[own] for field in answer[2]))


def check(answer, parts, side, special, blend, limit=1e-11):
    """Against the reference; rotations as far as they are well determined."""
    left, right, rotation = answer
    B, A = parts[:2]
    refs = [None if x is None else [x] for x in parts[2:]]
    ((_, _, wanted),) = backends.get("reference").align_factors([B], [A], *refs, side, special, blend)
    assert torch.equal(rotation.info, wanted.info)
    assert torch.equal(rotation.notes, wanted.notes)
    assert torch.equal(rotation.unique, wanted.unique)
    known = wanted.condition < 1e12  # beyond it is made of rounding
    assert torch.allclose(rotation.condition[known], wanted.condition[known], rtol=1e-9)
    assert bool((rotation.condition[~known] > 1e11).all())
    size = wanted.singular_values.abs().amax() if wanted.singular_values.numel() else 0.0
    assert torch.allclose(rotation.singular_values, wanted.singular_values, rtol=1e-12, atol=1e-14 * float(size))
    r = B.shape[-1]
    one = torch.eye(r, dtype=torch.float64)
    assert ((rotation.Q.mT @ rotation.Q - one).abs() <= tolerance("rotation")).all()
    if blend == 1.0:
        assert (
            ((rotation.Q - wanted.Q).abs().amax(dim=(1, 2)) <= limit * wanted.condition.clamp(1, 1e3)).all()
            if r
            else True
        )
    else:
        assert ((rotation.Q - wanted.Q).abs() <= 1e-9).all()
    for ours, X in ((left, B.double()), (right.mT, A.double().mT)):
        exact = X @ rotation.Q
        working = roundoff(torch.float64 if ours.dtype == torch.float64 else torch.float32)
        bound = roundoff(ours.dtype) * exact.abs() + (r + 2) * working * (X.abs() @ rotation.Q.abs()) * 2
        assert bool(((ours.double() - exact).abs() <= bound + torch.finfo(ours.dtype).smallest_normal).all())
    assert left.dtype == B.dtype
    assert right.dtype == A.dtype


@dtypes
@sides
@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("special", [False, True], ids=["O", "SO"])
def test_rotates_by_the_rotation_of_its_sides(cuda, poisoned_empty, dtype, side, special, blend):
    parts = make(dtype=dtype)
    check(align(cuda, *parts, side, special, blend), parts, side, special, blend)


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(cuda, poisoned_empty, dtype, shape):
    parts = make(*shape, dtype=dtype, seed=3)
    check(align(cuda, *parts, (1.0, 0.5)), parts, (1.0, 0.5), True, 1.0)


@sides
def test_each_part_keeps_its_dtype(cuda, side):
    for kinds in ((0, 1, 1, 1), (1, 0, 2, 3), (2, 1, 1, 1), (1, 1, 0, 0), (3, 2, 1, 2)):
        parts = [x.to(DTYPES[kind]) for x, kind in zip(make(), kinds, strict=True)]
        check(align(cuda, *parts, side), parts, side, True, 1.0)


@sides
@dtypes
@pytest.mark.parametrize("r", [5, 21])
def test_nothing_to_turn_keeps_every_bit(cuda, side, dtype, r):
    """No blend, a reference or a client of zeros: the identity to the bit."""
    B, A, B_ref, A_ref = make(2, 37, r, 23, dtype)
    B[0, 0, 0], A[0, 0, 0] = -0.0, -0.0
    B[1, 2, 1] = torch.finfo(dtype).smallest_normal / 8
    zero = [0 * x for x in (B, A)]
    cases = [((B, A, B_ref, A_ref), 0.0), ((B, A, *zero), 1.0), ((*zero, B_ref, A_ref), 1.0)]
    for parts, blend in cases:
        left, right, rotation = align(cuda, *parts, side, blend=blend)
        assert same_bits(left, parts[0])
        assert same_bits(right, parts[1])
        assert same_bits(rotation.Q, torch.eye(r, dtype=torch.float64).expand(2, r, r))
        if blend:
            assert rotation.unique.tolist() == [False, False]
            assert rotation.notes.tolist() == [Note.ILL_CONDITIONED] * 2


@pytest.mark.parametrize("special", [False, True], ids=["O", "SO"])
def test_degenerate_correlations(cuda, special):
    B, A, _, A_ref = make(4, 37, 6, 29)
    A_ref[1, 3:], A_ref[2, 1:] = 0, 0
    A_ref[3] = orthonormal(6, 6, 1).flip(0) @ A[3]
    left, right, rotation = align(cuda, B, A, None, A_ref, special=special)
    ((_, _, wanted),) = backends.get("reference").align_factors([B], [A], None, [A_ref], (1.0, 0.0), special, 1.0)
    assert (rotation.Q - wanted.Q).abs().max() <= 1e-12
    assert torch.equal(rotation.unique, wanted.unique)
    assert torch.equal(rotation.notes, wanted.notes)
    lost = torch.linalg.norm(left @ right - B @ A, dim=(1, 2))
    assert (lost <= tolerance("rotated") * torch.linalg.norm(B, dim=(1, 2)) * torch.linalg.norm(A, dim=(1, 2))).all()


def test_a_reference_without_weight_may_be_absent_or_wrong(cuda):
    B, A, B_ref, A_ref = make()
    answers = [align(cuda, B, A, other, A_ref) for other in (B_ref, None, torch.full_like(B_ref, math.nan))]
    assert all(same(answer, answers[0]) for answer in answers[1:])
    check(align(cuda, B, A, B_ref, None, (0.0, 1.0)), (B, A, B_ref, None), (0.0, 1.0), True, 1.0)


@pytest.mark.parametrize("scale", [2.0**400, 2.0**-400, 2.0**900])
@pytest.mark.parametrize("r", [5, 20, 33])
def test_float64_of_any_size(cuda, scale, r):
    B, A, B_ref, A_ref = make(2, 37, r, 150)
    plain = align(cuda, B, A, B_ref, A_ref)[2]
    scaled = align(cuda, B, scale * A, B_ref, A_ref / scale)[2]
    assert same_answer(scaled, plain)
    mixed = align(cuda, scale * B, A, scale * B_ref, A_ref, (0.5, 0.5))[2]
    only = align(cuda, B, A, B_ref, A_ref, (0.0, 1.0) if scale > 1 else (1.0, 0.0))[2]
    assert (mixed.Q - only.Q).abs().max() <= 1e-13
    assert mixed.info.tolist() == [Info.OVERFLOW if scale > 2.0**500 else 0] * 2


@pytest.mark.parametrize("alpha", [1e-300, 1e300])
def test_weights_of_any_size(cuda, alpha):
    parts = make()
    plain, weighed = align(cuda, *parts)[2], align(cuda, *parts, (alpha, 0.0))[2]
    assert (weighed.Q - plain.Q).abs().max() <= 1e-13
    assert weighed.info.tolist() == [0, 0]
    assert torch.allclose(weighed.singular_values, alpha * plain.singular_values, rtol=1e-13)
    assert torch.allclose(weighed.condition, plain.condition, rtol=1e-13)


@dtypes
@sides
@pytest.mark.parametrize("where", ["B", "A", "reference"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_non_finite_pair_is_marked_and_alone(cuda, dtype, side, where, bad):
    parts = make(3, 140, 4, 17, dtype)
    clean = align(cuda, *parts, side, blend=0.5)
    at = {"B": 0, "A": 1, "reference": 3 if side[0] else 2}[where]
    parts[at][1, 2, 3] = bad
    answer = align(cuda, *parts, side, blend=0.5)
    left, right, rotation = part(answer, slice(1, 2))
    assert answer[2].info.tolist() == [0, Info.NONFINITE, 0]
    assert answer[2].unique.tolist() == [True, False, True]
    for field in (left, right, rotation.Q, rotation.singular_values, rotation.condition):
        assert field.isnan().all()
    for i in (0, 2):
        assert same(part(answer, slice(i, i + 1)), part(clean, slice(i, i + 1)))


def test_overflow_of_the_output_is_marked(cuda):
    _, _, _, A_ref = make(2, 3, 4, 9)
    B = torch.full((2, 3, 4), 60000.0).half()
    B[1] = 1
    A = (orthonormal(4, 4, 3) @ A_ref).half()
    left, right, rotation = align(cuda, B, A, None, A_ref.half(), special=False)
    assert not left[0].isfinite().all()
    assert rotation.info.tolist() == [Info.OVERFLOW, 0]
    assert right.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
@sides
def test_empty(cuda, shape, side):
    N, m, r, n = shape
    left, right, rotation = align(cuda, *make(*shape), side, blend=0.5)
    assert left.shape == (N, m, r)
    assert right.shape == (N, r, n)
    assert rotation.Q.shape == (N, r, r)
    assert rotation.info.tolist() == [0] * N


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(cuda, dtype, layout):
    parts, change = make(2, 133, 9, 37, dtype), LAYOUTS[layout]
    assert same(align(cuda, *map(change, parts), (0.5, 1.0)), align(cuda, *parts, (0.5, 1.0)))


def test_one_reference_for_all_pairs(cuda):
    B, A, _, A_ref = make(5, 37, 4, 29, torch.float32)
    shared, own = (
        align(cuda, B, A, None, A_ref[:1].expand(5, 4, 29)),
        align(cuda, B, A, None, A_ref[:1].repeat(5, 1, 1)),
    )
    assert same(shared, own)


@dtypes
@pytest.mark.parametrize("r", [3, 8, 16, 32, pytest.param(34, marks=pytest.mark.full)])
def test_a_pair_depends_on_itself_alone(cuda, dtype, r):
    parts = make(5, 137, r, 41, dtype)
    parts[3][1], parts[3][2, r // 2 :] = 0, 0
    whole = align(cuda, *parts, (0.5, 2.0), blend=0.5)
    for i in range(5):
        own = slice(i, i + 1)
        assert same(align(cuda, *(x[own] for x in parts), (0.5, 2.0), blend=0.5), part(whole, own))


def test_groups_of_one_call(cuda):
    backend, device = cuda
    groups = [
        make(2, 31, 5, 17, torch.float32),
        make(1, 7, 3, 11),
        make(2, 40, 12, 9, torch.bfloat16),
        make(0, 4, 2, 3),
        make(1, 40, 20, 9),
    ]
    there = ([x.to(device) for x in parts] for parts in zip(*groups, strict=True))
    for (left, right, rotation), parts in zip(
        backend.align_factors(*there, (0.5, 0.5), True, 1.0), groups, strict=True
    ):
        assert same((left.cpu(), right.cpu(), home(rotation)), align(cuda, *parts, (0.5, 0.5)))
    assert backend.align_factors([], [], [], [], (1.0, 0.0), True, 1.0) == []


@dtypes
@pytest.mark.parametrize("r", [5, 14, 30])
def test_no_order_of_threads_shows(simt, monkeypatch, dtype, r):
    parts, answers = make(2, 140, r, 37, dtype), []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(align((simt, torch.device("cpu")), *parts, (0.5, 1.0), blend=0.5))
    assert all(same(answer, answers[0]) for answer in answers[1:])


@dtypes
@pytest.mark.parametrize("by_columns", [False, True])
def test_nothing_beside_the_answers_is_written_and_inputs_stay(cuda, monkeypatch, dtype, by_columns):
    backend, device = cuda
    parts = [part.to(device) for part in make(3, 133, 7, 39, dtype)]
    if by_columns:
        parts = [LAYOUTS["turned"](part) for part in parts]
    before = [part.clone() for part in parts]
    guards = Guards(monkeypatch, backend.library)
    ((left, right, rotation),) = backend.align_factors(*([part] for part in parts), (0.5, 1.0), True, 1.0)
    check((left.cpu(), right.cpu(), home(rotation)), [part.cpu() for part in before], (0.5, 1.0), True, 1.0)
    assert guards.hold()
    assert all(same_bits(x, y) for x, y in zip(parts, before, strict=True))


def test_used_memory_gives_the_same_bits(cuda, poisoned_empty):
    parts = make(3, 67, 5, 41, torch.float32)
    first = align(cuda, *parts, (1.0, 0.5), blend=0.5)
    align(cuda, *make(3, 210, 9, 50), (1.0, 1.0))
    assert same(align(cuda, *parts, (1.0, 0.5), blend=0.5), first)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 150), st.integers(1, 32), st.integers(1, 150)),
    dtype=st.sampled_from(DTYPES),
    side=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.3, 1.7)]),
    seed=st.integers(0, 1000),
)
def test_the_product_of_any_pair_is_kept(simt, shape, dtype, side, seed):
    parts = make(*shape, dtype=dtype, seed=seed)
    left, right, rotation = align((simt, torch.device("cpu")), *parts, side)
    B, A = parts[:2]
    size = torch.linalg.norm(B.double(), dim=(1, 2)) * torch.linalg.norm(A.double(), dim=(1, 2))
    lost = torch.linalg.norm(left.double() @ right.double() - B.double() @ A.double(), dim=(1, 2))
    assert (lost <= tolerance("rotated", dtype=dtype) * size).all()
    assert not rotation.info.any()
