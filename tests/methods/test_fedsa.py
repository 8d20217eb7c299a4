"""FedSA-LoRA: the mean of A for everybody, each with its own B."""

from dataclasses import replace

import pytest
import torch
from common_problems import EQUAL, OUTPUTS, SCALE, batched, without
from method_problems import Problem, distance, normalised, standard

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import MismatchError
from fedlora_kernels.methods import factors
from fedlora_kernels.methods.contract import make_method


def problem(**fields) -> Problem:
    return standard(m=37, n=29, ranks=EQUAL, scale=SCALE, **fields)


def mean(p: Problem) -> torch.Tensor:
    return sum(w * a.double() for w, a in zip(p.weight, p.A, strict=True))


def pair_products(outcome, i=0) -> list:
    return [pair.B[i].double() @ pair.A[i].double() for pair in outcome.personal]


def test_each_client_gets_its_own_B_and_the_mean_A():
    p = problem()
    outcome = p.run("fedsa")
    for k, pair in enumerate(outcome.personal):
        assert torch.equal(pair.B[0], p.scale[k] * p.B[k])
        assert distance(pair.A[0], mean(p)) < 1e-15
        assert pair.rank.tolist() == [6]
        assert distance(pair.B[0] @ pair.A[0], p.scale[k] * p.B[k] @ mean(p)) < 1e-14


def test_there_is_no_common_pair_and_no_error():
    outcome = problem().run("fedsa")
    assert outcome.B is None
    assert outcome.A is None
    assert outcome.rank is None
    assert outcome.residual is None
    assert bool(outcome.error.isnan().all())
    assert bool(outcome.error_bound.isnan().all())
    assert outcome.info.tolist() == outcome.notes.tolist() == [0]


