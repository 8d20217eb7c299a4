"""stacked_qr as a caller sees it."""

import numpy as np
import pytest
import torch
from call_problems import M, assert_near, clients

from fedlora_kernels.errors import BackendError, InputError, MismatchError, NonFiniteError
from fedlora_kernels.linalg import Info, Ragged, stacked_qr

WEIGHTS = [0.5, -2.0, 1.0]


def stacked(blocks, weights=None):
    w = torch.ones(len(blocks)) if weights is None else torch.as_tensor(weights)
    return torch.cat([w.double()[..., k, None, None] * block.double() for k, block in enumerate(blocks)], -1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("ranks", [(2, 3, 1), (4, 5, 3)])
def test_factors_the_weighted_stack(batch, ranks):
    blocks, _ = clients(ranks=ranks, batch=batch)
    k = min(M, sum(ranks))
    result = stacked_qr(blocks, weights=WEIGHTS, mode="reduced")
    assert result.Q.shape == (*batch, M, k)
    assert result.R.shape == (*batch, k, sum(ranks))
    assert_near(result.Q @ result.R, stacked(blocks, WEIGHTS))
    assert result.rank.shape == result.info.shape == result.notes.shape == batch
    assert result.rank.eq(k).all()
    only = stacked_qr(blocks, weights=WEIGHTS)
    assert only.Q is None
    assert_near(only.R, result.R)


def test_clients_of_weight_zero_leave_zero_columns():
    blocks, _ = clients(ranks=(2, 3, 4), batch=(4,))
    weights = torch.tensor([[1, 0, 2], [0, 0, 0], [3, 4, 5], [0, 6, 0]], dtype=torch.float64)
    X = stacked(blocks, weights)
    blocks[1][0] = float("nan")
    result = stacked_qr(blocks, weights=weights, mode="reduced")
    assert result.Q.shape == (4, M, 7)
    assert result.R.shape == (4, 7, 9)
    assert_near(result.Q @ result.R, X)
    assert result.rank.tolist() == [6, 0, 7, 3]
    assert not result.R[0, :, 2:5].any()
    assert not result.R[1].any()
    assert not result.R[3, 3:].any()
    assert not result.Q[3, :, 3:].any()
    assert result.info.eq(0).all()


@pytest.mark.parametrize(
    ("dtypes", "answer"),
    [
        (["float64"] * 2, torch.float64),
        (["float32"] * 2, torch.float32),
        (["float16"] * 2, torch.float32),
        (["bfloat16", "float16"], torch.float32),
        (["float32", "float64"], torch.float64),
    ],
)
@pytest.mark.parametrize("weights", [[1, 2], [1, 0]])
def test_dtype_of_the_answer_does_not_depend_on_weights(dtypes, answer, weights):
    blocks, _ = clients()
    blocks = [block.to(getattr(torch, dtype)) for block, dtype in zip(blocks, dtypes, strict=True)]
    result = stacked_qr(blocks, weights=weights, mode="reduced")
    assert result.R.dtype == result.Q.dtype == answer


def test_numpy_dense_and_ragged():
    blocks, _ = clients()
    result = stacked_qr(blocks[0].numpy(), mode="reduced")
    assert isinstance(result.R, np.ndarray)
    assert_near(result.Q @ result.R, blocks[0])
    first, second = stacked_qr(Ragged([blocks, blocks[1]]), weights=Ragged([[1, 2], None]), mode="reduced")
    assert_near(first.Q @ first.R, stacked(blocks, [1, 2]))
    assert_near(second.Q @ second.R, blocks[1])


def test_trouble_and_bad_arguments():
    blocks, _ = clients(batch=(2,))
    blocks[1][1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"stacked_qr: matrix \(1\)"):
        stacked_qr(blocks)
    assert stacked_qr(blocks, check=False).info.tolist() == [0, Info.NONFINITE]
    with pytest.raises(InputError, match="mode is 'full'; 'r' or 'reduced'"):
        stacked_qr(blocks, mode="full")
    with pytest.raises(MismatchError, match=r"blocks\[1\] has shape \(2, 6, 3\); \(2, 7, 3\) is needed"):
        stacked_qr([blocks[0], blocks[1][:, :6]])
    with pytest.raises(InputError, match="blocks is an empty list"):
        stacked_qr([])
    with pytest.raises(BackendError, match="does not serve this stacked_qr"):
        stacked_qr(torch.zeros(2, 5000), backend="cpu")
    with pytest.raises(NotImplementedError, match="stacked_qr"):
        stacked_qr(blocks[0].requires_grad_()).R.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_float64_client_of_weight_zero_leaves_a_float64_answer(backend):
    torch.manual_seed(0)
    X = [torch.randn(2, 300, 4, dtype=torch.float64), torch.randn(2, 300, 2).half()]
    weights = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    found = stacked_qr(X, weights=weights, mode="reduced", backend=backend)
    assert found.R.dtype == torch.float64
    Q, R = found.Q[0][:, :2], found.R[0]
    assert (Q.mT @ Q - torch.eye(2, dtype=torch.float64)).abs().max() <= 64 * 2**-53
    assert ((Q @ R[:2, 4:] - X[1][0]).norm(dim=0) / X[1][0].double().norm(dim=0)).max() <= 64 * 2**-53
