"""select_rank as a caller sees it; the boundaries of the rules are in test_rules.py."""

import math

import numpy as np
import pytest
import torch

from fedlora_kernels.errors import InputError, MismatchError, NonFiniteError
from fedlora_kernels.linalg import (
    Absolute,
    Budget,
    Energy,
    Frobenius,
    Ragged,
    Rank,
    SingularValueRatio,
    SingularValueSum,
    product_svd,
    select_rank,
)

S = torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_rank_per_spectrum(batch, dtype):
    rank = select_rank(S.to(dtype).expand(*batch, 5), Energy(0.9))
    assert rank.shape == batch
    assert rank.dtype == torch.int64
    assert rank.eq(3).all()


def test_numpy_and_ragged():
    rank = select_rank(S.numpy()[None], Rank(2))
    assert isinstance(rank, np.ndarray)
    assert rank.tolist() == [2]
    ranks = select_rank(Ragged([S, S[:2]]), Rank(3), floor=Ragged([None, 3.0]))
    assert [int(r) for r in ranks] == [3, 1]
    assert [int(r) for r in select_rank(Ragged([S, S[:2]]), Energy(0.6), total_energy=64.0)] == [4, 2]


def test_total_energy_replaces_the_sum_of_squares():
    assert select_rank(S, Energy(0.5)) == 1
    assert select_rank(S, Energy(0.5), total_energy=48.0) == 3
    assert select_rank(S.expand(2, 5), Energy(0.5), total_energy=torch.tensor([25.0, 48.0])).tolist() == [1, 3]
    assert select_rank(S, Energy(0.5), total_energy=1000.0) == 4  # never reached: all that is above the floor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_default_floor_is_the_rounding_of_the_dtype(dtype):
    u = torch.finfo(dtype).eps / 2
    limit = 4 * 3 * u
    for value, kept in ((limit * 1.25, 3), (limit, 2)):
        spectrum = torch.tensor([1.0, 0.5, value], dtype=torch.float64).to(dtype)
        assert select_rank(spectrum, Energy(1.0)) == kept


@pytest.mark.parametrize("e", [-1073, -600, 600, 1021])
@pytest.mark.parametrize(
    ("rule", "rank"),
    [(Energy(0.9), 3), (Frobenius(0.8), 1), (SingularValueSum(0.6), 2), (SingularValueRatio(2.0), 1), (Rank(9), 4)],
    ids=str,
)
def test_powers_of_two_over_the_whole_of_float64_change_no_rank(rule, rank, e):
    spectrum = torch.tensor([math.ldexp(s, e) for s in S.tolist()], dtype=torch.float64)
    assert select_rank(spectrum, rule) == select_rank(S, rule) == rank
    assert select_rank(spectrum, rule, floor=math.ldexp(1.5, e)) == min(rank, 3)
    assert select_rank(spectrum, Absolute(math.ldexp(1.5, e))) == 3


def test_a_given_floor_is_strict():
    assert select_rank(S, Energy(1.0), floor=1.0) == 3
    assert select_rank(S, Energy(1.0), floor=0) == 4
    assert select_rank(S.expand(2, 5), Rank(5), floor=np.nextafter(1.0, 0)).tolist() == [4, 4]
    assert select_rank(S.expand(2, 5), Rank(5), floor=torch.tensor([0.5, 2.0])).tolist() == [4, 1]


@pytest.mark.parametrize("rule", [Energy(1.0), Energy(0.5), Rank(3), SingularValueSum(0.5)], ids=str)
def test_zero_and_empty_spectra_have_rank_zero(rule):
    assert select_rank(torch.zeros(2, 5), rule).tolist() == [0, 0]
    assert select_rank(torch.zeros(2, 0), rule).tolist() == [0, 0]


def test_agrees_with_product_svd():
    g = torch.Generator().manual_seed(5)
    B, A = torch.randn(4, 13, 5, generator=g), torch.randn(4, 5, 17, generator=g)
    full = product_svd(B, A)
    for rule in (Energy(0.7), Energy(0.95), Rank(2)):
        ranks = select_rank(full.S, rule, total_energy=full.energy)
        assert ranks.equal(product_svd(B, A, rule=rule).rank)


def test_input_is_left_alone():
    spectrum = S.clone()
    select_rank(spectrum, Energy(0.5))
    assert spectrum.equal(S)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad):
    spectra = S.repeat(2, 3, 1)
    spectra[1, 0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"select_rank: spectrum \(1, 0\): S holds NaN or Inf"):
        select_rank(spectra, Energy(0.9))
    assert select_rank(spectra, Energy(0.9), check=False).tolist() == [[3, 3, 3], [0, 3, 3]]


@pytest.mark.parametrize("values", [[1.0, 2.0], [2.0, -1.0], [0.0, -0.5]])
def test_values_that_are_no_spectrum(values):
    with pytest.raises(InputError, match="S is not descending and >= 0; sort"):
        select_rank(torch.tensor(values), Energy(0.9))


@pytest.mark.parametrize("name", ["total_energy", "floor"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bounds_that_make_no_sense(name, value):
    with pytest.raises(InputError, match="finite numbers >= 0 are needed"):
        select_rank(S, Energy(0.9), **{name: value})


def test_shapes_and_types():
    with pytest.raises(MismatchError, match=r"total_energy has shape \(3,\); \(2,\) or one number"):
        select_rank(S.expand(2, 5), Energy(0.9), total_energy=torch.ones(3))
    with pytest.raises(MismatchError, match="S is a single number"):
        select_rank(torch.tensor(1.0), Energy(0.9))
    with pytest.raises(TypeError, match="rank rule"):
        select_rank(S, 3)
    with pytest.raises(ValueError, match="Budget"):
        select_rank(S, Budget(10))
    with pytest.raises(TypeError, match="S is a torch array and floor a numpy array"):
        select_rank(S, Rank(2), floor=np.ones(()))
    with pytest.raises(InputError, match=r"S has dtype torch.int64"):
        select_rank(torch.ones(3, dtype=torch.int64), Rank(2))
