"""What methods of factor means share: work in pieces, weights over owners, casts."""

from dataclasses import replace

import pytest
import torch
from method_problems import standard

from fedlora_kernels.methods import factors
from fedlora_kernels.methods.contract import make_method
from fedlora_kernels.methods.factors import cast, share
from fedlora_kernels.methods.products import svd_rounding


def batch(count=5):
    problems = [standard(m=29, n=23, ranks=(3, 5), seed=seed) for seed in range(count)]
    group = problems[0].group()
    return replace(
        group,
        modules=tuple(f"layers.{i}" for i in range(count)),
        B=tuple(torch.stack([p.B[k] for p in problems]) for k in range(2)),
        A=tuple(torch.stack([p.A[k] for p in problems]) for k in range(2)),
        scale=torch.rand(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5,
        weight=group.weight.expand(count, -1),
    )


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("method", ["zero_pad", "flora"])
def test_work_in_pieces_is_bitwise_the_same(monkeypatch, method, pieces):
    group = batch()
    whole = make_method(method, {}).combine(group, None, None)
    monkeypatch.setattr(factors, "CHUNK", pieces * 8 * 8 * (29 + 23))
    part = make_method(method, {}).combine(group, None, None)
    for field in ("B", "A", "rank", "notes", "info"):
        assert torch.equal(getattr(part, field), getattr(whole, field))
    for field in ("error", "error_bound", "energy"):
        torch.testing.assert_close(getattr(part, field), getattr(whole, field), rtol=1e-12, atol=0)


def test_weights_are_shared_among_owners_of_each_module():
    group = replace(batch(2), weight=torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64))
    weight = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert share(group, weight).tolist() == [[0.25, 0.75], [1.0, 0.0]]


def test_no_weight_among_the_owners_falls_back_to_the_samples():
    group = replace(batch(1), weight=torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert share(group, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [[1.0, 0.0]]


def test_a_cast_tells_lost_values_from_bad_input():
    x = torch.tensor([[[1e30]], [[float("inf")]], [[2.0]]], dtype=torch.float64)
    rounded, lost, taken = cast(x, torch.float16)
    assert rounded.dtype == torch.float16
    assert lost.tolist() == [True, False, False]
    assert taken[2] == 0.0


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_a_cast_measures_what_rounding_takes_even_below_the_normal_range(size):
    x = size * torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded, _, taken = cast(x, torch.float16)
    torch.testing.assert_close(taken, (x - rounded.double()).flatten(1).norm(dim=1))


@pytest.mark.parametrize("entry", [1.0 + 0.499 * 2**-10, 1.49 * 2**-24])
def test_the_rounding_of_an_svd_holds_where_both_factors_lose_the_most(entry):
    """Half a unit in B and in A, in the normal range of float16 and below it."""
    S = torch.tensor([[entry * entry]], dtype=torch.float64)
    rounded = float(torch.tensor(entry, dtype=torch.float64).half().double()) ** 2
    bound = float(svd_rounding(S, 1, 1, torch.float16, "balanced")[0])
    assert abs(rounded - entry * entry) <= bound <= 1.5 * abs(rounded - entry * entry)
