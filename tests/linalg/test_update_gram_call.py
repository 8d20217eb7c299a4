"""update_gram as a caller sees it."""

import numpy as np
import pytest
import torch
from call_problems import assert_near, clients

from fedlora_kernels.errors import MismatchError, NonFiniteError, OutputOverflowError
from fedlora_kernels.linalg import Ragged, update_gram


def model(B, A, weights=None):
    w = torch.ones(len(B)) if weights is None else torch.as_tensor(weights)
    D = torch.stack(
        [w.double()[..., k, None, None] * (B[k].double() @ A[k].double()) for k in range(len(B))], -3
    ).flatten(-2)
    return D @ D.mT


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)])
def test_inner_products_of_the_weighted_updates(batch):
    B, A = clients(ranks=(2, 3, 1), batch=batch)
    gram = update_gram(B, A, weights=[0.5, -2.0, 1.0])
    assert gram.shape == (*batch, 3, 3)
    assert gram.dtype == torch.float64
    assert_near(gram, model(B, A, [0.5, -2.0, 1.0]))
    assert gram.equal(gram.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float64_for_every_dtype(dtype):
    B, A = clients(dtype=dtype)
    assert update_gram(B, A).dtype == torch.float64
    assert_near(update_gram(B, A), model(B, A))


def test_clients_of_weight_zero_are_zero_and_unread():
    B, A = clients(ranks=(2, 3, 1), batch=(4,))
    weights = torch.tensor([[1, 0, 2], [0, 0, 0], [3, 4, 5], [0, 6, 0]], dtype=torch.float64)
    wanted = model(B, A, weights)
    A[1][0], B[2][1], B[0][3] = float("nan"), float("nan"), float("inf")
    gram = update_gram(B, A, weights=weights)
    assert_near(gram, wanted)
    assert not gram[1].any()
    assert not gram[0, 1].any()


def test_frameworks_dense_pairs_and_ragged():
    B, A = clients()
    gram = update_gram([b.numpy() for b in B], [a.numpy() for a in A])
    assert isinstance(gram, np.ndarray)
    assert_near(gram, model(B, A))
    assert_near(update_gram(B[0], A[0]), model(B[:1], A[:1]))
    first, second = update_gram(Ragged([B, B[1]]), Ragged([A, A[1]]))
    assert_near(first, model(B, A))
    assert_near(second, model(B[1:], A[1:]))


def test_a_bad_client_is_named():
    B, A = clients(ranks=(2, 3, 1), batch=(2, 2))
    good = update_gram(B, A)
    A[1][1, 0, 0, 5] = float("inf")
    with pytest.raises(
        NonFiniteError, match=r"update_gram: matrix \(1, 0\): client block 1: an input holds NaN or Inf"
    ):
        update_gram(B, A)
    gram = update_gram(B, A, check=False)
    assert gram[1, 0, 1].isnan().all()
    assert gram[1, 0, :, 1].isnan().all()
    assert_near(gram[1, 0][[0, 2]][:, [0, 2]], good[1, 0][[0, 2]][:, [0, 2]])
    assert_near(gram[0], good[0])


def test_a_norm_beyond_float64_is_an_overflow():
    B, A = clients()
    with pytest.raises(OutputOverflowError, match="client block 1: the squared norm"):
        update_gram([B[0], B[1] * 1e160], A)


def test_wrong_shapes_name_the_block():
    B, A = clients()
    with pytest.raises(MismatchError, match=r"update_gram: B\[1\] has shape \(6, 3\)"):
        update_gram([B[0], B[1][:6]], A)


def test_backward_is_refused():
    B, A = clients()
    with pytest.raises(NotImplementedError, match="update_gram"):
        update_gram([B[0].requires_grad_(), B[1]], A).sum().backward()
