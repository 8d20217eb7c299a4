"""Clients in memory for the engine's tests: (state_dict, config) pairs, and what they amount to, densely in float64."""

import torch

PREFIX = "base_model.model."
SHAPES = {
    "model.layers.0.self_attn.q_proj": (37, 23),
    "model.layers.0.mlp.down_proj": (19, 53),
    "model.layers.1.self_attn.q_proj": (37, 23),
    "model.layers.1.mlp.down_proj": (19, 53),
}
FIRST = "model.layers.0.self_attn.q_proj"


def config(rank=4, alpha=8, **more):
    targets = ["q_proj", "down_proj"]
    base = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "bias": "none"}
    return {**base, "r": rank, "lora_alpha": alpha, "target_modules": targets, **more}


def client(seed=0, rank=4, alpha=8, shapes=SHAPES, dtype=torch.float32, **more):
    """A pair (state_dict, config) with standard normal factors."""
    made = torch.Generator().manual_seed(seed)
    state = {}
    for name, (m, n) in shapes.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, n, generator=made, dtype=torch.float64).to(dtype)
        state[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(m, rank, generator=made, dtype=torch.float64).to(dtype)
    return state, config(rank, alpha, **more)


def clients(ranks=(4, 2, 5), **options):
    return [client(seed=k, rank=rank, alpha=8 + k, **options) for k, rank in enumerate(ranks)]


def changed(pair, part, change, module=FIRST):
    """A copy of a client with ``change(tensor)`` in one factor ("A" or "B") of a module."""
    state, settings = pair
    key = f"{PREFIX}{module}.lora_{part}.weight"
    return {**state, key: change(state[key].clone())}, settings


def without(pair, module):
    state, settings = pair
    return {key: value for key, value in state.items() if f"{PREFIX}{module}." not in key}, settings


def updates(pair):
    """s B A of every module, float64."""
    state, settings = pair
    found = {}
    for key, A in state.items():
        if ".lora_A." in key:
            B = state[key.replace("lora_A", "lora_B")]
            scale = settings["lora_alpha"] / (A.shape[0] ** 0.5 if settings.get("use_rslora") else A.shape[0])
            found[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = scale * (B.double() @ A.double())
    return found


def weighted(pairs, weights=None, normalize=True):
    """The ideal update of every module that all clients have."""
    weights = [1.0] * len(pairs) if weights is None else weights
    total = sum(weights) if normalize else 1.0
    dense = [updates(pair) for pair in pairs]
    return {name: sum(w / total * d[name] for w, d in zip(weights, dense, strict=True)) for name in dense[0]}


def products(adapter):
    """s B A of every module of an Adapter, float64."""
    pairs = {name: adapter[name] for name in adapter}
    return {name: pair.scale * (pair.B.double() @ pair.A.double()) for name, pair in pairs.items()}


def distance(found, wanted):
    """Largest relative Frobenius distance over modules; absolute where nothing is wanted."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).norm() / (wanted[n].norm() or 1.0)) for n in wanted)


def poison(value=float("nan"), at=(1, 2)):
    def change(tensor):
        tensor[at] = value
        return tensor

    return change
