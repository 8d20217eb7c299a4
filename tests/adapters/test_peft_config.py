"""peft_config: what stands in the configuration of an output, and that every module resolves to scale 1."""

import pytest
import torch
from adapter_files import one, state
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.adapters.config import peft_config, rank_patterns
from fedlora_kernels.adapters.model import ExtraSpec, TensorSpec
from fedlora_kernels.adapters.options import WriteOptions
from fedlora_kernels.adapters.patterns import PatternTable
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import InputError

SHAPES = {"l.0.q": (5, 7, 2), "l.0.v": (5, 7, 2), "l.1.q": (5, 7, 2)}


def client(**fields):
    return open_adapter((state(SHAPES), {"peft_type": "LORA", "r": 2, "target_modules": ["q", "v"], **fields}))


def extra(name, rule="absolute"):
    return {name: ExtraSpec(name, rule, TensorSpec(name, (3,), torch.float32))}


def test_only_what_old_peft_knows_unless_needed():
    config = peft_config([client()], dict.fromkeys(SHAPES, 2))
    assert config == {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "r": 2, "lora_alpha": 2, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "target_modules": ["q", "v"], "modules_to_save": None,
        "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip


def test_ranks_that_differ_stand_in_both_patterns_under_full_paths():
    config = peft_config([client()], {"l.0.q": 5, "l.0.v": 1, "l.1.q": 3})
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"l.0.v": 1, "l.1.q": 3}
    padded = peft_config([client()], {"l.0.q": 5, "l.0.v": 1, "l.1.q": 3}, uniform_rank=8)
    assert (padded["r"], padded["lora_alpha"], "rank_pattern" in padded) == (8, 8, False)


def test_common_values_are_kept_and_others_fall_back():
    one_, two = client(lora_dropout=0.1, task_type="CAUSAL_LM"), client(lora_dropout=0.2, task_type="CAUSAL_LM")
    config = peft_config([one_, two], dict.fromkeys(SHAPES, 2))
    assert (config["lora_dropout"], config["task_type"]) == (0.0, "CAUSAL_LM")
    assert peft_config([one_, one_], dict.fromkeys(SHAPES, 2))["lora_dropout"] == 0.1


def test_fields_of_wrong_type_are_not_passed_on():
    odd = client(lora_dropout="0.1", task_type=["x"], base_model_name_or_path={"a": 1})
    config = peft_config([odd], dict.fromkeys(SHAPES, 2))
    assert (config["lora_dropout"], config["task_type"], config["base_model_name_or_path"]) == (0.0, None, None)


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({"target_modules": ["v", "q"]}, list(SHAPES)),
        ({"target_modules": ["v", "q", "k"]}, list(SHAPES)),
        ({"target_modules": "all-linear"}, list(SHAPES)),
        ({"target_modules": r".*\.[qv]"}, list(SHAPES)),
        ({"target_modules": ["q"]}, list(SHAPES)),
        ({"layers_to_transform": [0, 1]}, list(SHAPES)),
        ({"exclude_modules": ["k"]}, list(SHAPES)),
        ({}, ["l.0.q", "l.1.q"]),
    ],
)
def test_target_modules_select_exactly_what_is_written(fields, written):
    found = peft_config([client(**fields)], dict.fromkeys(written, 2))["target_modules"]
    assert [name for name in SHAPES if any(name == t or name.endswith(f".{t}") for t in found)] == sorted(written)
    keeps = fields.get("target_modules") in (["v", "q"], ["v", "q", "k"])
    assert (found == sorted(fields.get("target_modules", []))) == keeps


def test_extras_decide_on_bias_and_modules_to_save():
    adapter = client(bias="all", modules_to_save=["score", "norm"])
    ranks = dict.fromkeys(SHAPES, 2)
    bare = peft_config([adapter], ranks)
    assert (bare["bias"], bare["modules_to_save"]) == ("none", None)
    full = peft_config(
        [adapter], ranks, extra("l.0.q.base_layer.bias") | extra("score.weight") | extra("x.lora_B.bias", "lora_bias")
    )
    assert (full["bias"], full["modules_to_save"], full["lora_bias"]) == ("all", ["score"], True)
    assert peft_config([client(layer_replication=[[0, 2]])], ranks)["layer_replication"] == [[0, 2]]


def test_nothing_to_write_is_an_error():
    with pytest.raises(InputError, match="no modules to write"):
        peft_config([client()], {})


def test_a_path_that_ends_another_path_is_anchored():
    assert rank_patterns({"a.q": 1, "enc.a.q": 2, "b.q": 3}, 3) == {"^a.q": 1, "enc.a.q": 2}
    assert rank_patterns({"a.q": 1, "enc.a.q": 1, "b.q": 3}, 3) == {"a.q": 1, "enc.a.q": 1}


def test_a_dot_that_would_match_another_letter_is_escaped():
    assert rank_patterns({"a.q": 1, "axq": 2}, 2) == {r"^a\.q": 1}


def test_operators_in_a_name_are_escaped():
    assert rank_patterns({"a+b(c)": 1, "x": 2}, 2) == {r"a\+b\(c\)": 1}


names = st.lists(st.from_regex(r"\A[ab+]{1,2}(\.[ab_]){0,3}\Z"), min_size=1, max_size=8, unique=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(names=names, data=st.data())
def test_every_module_resolves_to_its_rank_in_any_order_of_entries(names, data):
    ranks = {name: data.draw(st.integers(1, 3)) for name in names}
    patterns = rank_patterns(ranks, 3)
    for order in (sorted(patterns), sorted(patterns, reverse=True)):
        table = PatternTable({key: patterns[key] for key in order}, "rank_pattern")
        assert {name: table.resolve(name, 3) for name in names} == ranks


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target": "gguf"}, "target is 'gguf'; one of None, peft, kohya, vllm needed"),
        ({"output": "usv"}, "output is 'usv'; one of left, balanced needed"),
        ({"uniform_rank": 8}, "uniform_rank is '8'; one of None, True, False needed"),
        ({"fill": 0}, "fill is '0'; one of zero, random needed"),
        ({"drop_zero": 1}, "drop_zero is '1'; one of True, False needed"),
        ({"target": "vllm", "uniform_rank": False}, "target 'vllm' needs one rank"),
    ],
)
def test_write_options_are_checked_on_creation(fields, text):
    with pytest.raises(InputError, match=text):
        WriteOptions(**fields)


def test_vllm_pads_and_holds_no_extra_tensors():
    assert [WriteOptions().pads, WriteOptions("vllm").pads, WriteOptions(uniform_rank=True).pads] == [False, True, True]
    WriteOptions("vllm").check_extras([])
    WriteOptions().check_extras(["score.weight"])
    with pytest.raises(InputError, match=r"'vllm' holds no extra tensors, but there is 'score.weight'"):
        WriteOptions("vllm").check_extras(["score.weight"])


def test_one_module_of_a_pair_in_memory_round_trips_through_its_configuration():
    adapter = open_adapter(one())
    assert (
        len(
            open_adapter(
                ({k: adapter.source.read(k) for k in adapter.source.tensors}, peft_config([adapter], {"q": 2}))
            )
        )
        == 1
    )
