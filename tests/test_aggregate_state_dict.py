"""State dicts of results in memory: the keys that the clients sent, ready for the model that sends them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fedlora_kernels as fk

SPELLINGS = ("base_model.model.{}", "{}", "model.base_model.model.{}", "module.base_model.model.{}")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def client(form, seed, adapter="", rank=3):
    """A client of two linear layers, m != n, a bias and an embedding, whose keys are of this form."""
    name = f".{adapter}" if adapter else ""
    keys = {
        f"layers.0.q.lora_A{name}.weight": normal(rank, 7, seed=seed),
        f"layers.0.q.lora_B{name}.weight": normal(5, rank, seed=seed + 1),
        f"layers.1.q.lora_A{name}.weight": normal(rank, 4, seed=seed + 2),
        f"layers.1.q.lora_B{name}.weight": normal(9, rank, seed=seed + 3),
        f"embed.lora_embedding_A{name}": normal(rank, 11, seed=seed + 4),
        f"embed.lora_embedding_B{name}": normal(6, rank, seed=seed + 5),
        "layers.0.q.base_layer.bias": normal(5, seed=seed + 6),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "all", "target_modules": ["q", "embed"]}
    return {form.format(key): tensor for key, tensor in keys.items()}, config


@pytest.mark.parametrize("adapter", ["", "default"])
@pytest.mark.parametrize("form", SPELLINGS)
def test_keys_of_results_are_the_clients_own(form, adapter):
    clients = {"a": client(form, 0, adapter), "b": client(SPELLINGS[0], 20, "other", rank=2)}
    result = fk.aggregate(clients, rule=fk.Energy(1.0))
    assert list(result.adapter.state_dict()) == list(clients["a"][0])
    for name, (sent, _) in clients.items():
        back = result.for_client(name, rank=4).state_dict()
        assert list(back) == list(sent)
        assert all(back[key].shape[-1] == sent[key].shape[-1] for key in sent if "_A" in key)
        assert torch.equal(back[next(key for key in sent if key.endswith("bias"))], result.adapter.extra(BIAS))
    assert list(result.at(fk.Rank(1)).adapter.state_dict()) == list(clients["a"][0])


BIAS = "layers.0.q.base_layer.bias"


def test_files_have_the_keys_of_peft(tmp_path):
    result = fk.aggregate([client(SPELLINGS[2], 0, "default")], out=tmp_path / "out")
    assert all(key.startswith("base_model.model.") and ".default" not in key for key in result.adapter.state_dict())
    assert list(result.for_client(0).state_dict()) == list(client(SPELLINGS[2], 0, "default")[0])
    result.adapter.close()


def test_saved_from_memory_as_peft_has_it(tmp_path):
    result = fk.aggregate([client(SPELLINGS[2], 0, "default")])
    result.adapter.save(tmp_path / "out")
    with_peft_keys = fk.open_adapter(tmp_path / "out")
    assert all(key.startswith("base_model.model.") and ".default" not in key for key in with_peft_keys.state_dict())
    for name, pair in with_peft_keys.pairs():
        assert torch.equal(pair.B, result.adapter[name].B)
    with_peft_keys.close()


def test_adapter_of_one_name_among_several():
    """The other adapter of the file stays out, and the keys keep the name."""
    state, config = client(SPELLINGS[0], 0, "one")
    both = state | {key.replace(".one", ".two"): -tensor for key, tensor in state.items() if "lora_" in key}
    result = fk.aggregate([(both, config)], read=fk.ReadOptions(adapter_name="one"))
    assert list(result.for_client(0).state_dict()) == list(state)


def test_live_model_takes_what_comes_back():
    """PEFT's own model before and after, by its state dict with adapter names."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1", "3"], rank_pattern={"3": 2})
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    tokens = torch.arange(13)
    before = model(tokens)
    sent = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" in key}
    result = fk.aggregate([(sent, config)], rule=fk.Energy(1.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    ranks = {module: spec.rank for module, spec in fk.open_adapter((sent, config)).modules.items()}
    back = result.for_client(0).state_dict()
    assert ranks == {"0": 3, "1": 3, "3": 2}
    loaded = model.load_state_dict(back, strict=False)
    assert not loaded.unexpected_keys
    assert torch.allclose(model(tokens), before, atol=1e-5)
