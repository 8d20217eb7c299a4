"""PEFT judges: what it saves we read with its own delta, what we write it loads with the same logits."""

import warnings

import peft
import peft_models
import pytest
import torch
from peft_models import fitted, loaded, same_logits, saved
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.adapters.writer import pad_to_uniform


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(13, 7)
        self.c_fc = Conv1D(11, 7)
        self.norm = nn.LayerNorm(11)

    def forward(self, x):
        return self.norm(self.c_fc(torch.tanh(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.up = nn.Linear(11, 13, bias=False)
        self.score = nn.Linear(11, 3)

    def forward(self, x):
        return self.score(self.layers[1](self.up(self.layers[0](x))))


CONFIGS = {
    "alpha is not r": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"c_fc": 2, "layers.1.q_proj": 5}},
    "alpha_pattern": {"alpha_pattern": {"^layers.0.q_proj": 9, "up": 3.5}},
    "both and rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.\d\.q_proj": 9}, "use_rslora": True},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["score", "norm"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "patterns and extras": {"rank_pattern": {"up": 1}, "modules_to_save": ["score"], "bias": "lora_only"},
    "regex target": {"target_modules": r"layers\.[01]\.(q_proj|c_fc)"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.fixture(params=CONFIGS)
def trained(request):
    """A PEFT model with every trainable parameter drawn at random, and its base."""
    torch.manual_seed(7)
    base = Net()
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "c_fc", "up"], **CONFIGS[request.param]}
    return fitted(base, **fields), base


X = torch.randn(5, 13, generator=torch.Generator().manual_seed(1))


def test_our_update_is_pefts_own_delta(trained, tmp_path):
    model, _ = trained
    adapter = open_adapter(saved(model, tmp_path / "c"))
    layers = {
        name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "get_delta_weight")
    }
    assert set(adapter) == set(layers)
    for name, layer in layers.items():
        pair = adapter[name]
        delta = layer.get_delta_weight("default").detach().double()
        delta = delta.t() if isinstance(layer.base_layer, Conv1D) else delta
        ours = pair.scale * (pair.B.double() @ pair.A.double())
        assert (ours - delta).norm() <= 1e-6 * delta.norm()


def test_memory_and_file_are_the_same_adapter(trained, tmp_path):
    model, _ = trained
    file = open_adapter(saved(model, tmp_path / "c"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have invalid shape.*lora_B.bias.*")
        live = peft.get_peft_model_state_dict(model)
    memory = open_adapter((live, model.peft_config["default"]))
    assert set(memory) == set(file)
    assert set(memory.extras) == set(file.extras)
    assert all(memory.modules[name].scale == file.modules[name].scale for name in file)
    assert all(torch.equal(memory.extra(name), file.extra(name)) for name in file.extras)


def test_peft_loads_what_we_write_with_the_same_logits(trained, tmp_path):
    model, base = trained
    open_adapter(saved(model, tmp_path / "c")).save(tmp_path / "out")
    assert same_logits(model, loaded(base, tmp_path / "out"), inputs=X)


@pytest.mark.parametrize("fill", ["zero", "random"])
def test_peft_loads_the_padded_form_with_the_same_logits(trained, tmp_path, fill):
    model, base = trained
    open_adapter(saved(model, tmp_path / "c")).save(tmp_path / "out")
    pad_to_uniform(tmp_path / "out", 6, fill, seed=3)
    back = loaded(base, tmp_path / "out")
    assert same_logits(model, back, inputs=X)
    assert back.peft_config["default"].r == 6


def test_what_peft_saves_again_still_has_scale_one(trained, tmp_path):
    model, base = trained
    open_adapter(saved(model, tmp_path / "c")).save(tmp_path / "out")
    again = open_adapter(saved(loaded(base, tmp_path / "out"), tmp_path / "again"))
    assert {spec.scale for spec in again.modules.values()} == {1.0}
    assert again.warnings == ()


def kind_delta(pair, shape):
    """s B A of a pair in the shape of its layer's weight."""
    update = pair.scale * (pair.B.double() @ pair.A.double())
    return update.t() if pair.kind == "embedding" else update.reshape(shape)


@pytest.mark.parametrize("case", ["both and rslora", "tied head, rslora", "embedding and head"])
def test_our_update_is_pefts_own_delta_for_every_kind(case, tmp_path):
    model, _ = peft_models.trained(case)
    adapter = open_adapter(saved(model, tmp_path / "c"))
    judged = set()
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        embedding = adapter.modules.get("model.embed_tokens")
        tied = embedding is not None and embedding.form.tied == name
        delta = layer.get_delta_weight("default").detach().double()
        delta = delta.t() if getattr(layer, "fan_in_fan_out", False) else delta
        ours = kind_delta(adapter["model.embed_tokens"] if tied else adapter[name], delta.shape)
        assert (ours - delta).norm() <= 1e-6 * delta.norm()
        judged.add("model.embed_tokens" if tied else name)
    assert judged == set(adapter)


@pytest.mark.parametrize("case", ["both and rslora", "tied head", "trainable tokens"])
@pytest.mark.parametrize("fill", [None, "zero", "random"])
def test_peft_loads_every_kind_that_we_write_with_the_same_logits(case, fill, tmp_path):
    model, base = peft_models.trained(case)
    open_adapter(saved(model, tmp_path / "c")).save(tmp_path / "out")
    if fill is not None:
        pad_to_uniform(tmp_path / "out", 6, fill, seed=3)
    before, after = loaded(base, tmp_path / "c"), loaded(base, tmp_path / "out")
    assert same_logits(before, after)
    again = open_adapter(saved(after, tmp_path / "again"))
    assert {spec.scale for spec in again.modules.values()} == {1.0}
