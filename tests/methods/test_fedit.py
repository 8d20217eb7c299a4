"""FedIT: factor means with the scale on B, and a drift that is exact."""

from dataclasses import replace

import pytest
import torch
from method_problems import Problem, distance, normalised, product, standard

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import MismatchError

EQUAL = (6, 6, 6, 6)


def problem(**fields) -> Problem:
    return standard(m=37, n=29, ranks=EQUAL, scale=(1.0, 4.0, 2.0, 0.5), **fields)


def means(p):
    B = sum(w * s * b.double() for w, s, b in zip(p.weight, p.scale, p.B, strict=True))
    A = sum(w * a.double() for w, a in zip(p.weight, p.A, strict=True))
    return B, A


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_the_weighted_means(dtype):
    p = problem(dtype=dtype)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    outcome = p.run("fedit", dtype=out)
    B, A = means(p)
    limit = 4 * torch.finfo(out).eps
    assert distance(outcome.B[0].double(), B) < limit
    assert distance(outcome.A[0].double(), A) < limit
    assert int(outcome.rank[0]) == 6


def test_weights_of_all_clients_count():
    """Catches an accumulator that keeps client 0 alone."""
    p = problem()
    stacked = torch.stack([b.flatten() for b in p.B], 1)
    got = torch.linalg.lstsq(stacked, p.run("fedit").B[0].flatten()[:, None]).solution[:, 0]
    wanted = torch.tensor([w * s for w, s in zip(p.weight, p.scale, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(got, wanted)


def test_drift_is_the_distance_to_the_sum_of_the_updates():
    p = problem()
    outcome = p.run("fedit")
    assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), p.dense()), rel=1e-10, abs=0.0)
    assert float(outcome.error[0]) > 0.1
    assert float(outcome.error[0]) <= float(outcome.error_bound[0]) < float(outcome.error[0]) * (1 + 1e-5)


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9])
def test_drift_of_nearly_equal_clients_does_not_drown_in_rounding(delta):
    base = standard(m=37, n=29, ranks=(6,), scale=(2.0,))
    noise = problem()
    p = Problem(
        [base.B[0] + delta * b for b in noise.B], [base.A[0] + delta * a for a in noise.A], [2.0] * 4, noise.weight
    )
    B, A = [torch.stack(x) for x in (p.B, p.A)]
    w = torch.tensor(p.weight, dtype=torch.float64)[:, None, None]
    spread = (w * 2.0 * (B - (w * B).sum(0)) @ (A - (w * A).sum(0))).sum(0)
    wanted = float(torch.linalg.norm(spread) / torch.linalg.norm(p.dense()))
    # centring loses |B| u64 against differences of size delta
    assert float(p.run("fedit").error[0]) == pytest.approx(wanted, rel=1e-12 + 64 * 2**-53 / delta, abs=0.0)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_exact_where_one_factor_is_common(frozen):
    p = problem()
    p = replace(p, scale=[2.0] * 4, **{frozen: [getattr(p, frozen)[0]] * 4})
    outcome = p.run("fedit")
    assert distance(product(outcome), p.dense()) < 1e-12
    assert float(outcome.error[0]) < 1e-12


def test_one_client_and_identical_clients_return_that_update():
    one = standard(m=37, n=29, ranks=(6,), scale=(3.0,))
    for copies in (1, 3):
        p = Problem(one.B * copies, one.A * copies, one.scale * copies, normalised([1, 2, 4][:copies]))
        assert distance(product(p.run("fedit")), one.dense()) < 1e-14


def test_a_gauge_change_must_change_the_product():
    p = problem()
    assert distance(product(p.gauged().run("fedit")), product(p.run("fedit"))) > 0.05


def test_unnormalised_weights_are_in_the_drift():
    p = replace(problem(), weight=[0.7, -0.2, 1.1, 0.4])
    outcome = p.run("fedit")
    assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), p.dense()), rel=1e-10, abs=0.0)


def test_scaling_all_updates_scales_the_product():
    p = problem()
    scaled = replace(p, scale=[5.0 * s for s in p.scale])
    assert distance(product(scaled.run("fedit")), 5.0 * product(p.run("fedit"))) < 1e-13


def test_mixed_ranks_are_refused():
    with pytest.raises(MismatchError, match=r"layers\.0\.q_proj.*4, 8, 12.*zero_pad"):
        standard().run("fedit")


def test_a_missing_module_counts_as_zero_factors():
    p = problem()
    absent = replace(
        p,
        B=[*p.B[:3], torch.zeros(37, 0, dtype=torch.float64)],
        A=[*p.A[:3], torch.zeros(0, 29, dtype=torch.float64)],
    )
    zero = replace(p, B=[*p.B[:3], torch.zeros(37, 6).double()], A=[*p.A[:3], torch.zeros(6, 29).double()])
    first, second = absent.run("fedit"), zero.run("fedit")
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)
    assert float(first.error[0]) == pytest.approx(distance(product(first), absent.dense()), rel=1e-10, abs=0.0)


def test_zero_update_has_a_note_and_no_error():
    p = problem()
    outcome = replace(p, B=[torch.zeros_like(b) for b in p.B]).run("fedit")
    assert int(outcome.notes[0]) & Note.ZERO
    assert float(outcome.error[0]) == 0.0
    assert float(outcome.error_bound[0]) == 0.0


def test_trouble_is_reported_in_info():
    p = problem()
    assert int(replace(p, scale=[1e6] * 4).run("fedit", dtype=torch.float16).info[0]) == Info.OVERFLOW
    p.A[1][2, 3] = float("inf")
    assert int(p.run("fedit").info[0]) & Info.NONFINITE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_bound_holds_the_rounding_of_the_answer(dtype, scale):
    base = standard(m=37, n=29, ranks=(6,), scale=(scale,))
    p = Problem(base.B * 3, base.A * 3, base.scale * 3, normalised([1, 2, 4]))
    outcome = p.run("fedit", dtype=dtype)
    assert float(outcome.error[0]) < 1e-14
    assert 0.0 < distance(product(outcome), p.dense()) <= float(outcome.error_bound[0])
