"""One place computes the scale: alpha / r with every feature that changes alpha or r."""

import math

import pytest
import torch
from adapter_files import config, dense, one, state

from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import FormatError


def scales(**fields):
    return {name: spec.scale for name, spec in open_adapter((state(), config(**fields))).modules.items()}


def test_alpha_over_the_modules_own_rank():
    assert scales() == {"layers.0.q_proj": 2.0, "layers.0.v_proj": 3.0, "layers.1.q_proj": 2.0}


def test_rslora_divides_by_the_root_of_the_modules_own_rank():
    assert scales(use_rslora=True) == pytest.approx(
        {"layers.0.q_proj": 6 / math.sqrt(3), "layers.0.v_proj": 6 / math.sqrt(2), "layers.1.q_proj": 6 / math.sqrt(3)}
    )


def test_alpha_pattern_and_rank_pattern_are_looked_up_independently():
    found = scales(alpha_pattern={"layers.1.q_proj": 9, "v_proj": 5.0})
    assert found == {"layers.0.q_proj": 2.0, "layers.0.v_proj": 2.5, "layers.1.q_proj": 3.0}


def test_overlapping_patterns_with_different_values_warn_naming_both():
    adapter = open_adapter((state(), config(alpha_pattern={"q_proj": 16, "layers.1.q_proj": 64})))
    assert adapter.modules["layers.1.q_proj"].scale == 16 / 3
    (text,) = adapter.warnings
    assert "alpha_pattern: 'q_proj' and 'layers.1.q_proj' both match module 'layers.1.q_proj'" in text


def test_a_pattern_that_hits_nothing_is_a_note():
    adapter = open_adapter((state(), config(alpha_pattern={"base_model.model.layers.0.q_proj": 64})))
    assert adapter.modules["layers.0.q_proj"].scale == 2.0
    assert adapter.warnings == ()
    assert "alpha_pattern: 'base_model.model.layers.0.q_proj' matches no module" in adapter.notes[0]


def test_config_rank_against_tensor_rank():
    source = (state(), config(rank_pattern={}))
    needed = "module 'layers.0.v_proj': the configuration says rank 3, the tensors have 2; equal ranks needed"
    with pytest.raises(FormatError, match=needed):
        open_adapter(source)
    adapter = open_adapter(source, ReadOptions(rank_from="tensor"))
    assert adapter.modules["layers.0.v_proj"].scale == 3.0
    assert "the configuration says rank 3, the tensors have 2; the tensors' rank is used" in adapter.warnings[0]


def test_alpha_zero_is_legal_and_warns():
    adapter = open_adapter(one(lora_alpha=0))
    assert dense(adapter)["q"].abs().max() == 0
    assert "lora_alpha is 0, so the update is zero" in adapter.warnings[0]


def test_a_client_warns_once_however_many_modules_it_has():
    tensors = {**state(), "base_model.model.norm.bias": torch.ones(3), "base_model.model.norm.scale": torch.ones(3)}
    fields = {"rank_pattern": {}, "r": 5, "lora_alpha": 0}
    adapter = open_adapter((tensors, config(**fields)), ReadOptions(rank_from="tensor", extras="ignore"), name="c")
    assert adapter.warnings == (
        "client 'c', module 'layers.0.q_proj' and 1 more: the configuration says rank 5, the tensors have 3; "
        "the tensors' rank is used",
        "client 'c', module 'layers.0.q_proj' and 2 more: lora_alpha is 0, so the update is zero",
        "client 'c', module 'layers.0.v_proj': the configuration says rank 5, the tensors have 2; the tensors' rank is used",
        "client 'c', tensor 'base_model.model.norm.bias' and 1 more: not understood, dropped",
    )


def test_fields_left_out_take_pefts_defaults():
    tensors = state({"q": (5, 7, 8)})
    assert open_adapter((tensors, {"peft_type": "LORA"})).modules["q"].scale == 1.0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "r is 0; an integer of at least 1"),
        ({"r": "8"}, "r is 8; an integer"),
        ({"r": True}, "r is True; an integer"),
        ({"r": None}, "r is None; an integer"),
        ({"lora_alpha": "8"}, "lora_alpha is 8; a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*; a finite number"),
        ({"lora_alpha": None}, "lora_alpha is None; a finite number"),
        ({"use_rslora": "yes"}, "use_rslora is yes; true or false"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1; true or false"),
        ({"bias": "some"}, "bias is 'some'; 'none', 'all' or 'lora_only'"),
        ({"bias": ["all"]}, "bias is .*; 'none', 'all' or 'lora_only'"),
        ({"modules_to_save": "score"}, "modules_to_save is score; a list of names"),
        ({"modules_to_save": [1]}, "modules_to_save is .*; a list of names"),
        ({"rank_pattern": ["q"]}, "rank_pattern is .*; a mapping"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0; an integer"),
        ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\] is x; a finite number"),
    ],
)
def test_fields_of_wrong_type_or_range_are_refused(fields, text):
    with pytest.raises(FormatError, match=text):
        open_adapter(one(**fields))


@pytest.mark.parametrize(
    ("A", "B", "text"),
    [
        ((4, 7), (5, 8), r"lora_A \(4, 7\) has 4 rows, lora_B \(5, 8\) has 8 columns"),
        ((0, 7), (5, 0), "Sharded export"),
        ((2, 0), (5, 2), "Sharded export"),
        ((14,), (10,), "Sharded export"),
    ],
)
def test_shapes_that_are_no_pair_are_refused(A, B, text):
    tensors = {"q.lora_A.weight": torch.ones(A), "q.lora_B.weight": torch.ones(B)}
    with pytest.raises(FormatError, match=f"module 'q'.*{text}"):
        open_adapter((tensors, {"peft_type": "LORA", "r": 4}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_dtypes_that_are_no_floats_are_refused_naming_tensor_and_dtype(dtype):
    tensors, settings = one()
    key = "base_model.model.q.lora_B.weight"
    tensors[key] = torch.zeros(tensors[key].shape, dtype=dtype)
    with pytest.raises(FormatError, match=f"tensor '{key}' is {str(dtype)[6:]}; float64, float32, float16 or bfloat16"):
        open_adapter((tensors, settings))


@pytest.mark.parametrize("shape", [(1, 7, 1), (5, 1, 1), (1, 1, 1), (5, 7, 5)])
def test_thin_layers_are_accepted(shape):
    m, n, r = shape
    assert dense(open_adapter(one("q", m, n, r)))["q"].shape == (m, n)
