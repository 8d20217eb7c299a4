"""Mixtures of experts for tests: clients as PEFT lays them out, and their updates by the index formula, entry by entry."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
TARGETS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
PARAMETERS = {"gate_up_proj": (14, 9), "down_proj": (11, 6)}
"""(m, n) of the parameters of one module, in the order in which the model registers them."""
PLAIN = {"model.layers.0.self_attn.q_proj": (13, 8)}
EXPERTS = 5


def nested(target, depth):
    """The path of the pair ``depth`` wrappers below the outermost one."""
    return target + ".base_layer" * depth


def paths(targets=TARGETS, parameters=PARAMETERS):
    """(path, parameter, m, n) of every stored pair: the first registered parameter is innermost."""
    depths = range(len(parameters) - 1, -1, -1)
    return [
        (nested(target, depth), name, *shape)
        for target in targets
        for depth, (name, shape) in zip(depths, parameters.items(), strict=True)
    ]


def config(rank=3, alpha=5, targets=("mlp.experts.down_proj", "mlp.experts.gate_up_proj"), **more):
    base = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "bias": "none"}
    fields = {"r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "target_parameters": list(targets)}
    return {**base, **fields, "peft_version": "0.21.2", **more}


def state(seed=0, rank=3, experts=EXPERTS, targets=TARGETS, parameters=PARAMETERS, dtype=torch.float32, plain=PLAIN):
    """Stored tensors: A (E*r, n) and B (m, r*E) of every parameter, and plain pairs."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    tensors = {}
    for path, _, m, n in paths(targets, parameters):
        tensors[f"{PREFIX}{path}.lora_A.weight"] = normal(experts * rank, n)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = normal(m, rank * experts)
    for path, (m, n) in plain.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = normal(rank, n)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = normal(m, rank)
    return tensors


def client(seed=0, rank=3, alpha=5, **options):
    """A pair (state_dict, config)."""
    fields = {key: options.pop(key) for key in list(options) if key not in state.__code__.co_varnames}
    return state(seed, rank, **options), config(rank, alpha, **fields)


def clients(ranks=(3, 2, 4), **options):
    return [client(k, rank, 5 + k, **options) for k, rank in enumerate(ranks)]


def folder(path, pair):
    """Write a pair (state_dict, config) as a PEFT folder."""
    path = Path(path)
    path.mkdir(parents=True)
    save_file(pair[0], path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(pair[1]))
    return str(path)


def read_back(path):
    """The (state_dict, config) of a written folder."""
    path = Path(path)
    return load_file(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())


def dense(pair, experts=EXPERTS, scale=None):
    """D[e, o, i] = s sum_j B[o, j E + e] A[e r + j, i] by loops over experts and ranks, under the names that modules have here."""
    tensors, settings = pair
    updates = {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        B = tensors[key.replace("lora_A", "lora_B")].double()
        count = experts if path.split(".base_layer")[0].endswith("experts") else 1
        rank = A.shape[0] // count
        s = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank) if scale is None else scale
        for e in range(count):
            update = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
            for j in range(rank):
                update += torch.outer(B[:, j * count + e], A[e * rank + j].double())
            updates[path if count == 1 else f"{path}[{e}]"] = s * update
    return updates


def unfused(pair, experts=EXPERTS):
    """The same client with a plain pair for each expert, under the same names: what no fused layout can confuse."""
    tensors, settings = pair
    plain = {}
    for key, A in tensors.items():
        path, letter = key.removeprefix(PREFIX).removesuffix(".weight").rsplit(".lora_", 1)
        if not path.split(".base_layer")[0].endswith("experts"):
            plain[key] = A
            continue
        X = tensors[key]
        for e in range(experts):
            name = f"{PREFIX}{path.replace('.base_layer', '_inner')}[{e}].lora_{letter}.weight"
            rank = (X.shape[0] if letter == "A" else X.shape[1]) // experts
            own = X[e * rank : (e + 1) * rank] if letter == "A" else X[:, e::experts]
            plain[name] = own.clone()
    settings = {key: value for key, value in settings.items() if key not in ("target_parameters", "peft_version")}
    return plain, settings


def weighted(pairs, weights=None):
    """The weighted mean of the updates."""
    weights = [1.0] * len(pairs) if weights is None else weights
    updates = [dense(pair) for pair in pairs]
    return {name: sum(w * d[name] for w, d in zip(weights, updates, strict=True)) / sum(weights) for name in updates[0]}


def distance(found, wanted):
    """Largest relative Frobenius distance over modules; absolute where nothing is wanted."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / (wanted[name].norm() or 1.0)) for name in wanted)
