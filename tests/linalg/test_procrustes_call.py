"""procrustes_rotation, rotate_factors and align_factors as a caller sees them."""

import ml_dtypes
import numpy as np
import pytest
import torch
from call_problems import M, N, assert_near, clients

from fedlora_kernels import backends
from fedlora_kernels.errors import InputError, MismatchError, NonFiniteError, OutputOverflowError
from fedlora_kernels.linalg import Info, Ragged, align_factors, procrustes_rotation, rotate_factors

R = 3


def pair(batch=(), dtype=torch.float64, seed=0):
    B, A = clients(ranks=(R,), batch=batch, dtype=dtype, seed=seed)
    return B[0], A[0]


def rotation(batch=(), seed=9):
    """Random rotations with determinant +1."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(*batch, R, R, generator=g, dtype=torch.float64))[0]
    Q[..., 0] *= torch.linalg.det(Q)[..., None].sign()
    return Q


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("special", [False, True])
def test_finds_the_rotation(batch, special):
    X, Q = pair(batch)[0], rotation(batch)
    result = procrustes_rotation(X, X @ Q, special=special)
    assert_near(result.Q, Q)
    assert result.Q.dtype == result.singular_values.dtype == result.condition.dtype == torch.float64
    assert result.singular_values.shape == (*batch, R)
    assert result.unique.shape == result.condition.shape == result.info.shape == result.notes.shape == batch
    assert result.unique.dtype == torch.bool
    assert result.unique.all()


def test_a_reflection_is_kept_unless_special():
    X = pair()[0]
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert_near(procrustes_rotation(X, X @ mirror).Q, mirror)
    assert torch.linalg.det(procrustes_rotation(X, X @ mirror, special=True).Q) > 0


def test_blend_goes_from_the_identity_to_the_rotation():
    X, Q = pair()[0], rotation()
    assert procrustes_rotation(X, X @ Q, blend=0).Q.equal(torch.eye(R, dtype=torch.float64))
    half = procrustes_rotation(X, X @ Q, special=True, blend=0.5).Q
    assert_near(half @ half, Q)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
def test_rotate_keeps_the_update(batch):
    (B, A), Q = pair(batch), rotation(batch)
    BQ, QA = rotate_factors(B, A, Q)
    assert_near(BQ, B @ Q)
    assert_near(QA, Q.mT @ A)
    assert_near(BQ @ QA, B @ A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotated_factors_keep_their_dtypes(dtype):
    B, A = pair()[0].to(dtype), pair()[1].float()
    BQ, QA = rotate_factors(B, A, rotation().float())
    assert (BQ.dtype, QA.dtype) == (dtype, torch.float32)
    BQ, QA, found = align_factors(B, A, pair(seed=1)[1].to(dtype))
    assert (BQ.dtype, QA.dtype, found.Q.dtype) == (dtype, torch.float32, torch.float64)


def test_numpy_bfloat16_is_rotated_in_float32():
    B, A = (x.float().numpy().astype(ml_dtypes.bfloat16) for x in pair())
    Q = rotation().numpy()
    BQ, QA = rotate_factors(B, A, Q)
    assert BQ.dtype == QA.dtype == np.float32
    assert_near(BQ, B.astype(float) @ Q, 1e-6)
    BQ, _, found = align_factors(B, A, A)
    assert BQ.dtype == np.float32
    assert_near(found.Q, np.eye(R))


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("side", ["A", "B", (1.0, 0.0), (0, 1), (0.25, 2.0)])
def test_align_undoes_a_rotation(batch, side):
    (B, A), Q = pair(batch), rotation(batch)
    turned = B @ Q, Q.mT @ A
    reference = {"A": A, "B": B}.get(side, (B, A)) if isinstance(side, str) else (B, A)
    BQ, QA, found = align_factors(*turned, reference, side=side)
    assert_near(BQ, B)
    assert_near(QA, A)
    assert_near(found.Q, Q.mT)
    assert found.info.shape == batch


def test_align_is_the_composition_of_its_parts():
    (B, A), (B_ref, A_ref) = pair(), pair(seed=1)
    BQ, _, found = align_factors(B, A, A_ref, special=False)
    alone = procrustes_rotation(A.mT, A_ref.mT)
    assert_near(found.Q, alone.Q)
    assert_near(BQ, rotate_factors(B, A, alone.Q)[0])
    assert_near(align_factors(B, A, B_ref, side="B")[2].Q, procrustes_rotation(B, B_ref, special=True).Q)
    assert_near(align_factors(B, A, (B_ref, A_ref), side="A")[2].Q, align_factors(B, A, A_ref)[2].Q)
    assert_near(align_factors(B, A, (B_ref, None), side="B")[2].Q, align_factors(B, A, B_ref, side="B")[2].Q)


def test_blend_zero_gives_the_factors_bit_for_bit_in_new_memory():
    (B, A), (_, A_ref) = pair(dtype=torch.float16), pair(seed=1, dtype=torch.float16)
    BQ, QA, found = align_factors(B, A, A_ref, blend=0.0)
    assert BQ.equal(B)
    assert QA.equal(A)
    assert found.Q.equal(torch.eye(R, dtype=torch.float64))
    BQ.zero_()
    QA.zero_()
    assert B.any()
    assert A.any()


def test_numpy_and_ragged():
    (B, A), (C, D) = pair((2,)), pair(seed=1)
    BQ, QA, found = align_factors(B.numpy(), A.numpy(), A.numpy())
    assert all(isinstance(x, np.ndarray) for x in (BQ, QA, found.Q, found.unique))
    results = align_factors(Ragged([B, C]), Ragged([A, D]), Ragged([A, D]))
    assert_near(results[0][0], B)
    assert_near(results[1][1], D)
    results = align_factors(Ragged([B, C]), Ragged([A, D]), (Ragged([B, C]), Ragged([A, D])), side=(1, 1))
    assert_near(results[1][0], C)
    first, second = procrustes_rotation(Ragged([B, D.mT]), Ragged([B, D.mT]))
    assert first.Q.shape == (2, R, R)
    assert_near(second.Q, np.eye(R))
    rotated = rotate_factors(Ragged([B, C]), Ragged([A, D]), Ragged([first.Q, second.Q]))
    assert_near(rotated[1][0], C)
    assert align_factors(Ragged([]), Ragged([]), Ragged([])) == []


def test_a_bad_matrix_is_named_and_harms_no_neighbour():
    B, A = pair((2, 2))
    good = align_factors(B, A, A, backend="reference")
    bad = A.clone()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"align_factors: matrix \(1, 0\)"):
        align_factors(B, A, bad)
    with pytest.raises(NonFiniteError, match=r"procrustes_rotation: matrix \(1, 0\)"):
        procrustes_rotation(bad.mT, A.mT)
    with pytest.raises(NonFiniteError, match=r"rotate_factors: matrix \(1, 0\)"):
        rotate_factors(B, bad, rotation((2, 2)))
    BQ, _, found = align_factors(B, A, bad, check=False, backend="reference")
    assert found.info.tolist() == [[0, 0], [Info.NONFINITE, 0]]
    assert BQ[0].equal(good[0][0])
    assert BQ[1, 1].equal(good[0][1, 1])
    assert rotate_factors(B, bad, rotation((2, 2)), check=False)[1][1, 0].isnan().any()


def test_overflow_of_the_output_dtype():
    B = torch.full((M, R), 6e4, dtype=torch.float16)
    Q = torch.linalg.qr(torch.tensor([[1.0, 1, 0], [1, -1, 0], [1, 0, 1]], dtype=torch.float64))[0]
    with pytest.raises(OutputOverflowError, match="rotate_factors"):
        rotate_factors(B, pair(dtype=torch.float16)[1], Q)
    BQ, _ = rotate_factors(B, pair(dtype=torch.float16)[1], Q, check=False)
    assert BQ.isinf().any()
    reference = (Q.mT @ pair()[1]).half()
    with pytest.raises(OutputOverflowError, match="align_factors"):
        align_factors(B, pair(dtype=torch.float16)[1], reference, special=False)


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan"), float("inf"), True, "1", None])
def test_blends_outside_the_unit_interval(blend):
    B, A = pair()
    with pytest.raises(InputError, match=r"procrustes_rotation: blend is .*0 <= blend <= 1"):
        procrustes_rotation(B, B, blend=blend)
    with pytest.raises(InputError, match="align_factors: blend is "):
        align_factors(B, A, A, blend=blend)


@pytest.mark.parametrize(
    "side", ["C", "a", (0, 0), (-1, 1), (1, float("nan")), (1,), (1, 2, 3), None, 1.0, (True, 1), "AB"]
)
def test_sides_that_make_no_sense(side):
    B, A = pair()
    with pytest.raises(InputError, match="side is "):
        align_factors(B, A, (B, A), side=side)


def test_references_that_do_not_fit():
    B, A = pair()
    with pytest.raises(InputError, match="needs reference as the pair"):
        align_factors(B, A, A, side=(1, 1))
    with pytest.raises(InputError, match="needs a reference for B; it is None"):
        align_factors(B, A, (None, A), side=(1, 1))
    with pytest.raises(InputError, match="needs a reference for A; it is None"):
        align_factors(B, A, None)
    with pytest.raises(InputError, match="reference holds 3 entries"):
        align_factors(B, A, (B, A, A))
    with pytest.raises(MismatchError, match=r"reference A has shape \(7, 3\); \(3, 11\) is needed to fit A"):
        align_factors(B, A, B)
    with pytest.raises(MismatchError, match=r"reference A has shape \(1, 3, 11\); no leading dimensions"):
        align_factors(B, A, A[None])


def test_shapes_that_do_not_fit():
    B, A = pair()
    with pytest.raises(MismatchError, match=r"A has shape \(2, 11\); \(3, 11\) is needed to fit B"):
        rotate_factors(B, A[:2], rotation())
    with pytest.raises(MismatchError, match=r"Q has shape \(2, 3\); \(3, 3\)"):
        rotate_factors(B, A, rotation()[:2])
    with pytest.raises(MismatchError, match=r"target has shape \(6, 3\); \(7, 3\) is needed to fit source"):
        procrustes_rotation(B, B[:6])
    with pytest.raises(TypeError, match="B is a list of 1; an array is needed"):
        rotate_factors([B], A, rotation())
    with pytest.raises(TypeError, match="B is a torch array and Q a numpy array"):
        rotate_factors(B, A, rotation().numpy())


def test_a_backend_gets_the_rotation_in_float64(monkeypatch):
    seen = []

    class Spy:
        def rotate_factors(self, B, A, Q):
            seen.extend(q.dtype for q in Q)
            return list(zip(B, A, strict=True))

    monkeypatch.setattr(backends, "choose", lambda *call: Spy())
    rotate_factors(*pair(), rotation().half())
    assert seen == [torch.float64]


def test_backward_is_refused():
    B, A = pair()
    with pytest.raises(NotImplementedError, match="rotate_factors has no backward"):
        rotate_factors(B.requires_grad_(), A, rotation())[0].sum().backward()
    with pytest.raises(NotImplementedError, match="align_factors has no backward"):
        align_factors(B, A, A)[2].Q.sum().backward()


def test_sizes_along_both_factors():
    assert align_factors(*pair(), pair()[1])[0].shape == (M, R)
    assert align_factors(*pair(), pair()[1])[1].shape == (R, N)
