"""PEFT judges experts: what it saves we read with its own delta, what we write it loads with the same logits."""

import peft
import peft_models
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft_models import loaded, saved
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import fedlora_kernels as fk
from fedlora_kernels.adapters.moe import nesting
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.adapters.writer import pad_to_uniform

EXPERTS = 3


class Experts(nn.Module):
    """Parameters (E, m, n), or (E, n, m) with ``is_transposed``; the first registered one is not the first by name."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        up, down = ((EXPERTS, 7, 10), (EXPERTS, 10, 7)) if transposed else ((EXPERTS, 10, 7), (EXPERTS, 7, 10))
        self.up_proj = nn.Parameter(torch.randn(up) / 3)
        self.down_proj = nn.Parameter(torch.randn(down) / 3)

    def forward(self, x):
        up, down = (w if self.is_transposed else w.mT for w in (self.up_proj, self.down_proj))
        return torch.tanh(x[:, None, None] @ up @ down).squeeze(2).mean(1)


class Block(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.q_proj = nn.Linear(7, 7)
        self.experts = Experts(transposed)

    def forward(self, x):
        return x + self.experts(self.q_proj(x))


class Net(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.layers = nn.ModuleList([Block(transposed), Block(transposed)])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def handmade(transposed):
    torch.manual_seed(3)
    return Net(transposed), torch.randn(6, 7)


def language_model(kind):
    torch.manual_seed(3)
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    small |= {"num_key_value_heads": 1, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 12}
    config = {"mixtral": MixtralConfig, "gpt_oss": GptOssConfig}[kind](**small)
    model = {"mixtral": MixtralForCausalLM, "gpt_oss": GptOssForCausalLM}[kind](config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, torch.arange(12).reshape(2, 6)


MODELS = {
    "rows outside": lambda: handmade(False),
    "is_transposed": lambda: handmade(True),
    "mixtral": lambda: language_model("mixtral"),
    "gpt_oss": lambda: language_model("gpt_oss"),
}
BOTH = {"handmade": ["experts.up_proj", "experts.down_proj"], "hub": ["experts.gate_up_proj", "experts.down_proj"]}
CONFIGS = {
    "two parameters": {},
    "one parameter": {"target_parameters": ["experts.down_proj"]},
    "bare names": {"target_parameters": ["down_proj"]},
    "experts alone": {"target_modules": []},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.experts.up_proj": 3, "layers.1.experts.down_proj": 3},
        "alpha_pattern": {r"layers\.0\.experts\.(up|down)_proj": 4},
    },
    "one rank for a layer": {"rank_pattern": {r"layers.1.experts.[a-z_]+": 5}},
}
CASES = [*((model, "two parameters") for model in MODELS), *(("rows outside", name) for name in list(CONFIGS)[1:])]


def names_of(model):
    return BOTH["handmade" if isinstance(model, Net) else "hub"]


def fitted(base, **fields):
    """A PEFT model with random factors."""
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": names_of(base), **fields}
    return peft_models.fitted(base, std=0.3, **fields)


def same_logits(one, two, x):
    # torch multiplies groups of tokens by their experts in float32 at most
    return peft_models.same_logits(one, two, inputs=x, dtype=torch.float32)


def deltas(model):
    """PEFT's own change of every expert (m, n), by the name that it has here."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, ParamWrapper):
            delta = module.get_delta_weight("default").detach().double()
            delta = delta.mT if getattr(module.get_base_layer(), "is_transposed", False) else delta
            found |= {f"{path}[{e}]": delta[e] for e in range(EXPERTS)}
    return found


@pytest.fixture(params=CASES, ids=" ".join)
def trained(request):
    kind, fields = request.param
    base, x = MODELS[kind]()
    return fitted(base, **CONFIGS[fields]), base, x


def test_our_update_is_pefts_own_delta(trained, tmp_path):
    model, _, _ = trained
    adapter = open_adapter(saved(model, tmp_path / "c"))
    theirs = deltas(model)
    assert {name for name, module in adapter.modules.items() if module.kind == "expert"} == set(theirs)
    for name, delta in theirs.items():
        pair = adapter[name]
        assert (pair.scale * (pair.B.double() @ pair.A.double()) - delta).norm() <= 1e-6 * delta.norm()


def test_memory_and_file_are_the_same_adapter(trained, tmp_path):
    model, _, _ = trained
    file = open_adapter(saved(model, tmp_path / "c"))
    memory = open_adapter((peft.get_peft_model_state_dict(model), model.peft_config["default"]))
    assert set(memory) == set(file)
    assert all(memory.modules[name].scale == file.modules[name].scale for name in file)
    assert all(torch.equal(memory[name].B, file[name].B) for name in file)