def test_weights_of_all_clients_count_and_scales_do_not_reach_A():
    """Catches an accumulator that keeps client 0 alone, unweighted means, and the scale folded into A."""
    p = problem()
    stacked = torch.stack([a.flatten() for a in p.A], 1)
    got = torch.linalg.lstsq(stacked, p.run("fedsa").personal[0].A[0].flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(got, torch.tensor(p.weight).double())


def test_unnormalised_weights_are_used_as_they_are():
    p = replace(problem(), weight=[0.7, -0.2, 1.1, 0.4, 0.0])
    for k, pair in enumerate(p.run("fedsa").personal):
        assert distance(pair.A[0], mean(p)) < 1e-14
        assert torch.equal(pair.B[0], p.scale[k] * p.B[k])


def test_common_A_gives_every_client_its_own_update():
    p = problem()
    p = replace(p, A=[p.A[0]] * 5)
    for got, wanted in zip(pair_products(p.run("fedsa")), p.updates(), strict=True):
        assert distance(got, wanted) < 1e-14


def test_one_client_and_identical_clients_return_that_update():
    one = standard(m=37, n=29, ranks=(7,), scale=(3.0,))
    for copies in (1, 4):
        p = Problem(one.B * copies, one.A * copies, one.scale * copies, normalised([1, 2, 4, 5][:copies]))
        for got in pair_products(p.run("fedsa")):
            assert distance(got, one.dense()) < 1e-14


def test_the_mean_of_the_personal_updates_is_fedit():
    p = problem()
    outcome = p.run("fedsa")
    fedit = p.run("fedit")
    whole = sum(w * d for w, d in zip(p.weight, pair_products(outcome), strict=True))
    assert distance(whole, fedit.B[0] @ fedit.A[0]) < 1e-14


def test_order_moves_pairs_with_their_clients():
    p = problem()
    order = [3, 0, 4, 1, 2]
    straight, moved = pair_products(p.run("fedsa")), pair_products(p.permuted(order).run("fedsa"))
    for place, k in enumerate(order):
        assert distance(moved[place], straight[k]) < 1e-14


def test_splitting_a_client_changes_nothing():
    p = problem()
    order = [0, 1, 1, 2, 3, 4]
    split = replace(p.permuted(order), weight=[p.weight[k] / (2 if k == 1 else 1) for k in order])
    straight, halves = pair_products(p.run("fedsa")), pair_products(split.run("fedsa"))
    for place, k in enumerate(order):
        assert distance(halves[place], straight[k]) < 1e-14


def test_scaling_every_update_scales_every_pair():
    p = problem()
    scaled = replace(p, scale=[7.0 * s for s in p.scale])
    for got, base in zip(pair_products(scaled.run("fedsa")), pair_products(p.run("fedsa")), strict=True):
        assert distance(got, 7.0 * base) < 1e-14


def test_a_gauge_change_must_change_the_pairs():
    p = problem()
    moved = pair_products(p.gauged().run("fedsa"))
    assert distance(moved[1], pair_products(p.run("fedsa"))[1]) > 0.05


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("stored", OUTPUTS)
def test_every_dtype_in_and_out(stored, dtype):
    p = problem(dtype=stored)
    outcome = p.run("fedsa", dtype=dtype)
    limit = torch.finfo(dtype).eps
    for k, pair in enumerate(outcome.personal):
        assert pair.B.dtype == pair.A.dtype == dtype
        assert torch.equal(pair.B[0], (p.scale[k] * p.B[k].double()).to(dtype))
        assert distance(pair.A[0].double(), mean(p)) < limit
    assert int(outcome.info[0]) == 0


def test_mixed_ranks_are_refused():
    with pytest.raises(MismatchError, match=r"layers\.0\.q_proj.*4, 8, 12"):
        standard().run("fedsa")


def test_a_client_without_the_module_gets_no_pair():
    p = problem()
    for weight in ([0.0, 0.2, 0.1, 0.3, 0.4], p.weight):  # renormalised over the owners, or kept for a zero factor
        absent = without(p, 0, weight)
        outcome = absent.run("fedsa")
        assert outcome.personal[0] is None
        wanted = sum(w * a for w, a in zip(weight[1:], p.A[1:], strict=True))
        assert distance(outcome.personal[1].A[0], wanted) < 1e-14


def test_what_has_weight_zero_does_not_reach_the_others():
    p = problem()
    p.A[0][:] = float("nan")
    p = replace(p, weight=[0.0, 0.25, 0.25, 0.25, 0.25])
    outcome = p.run("fedsa")
    assert int(outcome.info[0]) == 0
    assert distance(outcome.personal[1].A[0], 0.25 * sum(p.A[1:])) < 1e-14


def test_zero_pairs_have_a_note():
    p = problem()
    assert int(replace(p, B=[torch.zeros_like(b) for b in p.B]).run("fedsa").notes[0]) == Note.ZERO
    assert int(replace(p, A=[torch.zeros_like(a) for a in p.A]).run("fedsa").notes[0]) == Note.ZERO
    assert int(replace(p, B=[torch.zeros_like(p.B[0]), *p.B[1:]]).run("fedsa").notes[0]) == 0


@pytest.mark.parametrize("factor", ["A", "B"])
def test_overflow_of_any_client_is_flagged(factor):
    p = problem()
    wide = replace(p, **{factor: [*getattr(p, factor)[:4], 1e6 * getattr(p, factor)[4]]})
    assert int(wide.run("fedsa", dtype=torch.float16).info[0]) == Info.OVERFLOW
    assert int(wide.run("fedsa", dtype=torch.float32).info[0]) == 0


@pytest.mark.parametrize("factor", ["A", "B"])
def test_bad_numbers_are_flagged_for_their_module_alone(factor):
    group = batched([problem(seed=seed) for seed in range(3)])
    clean = make_method("fedsa", {}).combine(group, None, None)
    getattr(group, factor)[3][1, 2, 1] = float("nan")
    outcome = make_method("fedsa", {}).combine(group, None, None)
    assert outcome.info.tolist() == [0, Info.NONFINITE, 0]
    for got, wanted in zip(outcome.personal, clean.personal, strict=True):
        assert torch.equal(got.B[::2], wanted.B[::2])
        assert torch.equal(got.A[::2], wanted.A[::2])


def test_work_in_pieces_is_bitwise_the_same(monkeypatch):
    problems = [without(problem(seed=seed), 2, [0.25, 0.25, 0.0, 0.25, 0.25]) for seed in range(4)]
    whole = make_method("fedsa", {}).combine(batched(problems), None, None)
    monkeypatch.setattr(factors, "CHUNK", 1)
    part = make_method("fedsa", {}).combine(batched(problems), None, None)
    assert part.personal[2] is None
    for k in (0, 1, 3, 4):
        for got, wanted in zip(part.personal[k], whole.personal[k], strict=True):
            assert torch.equal(got, wanted)
    assert part.rank is None


def test_what_it_declares():
    method = make_method("fedsa", {})
    assert method.gives == ("personal",)
    assert method.own_extras
    assert method.equal_ranks
    assert method.frozen_factor(0) is None
    assert method.broadcast_rank((6, 6), 6, 0) == 3.0
