"""PreLort: means over the clients that have a rank index, empty segments kept, the distance from D exact."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import VARIANTS, Problem, distance, normalised, product, standard

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError, WeightError
from fedlora_kernels.methods import factors
from fedlora_kernels.methods.contract import Previous, make_method
from fedlora_kernels.rows import random_rows

BACKENDS = ("torch", "reference", "auto")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BAD = [(), (8, 4), (0, 4)]


def pair_of(m, n, rank, seed=7, dtype=torch.float32, modules=1):
    made = torch.Generator().manual_seed(seed)
    B = torch.randn(modules, m, rank, generator=made, dtype=torch.float64).to(dtype)
    return B, torch.randn(modules, rank, n, generator=made, dtype=torch.float64).to(dtype)


def left(m, n, rank, round=2, **fields):  # noqa: A002
    B, A = pair_of(m, n, rank, **fields)
    return Previous(round=round, B=B, A=A)


def by_column(p: Problem):
    """The rule index by index, from counts in proportion to the weights."""
    top = max(b.shape[1] for b in p.B)
    B, A = torch.zeros(p.B[0].shape[0], top).double(), torch.zeros(top, p.A[0].shape[1]).double()
    for j in range(top):
        have = [k for k, b in enumerate(p.B) if b.shape[1] > j]
        total = sum(p.weight[k] for k in have)
        for k in have:
            B[:, j] += p.weight[k] / total * p.scale[k] * p.B[k][:, j].double()
            A[j] += p.weight[k] / total * p.A[k][j].double()
    return B, A


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_index_is_the_mean_over_the_clients_that_have_it(variant, backend):
    p = VARIANTS[variant]()
    outcome = p.run("prelort", backend=backend)
    B, A = by_column(p)
    assert distance(outcome.B[0], B) < 1e-14
    assert distance(outcome.A[0], A) < 1e-14
    assert int(outcome.rank[0]) == max(b.shape[1] for b in p.B)
    assert int(outcome.info[0]) == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_the_distance_from_the_sum_of_the_updates(variant, backend):
    p = VARIANTS[variant]()
    outcome = p.run("prelort", backend=backend)
    measured = distance(product(outcome), p.dense())
    assert float(outcome.error[0]) == pytest.approx(measured, rel=1e-10, abs=1e-14)
    assert measured <= float(outcome.error_bound[0]) + 1e-14
    assert float(outcome.error_bound[0]) <= float(outcome.error[0]) * (1 + 1e-5) + 1e-7
    assert float(outcome.energy[0]) == pytest.approx(float(torch.linalg.norm(p.dense()) ** 2), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_ranks_are_bitwise_fedit(dtype):
    p = standard(m=37, n=29, ranks=(6,) * 5, scale=(1.0, 4.0, 2.0, 0.5, 3.0), dtype=dtype)
    for q in (p, replace(p, weight=[0.7, -0.2, 1.1, 0.4, 0.0])):
        ours, fedit = q.run("prelort"), q.run("fedit")
        assert torch.equal(ours.B, fedit.B)
        assert torch.equal(ours.A, fedit.A)
        assert float(ours.error[0]) == pytest.approx(float(fedit.error[0]), rel=1e-12)


@pytest.mark.parametrize("missing", ["zero", "renormalize"])
def test_equal_ranks_are_bitwise_fedit_where_a_client_lacks_the_module(missing):
    p = standard(m=37, n=29, ranks=(6, 6, 0), counts=(1, 2, 4), scale=(1.0, 3.0, 0.0))
    p = replace(p, weight=p.weight if missing == "zero" else [1 / 3, 2 / 3, 0.0])
    ours, fedit = p.run("prelort"), p.run("fedit")
    assert torch.equal(ours.B, fedit.B)
    assert torch.equal(ours.A, fedit.A)
    assert float(ours.error[0]) == pytest.approx(distance(product(ours), p.dense()), rel=1e-10)


def test_a_missing_module_counts_as_zero_in_every_segment_or_not_at_all():
    p = standard(m=37, n=29, ranks=(2, 4, 0), counts=(1, 1, 2), scale=(1.0, 3.0, 0.0))
    diluted = p.run("prelort")
    shared = replace(p, weight=[0.5, 0.5, 0.0]).run("prelort")
    torch.testing.assert_close(diluted.A[0, :2], shared.A[0, :2] / 2)
    torch.testing.assert_close(diluted.A[0, 2:], p.A[1][2:] / 3)
    torch.testing.assert_close(shared.A[0, 2:], p.A[1][2:])
    for q, outcome in ((p, diluted), (replace(p, weight=[0.5, 0.5, 0.0]), shared)):
        assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), q.dense()), rel=1e-10)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3000)), min_size=1, max_size=5),
    st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
)
def test_clients_of_lower_rank_leave_the_columns_above_bitwise(clients, lower, dtype):
    ranks, counts = zip(*[(r + 2, n) for r, n in clients], strict=True)
    p = standard(m=11, n=9, ranks=ranks, counts=counts, dtype=dtype)
    low = standard(m=11, n=9, ranks=(2,) * len(lower), counts=lower, seed=3, dtype=dtype)
    both = Problem(p.B + low.B, p.A + low.A, p.scale + low.scale, normalised([*counts, *lower]))
    alone, among = p.run("prelort", dtype=torch.float64), both.run("prelort", dtype=torch.float64)
    assert torch.equal(alone.B[0, :, 2:], among.B[0, :, 2:])
    assert torch.equal(alone.A[0, 2:], among.A[0, 2:])
    assert not torch.equal(alone.A[0, :2], among.A[0, :2])


def test_clients_that_agree_on_an_index_are_not_shrunk_by_those_without_it():
    """Zero-padding leaves 4/15 of the column that one client of top rank, with 4 of 15 samples, alone has."""
    p = standard(m=23, n=19, ranks=(2, 2, 2, 6, 2), counts=(3, 1, 2, 4, 5), scale=(1.0,) * 5)
    ours, padded = p.run("prelort"), p.run("zero_pad")
    assert torch.equal(ours.B[0, :, 2:], p.B[3][:, 2:])
    assert torch.equal(ours.A[0, 2:], p.A[3][2:])
    torch.testing.assert_close(padded.B[0, :, 2:], p.B[3][:, 2:] * (4 / 15))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.permutations(range(5)))
def test_the_order_of_clients_does_not_matter(order):
    p = standard(m=11, n=13)
    first, second = p.run("prelort"), p.permuted(order).run("prelort")
    assert distance(first.B[0], second.B[0]) < 1e-14
    assert distance(first.A[0], second.A[0]) < 1e-14


@pytest.mark.parametrize("cut", [1, 4, 6, 8, 11])
def test_prefix_of_the_aggregate_is_bitwise_the_aggregate_of_the_prefixes(cut):
    p = standard()
    short = replace(p, B=[b[:, :cut] for b in p.B], A=[a[:cut] for a in p.A])
    whole, part = p.run("prelort"), short.run("prelort")
    assert torch.equal(whole.B[:, :, :cut], part.B)
    assert torch.equal(whole.A[:, :cut], part.A)


@pytest.mark.parametrize("levels", [None, (12,), (4, 8, 12), tuple(range(1, 13)), (1, 5, 7)])
def test_finer_levels_change_no_bit(levels):
    p = standard()
    first, second = p.run("prelort"), p.run("prelort", levels=levels)
    for field in ("B", "A", "rank", "error"):
        assert torch.equal(getattr(first, field), getattr(second, field))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_empty_segment_keeps_the_previous_values_bitwise(dtype):
    p = standard(m=37, n=29, ranks=(4, 4, 8), dtype=dtype)
    previous = left(37, 29, 12, dtype=dtype)
    for levels in (None, (12,), (4, 8, 12)):
        outcome = p.run("prelort", previous=previous, levels=levels)
        assert int(outcome.rank[0]) == 12
        assert torch.equal(outcome.B[:, :, 8:], previous.B[:, :, 8:])
        assert torch.equal(outcome.A[:, 8:], previous.A[:, 8:])
        fresh = p.run("prelort")
        assert torch.equal(outcome.B[:, :, :8], fresh.B)
        assert torch.equal(outcome.A[:, :8], fresh.A)
        measured = distance(product(outcome), p.dense())
        assert float(outcome.error[0]) == pytest.approx(measured, rel=1e-10 if dtype == torch.float64 else 1e-6)
        assert measured <= float(outcome.error_bound[0])


def test_without_previous_values_an_empty_segment_has_random_rows_and_zero_columns():
    p = standard(m=37, n=29, ranks=(4, 8), dtype=torch.float32)
    group = p.group(round=3, seed=11)
    for previous in (None, Previous(round=2), left(37, 29, 10)):
        outcome = make_method("prelort", {"levels": (4, 13)}).combine(group, None, previous)
        start = 8 if previous is None or previous.B is None else 10
        rows = random_rows(11, 3, "layers.0.q_proj", range(start, 13), 29).float()
        assert torch.equal(outcome.A[0, start:], rows)
        assert not outcome.B[0, :, start:].any()
        assert bool((outcome.A[0] != 0).any(1).all()), "no zero rows in A"


def test_a_kept_segment_survives_the_round_after():
    p = standard(m=37, n=29, ranks=(4, 8))
    first = p.run("prelort", levels=(13,))
    second = standard(m=37, n=29, ranks=(4, 4), seed=5).run("prelort", previous=Previous(round=0, B=first.B, A=first.A))
    assert torch.equal(second.A[:, 4:], first.A[:, 4:])
    assert torch.equal(second.B[:, :, 4:], first.B[:, :, 4:])


def test_weight_zero_is_no_contributor():
    p = standard(m=37, n=29, ranks=(4, 8), counts=(1, 3))
    p = replace(p, weight=[1.0, 0.0])
    p.B[1][0, 0] = p.A[1][0, 0] = float("nan")  # never read
    outcome = p.run("prelort", previous=left(37, 29, 8))
    assert torch.equal(outcome.B[0, :, :4], p.scale[0] * p.B[0])
    assert torch.equal(outcome.A[0, 4:], left(37, 29, 8).A[0, 4:].double())
    assert int(outcome.info[0]) == 0
    assert float(outcome.error[0]) < 10


def test_weight_zero_in_one_module_alone_does_not_enter_it():
    problems = [standard(m=37, n=29, ranks=(4, 8), seed=seed) for seed in (0, 1)]
    problems[1] = replace(problems[1], weight=[1.0, 0.0])
    problems[1].B[1][0, 0] = problems[1].A[1][0, 0] = float("nan")
    outcome = make_method("prelort", {}).combine(batch(problems), None, None)
    assert outcome.info.tolist() == [0, 0]
    for i, problem in enumerate(problems):
        assert distance(outcome.B[i].double() @ outcome.A[i].double(), product(problem.run("prelort"))) < 1e-12
        assert float(outcome.error[i]) == pytest.approx(float(problem.run("prelort").error[0]), rel=1e-9, abs=1e-12)


def test_one_client_is_returned_and_higher_segments_kept():
    p = standard(m=37, n=29, ranks=(5,), scale=(3.0,))
    assert distance(product(p.run("prelort")), p.dense()) < 1e-14
    outcome = p.run("prelort", previous=left(37, 29, 9))
    assert torch.equal(outcome.B[0, :, :5], 3.0 * p.B[0])
    assert torch.equal(outcome.A[0, :5], p.A[0])
    assert torch.equal(outcome.A[0, 5:], left(37, 29, 9).A[0, 5:].double())


@pytest.mark.parametrize("copies", [2, 5])
def test_identical_clients_return_that_update_and_no_error(copies):
    one = standard(m=37, n=29, ranks=(6,), scale=(3.0,))
    p = Problem(one.B * copies, one.A * copies, one.scale * copies, normalised(range(1, copies + 1)))
    outcome = p.run("prelort")
    assert distance(product(outcome), one.dense()) < 1e-14
    assert float(outcome.error[0]) < 1e-14


def test_zero_update_keeps_the_mean_of_A():
    p = standard()
    p = replace(p, B=[torch.zeros_like(b) for b in p.B])
    outcome = p.run("prelort")
    assert not outcome.B.any()
    assert distance(outcome.A[0], by_column(p)[1]) < 1e-14
    assert int(outcome.notes[0]) & Note.ZERO
    assert float(outcome.error[0]) == float(outcome.error_bound[0]) == 0.0
    kept = p.run("prelort", previous=left(48, 40, 14))
    assert float(kept.error[0]) == float("inf"), "a kept segment where D = 0"


def test_nobody_present():
    p = standard(m=37, n=29, ranks=(0, 0), counts=(1, 1), scale=(0.0, 0.0))
    zero = p.run("prelort")
    assert int(zero.rank[0]) == 1
    assert int(zero.notes[0]) & Note.ZERO
    kept = p.run("prelort", previous=left(37, 29, 3))
    assert torch.equal(kept.B, left(37, 29, 3).B.to(kept.B.dtype))
    assert float(kept.error[0]) == float("inf")
    drawn = p.run("prelort", levels=(3,))
    assert int(drawn.rank[0]) == 3
    assert float(drawn.error[0]) == 0.0


def test_a_gauge_change_must_change_the_product():
    p = standard()
    assert distance(product(p.gauged().run("prelort")), product(p.run("prelort"))) > 0.05


def test_scaling_all_updates_scales_the_product():
    p = standard()
    scaled = replace(p, scale=[5.0 * s for s in p.scale])
    assert distance(product(scaled.run("prelort")), 5.0 * product(p.run("prelort"))) < 1e-13


def test_splitting_a_client_changes_nothing():
    p = standard()
    w = p.weight
    split = Problem([*p.B, p.B[4]], [*p.A, p.A[4]], [*p.scale, p.scale[4]], [*w[:4], w[4] / 2, w[4] / 2])
    assert distance(split.run("prelort").B[0], p.run("prelort").B[0]) < 1e-14


def test_differs_from_raflora_with_mixed_ranks():
    p = standard()
    assert distance(product(p.run("prelort")), product(p.run("raflora"))) > 0.05


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9])
def test_the_error_of_nearly_equal_clients_does_not_drown_in_rounding(delta):
    base = standard(m=37, n=29, ranks=(6,), scale=(2.0,))
    noise = standard(m=37, n=29, ranks=(6, 6, 6), scale=(2.0,) * 3)
    p = Problem(
        [base.B[0] + delta * b for b in noise.B], [base.A[0] + delta * a for a in noise.A], [2.0] * 3, noise.weight
    )
    w = torch.tensor(p.weight, dtype=torch.float64)[:, None, None]
    B, A = torch.stack(p.B), torch.stack(p.A)
    spread = (w * 2.0 * (B - (w * B).sum(0)) @ (A - (w * A).sum(0))).sum(0)
    wanted = float(torch.linalg.norm(spread) / torch.linalg.norm(p.dense()))
    assert float(p.run("prelort").error[0]) == pytest.approx(wanted, rel=1e-12 + 64 * 2**-53 / delta, abs=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_bound_holds_the_rounding_of_the_answer(dtype, scale):
    p = standard(m=37, n=29, ranks=(6,), scale=(scale,))
    outcome = p.run("prelort", dtype=dtype)
    assert 0.0 < distance(product(outcome), p.dense()) <= float(outcome.error_bound[0])


def test_unnormalised_weights():
    p = replace(standard(), weight=[0.5, 2.0, 1.0, 0.25, 3.0])
    outcome = p.run("prelort")
    torch.testing.assert_close(outcome.A[0, 8:], p.A[4][8:] * 6.75)
    assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), p.dense()), rel=1e-10)
    with pytest.raises(WeightError, match=r"'layers\.0\.q_proj'.*has weight -0\.2.*'prelort'"):
        replace(p, weight=[0.5, -0.2, 1.0, 0.25, 3.0]).run("prelort")


def test_trouble_is_reported_in_info_and_harms_no_neighbour():
    p = standard(m=37, n=29)
    assert int(replace(p, scale=[1e6] * 5).run("prelort", dtype=torch.float16).info[0]) == Info.OVERFLOW
    group = batch([p, standard(m=37, n=29, seed=3)])
    group.B[1][0, 2, 3] = float("inf")
    outcome = make_method("prelort", {}).combine(group, None, None)
    alone = standard(m=37, n=29, seed=3).run("prelort")
    assert outcome.info.tolist() == [int(Info.NONFINITE), 0]
    assert torch.equal(outcome.B[1], alone.B[0])


def batch(problems):
    groups = [p.group() for p in problems]
    K = len(groups[0].B)
    return replace(
        groups[0],
        modules=tuple(f"layers.{i}" for i in range(len(groups))),
        B=tuple(torch.cat([g.B[k] for g in groups]) for k in range(K)),
        A=tuple(torch.cat([g.A[k] for g in groups]) for k in range(K)),
        scale=torch.cat([g.scale for g in groups]),
        weight=torch.cat([g.weight for g in groups]),
    )


@pytest.mark.parametrize("pieces", [1, 2])
def test_modules_do_not_feel_their_neighbours_nor_the_pieces_of_the_work(monkeypatch, pieces):
    """Previous pairs of several ranks, padded to the widest, and weights that differ from module to module."""
    problems = [standard(m=31, n=23, ranks=(3, 5), seed=seed) for seed in range(4)]
    problems[2] = replace(problems[2], weight=[1.0, 0.0])
    group = batch(problems)
    B, A = pair_of(31, 23, 9, dtype=torch.float64, modules=4)
    for i, rank in enumerate((9, 7, 7, 2)):
        B[i, :, rank:], A[i, rank:] = 0, 0
    monkeypatch.setattr(factors, "CHUNK", pieces * 8 * 8 * (31 + 23))
    outcome = make_method("prelort", {}).combine(group, None, Previous(round=0, B=B, A=A))
    assert outcome.rank.tolist() == [9, 7, 7, 5]
    for i, rank in enumerate((9, 7, 7, 2)):
        alone = make_method("prelort", {}).combine(
            group.part(i, i + 1), None, Previous(round=0, B=B[i : i + 1, :, :rank], A=A[i : i + 1, :rank])
        )
        top = int(outcome.rank[i])
        assert torch.equal(outcome.B[i, :, :top], alone.B[0])
        assert torch.equal(outcome.A[i, :top], alone.A[0])
        assert float(outcome.error[i]) == pytest.approx(float(alone.error[0]), rel=1e-12)


def test_distance_is_not_measured_where_it_is_not_asked():
    outcome = make_method("prelort", {}).combine(standard().group(measure=False), None, None)
    assert bool(outcome.error.isnan().all())
    assert outcome.energy is None


@pytest.mark.parametrize("levels", BAD)
def test_bad_levels_are_refused(levels):
    with pytest.raises(InputError, match="prelort: levels is"):
        make_method("prelort", {"levels": levels})


def test_what_the_method_says_of_itself():
    method = make_method("prelort", {"levels": [4, 8]})
    assert method.options() == {"levels": (4, 8)}
    assert (method.reads_previous, method.needs_previous, method.gives) == ("pair", False, ("common",))
    assert [method.client_rank(r, 12) for r in (4, 12, 16)] == [4, 12, 12]
