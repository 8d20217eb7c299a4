"""Variants whose update is not s B A, and kinds not aggregated here, are refused by name."""

import pytest
import torch
from adapter_files import one

from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import FormatError, InputError, UnsupportedVariantError

FIELDS = {
    "use_dora": (True, "DoRA"),
    "kasa_config": ({"beta": 1}, "KaSA"),
    "use_qalora": (True, "QALoRA"),
    "use_bdlora": ({"nblocks": 2}, "BD-LoRA"),
    "alora_invocation_tokens": ([1, 2], "aLoRA"),
    "arrow_config": ({"top_k": 2}, "Arrow"),
    "monteclora_config": ({"n": 2}, "MonteCLoRA"),
    "velora_config": ({"rank": 2}, "VeLoRA"),
}
KEYS = {
    "q.lora_magnitude_vector": "DoRA",
    "q.lora_magnitude_vector.default.weight": "DoRA",
    "q.lora_diag": "KaSA",
    "q.lora_E": "AdaLoRA",
    "q.lora_E.default": "AdaLoRA",
    "q.lora_arrow": "Arrow",
    "q.lora_monteclora_sampler.x": "MonteCLoRA",
    "q.lora_velora_embed": "VeLoRA",
    "lora_unet_q.lora_down.weight": "the kohya format",
    "lora_unet_q.lora_up.weight": "the kohya format",
    "q.lora_mid.weight": "a Tucker decomposition",
    "q.dora_scale": "DoRA",
    "q.hada_w1_a": "LoHa",
    "q.lokr_w1": "LoKr",
    "q.oft_r": "OFT",
    "q.boft_R": "BOFT",
    "q.ia3_l": "IA3",
    "q.vera_lambda_b": "VeRA",
    "attn.base_layer.out_proj.lora_B.weight": "nested base layers",
    "p.lora_A": "AdaLoRA or another form",
    "p.lora_B.default": "AdaLoRA or another form",
}
TYPES = {
    "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "OFT": "OFT", "BOFT": "BOFT", "IA3": "IA3",
    "loha": "LoHa", "HRA": "HRA", "P_TUNING": "P_TUNING",
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_configuration_markers_are_refused_by_name(field):
    value, variant = FIELDS[field]
    with pytest.raises(UnsupportedVariantError) as caught:
        open_adapter(one(**{field: value}), name="c")
    assert str(caught.value).startswith(f"client 'c': adapter uses {variant}")
    assert f"({field})" in str(caught.value)
    if field == "velora_config":
        assert "its tensors are more than B and A, so it cannot be aggregated here. " in str(caught.value)
        return
    assert "its update is not s*B*A, so it cannot be aggregated here. " in str(caught.value)


@pytest.mark.parametrize("field", FIELDS)
def test_markers_that_are_off_do_not_matter(field):
    for off in (None, False, [], {}):
        assert len(open_adapter(one(**{field: off}))) == 1


@pytest.mark.parametrize("key", KEYS)
def test_tensor_markers_are_refused_by_name(key):
    tensors, settings = one()
    tensors[key] = torch.ones(5)
    with pytest.raises(UnsupportedVariantError) as caught:
        open_adapter((tensors, settings), name="c")
    assert str(caught.value).startswith(f"client 'c': adapter uses {KEYS[key]}")
    assert f"({key}" in str(caught.value)


@pytest.mark.parametrize("peft_type", TYPES)
def test_other_peft_types_are_refused_by_name(peft_type):
    with pytest.raises(
        UnsupportedVariantError, match=f"adapter uses {TYPES[peft_type]} \\(peft_type {peft_type}\\)"
    ) as e:
        open_adapter(one(peft_type=peft_type))
    pair = peft_type not in ("P_TUNING", "ADALORA")
    assert ("Convert it to LoRA first" in str(e.value)) == pair
    assert ("adalora='fold'" in str(e.value)) == (peft_type == "ADALORA")


@pytest.mark.parametrize("peft_type", [None, 3, ["LORA"]])
def test_a_configuration_without_a_peft_type_is_no_adapter(peft_type):
    with pytest.raises(FormatError, match=r"peft_type is .*; 'LORA' needed"):
        open_adapter(one(peft_type=peft_type))


@pytest.mark.parametrize(
    ("A", "B"),
    [
        ((2, 7, 3), (6, 1, 1)),
        ((2, 7, 3, 3), (6, 1, 1, 1)),
        ((6, 7, 3, 3, 3), (6, 2, 1, 1, 1)),
    ],
)
def test_grouped_convolutions_are_refused_by_name(A, B):
    tensors = {"conv.lora_A.weight": torch.ones(A), "conv.lora_B.weight": torch.ones(B)}
    with pytest.raises(UnsupportedVariantError, match="module 'conv': adapter uses a grouped convolution"):
        open_adapter((tensors, {"peft_type": "LORA", "r": 2}))


@pytest.mark.parametrize(
    ("A", "B", "needed"),
    [
        ((2, 7, 3), (5, 2), "(r, n) and (m, r) needed"),
        ((2, 7, 3), (5, 2, 3), "(r, c_in, *k) and (m, r, 1, ...) needed"),
        ((2, 7, 3, 0), (5, 2, 1, 1), "(r, n) and (m, r) needed"),
        ((2, 7, 3, 3, 3, 3), (5, 2, 1, 1, 1, 1), "(r, c_in, *k) and (m, r, 1, ...) needed"),
        ((2, 7, 3), (5, 3, 1), "equal needed"),
    ],
)
def test_convolutions_of_other_shapes_are_refused(A, B, needed):
    tensors = {"conv.lora_A.weight": torch.ones(A), "conv.lora_B.weight": torch.ones(B)}
    with pytest.raises(FormatError) as caught:
        open_adapter((tensors, {"peft_type": "LORA", "r": 2}))
    assert needed in str(caught.value)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_initialisations_that_change_the_base_are_refused_with_the_choices_there_are(init):
    with pytest.raises(
        UnsupportedVariantError, match=f"init_lora_weights is '{init}', which changes the base weights"
    ) as e:
        open_adapter(one(init_lora_weights=init))
    assert "init_factors=" in str(e.value)
    assert "init='keep'" in str(e.value)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_read(init):
    assert len(open_adapter(one(init_lora_weights=init))) == 1


@pytest.mark.parametrize("init", ["newest", 3, ["pissa"]])
def test_unknown_initialisations_are_refused(init):
    with pytest.raises(UnsupportedVariantError, match="is not known here"):
        open_adapter(one(init_lora_weights=init))


VELORA = {"num_groups": 2}


def test_drop_state_takes_the_plain_pair_of_velora_and_says_what_it_dropped():
    tensors, settings = one(velora_config=VELORA)
    adapter = open_adapter(
        ({**tensors, "q.lora_velora_embed": torch.ones(5)}, settings), ReadOptions(drop_state=True), name="c"
    )
    plain = open_adapter(one())
    assert list(adapter) == ["q"]
    assert torch.equal(adapter["q"].B, plain["q"].B)
    assert adapter.modules["q"].scale == plain.modules["q"].scale
    assert adapter.warnings == ("client 'c': velora_config: 1 tensors beside the factors were dropped",)
    assert "velora_config" not in adapter.config


def test_drop_state_drops_no_other_variants_tensors():
    tensors, settings = one(velora_config=VELORA)
    with pytest.raises(UnsupportedVariantError, match="adapter uses DoRA"):
        open_adapter(({**tensors, "q.lora_magnitude_vector": torch.ones(5)}, settings), ReadOptions(drop_state=True))
    with pytest.raises(UnsupportedVariantError, match="adapter uses VeLoRA"):  # the configuration does not own it
        open_adapter(({**one()[0], "q.lora_velora_embed": torch.ones(5)}, one()[1]), ReadOptions(drop_state=True))


@pytest.mark.parametrize(("name", "value"), [("adalora", "merge"), ("init", "drop"), ("drop_state", "yes")])
def test_a_choice_that_does_not_exist_is_refused(name, value):
    with pytest.raises(InputError, match=f"ReadOptions: {name} is '{value}'; "):
        ReadOptions(**{name: value})


def test_the_two_choices_for_an_initialisation_exclude_each_other():
    with pytest.raises(InputError, match="exclude each other"):
        ReadOptions(init="keep", init_factors="start")
