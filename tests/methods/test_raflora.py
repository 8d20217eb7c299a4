"""raFLoRA: the SVD of the re-weighted sum, its rank and balance, kept segments, the distance from D."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import VARIANTS, Problem, distance, normalised, product, standard, with_spectrum

import fedlora_kernels as fk
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError, WeightError
from fedlora_kernels.linalg.rules import Energy, Rank
from fedlora_kernels.methods.contract import Previous, make_method

BACKENDS = ("torch", "reference", "auto")


def target(p: Problem, kept=None):
    """D' index by index, and the previous pair's product beyond the clients' ranks."""
    top = max(b.shape[1] for b in p.B)
    total = torch.zeros(p.B[0].shape[0], p.A[0].shape[1]).double()
    for j in range(top):
        have = [k for k, b in enumerate(p.B) if b.shape[1] > j]
        share = sum(p.weight[k] for k in have)
        for k in have:
            total += p.weight[k] / share * p.scale[k] * torch.outer(p.B[k][:, j].double(), p.A[k][j].double())
    if kept is not None:
        total += kept.B[0, :, top:].double() @ kept.A[0, top:].double()
    return total


def truncated(x, rank):
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def left(m, n, rank, seed=7, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    B, A = torch.randn(1, m, rank, generator=made), torch.randn(1, rank, n, generator=made)
    return Previous(round=2, B=B.to(dtype), A=A.to(dtype))


def noise(p: Problem) -> float:
    """What a Gram can hide of a distance, relative to D: the root of 18 u64 of the square of the sum of the terms' norms."""
    terms = sum(
        w * s * float(b.double().norm() * a.double().norm())
        for w, s, b, a in zip(p.weight, p.scale, p.B, p.A, strict=True)
    )
    return (18 * 2**-53) ** 0.5 * terms / float(p.dense().norm())


def check_error(outcome, p, rel=1e-9):
    measured = distance(product(outcome), p.dense())
    assert float(outcome.error[0]) == pytest.approx(measured, rel=rel, abs=1e-13)
    assert measured <= float(outcome.error_bound[0]) * (1 + 1e-12) + 1e-14
    return measured


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_answer_is_the_best_approximation_of_the_re_weighted_sum(variant, backend):
    p = VARIANTS[variant]()
    outcome = p.run("raflora", backend=backend)
    top = max(b.shape[1] for b in p.B)
    assert int(outcome.rank[0]) == min(top, *p.dense().shape)
    assert distance(product(outcome), truncated(target(p), top)) < 1e-11
    check_error(outcome, p)
    assert float(outcome.error_bound[0]) <= float(outcome.error[0]) * (1 + 1e-6) + 2 * noise(p)
    assert float(outcome.energy[0]) == pytest.approx(float(torch.linalg.norm(p.dense()) ** 2), rel=1e-11)
    assert outcome.spectrum is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_singular_values_are_halved_between_the_factors(backend):
    p = standard()
    outcome = p.run("raflora", backend=backend)
    root = torch.linalg.svdvals(target(p))[:12]
    torch.testing.assert_close(outcome.B[0].T @ outcome.B[0], torch.diag(root), rtol=0, atol=1e-11 * float(root[0]))
    torch.testing.assert_close(outcome.A[0] @ outcome.A[0].T, torch.diag(root), rtol=0, atol=1e-11 * float(root[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype):
    p = standard(dtype=dtype)
    outcome = p.run("raflora", dtype=torch.float32)
    assert distance(product(outcome), truncated(target(p), 12)) < 1e-6
    check_error(outcome, p, rel=1e-6)


def test_equal_ranks_have_the_target_of_flexlora():
    """And the same product as FLoRIST cut to the rank, with half of the singular values on either side."""
    p = standard(m=37, n=29, ranks=(6,) * 5)
    outcome, florist = p.run("raflora"), p.run("florist", rule=Rank(6))
    assert distance(product(outcome), product(florist)) < 1e-13
    assert float(outcome.error[0]) == pytest.approx(float(florist.error[0]), rel=1e-13)
    assert float(outcome.energy[0]) == pytest.approx(float(torch.linalg.norm(p.dense()) ** 2), rel=1e-13)
    check_error(outcome, p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_one_client_and_identical_clients_return_that_update(dtype):
    one = standard(m=37, n=29, ranks=(6,), scale=(3.0,))
    for copies in (1, 3):
        p = Problem(one.B * copies, one.A * copies, one.scale * copies, normalised([1, 2, 4][:copies]))
        outcome = p.run("raflora", dtype=dtype)
        eps = torch.finfo(dtype).eps
        measured = distance(product(outcome), one.dense())
        assert measured < 4 * eps
        assert measured <= float(outcome.error_bound[0])
        assert float(outcome.error[0]) < 1e-14


def test_mixed_ranks_differ_from_the_weighted_sum_and_from_prelort():
    p = standard()
    assert distance(target(p), p.dense()) > 0.1
    assert float(p.run("raflora").error[0]) > 0.1
    assert distance(product(p.run("raflora")), product(p.run("prelort"))) > 0.05


def test_a_gauge_change_must_change_the_product():
    p = standard()
    assert distance(product(p.gauged().run("raflora")), product(p.run("raflora"))) > 0.05


def test_a_gauge_change_of_equal_ranks_does_not():
    p = standard(m=37, n=29, ranks=(6,) * 5)
    assert distance(product(p.gauged().run("raflora")), product(p.run("raflora"))) < 1e-12


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 100)), min_size=1, max_size=4),
    st.integers(2, 17),
    st.integers(2, 15),
    st.integers(0, 8),
)
def test_any_ranks_any_sizes_any_previous_pair(clients, m, n, before):
    ranks, counts = zip(*clients, strict=True)
    p = standard(m=m, n=n + 1 if n == m else n, ranks=ranks, counts=counts)
    previous = left(*p.dense().shape, before, dtype=torch.float64) if before else None
    outcome = p.run("raflora", previous=previous)
    wanted = truncated(target(p, previous), max(*ranks, before))
    assert distance(product(outcome), wanted) < 1e-10
    measured = distance(product(outcome), p.dense())
    assert float(outcome.error[0]) == pytest.approx(measured, rel=1e-7, abs=1e-11)
    assert measured <= float(outcome.error_bound[0]) + 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("levels", [None, (12,), (4, 12)])