def test_peft_loads_what_we_write_with_the_same_logits(trained, tmp_path):
    model, base, x = trained
    open_adapter(saved(model, tmp_path / "c")).save(tmp_path / "out")
    assert same_logits(model, loaded(base, tmp_path / "out"), x)
    assert not same_logits(base, model, x)


@pytest.mark.parametrize("fill", ["zero", "random"])
def test_peft_loads_the_padded_form_with_the_same_logits(trained, tmp_path, fill):
    model, base, x = trained
    open_adapter(saved(model, tmp_path / "c")).save(tmp_path / "out")
    pad_to_uniform(tmp_path / "out", 6, fill, seed=3)
    assert same_logits(model, loaded(base, tmp_path / "out"), x)


def test_one_client_of_weight_one_comes_back(trained, tmp_path):
    model, base, x = trained
    fk.aggregate([saved(model, tmp_path / "c")], rule=fk.Energy(1.0), out=tmp_path / "out")
    assert same_logits(model, loaded(base, tmp_path / "out"), x)
    again = open_adapter(saved(loaded(base, tmp_path / "out"), tmp_path / "again"))
    assert {spec.scale for spec in again.modules.values()} == {1.0}


@pytest.mark.parametrize("kind", MODELS)
def test_the_weighted_sum_of_clients_is_that_of_their_deltas(kind, tmp_path):
    base, _ = MODELS[kind]()
    models = [fitted(base, r=rank) for rank in (2, 3)]
    clients = [saved(model, tmp_path / f"c{k}") for k, model in enumerate(models)]
    fk.aggregate(clients, weights=[1, 3], rule=fk.Energy(1.0), out=tmp_path / "out")
    found = deltas(loaded(base, tmp_path / "out"))
    one, two = (deltas(model) for model in models)
    for name, delta in found.items():
        wanted = 0.25 * one[name] + 0.75 * two[name]
        assert nesting(name.partition("[")[0])[0].endswith("experts")
        assert (delta - wanted).norm() <= 1e-6 * wanted.norm()


def test_ranks_that_differ_among_experts_are_padded_to_one(tmp_path):
    base, _ = MODELS["rows outside"]()
    models = [fitted(base, r=rank) for rank in (2, 3)]
    clients = [saved(model, tmp_path / f"c{k}") for k, model in enumerate(models)]
    result = fk.aggregate(clients, rule=fk.Energy(0.8), out=tmp_path / "out")
    ranks = {row["name"]: row["rank"] for row in result.report["modules"] if row["kind"] == "expert"}
    assert len(set(ranks.values())) > 1
    written = {module.form.target: module.rank for module in result.adapter.modules.values() if module.kind == "expert"}
    for target, rank in written.items():
        assert rank == max(found for name, found in ranks.items() if nesting(name.partition("[")[0])[0] == target)
    back = deltas(loaded(base, tmp_path / "out"))
    for name, delta in back.items():
        pair = result.adapter[name]
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == ranks[name]
        assert (pair.B.double() @ pair.A.double() - delta).norm() <= 1e-6 * delta.norm()


def test_what_a_client_receives_is_loaded_in_its_own_scale(tmp_path):
    base, x = MODELS["is_transposed"]()
    models = [fitted(base, r=rank, lora_alpha=alpha) for rank, alpha in ((2, 6), (3, 1))]
    clients = [saved(model, tmp_path / f"c{k}") for k, model in enumerate(models)]
    result = fk.aggregate(clients, "flora", out=tmp_path / "out")
    wanted = loaded(base, tmp_path / "out")
    for k, model in enumerate(models):
        sent = result.for_client(k)
        assert {sent.modules[name].scale for name in sent} == {client_scale(model)}
        keys = {key.replace(".weight", ".default.weight"): value for key, value in sent.source._state.items()}
        into = fitted(base, r=5, lora_alpha=5 * client_scale(model))
        with torch.no_grad():
            state = into.state_dict()
            assert set(keys) <= set(state)
            into.load_state_dict({**state, **keys})
        assert same_logits(wanted, into, x)


def client_scale(model):
    config = model.peft_config["default"]
    return config.lora_alpha / config.r


def test_the_old_layers_of_experts_do_not_mix_with_fused_ones(tmp_path):
    base, _ = MODELS["mixtral"]()
    fused = saved(fitted(base), tmp_path / "fused")
    state = {}
    for layer in range(2):
        for e in range(EXPERTS):
            for name, (m, n) in {"w1": (12, 16), "w2": (16, 12), "w3": (12, 16)}.items():
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.{name}"
                state[f"{path}.lora_A.weight"] = torch.randn(2, n)
                state[f"{path}.lora_B.weight"] = torch.randn(m, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    assert {module.kind for module in open_adapter((state, config)).modules.values()} == {"linear"}
    with pytest.raises(fk.errors.MismatchError, match="a layer for each expert"):
        fk.aggregate([fused, (state, config)], read=fk.ReadOptions(missing="zero"))
