"""product_svd as a caller sees it: arguments, frameworks, batches, errors."""

import ml_dtypes
import numpy as np
import pytest
import torch
from call_problems import M, N, assert_near, clients, dense_update

from fedlora_kernels.errors import (
    BackendError,
    InputError,
    MismatchError,
    NonFiniteError,
    OutputOverflowError,
    WeightError,
)
from fedlora_kernels.linalg import Budget, Energy, Info, Note, Ragged, Rank, product_svd

WEIGHTS = [0.5, -2.0]
BATCHES = [(), (3,), (2, 3), (1, 1, 2)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("output", ["usv", "left", "balanced"])
def test_is_the_weighted_sum_of_the_updates(batch, output):
    B, A = clients(batch=batch)
    result = product_svd(B, A, weights=WEIGHTS, output=output)
    assert result.left.shape == (*batch, M, 5)
    assert result.S.shape == (*batch, 5)
    assert result.right.shape == (*batch, 5, N)
    left = result.left * result.S[..., None, :] if output == "usv" else result.left
    wanted = dense_update(B, A, WEIGHTS)
    assert_near(left @ result.right, wanted)
    assert_near(result.energy, (wanted**2).sum((-2, -1)))
    for field in (result.rank, result.energy, result.error, result.error_bound, result.info, result.notes, result.kept):
        assert field.shape == batch
    for field in vars_of(result.certificate):
        assert field.shape == batch
    assert result.rank.eq(5).all()
    assert result.info.eq(0).all()


def vars_of(record):
    return [getattr(record, name) for name in record.__dataclass_fields__]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_dense_pair_is_one_block(batch):
    B, A = clients(ranks=(5,), batch=batch)
    assert_near(
        product_svd(B[0], A[0], weights=-0.5, output="left").left, product_svd(B, A, weights=[-0.5], output="left").left
    )
    result = product_svd(B[0], A[0], output="left")
    assert_near(result.left @ result.right, B[0] @ A[0])


def test_weights_per_matrix():
    B, A = clients(batch=(2, 3))
    weights = torch.arange(1.0, 13.0).reshape(2, 3, 2)
    result = product_svd(B, A, weights=weights, output="left")
    assert_near(result.left @ result.right, dense_update(B, A, weights))


def test_mixed_zero_weights_are_put_back_in_place():
    B, A = clients(batch=(2, 3))
    weights = torch.tensor([[[1, 2], [0, 3], [4, 5]], [[0, 0], [6, 0], [0, 7]]], dtype=torch.float64)
    result = product_svd(B, A, weights=weights, output="left")
    assert result.left.shape == (2, 3, M, 5)
    assert_near(result.left @ result.right, dense_update(B, A, weights))
    assert result.rank.tolist() == [[5, 3, 5], [0, 2, 3]]
    assert result.notes[1, 0] & Note.ZERO
    assert result.kept[1, 0] == 1.0


def test_clients_of_weight_zero_are_never_read():
    B, A = clients(ranks=(2, 3, 1))
    B[1].fill_(float("nan"))
    result = product_svd(B, A, weights=[1.0, 0.0, 2.0])
    alone = product_svd([B[0], B[2]], [A[0], A[2]], weights=[1.0, 2.0])
    assert result.S.shape == (6,)
    assert_near(result.S[:3], alone.S)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_answers_in_its_dtype(dtype):
    B, A = clients(dtype=dtype)
    result = product_svd(B, A)
    assert result.left.dtype == result.right.dtype == dtype
    for field in (result.S, result.energy, result.error, result.error_bound, result.certificate.rho):
        assert field.dtype == torch.float64
    assert result.rank.dtype == result.certificate.numerical_rank.dtype == torch.int64
    assert result.info.dtype == result.notes.dtype == torch.int32


def test_numpy_answers_in_numpy():
    B, A = clients(batch=(3,))
    result = product_svd([b.numpy() for b in B], [a.numpy() for a in A], weights=WEIGHTS, output="left")
    assert all(isinstance(field, np.ndarray) for field in vars_of(result.certificate))
    assert isinstance(result.left, np.ndarray)
    assert_near(result.left @ result.right, dense_update(B, A, WEIGHTS))
    assert result.rank.dtype == np.int64
    single = product_svd(B[0][0].numpy(), A[0][0].numpy())
    assert isinstance(single.rank, np.ndarray)
    assert single.rank.shape == ()


def test_numpy_bfloat16_answers_in_float32_unless_asked():
    B, A = (x[0].float().numpy().astype(ml_dtypes.bfloat16) for x in clients(ranks=(3,)))
    result = product_svd(B, A, output="left")
    assert result.left.dtype == np.float32
    assert_near(result.left @ result.right, B.astype(float) @ A.astype(float), 1e-6)  # no rounding to bfloat16
    assert product_svd(B, A, dtype=ml_dtypes.bfloat16).left.dtype == ml_dtypes.bfloat16


def test_mixed_halves_answer_in_float32_and_dtype_overrides():
    B, A = clients()
    B, A = [B[0].half(), B[1].bfloat16()], [A[0].half(), A[1].bfloat16()]
    assert product_svd(B, A).left.dtype == torch.float32
    assert product_svd(B, A, dtype=torch.float16).left.dtype == torch.float16
    assert (
        product_svd([b.bfloat16() for b in B], [a.bfloat16() for a in A], dtype="float32").left.dtype == torch.float32
    )


def test_ragged_is_answered_by_a_list_in_order():
    given = [clients(ranks=(2, 3)), clients(ranks=(1,), batch=(2,), dtype=torch.float32), clients(ranks=(9, 4), m=5)]
    results = product_svd(Ragged([B for B, _ in given]), Ragged([A for _, A in given]), output="left")
    assert [type(result).__name__ for result in results] == ["ProductSVD"] * 3
    assert [result.left.dtype for result in results] == [torch.float64, torch.float32, torch.float64]
    for (B, A), result in zip(given, results, strict=True):
        assert_near(result.left.double() @ result.right.double(), dense_update(B, A), 1e-6)
    assert results[2].left.shape == (5, 5)
    assert product_svd(Ragged([]), Ragged([])) == []


def test_ragged_of_dense_pairs_with_weights_of_their_own():
    given = [clients(ranks=(2,)), clients(ranks=(3,))]
    B, A = Ragged([B[0] for B, _ in given]), Ragged([A[0] for _, A in given])
    results = product_svd(B, A, weights=Ragged([2.0, [0.0]]), output="left")
    assert_near(results[0].left @ results[0].right, 2 * dense_update(*given[0]))
    assert results[1].rank == 0


@pytest.mark.parametrize(
    ("shape", "width"), [((0, 7, 11), 3), ((2, 0, 11), 3), ((2, 7, 0), 3), ((2, 7, 11), 0), ((0, 2, 7, 11), 3)]
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_problems_have_shaped_answers(shape, width, backend):
    *batch, m, n = shape
    result = product_svd(torch.ones(*batch, m, width), torch.ones(*batch, width, n), backend=backend)
    p = min(m, n, width)
    assert result.left.shape == (*batch, m, p)
    assert result.right.shape == (*batch, p, n)
    assert result.rank.shape == tuple(batch)
    assert not result.rank.any()
    assert result.trim().left.shape == (*batch, m, 0)


def test_all_clients_of_weight_zero():
    B, A = clients(batch=(2,))
    result = product_svd(B, A, weights=[0, 0])
    assert result.left.shape == (2, M, 5)
    assert not result.left.any()
    assert not result.rank.any()
    assert (result.notes & Note.ZERO).all()


def test_rules_and_caps_bound_the_columns():
    B, A = clients(ranks=(3, 4))
    assert product_svd(B, A, rule=Rank(2)).left.shape == (M, 2)
    capped = product_svd(B, A, rule=Energy(1.0).capped(3))
    assert capped.left.shape == (M, 3)
    assert capped.notes & Note.CAPPED
    assert product_svd(B, A, rule=Rank(5).capped(4)).left.shape == (M, 4)
    loose = product_svd(B, A, rule=Energy(0.5))
    assert loose.left.shape == (M, 7)
    assert loose.trim().left.shape == (M, int(loose.rank))
    assert 0.5 <= float(loose.kept) < 1
    assert float(loose.kept) == pytest.approx(float((loose.S**2).sum() / loose.energy), rel=1e-13)
    assert loose.error <= loose.error_bound


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_share_kept_outlives_an_energy_beyond_float64(scale):
    B, A = clients(dtype=torch.float64)
    expected = product_svd(B, A, rule=Rank(2))
    result = product_svd([b * scale for b in B], A, rule=Rank(2))
    assert float(result.energy) in (0.0, float("inf"))
    assert float(result.kept) == pytest.approx(float(expected.kept), rel=1e-12)
    assert 0.1 < float(result.kept) < 0.999


@pytest.mark.parametrize("view", ["transposed", "strided", "offset", "expanded"])
def test_views_are_read_right_and_left_alone(view):
    B, A = clients(ranks=(3,), batch=(2,))
    b, a = B[0], A[0]
    if view == "transposed":
        b, a = b.mT.contiguous().mT, a.mT.contiguous().mT
    elif view == "strided":
        b, a = torch.stack([b, b], -1)[..., 0], torch.stack([a, a], -1)[..., 1]
    elif view == "offset":
        b = torch.cat([torch.zeros(1), b.flatten()])[1:].view(2, M, 3)
    else:
        b, a = b[:1].expand(2, M, 3), a[:, :1].expand(2, 3, N)
    before = b.clone(), a.clone()
    result = product_svd(b, a, output="left")
    assert_near(result.left @ result.right, before[0] @ before[1])
    assert b.equal(before[0])
    assert a.equal(before[1])


def test_answers_are_memory_of_their_own():
    B, A = torch.eye(4)[:, :3].contiguous(), torch.eye(5)[:3].contiguous()
    result = product_svd(B, A)
    pointers = {result.left.data_ptr(), result.right.data_ptr()}
    assert not pointers & {B.data_ptr(), A.data_ptr()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_matrix_is_named_and_harms_no_neighbour(bad):
    B, A = clients(batch=(2, 3))
    good = product_svd(B, A, backend="reference")
    A[1][1, 0, 2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"product_svd: matrix \(1, 0\): an input holds NaN"):
        product_svd(B, A)
    result = product_svd(B, A, check=False, backend="reference")
    assert result.info.tolist() == [[0, 0, 0], [Info.NONFINITE, 0, 0]]
    assert result.left[1, 0].isnan().all()
    assert result.rank[1, 0] == 0
    assert result.left[0].equal(good.left[0])
    assert result.left[1, 1:].equal(good.left[1, 1:])


def test_ragged_trouble_names_the_problem():
    B, A = clients()
    bad = [B[0], torch.full_like(B[1], float("nan"))]
    with pytest.raises(NonFiniteError, match="product_svd: problem 1: an input"):
        product_svd(Ragged([B, bad]), Ragged([A, A]))


def test_overflow_of_the_output_dtype():
    B, A = (x[0] for x in clients(ranks=(2,), dtype=torch.float16))
    with pytest.raises(OutputOverflowError, match="balanced"):
        product_svd(B, A, weights=1e6, output="left")
    assert product_svd(B, A, weights=1e6, output="left", check=False).info == Info.OVERFLOW
    assert product_svd(B, A, weights=1e6, output="left", dtype="bfloat16").info == 0


def test_backward_is_refused():
    B, A = clients(ranks=(2,))
    lora_B = B[0].requires_grad_()
    result = product_svd(lora_B, A[0])
    with pytest.raises(NotImplementedError, match="product_svd has no backward"):
        (result.left.sum() + result.energy).backward()
    assert not product_svd(lora_B.detach(), A[0]).left.requires_grad


@pytest.mark.parametrize(
    ("kind", "text", "options"),
    [
        (TypeError, "a rank rule is needed", {"rule": 0.9}),
        (ValueError, "Budget.* needs the spectra", {"rule": Budget("10MB")}),
        (InputError, "output is 'right'; one of usv, left, balanced", {"output": "right"}),
        (InputError, "dtype is torch.int8", {"dtype": torch.int8}),
        (InputError, "unknown backend 'gpu'; known backends: auto", {"backend": "gpu"}),
        (WeightError, r"weights has shape \(3,\); \(2,\) is needed", {"weights": [1, 2, 3]}),
        (WeightError, r"weights\[1\] is inf", {"weights": [1, float("inf")]}),
    ],
)
def test_options_that_make_no_sense(kind, text, options):
    if options.get("backend") == "cpu":
        text = f"{text}|cannot run here"
    with pytest.raises(kind, match=text):
        product_svd(*clients(), **options)


def test_shapes_and_types_that_do_not_fit():
    B, A = clients()
    with pytest.raises(
        MismatchError, match=r"product_svd: A\[1\] has shape \(2, 11\); \(3, 11\) is needed to fit B\[1\]"
    ):
        product_svd(B, [A[0], A[0]])
    with pytest.raises(TypeError, match=r"B\[0\] is a torch array and A\[0\] a numpy array"):
        product_svd(B, [a.numpy() for a in A])
    with pytest.raises(InputError, match=r"A\[1\] has dtype torch.int64"):
        product_svd(B, [A[0], A[1].long()])
    with pytest.raises(InputError, match="empty list"):
        product_svd([], [])
    with pytest.raises(BackendError, match=r"B\[0\] is on cpu and B\[1\] on meta"):
        product_svd([B[0], B[1].to("meta")], A)
