"""PEFT judges the whole engine: one client with weight 1 and nothing cut off is the same model before and after."""

import json

import pytest
import torch
from kind_problems import distance, updates
from peft_models import CASES, loaded, same_logits, saved, trained
from safetensors.torch import load_file, save_file

from fedlora_kernels import Energy, WriteOptions, aggregate

WHOLE = Energy(1.0)
RICH = "both and rslora"
"""The case with every kind of layer, ranks and alphas of their own, and rsLoRA."""


def stored(folder):
    """Tensors and configuration of a folder that PEFT has written."""
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_one_client_is_the_same_model(case, tmp_path):
    model, base = trained(case)
    aggregate([saved(model, tmp_path / "c")], rule=WHOLE, out=tmp_path / "out")
    before, after = loaded(base, tmp_path / "c"), loaded(base, tmp_path / "out")
    assert not same_logits(before, base, 1e-2)
    assert same_logits(before, after)


@pytest.mark.parametrize("case", ["every kind", "tied head"])
@pytest.mark.parametrize(
    "options", [{"uniform_rank": True}, {"output": "balanced"}, {"uniform_rank": True, "fill": "random"}]
)
def test_every_way_of_writing_is_the_same_model(case, options, tmp_path):
    model, base = trained(case, rank_pattern={"embed_tokens": 1, "lm_head": 1, "attn": 2, "conv3d": 5})
    aggregate([saved(model, tmp_path / "c")], rule=WHOLE, write=WriteOptions(**options), out=tmp_path / "out")
    assert same_logits(loaded(base, tmp_path / "c"), loaded(base, tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["rank_pattern", "tied head"])
def test_factors_of_other_dtypes_are_the_same_model(case, dtype, tmp_path):
    model, base = trained(case)
    state, _ = stored(saved(model, tmp_path / "c"))
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    save_file(state, str(tmp_path / "c" / "adapter_model.safetensors"), metadata={"format": "pt"})
    aggregate([tmp_path / "c"], rule=WHOLE, out=tmp_path / "out")
    assert same_logits(loaded(base, tmp_path / "c"), loaded(base, tmp_path / "out"))


METHODS = ["fedit", "zero_pad", "ffa", "flora", "hetlora", "prelort"]


@pytest.mark.parametrize("method", METHODS)
def test_one_client_is_the_same_model_by_every_method(method, tmp_path):
    model, base = trained(RICH)
    aggregate([saved(model, tmp_path / "c")], method, out=tmp_path / "out")
    assert same_logits(loaded(base, tmp_path / "c"), loaded(base, tmp_path / "out"))


def test_what_a_client_receives_loads_into_its_own_model(tmp_path):
    """Bare tensors in the client's own scale and ranks, as a framework sends them."""
    model, base = trained(RICH)
    saved(model, tmp_path / "c")
    sent = aggregate([tmp_path / "c"], rule=WHOLE).for_client(0)
    sent.save(tmp_path / "sent")
    assert same_logits(loaded(base, tmp_path / "c"), loaded(base, tmp_path / "sent"))
    state, _ = stored(tmp_path / "c")
    own = {key: sent.source.read(key) for key in sent.source.tensors}
    assert {key: tensor.shape for key, tensor in own.items()} == {key: tensor.shape for key, tensor in state.items()}
    scale_free = {"r": 1, "lora_alpha": 1}
    assert distance(updates((own, scale_free)), updates((state, scale_free))) <= 1e-6
