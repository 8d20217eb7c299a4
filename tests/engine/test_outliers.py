"""Whose norm stands out: one rule, in inspections and in every run."""

import math

import numpy as np
import pytest
from adapter_problems import client

import fedlora_kernels as fk
from fedlora_kernels.engine.outliers import outlier_scores, outliers
from fedlora_kernels.inspection import inspect_adapters


def test_scores_of_norms_are_modified_z_scores():
    norms = [1.0, 1.1, 0.9, 1.05, 7.0, 0.0, None, math.inf]
    logs = sorted(math.log(norm) for norm in norms[:5])
    spread = 1.4826 * sorted(abs(value - logs[2]) for value in logs)[2]
    expected = [(math.log(norm) - logs[2]) / spread for norm in norms[:5]]
    scores = outlier_scores(norms)
    assert scores[:5] == pytest.approx(expected)
    assert scores[5:] == [None] * 3
    assert scores[4] > 3.5
    assert outlier_scores([1.0, 1.0, 1.0, 9.0]) == [None] * 4
    assert outlier_scores([1.0, 2.0, 4.0]) == [None] * 3
    assert outlier_scores([]) == []


def test_an_outlier_is_beyond_the_spread_and_a_factor_of_two_and_one_of_four():
    assert outliers([1.0, 1.1, 0.9, 1.05, 7.0]) == {4: "the norm of its update is 6.67 times the median of all"}
    assert outliers([1.0, 1.0, 1.0, 1.9, 0.0]) == {}
    assert list(outliers([1.0, 1.0, 1.0, 2.1, None])) == [3]
    assert list(outliers([1.0, 1.0, 1.0, 0.4])) == [3]
    assert outliers([1.0, 2.0, 4.0, 8.0]) == {}
    assert outliers([1.0, 1.0, 9.0]) == outliers([]) == {}


def test_ratios_beyond_float64_are_told_too():
    with np.errstate(all="raise"):
        assert outliers([1e-160, 1e-160, 1e-160, 1e150])[3].split(" is ")[1].startswith("1e+310 times")
        assert outliers([1e150, 1e150, 1e150, 1e-160])[3].split(" is ")[1].startswith("1e-310 times")


@pytest.mark.parametrize("count", [3, 4])
def test_inspections_and_runs_say_the_same(tmp_path, count):
    """Of three nobody stands out."""
    paths = []
    for k in range(count):
        state, settings = client(1)
        loud = 9.0 if k == 1 else 1.0 + 0.01 * k
        pair = {key: value * (loud if ".lora_B." in key else 1.0) for key, value in state.items()}, settings
        fk.open_adapter(pair).save(tmp_path / f"c{k}")
        paths.append(str(tmp_path / f"c{k}"))
    said = [[text for text in inspect_adapters(paths)["findings"] if "the norm of its update is" in text]]
    for options in ({}, {"policy": "drop"}, {"compare": True}):
        notes = fk.aggregate(paths, "florist", **options).report["notes"]
        said.append([text.removeprefix("client ") for text in notes if "the norm of its update is" in text])
    assert all(texts == said[0] for texts in said)
    assert [text[:4] for text in said[0]] == (["'c1'"] if count == 4 else [])
