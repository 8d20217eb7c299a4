"""Client weights: shapes, values, where they live."""

import ml_dtypes
import numpy as np
import pytest
import torch

from fedlora_kernels.errors import BackendError, WeightError
from fedlora_kernels.linalg.weights import host_weights


@pytest.mark.parametrize(
    "weights",
    [
        [120, 80, -2.5],
        (120, 80, -2.5),
        np.array([120, 80, -2.5]),
        np.array([120, 80, -2.5]).astype(ml_dtypes.bfloat16),
        torch.tensor([120, 80, -2.5], dtype=torch.bfloat16),
        torch.tensor([120, 80, -2.5], requires_grad=True),
    ],
    ids=lambda w: type(w).__name__,
)
def test_any_array_of_numbers(weights):
    w = host_weights("", weights, (2,), 3)
    assert w.dtype == torch.float64
    assert w.is_contiguous()
    assert w.tolist() == [[120.0, 80.0, -2.5]] * 2


def test_shapes():
    assert host_weights("", None, (2, 5), 3).tolist() == [[1.0] * 3] * 10
    assert host_weights("", [1, 2, 3], (), 3).tolist() == [[1.0, 2.0, 3.0]]
    assert host_weights("", 4, (2,), 1).tolist() == [[4.0], [4.0]]
    assert (
        host_weights("", np.arange(12).reshape(2, 2, 3), (2, 2), 3).tolist() == np.arange(12.0).reshape(4, 3).tolist()
    )
    assert host_weights("", None, (0,), 3).shape == (0, 3)
    assert host_weights("", np.ones((0, 3)), (0,), 3).shape == (0, 3)


def test_float64_is_kept_to_the_last_bit():
    value = 0.1 + 2.0**-55
    assert host_weights("", [value], (), 1).item() == value


def test_answer_is_no_view_of_the_input():
    given = torch.ones(2, 3, dtype=torch.float64)
    host_weights("", given, (2,), 3).zero_()
    assert given.eq(1).all()


@pytest.mark.parametrize("shape", [(), (2,), (4,), (1, 3), (3, 2), (2, 2, 3), (0,)])
def test_wrong_shapes_name_what_is_needed(shape):
    with pytest.raises(WeightError, match=r"f: weights has shape .*; \(3,\) or \(2, 3\) is needed"):
        host_weights("f: ", np.ones(shape), (2,), 3)


def test_wrong_count_for_a_single_matrix():
    with pytest.raises(WeightError, match=r"\(2,\); \(3,\) is needed"):
        host_weights("", [1, 2], (), 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    with pytest.raises(WeightError, match=r"weights\[1\] is -?(nan|inf)"):
        host_weights("", [1, bad], (), 2)
    with pytest.raises(WeightError, match=r"weights\[1, 0\] is "):
        host_weights("", [[1, 2], [bad, bad]], (2,), 2)


@pytest.mark.parametrize(
    "weights", [["a", "b"], [True, False], [1j, 2], [[1], [1, 2]], torch.tensor([True, False]), {}, [None, 1]]
)
def test_things_that_are_no_weights(weights):
    with pytest.raises(WeightError):
        host_weights("", weights, (), 2)


def test_weights_on_a_device_are_refused():
    with pytest.raises(BackendError, match=r"meta; the host is needed. Pass weights.cpu\(\)"):
        host_weights("", torch.ones(2, device="meta"), (), 2)
