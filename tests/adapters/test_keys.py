"""Every spelling of a PEFT key means the same module; what is ambiguous, alone or unknown is refused by name."""

import pytest
import torch
from adapter_files import config, dense, one, same_updates, state

from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import FormatError, UnsupportedVariantError

PLAIN = (state(), config())


def respelled(change):
    return {change(key): tensor for key, tensor in state().items()}, config()


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k,
        lambda k: k.removeprefix("base_model.model."),
        lambda k: f"model.{k}",
        lambda k: f"module.{k}",
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda k: f"_orig_mod.{k}",
        lambda k: f"_fsdp_wrapped_module.{k}".replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
        lambda k: k.replace(".weight", ".default.weight"),
        lambda k: k.replace(".weight", ".client-7.weight"),
        lambda k: f"module.model.{k}".replace(".weight", ".x.weight"),
    ],
)
def test_every_spelling_means_the_same_modules(change):
    adapter = open_adapter(respelled(change))
    assert list(adapter) == ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"]
    assert same_updates(adapter, open_adapter(PLAIN), 0)


def test_model_is_part_of_a_path_unless_base_model_follows():
    tensors, settings = one("model.layers.0.q")
    assert list(open_adapter((tensors, settings))) == ["model.layers.0.q"]
    bare = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    assert list(open_adapter((bare, settings))) == ["model.layers.0.q"]


def test_two_adapter_names_need_a_choice():
    tensors = state(adapter=".a") | state(adapter=".b", seed=1)
    with pytest.raises(FormatError, match=r"several adapters in one file \(a, b\); choose one with adapter_name="):
        open_adapter((tensors, config()))
    chosen = open_adapter((tensors, config()), ReadOptions(adapter_name="b"))
    assert same_updates(chosen, open_adapter((state(seed=1), config())), 0)
    with pytest.raises(FormatError, match="no adapter 'c'; there are a, b"):
        open_adapter((tensors, config()), ReadOptions(adapter_name="c"))


def test_a_choice_among_keys_without_a_name_is_refused():
    with pytest.raises(
        FormatError, match=r"no adapter 'x'; there is one without a name, as in '.*lora_.\.weight'.*adapter_name="
    ):
        open_adapter(PLAIN, ReadOptions(adapter_name="x"))


def test_two_keys_of_one_meaning_are_ambiguous():
    tensors, settings = one()
    tensors["q.lora_A.weight"] = tensors["base_model.model.q.lora_A.weight"]
    with pytest.raises(FormatError, match=r"'base_model.model.q.lora_A.weight' and 'q.lora_A.weight' are ambiguous"):
        open_adapter((tensors, settings))


@pytest.mark.parametrize("letter", "AB")
def test_a_factor_alone_is_refused_naming_the_module(letter):
    tensors, settings = one("layers.0.q")
    del tensors[f"base_model.model.layers.0.q.lora_{letter}.weight"]
    with pytest.raises(FormatError, match=f"module 'layers.0.q': lora_[AB] without lora_{letter}"):
        open_adapter((tensors, settings))


@pytest.mark.parametrize(
    "key",
    ["q.lora_C.weight", "q.lora_A.bias", "q.lora_A.x.y.weight", "q.lora_A.weight.x", "my_lora_thing.weight"],
)
def test_unknown_lora_tensors_are_refused_by_name_whatever_extras_says(key):
    tensors, settings = one()
    tensors[key] = torch.ones(2, 3)
    for extras in ("strict", "ignore"):
        with pytest.raises(UnsupportedVariantError, match=f"unknown tensor '{key}'"):
            open_adapter((tensors, settings), ReadOptions(extras=extras))


@pytest.mark.parametrize("key", ["lora_A.weight", "a..lora_A.weight", "", ".x.weight", "a\ud800.lora_A.weight"])
def test_malformed_keys_are_refused(key):
    tensors, settings = one()
    tensors[key] = torch.ones(2, 3)
    with pytest.raises(FormatError, match="malformed key"):
        open_adapter((tensors, settings))


def test_the_key_decides_which_factor_is_which_even_where_dimensions_equal_the_rank():
    generator = torch.Generator().manual_seed(3)
    A, B = torch.randn(5, 5, generator=generator), torch.randn(5, 5, generator=generator)
    pair = {"q.lora_B.weight": B, "q.lora_A.weight": A}
    adapter = open_adapter((pair, {"peft_type": "LORA", "r": 5, "lora_alpha": 5}))
    assert torch.equal(dense(adapter)["q"], B.double() @ A.double())


def test_names_with_control_characters_reach_messages_clean():
    tensors = {"a\x1b[31m\nb.lora_A.weight": torch.ones(2, 3)}
    with pytest.raises(FormatError) as caught:
        open_adapter((tensors, {"peft_type": "LORA"}), name="c\r\n3")
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("client 'c??3', module 'a?[31m?b': lora_A without lora_B")
