"""`select_rank` of every backend: boundaries, strictness, slack and caps of the rank rules."""

import math

import pytest
import torch
from frames import every_backend
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.backends.contract import RuleCode, RuleSpec
from fedlora_kernels.backends.reference.threshold import rank_of
from fedlora_kernels.testing import SPECTRA, spectrum

backends = every_backend("select_rank")

ENERGY, RANK, RATIO, ABSOLUTE, SUM = RuleCode
TEN = (1.0,) * 10
STEEP = (1.0,) * 4 + (1e-4,) * 8
TABLE = [
    (TEN, ENERGY, 0.9, 9),
    (TEN, ENERGY, 0.9 + 1e-9, 10),
    (TEN, ENERGY, 1e-12, 1),
    (TEN, ENERGY, 1 - 1e-12, 10),
    (TEN, ENERGY, 1.0, 10),
    (STEEP, ENERGY, 1.0, 12),
    (STEEP, ENERGY, 0.999, 4),
    ((4.0, 3.0), ENERGY, 0.64, 1),
    ((4.0, 3.0), ENERGY, 0.64 + 1e-9, 2),
    ((0.3, 0.4 * 0.75), ENERGY, 0.5, 1),
    ((0.0, 0.0), ENERGY, 0.5, 0),
    ((0.0, 0.0), ENERGY, 1.0, 0),
    (TEN, RANK, 1.0, 1),
    (TEN, RANK, 10.0, 10),
    (TEN, RANK, 1e30, 10),
    ((1.0, 0.0), RANK, 2.0, 1),
    ((0.0,), RANK, 1.0, 0),
    ((8.0, 4.0, 2.0), RATIO, 2.0, 1),
    ((8.0, 4.0, 2.0), RATIO, 2.0000001, 2),
    ((8.0, 4.0, 2.0), RATIO, 1e9, 3),
    ((8.0, 4.0, 2.0), RATIO, 1.0, 1),
    (TEN, RATIO, 1.0, 1),
    (TEN, RATIO, 1.5, 10),
    ((0.0, 0.0), RATIO, 2.0, 0),
    ((8.0, 4.0, 2.0), ABSOLUTE, 4.0, 1),
    ((8.0, 4.0, 2.0), ABSOLUTE, 3.9, 2),
    ((8.0, 4.0, 2.0), ABSOLUTE, 0.0, 3),
    ((8.0, 4.0, 2.0), ABSOLUTE, 8.0, 0),
    ((0.0,), ABSOLUTE, 0.0, 0),
    (TEN, SUM, 0.9, 9),
    (TEN, SUM, 0.9 + 1e-9, 10),
    (STEEP, SUM, 1.0, 12),
    ((2.0, 1.0, 1.0), SUM, 0.5, 1),
    ((2.0, 1.0, 1.0), SUM, 0.75, 2),
    ((0.0, 0.0), SUM, 0.5, 0),
    ((), ENERGY, 0.5, 0),
    ((), RATIO, 2.0, 0),
    ((), SUM, 0.5, 0),
]


def choose(backend, rows, rule, total=None, floor=None):
    S = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1)
    total = (S * S).sum(-1) if total is None else torch.tensor(total, dtype=torch.float64)
    floor = (
        torch.full((len(rows),), 1e-9, dtype=torch.float64)
        if floor is None
        else torch.tensor(floor, dtype=torch.float64)
    )
    ranks = backend(S, rule, total, floor, N=len(rows))
    assert ranks.dtype == torch.int64
    assert ranks.shape == (len(rows),)
    return ranks.tolist()


@backends
@pytest.mark.parametrize(("values", "code", "value", "expected"), TABLE)
def test_boundaries(backend, values, code, value, expected):
    assert choose(backend, [values], RuleSpec(code, value)) == [expected]


@backends
@pytest.mark.parametrize("scale", [1e-100, 1 / 3, 0.1, 7.7, 1e100])
def test_reaching_the_threshold_counts_whatever_the_scale(backend, scale):
    values = tuple(x * scale for x in TEN)
    for code in (ENERGY, SUM):
        assert choose(backend, [values], RuleSpec(code, 0.9), floor=[0.0]) == [9]


@backends
def test_a_thousand_scalings_of_ten_equal_values(backend):
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = scales[:, None].expand(-1, 10).tolist()
    assert set(choose(backend, rows, RuleSpec(ENERGY, 0.9))) == {9}


@backends
@pytest.mark.parametrize("cap", range(1, 12))
@pytest.mark.parametrize(("code", "value"), [(ENERGY, 0.7), (RANK, 9.0), (RATIO, 3.0), (ABSOLUTE, 0.5), (SUM, 1.0)])
def test_caps_come_last(backend, code, value, cap):
    free = choose(backend, [TEN], RuleSpec(code, value))[0]
    assert choose(backend, [TEN], RuleSpec(code, value, cap)) == [min(free, cap)]


@backends
def test_energy_is_compared_with_the_total_that_is_given(backend):
    """The tail need not be computed: the total comes from elsewhere."""
    rows = [(2.0, 1.0)] * 3
    assert choose(backend, rows, RuleSpec(ENERGY, 0.5), total=[5.0, 9.0, 100.0]) == [1, 2, 2]


@backends
@pytest.mark.parametrize(
    "rule", [RuleSpec(ENERGY, 1.0), RuleSpec(RANK, 5.0), RuleSpec(ABSOLUTE, 0.0), RuleSpec(RATIO, 1e9)]
)
def test_nothing_at_or_below_the_floor_is_kept(backend, rule):
    rows = [(4.0, 2.0, 1.0)] * 4
    assert choose(backend, rows, rule, floor=[0.5, 1.0, 2.0, 4.0]) == [3, 2, 1, 0]


@backends
@pytest.mark.parametrize(
    ("code", "value"), [(ENERGY, 0.5), (ENERGY, 1.0), (RANK, 2.0), (RATIO, 2.0), (ABSOLUTE, 0.1), (SUM, 0.5)]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_gives_zero_and_harms_no_neighbour(backend, code, value, bad):
    rows = [(3.0, 2.0, 1.0)] * 5
    clean = choose(backend, rows[:1], RuleSpec(code, value))[0]
    rows[1] = (bad, 2.0, 1.0)
    rows[2] = (3.0, 2.0, bad)
    assert clean > 0
    assert choose(backend, rows, RuleSpec(code, value), total=[14.0, 14.0, 14.0, bad, 14.0]) == [clean, 0, 0, 0, clean]


@backends
def test_no_matrices(backend):
    none = torch.zeros(0, dtype=torch.float64)
    assert backend(none.reshape(0, 3), RuleSpec(ENERGY, 0.5), none, none).shape == (0,)


@backends
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(SPECTRA),
    k=st.integers(1, 40),
    code=st.sampled_from(list(RuleCode)),
    value=st.floats(0.01, 1.0),
    cap=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_plain_loop(backend, name, k, code, value, cap, seed):
    """Every backend against the loop of the reference, which is short enough to read."""
    value = {RANK: float(round(40 * value)) or 1.0, RATIO: 1 / value}.get(code, value)
    rows = [spectrum(name, k, 1e4, seed + i).tolist() for i in range(3)]
    expected = [rank_of(s, RuleSpec(code, value, cap), sum(x * x for x in s), 1e-9) for s in rows]
    found = choose(backend, rows, RuleSpec(code, value, cap))
    reached = [x / sum(x * x for x in s) for s in rows for x in torch.tensor(s).double().square().cumsum(0).tolist()]
    if all(abs(x - value) > 1e-11 for x in reached):
        assert found == expected
