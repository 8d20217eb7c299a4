"""Weights of rank segments: who takes part, to which sum, and what does not depend on whom."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import normalised, standard

from fedlora_kernels.errors import InputError, WeightError
from fedlora_kernels.methods.contract import Previous
from fedlora_kernels.methods.segments import checked_levels, ranked_parts, segments

counts = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5000)), min_size=1, max_size=7)


def cut(ranks, weights, top=None):
    p = standard(m=5, n=4, ranks=ranks, counts=[1] * len(ranks), scale=[1.0] * len(ranks))
    return segments(replace(p, weight=list(weights)).group(), top or max(ranks), "prelort")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(counts)
def test_weights_of_every_segment_are_the_exact_ratios_of_counts(clients):
    ranks, n = zip(*clients, strict=True)
    found = cut(ranks, normalised(n))
    for s, (_, stop) in enumerate(found.spans):
        total = sum(c for r, c in clients if r >= stop)
        wanted = [float(Fraction(c, total)) if r >= stop else 0.0 for r, c in clients]
        assert found.weight[0, :, s].tolist() == wanted
        assert float(found.weight[0, :, s].sum()) == pytest.approx(1.0, abs=1e-15 * len(ranks))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(counts, st.lists(st.integers(1, 5000), min_size=1, max_size=3))
def test_clients_of_lower_rank_leave_the_weights_above_bitwise(clients, lower):
    ranks, n = zip(*[(r + 1, c) for r, c in clients], strict=True)
    alone = cut(ranks, normalised(n))
    among = cut((*ranks, *[1] * len(lower)), normalised([*n, *lower]))
    columns, joined = alone.columns()[0], among.columns()[0]
    assert torch.equal(columns[:, :, 1:], joined[:, : len(ranks), 1:])


def test_weights_that_are_no_ratios_of_counts_are_left_as_they_are():
    w = [0.123456789012345, 0.3, 0.576543210987655]
    found = cut((2, 4, 4), w)
    assert found.weight[0, :, 0].tolist() == w
    assert found.weight[0, 1:, 1].tolist() == [w[1] / (w[1] + w[2]), w[2] / (w[1] + w[2])]


def test_equal_ranks_keep_the_weights_to_the_bit_whatever_their_sum():
    w = [0.1, -0.7, 1.3]
    assert cut((3, 3, 3), w).weight[0, :, 0].tolist() == w


def test_a_segment_has_the_sum_of_all_weights_where_they_are_not_normalised():
    found = cut((2, 4, 4), [1.0, 3.0, 0.5])
    torch.testing.assert_close(found.weight[0].sum(0), torch.full((2,), 4.5, dtype=torch.float64))
    torch.testing.assert_close(found.weight[0, :, 1], torch.tensor([0.0, 27 / 7, 4.5 / 7], dtype=torch.float64))


def test_weight_zero_has_no_part_in_a_segment():
    found = cut((2, 4, 6), [0.25, 0.75, 0.0])
    assert found.bounds == (0, 2, 4, 6)
    assert found.owned.tolist() == [[True, True, False]]
    assert found.weight[0].tolist() == [[0.25, 0.0, 0.0], [0.75, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_missing_module_dilutes_every_segment_where_it_counts_as_zero():
    found = cut((0, 2, 4), [0.5, 0.25, 0.25])
    assert found.weight[0].tolist() == [[0.0, 0.0], [0.25, 0.0], [0.25, 1 / 3]]


def test_patterns_of_weights_differ_from_module_to_module():
    group = standard(m=5, n=4, ranks=(2, 4), counts=(1, 3)).group()
    pair = {"B": tuple(torch.cat([b, b]) for b in group.B), "A": tuple(torch.cat([a, a]) for a in group.A)}
    weight = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    group = replace(group, modules=("x", "y"), scale=group.scale.repeat(2, 1), weight=weight, **pair)
    found = segments(group, 4, "prelort")
    assert found.weight.tolist() == [[[0.25, 0.0], [0.75, 1.0]], [[1.0, 0.0], [0.0, 0.0]]]
    assert found.owned.tolist() == [[True, True], [True, False]]


def test_negative_weights_are_refused_by_name_where_ranks_differ():
    with pytest.raises(
        WeightError, match=r"layers\.0\.q_proj.*client 1 \(counted from 0\) has weight -0\.5.*'prelort'"
    ):
        cut((2, 4), [1.0, -0.5])
    assert cut((4, 0), [1.0, -0.5]).weight[0].tolist() == [[1.0], [0.0]]
    assert not cut((0, 0), [0.5, -0.5], top=3).owned.any()
    assert cut((0, 0, 2), [0.5, -0.5, 1.0], top=4).weight[0].tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("levels", [(), (4, 4), (8, 4), (0, 4), (-1,), (2.5,), (True,), "48", 8])
def test_levels_that_are_no_ascending_ranks_are_refused(levels):
    with pytest.raises(InputError, match=r"raflora: levels is .*; ascending ranks >= 1 are needed"):
        checked_levels(levels, "raflora")


def test_levels_become_a_tuple_of_integers():
    assert checked_levels([4, 8], "prelort") == (4, 8)
    assert checked_levels(None, "prelort") is None


def test_parts_have_one_rank_which_padding_of_the_previous_pair_does_not_raise():
    group = standard(m=5, n=4, ranks=(2, 3)).group()
    names = ("a", "b", "c")
    group = replace(
        group,
        modules=names,
        B=tuple(b.repeat(3, 1, 1) for b in group.B),
        A=tuple(a.repeat(3, 1, 1) for a in group.A),
        scale=group.scale.repeat(3, 1),
        weight=group.weight.repeat(3, 1),
    )
    B, A = torch.ones(3, 5, 6), torch.ones(3, 6, 4)
    B[0, :, 1:], A[0, 1:] = 0, 0  # of rank 1
    B[1:, :, 4:] = 0  # A alone makes rank 6
    parts = list(ranked_parts(group, Previous(round=0, B=B, A=A), (2, 4), "prelort"))
    assert [(part.modules, kept[0].shape, top) for part, kept, top in parts] == [
        (("a",), (1, 5, 4), 4),
        (("b", "c"), (2, 5, 6), 6),
    ]
    ((part, kept, top),) = ranked_parts(group, Previous(round=0), (2, 4), "prelort")
    assert (part.modules, kept, top) == (names, None, 4)
    ((_, kept, top),) = ranked_parts(group, Previous(round=0, B=B[:, :, :0], A=A[:, :0]), None, "prelort")
    assert (kept[0].shape, top) == ((3, 5, 0), 3)