def test_an_empty_segment_is_the_product_of_the_previous_one(backend, levels):
    p = standard(m=37, n=29, ranks=(4, 4, 8))
    previous = left(37, 29, 12)
    outcome = p.run("raflora", previous=previous, levels=levels, backend=backend)
    assert distance(product(outcome), truncated(target(p, previous), 12)) < 1e-11
    assert int(outcome.rank[0]) == 12
    check_error(outcome, p)
    assert distance(product(outcome), product(p.run("raflora"))) > 0.1


def test_an_empty_segment_without_a_previous_one_adds_nothing():
    p = standard(m=37, n=29, ranks=(4, 4, 8))
    for previous in (None, Previous(round=2), left(37, 29, 8)):
        outcome = p.run("raflora", levels=(16,), previous=previous)
        assert int(outcome.rank[0]) == 16
        assert distance(product(outcome), truncated(target(p), 16)) < 1e-11


def test_finer_levels_change_no_bit():
    p = standard()
    first = p.run("raflora")
    for levels in ((12,), (4, 8, 12), (1, 3, 5)):
        second = p.run("raflora", levels=levels)
        assert torch.equal(first.B, second.B)
        assert torch.equal(first.A, second.A)


def test_weight_zero_is_no_contributor():
    p = replace(standard(m=37, n=29, ranks=(4, 8)), weight=[1.0, 0.0])
    p.B[1][0, 0] = p.A[1][0, 0] = float("nan")  # never read
    outcome = p.run("raflora")
    assert distance(product(outcome), p.updates()[0]) < 1e-12
    assert float(outcome.error[0]) < 1e-12


