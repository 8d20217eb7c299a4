"""random_rows: the same row for the same key, wherever and in whatever order it is drawn."""

import math

import pytest
import torch

from fedlora_kernels.rows import random_rows


def test_rows_depend_on_their_own_key_only():
    rows = random_rows(0, 2, "layers.0.q", range(5), 37)
    assert rows.shape == (5, 37)
    assert rows.dtype == torch.float64
    assert torch.equal(random_rows(0, 2, "layers.0.q", [3, 1], 37), rows[[3, 1]])
    shorter = random_rows(0, 2, "layers.0.q", [4], 11)[0]
    assert torch.allclose(shorter, rows[4, :11] * math.sqrt(37 / 11), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "other", [(1, 2, "layers.0.q"), (0, 3, "layers.0.q"), (0, 2, "layers.0.v"), (-1, 2, "layers.0.q")]
)
def test_each_part_of_the_key_counts(other):
    one, two = random_rows(0, 2, "layers.0.q", [0], 37), random_rows(*other, [0], 37)
    assert not torch.equal(one, two)


def test_rows_are_uniform_within_the_kaiming_bound():
    n = 101
    rows = random_rows(3, 0, "m", range(400), n) * math.sqrt(n)
    assert rows.abs().max() <= 1
    count = rows.numel()
    # Uniform on [-1, 1]: mean 0 with variance 1/3, square 1/3 with variance 4/45; six standard errors.
    assert abs(rows.mean()) < 6 * math.sqrt(1 / 3 / count)
    assert abs((rows**2).mean() - 1 / 3) < 6 * math.sqrt(4 / 45 / count)


def test_the_stream_is_pinned():
    pinned = [-0.501315104130294, 0.19714880868210619, -0.5000913065192847]
    assert random_rows(0, 0, "m", [0], 3)[0].tolist() == pytest.approx(pinned, rel=1e-15)


def test_no_rows():
    assert random_rows(0, 0, "m", [], 7).shape == (0, 7)
