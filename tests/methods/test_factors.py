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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 64, 64), (2, 91, 101), (1, 1, 1), (2, 0, 3), (0, 4, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-30, 1e25, 1e300])
def test_the_quick_size_is_an_upper_bound_of_the_norm(dtype, shape, scale):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    x = x.to(dtype)
    exact, found = factors.norms(x), factors._size(x)
    finite = torch.isfinite(exact)
    assert bool((found >= exact)[finite].all())
    assert bool((found <= exact * 1.001)[finite].all())
    assert not bool(torch.isfinite(found[~finite]).any())


@pytest.mark.parametrize("spread", [[1.0] * 5, [1e-2] * 5, [1e-4] * 5, [1e-6] * 5, [1.0, 1e-6, 1.0, 1e-5, 1e-5]])
@pytest.mark.parametrize("out", [torch.float64, torch.float32, torch.bfloat16])
def test_far_and_near_distances_are_the_same(monkeypatch, spread, out):
    group, one = batch(), batch(1)
    B, A = ([x[:1, :, :3] for x in one.B], [x[:1, :3] for x in one.A])
    spread = torch.tensor(spread, dtype=torch.float64)[:, None, None]
    first = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    group = replace(
        group,
        B=tuple(B[0] + spread * x[:, :, :3] for x in group.B),
        A=tuple(A[0] + spread * x[:, :3] for x in group.A),
        scale=torch.ones_like(group.scale),
        weight=torch.stack([first, 1.0 - first], 1),
        dtype=out,
    )
    either = factors.mean_outcome(group)
    monkeypatch.setattr(factors, "FAR", float("inf"))
    near = factors.mean_outcome(group)
    rounding = {torch.float64: 0.0, torch.float32: 1e-7, torch.bfloat16: 1e-7}[out]
    torch.testing.assert_close(either.energy, near.energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(either.error, near.error, rtol=1e-8, atol=rounding)
    assert bool((either.error_bound >= near.error * (1 - 1e-12)).all())
    torch.testing.assert_close(either.error_bound, near.error_bound, rtol=1e-6, atol=2 * rounding)


def test_only_what_is_near_is_looked_at_again(monkeypatch):
    group = batch()
    same = torch.tensor([1, 2, 4])
    B, A = [x[:, :, :3].clone() for x in group.B], [x[:, :3].clone() for x in group.A]
    B[1][same], A[1][same] = B[0][same], A[0][same]
    group = replace(group, B=tuple(B), A=tuple(A))
    seen = []
    plain = factors.drift

    def watched(part, *args):
        seen.extend(part.modules)
        return plain(part, *args)

    monkeypatch.setattr(factors, "drift", watched)
    outcome = factors.mean_outcome(replace(group, scale=torch.ones_like(group.scale), weight=torch.full((5, 2), 0.5)))
    assert seen == [f"layers.{i}" for i in same.tolist()]
    assert outcome.error[same].max() < 1e-12 < outcome.error[[0, 3]].min()


def test_a_client_that_is_not_finite_leaves_the_other_modules_measured():
    group = batch()
    clean = factors.mean_outcome(group)
    group.B[1][2, 3, 1] = float("nan")
    outcome = factors.mean_outcome(group)
    left = [0, 1, 3, 4]
    torch.testing.assert_close(outcome.error[left], clean.error[left], rtol=1e-12, atol=0)
    assert bool(outcome.error[2].isnan())
    assert int(outcome.info[2]) != 0


def test_squares_of_clients_are_the_diagonal_of_their_gram():
    group = batch()
    gram = factors.client_gram(group)
    torch.testing.assert_close(factors.client_squares(group), gram.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=0)
