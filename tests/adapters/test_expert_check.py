"""Clients whose experts do not fit each other are refused, each with one line that says why, whatever may be missing."""

import pytest
import torch
from expert_problems import PREFIX, TARGETS, client, clients, config, nested, state

from fedlora_kernels.adapters.expert_check import expert_misfits, swapped
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.adapters.validation import validate_clients

MISSING = pytest.mark.parametrize("missing", ["error", "zero", "renormalize"])
SQUARE = {"gate_up_proj": (9, 9), "down_proj": (11, 6)}
BEFORE = "PEFT before 0.19 swaps the two sides of an expert, "


def opened(*pairs):
    return {f"c{k}": open_adapter(pair) for k, pair in enumerate(pairs)}


def texts(adapters, missing="error"):
    return [str(failure) for failure in validate_clients(adapters, missing=missing).failures]


def layers(experts=5, block="block_sparse_moe"):
    """A client with a layer for each expert."""
    names = [
        f"model.layers.{layer}.{block}.experts.{e}.{name}"
        for layer in range(2)
        for e in range(experts)
        for name in ("w1", "w2", "w3")
    ]
    tensors = {}
    for name in [*names, "model.layers.0.self_attn.q_proj"]:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.ones(3, 8)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.ones(13, 3)
    return tensors, {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["w1", "w2", "w3", "q_proj"]}


@MISSING
def test_clients_that_fit_have_no_failures(missing):
    assert texts(opened(*clients()), missing) == []


@MISSING
def test_another_number_of_experts_is_said_once_for_each_module(missing):
    found = texts(opened(client(0), client(1), client(2, experts=4)), missing)
    assert found == [
        f"client 'c2', module '{target}': 2 parameters of 4 experts but 2 parameters of 5 experts in client 'c0'; the same "
        "parameters with the same number of experts needed. The number is the rows of lora_A over the configured rank"
        for target in TARGETS
    ]


@MISSING
def test_one_expert_beside_many_is_refused(missing):
    found = texts(opened(client(0), client(1), client(2, experts=1)), missing)
    assert len(found) == 2
    assert "2 parameters of 1 expert but 2 parameters of 5 experts" in found[0]


@MISSING
def test_a_parameter_less_in_one_module_is_refused(missing):
    outer = state(1, parameters={"down_proj": (11, 6)}, plain={}, targets=TARGETS[:1])
    both = state(1, targets=TARGETS[1:])
    found = texts(opened(client(0), ({**outer, **both}, config()), client(2)), missing)
    assert len(found) == 1
    assert (
        "client 'c1', module 'model.layers.0.mlp.experts': 1 parameter of 5 experts but 2 parameters of 5" in found[0]
    )


@MISSING
def test_other_target_parameters_are_refused(missing):
    other = state(1), config(targets=["experts.gate_up_proj", "mlp.experts.down_proj"])
    found = texts(opened(client(0), other, client(2)), missing)
    assert len(found) == 1
    assert found[0].startswith("client 'c1', configuration: target_parameters is ")


def test_the_order_of_target_parameters_does_not_matter():
    other = state(1), config(targets=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.experts.down_proj"])
    assert texts(opened(client(0), other)) == []


def test_other_shapes_are_said_once_for_each_parameter():
    wide = {"gate_up_proj": (14, 10), "down_proj": (11, 6)}
    found = texts(opened(client(0), client(1), client(2, parameters=wide)))
    assert found == [
        f"client 'c2', module '{nested(target, 1)}[0]': expert 14 x 10, 5 of them but expert 14 x 9, 5 of them in client 'c0'; "
        "equal shapes needed"
        for target in TARGETS
    ]


@MISSING
def test_both_sides_of_the_change_of_layout_are_refused_even_where_shapes_agree(missing):
    found = texts(opened(client(0), client(1, peft_version="0.18.1"), client(2, peft_version="0.19.0")), missing)
    assert found == [
        f"client 'c1', configuration: peft_version is '0.18.1' but '0.21.2' in client 'c0'; {BEFORE}so one layout needed. Train "
        "and save all clients with one version"
    ]


def test_swapped_shapes_say_the_version_and_nothing_else():
    turned = {name: (n, m) for name, (m, n) in {"gate_up_proj": (14, 9), "down_proj": (11, 6)}.items()}
    found = texts(opened(client(0), client(1), client(2, parameters=turned, peft_version="0.17.1")))
    assert len(found) == 1
    assert BEFORE in found[0]


@MISSING
def test_a_version_that_is_missing_is_refused_where_an_expert_is_square(missing):
    found = texts(opened(client(0, parameters=SQUARE), client(1, parameters=SQUARE, peft_version=None)), missing)
    assert found == [
        f"client 'c1', configuration: peft_version is 'None' but '0.21.2' in client 'c0'; {BEFORE}which the shape of module "
        f"'{nested(TARGETS[0], 1)}[0]' does not show; a release needed. Write the one that saved it into the configuration"
    ]


def test_a_build_between_releases_counts_as_missing():
    found = texts(opened(client(0, parameters=SQUARE), client(1, parameters=SQUARE, peft_version="0.18.2.dev0@abc")))
    assert len(found) == 1
    assert "'0.18.2.dev0@abc'" in found[0]


@pytest.mark.parametrize("versions", [(None, None), (None, "0.21.2"), ("0.17.0", "0.18.1"), ("0.19.0", "0.30")])
def test_versions_that_shapes_or_sides_agree_on_are_taken(versions):
    assert texts(opened(*(client(k, peft_version=version) for k, version in enumerate(versions)))) == []


@pytest.mark.parametrize(
    ("version", "side"),
    [
        ("0.17.0", True), ("0.18.1", True), ("0.18.1.post1", True), ("0.19.0", False), ("1.0", False), ("0.100.1", False),
        ("0.18.2.dev0", None), ("0.19.0rc1", None), (None, None), (18, None), ("", None), ("0", None), ("9" * 5 + ".1", None),
    ],
)  # fmt: skip
def test_sides_of_versions(version, side):
    assert swapped(version) is side


@MISSING
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_a_layer_for_each_expert_does_not_mix_with_fused_ones(missing, block):
    found = texts(opened(client(0), client(1), layers(block=block)), missing)
    assert [text for text in found if "configuration" not in text] == [
        f"client 'c2', module 'model.layers.0.{block}.experts.0.w1': a layer for each expert, but one tensor for all in client 'c0' "
        "('model.layers.0.mlp.experts'); one form needed. Load the layers into the fused model with PEFT and save them again"
    ]


def test_a_fused_client_among_layers_is_the_one_that_is_named():
    found = texts(opened(layers(), layers(), client(2)))
    assert [text for text in found if "configuration" not in text] == [
        "client 'c2', module 'model.layers.0.mlp.experts': one tensor for all experts, but a layer for each in client 'c0' "
        "('model.layers.0.block_sparse_moe.experts.0.w1'); one form needed. Load the layers into the fused model with PEFT and save "
        "them again"
    ]


def test_layers_in_all_clients_are_plain_pairs():
    assert texts(opened(layers(), layers())) == []


def test_both_forms_in_every_client_are_a_model_of_both():
    extra = {key: value for key, value in layers(block="shared")[0].items() if ".experts." in key}
    pair = {**state(), **extra}, config()
    assert expert_misfits(opened(pair, pair)) == []
    assert texts(opened(pair, pair)) == []