def test_weight_zero_in_one_module_alone_does_not_enter_it():
    problems = [standard(m=37, n=29, ranks=(4, 8), seed=seed) for seed in (0, 1)]
    problems[1] = replace(problems[1], weight=[1.0, 0.0])
    problems[1].B[1][0, 0] = problems[1].A[1][0, 0] = float("nan")
    outcome = make_method("raflora", {}).combine(batch(problems), None, None)
    assert outcome.info.tolist() == [0, 0]
    for i, problem in enumerate(problems):
        assert distance(outcome.B[i].double() @ outcome.A[i].double(), product(problem.run("raflora"))) < 1e-12
        assert float(outcome.error[i]) == pytest.approx(float(problem.run("raflora").error[0]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("missing", ["zero", "renormalize"])
def test_a_missing_module_counts_as_zero_in_every_segment_or_not_at_all(missing):
    p = standard(m=37, n=29, ranks=(3, 3, 0), counts=(1, 1, 2), scale=(1.0, 3.0, 0.0))
    p = replace(p, weight=p.weight if missing == "zero" else [0.5, 0.5, 0.0])
    outcome = p.run("raflora", levels=(6,))
    assert distance(product(outcome), p.dense()) < 1e-12, "equal ranks: D' = D"
    assert float(outcome.error[0]) < 1e-12


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-8, 1e-13])
def test_a_small_re_weighting_does_not_drown_in_rounding(delta):
    """The last segment weighs delta, so D' - D does, and the tail is zero: a Gram of D - X would know it to 1e-8 only."""
    one = standard(m=37, n=29, ranks=(6,), scale=(2.0,), seed=3)
    B, A = one.B[0].clone(), one.A[0]
    B[:, 4:] *= delta
    p = Problem([B[:, :4], B], [A[:4], A], [2.0, 2.0], [0.5, 0.5])
    outcome = p.run("raflora")
    wanted = float(torch.linalg.norm(B[:, 4:] @ A[4:]) / torch.linalg.norm(p.dense()))
    assert float(outcome.error[0]) == pytest.approx(wanted, rel=1e-6, abs=0.0)
    assert float(outcome.error[0]) <= float(outcome.error_bound[0])
    assert float(outcome.error_bound[0]) < 1.01 * wanted + 2 * noise(p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_update(backend):
    p = standard()
    zero = replace(p, B=[torch.zeros_like(b) for b in p.B])
    outcome = zero.run("raflora", backend=backend)
    assert int(outcome.rank[0]) == 1
    assert int(outcome.notes[0]) & Note.ZERO
    assert not outcome.B.any()
    assert outcome.A[0, 0].tolist() == [1.0] + [0.0] * 39
    assert float(outcome.error[0]) == float(outcome.error_bound[0]) == 0.0
    kept = zero.run("raflora", previous=left(48, 40, 14), backend=backend)
    assert distance(product(kept), left(48, 40, 14).B[0, :, 12:].double() @ left(48, 40, 14).A[0, 12:].double()) < 1e-12
    assert float(kept.error[0]) == float("inf"), "a kept segment where D = 0"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_cancels_where_the_sum_does_not(backend):
    """The weighted sum misses by all of D where the re-weighted one is zero."""
    u, a = standard(m=19, n=17, ranks=(1,)).B[0], standard(m=19, n=17, ranks=(1,)).A[0]
    # D' = (-2/3 + 1/3) u a + u a / 3
    p = Problem([u, torch.cat([u, u / 3], 1)], [-a, torch.cat([a, a])], [1.0, 1.0], [2 / 3, 1 / 3])
    assert distance(target(p), p.dense()) > 0.99
    assert float(target(p).norm()) < 1e-14
    outcome = p.run("raflora", backend=backend)
    assert int(outcome.notes[0]) & Note.ZERO
    assert float(outcome.error[0]) == pytest.approx(1.0, rel=1e-12)


def test_nobody_present():
    p = standard(m=37, n=29, ranks=(0, 0), counts=(1, 1), scale=(0.0, 0.0))
    for levels in (None, (4,)):
        outcome = p.run("raflora", levels=levels)
        assert int(outcome.rank[0]) == 1
        assert int(outcome.notes[0]) & Note.ZERO
    kept = p.run("raflora", previous=left(37, 29, 3))
    assert distance(product(kept), left(37, 29, 3).B[0].double() @ left(37, 29, 3).A[0].double()) < 1e-12
    assert float(kept.error[0]) == float("inf")


def test_scaling_all_updates_scales_the_product():
    p = standard()
    scaled = replace(p, scale=[5.0 * s for s in p.scale])
    assert distance(product(scaled.run("raflora")), 5.0 * product(p.run("raflora"))) < 1e-12


@settings(derandomize=True, deadline=None, max_examples=10)
@given(st.permutations(range(5)))
def test_the_order_of_clients_does_not_matter(order):
    p = standard(m=11, n=13)
    assert distance(product(p.run("raflora")), product(p.permuted(order).run("raflora"))) < 1e-11


def test_splitting_a_client_changes_nothing():
    p = standard()
    w = p.weight
    split = Problem([*p.B, p.B[4]], [*p.A, p.A[4]], [*p.scale, p.scale[4]], [*w[:4], w[4] / 2, w[4] / 2])
    assert distance(product(split.run("raflora")), product(p.run("raflora"))) < 1e-12


def test_unnormalised_weights():
    p = replace(standard(), weight=[0.5, 2.0, 1.0, 0.25, 3.0])
    outcome = p.run("raflora")
    assert distance(product(outcome), truncated(6.75 * target(p), 12)) < 1e-11
    check_error(outcome, p)
    with pytest.raises(WeightError, match=r"'layers\.0\.q_proj'.*has weight -0\.2.*'raflora'"):
        replace(p, weight=[0.5, -0.2, 1.0, 0.25, 3.0]).run("raflora")


def test_negative_weights_of_equal_ranks_are_exact():
    p = replace(standard(m=37, n=29, ranks=(3, 3)), weight=[1.5, -0.5])
    assert distance(product(p.run("raflora", levels=(6,))), p.dense()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_holds_the_rounding_of_the_answer(dtype):
    p = standard(m=37, n=29, ranks=(3, 5))
    for q in (p, replace(p, scale=[1e-5, 1e-5])):
        outcome = q.run("raflora", dtype=dtype)
        assert 0.0 < distance(product(outcome), q.dense()) <= float(outcome.error_bound[0])


def test_trouble_is_reported_in_info_and_harms_no_neighbour():
    problems = [standard(m=37, n=29), standard(m=37, n=29, seed=3)]
    group = batch(problems)
    group.B[1][0, 2, 3] = float("inf")
    outcome = make_method("raflora", {}).combine(group, None, None)
    assert int(outcome.info[0]) & Info.NONFINITE
    assert int(outcome.info[1]) == 0
    alone = problems[1].run("raflora")
    p = int(alone.rank[0])
    assert distance(outcome.B[1, :, :p] @ outcome.A[1, :p], product(alone)) < 1e-12


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


def test_modules_do_not_feel_their_neighbours():
    """Previous pairs of several ranks, padded to the widest, and weights that differ from module to module."""
    problems = [standard(m=31, n=23, ranks=(3, 5), seed=seed) for seed in range(4)]
    problems[2] = replace(problems[2], weight=[1.0, 0.0])
    group = batch(problems)
    B, A = (x.repeat(4, 1, 1) for x in (left(31, 23, 9).B.double(), left(31, 23, 9).A.double()))
    ranks = (9, 7, 7, 2)
    for i, rank in enumerate(ranks):
        B[i, :, rank:], A[i, rank:] = 0, 0
    outcome = make_method("raflora", {}).combine(group, None, Previous(round=0, B=B, A=A))
    assert outcome.rank.tolist() == [9, 7, 7, 5]
    for i, rank in enumerate(ranks):
        before = Previous(round=0, B=B[i : i + 1, :, :rank], A=A[i : i + 1, :rank])
        alone = make_method("raflora", {}).combine(group.part(i, i + 1), None, before)
        top = int(alone.rank[0])
        found = outcome.B[i, :, :top] @ outcome.A[i, :top]
        assert distance(found, product(alone)) < 1e-12
        assert float(outcome.error[i]) == pytest.approx(float(alone.error[0]), rel=1e-9)


@pytest.mark.parametrize("ranks", [(3, 5), (5, 5)])
def test_distance_is_not_measured_where_it_costs_and_is_not_asked(ranks):
    group = standard(m=31, n=23, ranks=ranks).group(measure=False)
    outcome = make_method("raflora", {}).combine(group, None, None)
    assert bool(outcome.error.isnan().all()) == (ranks == (3, 5))


def test_a_pair_below_the_rank_of_the_clients():
    """The numerical rank of D' is the rank of the pair."""
    p = with_spectrum([4.0, 1.0])
    p = Problem([torch.cat([p.B[0]] * 3, 1)], [torch.cat([p.A[0]] * 3)], [1.0], [1.0])
    outcome = p.run("raflora")
    assert int(outcome.rank[0]) == 2
    assert distance(product(outcome), p.dense()) < 1e-13


@pytest.mark.parametrize("levels", [(), (8, 4), (0, 4)])
def test_bad_levels_and_rules_are_refused(levels):
    with pytest.raises(InputError, match="raflora: levels is"):
        make_method("raflora", {"levels": levels})
    with pytest.raises(InputError, match="rule"):
        make_method("raflora", {}, Energy(0.9))


def test_what_the_method_says_of_itself():
    method = make_method("raflora", {"levels": [4, 8]})
    assert method.options() == {"levels": (4, 8)}
    assert (method.reads_previous, method.needs_previous, method.gives) == ("pair", False, ("common",))
    assert [method.client_rank(r, 12) for r in (4, 12, 16)] == [4, 12, 16]
    assert method.broadcast_rank([4, 8, 0, 16], 12, 0) == 8


def test_a_client_beyond_the_rank_of_the_sum_is_filled_up():
    """Zero rows would leave it nothing to train, fewer would not fit its model."""
    A = torch.randn(4, 17, generator=torch.Generator().manual_seed(1))
    A[2:] = 0.0
    B = torch.randn(24, 4, generator=torch.Generator().manual_seed(2))
    path = "base_model.model.layers.0.q_proj"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    client = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}, config
    result = fk.aggregate([client, client], "raflora")
    common, sent = (source["layers.0.q_proj"] for source in (result.adapter, result.for_client(0)))
    assert (common.A.shape[0], sent.A.shape[0]) == (2, 4)
    assert torch.equal(sent.B[:, 2:], torch.zeros(24, 2))
    assert sent.A.any(1).all()
    assert distance(sent.B @ sent.A, B.double() @ A.double()) < 1e-6
