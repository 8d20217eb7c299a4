"""FLoRA: the stack, exact."""

from dataclasses import replace

import pytest
import torch
from method_problems import VARIANTS, Problem, distance, product, standard

from fedlora_kernels.backends.contract import Info, Note


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_product_is_the_weighted_sum_and_the_rank_the_sum_of_ranks(variant):
    p = VARIANTS[variant]()
    outcome = p.run("flora")
    assert int(outcome.rank[0]) == sum(b.shape[1] for b in p.B)
    assert distance(product(outcome), p.dense()) < 1e-12


def test_scale_sits_on_B_and_weight_on_A():
    p = standard()
    outcome = p.run("flora")
    assert torch.equal(outcome.B[0], torch.cat([s * b for s, b in zip(p.scale, p.B, strict=True)], 1))
    assert torch.equal(outcome.A[0], torch.cat([w * a for w, a in zip(p.weight, p.A, strict=True)], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 1e-7])
def test_the_rounding_of_the_answer_is_within_the_bound(dtype, scale):
    p = standard(scale=(scale,) * 5)
    outcome = p.run("flora", dtype=dtype)
    assert outcome.B.dtype == dtype
    assert 0.0 < distance(product(outcome), p.dense()) <= float(outcome.error_bound[0])
    if scale == 0.3:
        assert float(outcome.error_bound[0]) < 40 * torch.finfo(dtype).eps


def test_a_gauge_change_leaves_the_product():
    p = standard()
    assert distance(product(p.gauged().run("flora")), product(p.run("flora"))) < 1e-12


def test_zero_update_has_a_note():
    p = standard()
    outcome = replace(p, B=[torch.zeros_like(b) for b in p.B]).run("flora")
    assert int(outcome.notes[0]) & Note.ZERO
    assert float(outcome.error_bound[0]) == 0.0


def test_trouble_is_reported_in_info():
    p = standard(scale=(1e6,) * 5)
    assert int(p.run("flora", dtype=torch.float16).info[0]) == Info.OVERFLOW
    p.B[0][1, 1] = float("nan")
    assert int(p.run("flora").info[0]) & Info.NONFINITE


def test_a_client_without_the_module_adds_no_rank():
    p = standard()
    absent = Problem([*p.B, p.B[0][:, :0]], [*p.A, p.A[0][:0]], [*p.scale, 0.0], [*p.weight, 0.0])
    assert torch.equal(absent.run("flora").B, p.run("flora").B)
