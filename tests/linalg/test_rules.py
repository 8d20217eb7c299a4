"""Rank rules: their boundaries on exact spectra, what they refuse, sizes in bytes."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora_kernels.backends.contract import RuleCode, RuleSpec
from fedlora_kernels.linalg import (
    Absolute,
    Budget,
    Energy,
    Frobenius,
    Rank,
    RankRule,
    SingularValueRatio,
    SingularValueSum,
    select_rank,
)
from fedlora_kernels.linalg.rules import parse_size, spec_of

S = torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # squares 16 20 24 25, sums 4 6 8 9


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        (Energy(16 / 25), 1),
        (Energy(np.nextafter(16 / 25, 1)), 1),  # within the slack of 1e-12: reaching the threshold counts
        (Energy(16 / 25 + 1e-11), 2),
        (Energy(0.96), 3),
        (Energy(0.9600001), 4),
        (Energy(1.0), 4),
        (Energy(1e-300), 1),
        (Frobenius(0.8), 1),
        (Frobenius(0.81), 2),
        (Frobenius(1), 4),
        (Rank(1), 1),
        (Rank(3), 3),
        (Rank(4), 4),
        (Rank(5), 4),
        (Rank(10**6), 4),
        (SingularValueSum(4 / 9), 1),
        (SingularValueSum(0.45), 2),
        (SingularValueSum(8 / 9), 3),
        (SingularValueSum(1.0), 4),
        (SingularValueRatio(1), 1),
        (SingularValueRatio(2), 1),  # strict: the ties with s_1 / 2 are dropped
        (SingularValueRatio(2.0000001), 3),
        (SingularValueRatio(1e9), 4),
        (Absolute(0), 4),
        (Absolute(1.0), 3),  # strict
        (Absolute(0.999), 4),
        (Absolute(4.0), 0),
        (Energy(1.0).capped(2), 2),
        (Rank(3).capped(7), 3),
        (Absolute(0).capped(1), 1),
        (Energy(0.96).capped(3), 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("power", [0, -60, 60])
def test_boundaries(rule, rank, power):
    if isinstance(rule, Absolute):
        rule = dataclasses.replace(rule, cutoff=rule.cutoff * 2.0**power)
    assert select_rank(S * 2.0**power, rule).item() == rank


def test_ten_equal_values_at_nine_tenths():
    g = torch.Generator().manual_seed(3)
    scales = torch.rand(200, 1, generator=g, dtype=torch.float64) + 0.1
    assert select_rank(scales.expand(200, 10), Energy(0.9)).eq(9).all()


@pytest.mark.parametrize("make", [Energy, Frobenius, SingularValueSum])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.5, 1.0000001, float("nan"), float("inf"), True, "0.9", None, 1j])
def test_shares_outside_their_range(make, value):
    with pytest.raises(ValueError, match=make.__name__):
        make(value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None, float("nan"), np.float64(2), np.True_])
def test_ranks_outside_their_range(value):
    with pytest.raises(ValueError, match="integer >= 1"):
        Rank(value)
    with pytest.raises(ValueError, match="integer >= 1"):
        Energy(0.9).capped(value)
    if value is not None:
        with pytest.raises(ValueError, match="integer >= 1"):
            Energy(0.9, cap=value)


@pytest.mark.parametrize("value", [0.5, 0, -1, float("nan"), float("inf"), True, "2", None])
def test_ratios_outside_their_range(value):
    with pytest.raises(ValueError, match="SingularValueRatio"):
        SingularValueRatio(value)


@pytest.mark.parametrize("value", [-1e-300, float("nan"), float("inf"), False, "2", None])
def test_cutoffs_outside_their_range(value):
    with pytest.raises(ValueError, match="Absolute"):
        Absolute(value)


def test_numbers_of_numpy_become_plain_ones():
    assert Rank(np.int64(3)) == Rank(3)
    assert type(Rank(np.int64(3)).capped(np.int32(2)).cap) is int
    assert type(Rank(np.int64(3)).k) is int
    assert type(Energy(np.float32(0.5)).threshold) is float
    assert str(Energy(1)) == "Energy(1.0)"


def test_rules_are_frozen_and_compare_by_value():
    rule = Energy(0.9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.threshold = 0.8
    assert Energy(0.9) == rule
    assert Energy(0.9).capped(3) != rule
    assert hash(Rank(3)) == hash(Rank(3))
    with pytest.raises(TypeError, match="base class"):
        RankRule()


def test_the_tighter_cap_wins():
    assert Energy(0.9).capped(5).capped(3).cap == 3
    assert Energy(0.9).capped(3).capped(5).cap == 3
    assert str(Energy(0.9)) == "Energy(0.9)"
    assert str(Rank(8).capped(4)) == "Rank(8).capped(4)"


def test_plain_numbers_for_a_backend():
    assert Energy(0.9).spec() == RuleSpec(RuleCode.ENERGY, 0.9, 0)
    assert Frobenius(0.5).spec() == RuleSpec(RuleCode.ENERGY, 0.25, 0)
    assert Rank(8).capped(4).spec() == RuleSpec(RuleCode.RANK, 8.0, 4)
    assert SingularValueRatio(2).spec() == RuleSpec(RuleCode.SV_RATIO, 2.0, 0)
    assert Absolute(1e-3).spec() == RuleSpec(RuleCode.ABSOLUTE, 1e-3, 0)
    assert SingularValueSum(1).spec() == RuleSpec(RuleCode.SV_SUM, 1.0, 0)


@pytest.mark.parametrize("thing", [0.9, 8, "energy", None, Energy, RuleSpec(RuleCode.RANK, 8.0)], ids=repr)
def test_things_that_are_no_rules(thing):
    with pytest.raises(TypeError, match="a rank rule is needed"):
        spec_of(thing)


def test_a_budget_is_no_rule_for_one_matrix():
    assert Budget("10MB").capped(4).cap == 4
    with pytest.raises(ValueError, match="spectra of all modules"):
        spec_of(Budget("10MB"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1), (7000, 7000), ("7000", 7000), ("1B", 1), ("10MB", 10**7), ("10MiB", 10 * 2**20), ("1.5 GB", 1.5e9), (" 2 KiB ", 2048),
        ("3kB", 3000), ("3KB", 3000), ("1TiB", 2**40), ("0.5GiB", 2**29),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size
    Budget(text)


@pytest.mark.parametrize(
    "text", [0, -1, True, 1.5, None, "", "MB", "10 mb", "-1MB", "0MB", "1e9", "10 MB each", "0.1B"]
)
def test_sizes_that_make_no_sense(text):
    with pytest.raises(ValueError, match="size"):
        Budget(text)
