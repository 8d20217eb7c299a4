"""Clients with a module of every kind, and what they amount to: dense updates of the layers' own shapes, in float64."""

import torch

PREFIX = "base_model.model."
LINEAR = {"layers.0.q_proj": (7, 10), "attn": (33, 11), "attn.base_layer.out_proj": (11, 13), "lm_head": (17, 6)}
CONVOLUTIONS = {"conv1d": (7, 5, 3), "conv3x3": (5, 4, 3, 3), "conv1x1": (8, 5, 1, 1), "conv3d": (3, 4, 1, 2, 3)}
EMBEDDING = {"model.embed_tokens": (6, 17)}
NAMES = ["layers.0.q_proj", "attn", "attn.base_layer.out_proj", *CONVOLUTIONS, *EMBEDDING]
"""What is a module of its own: the head is tied to the embedding."""
TARGETS = ["q_proj", "attn", *CONVOLUTIONS, "embed_tokens"]


def client(seed=0, rank=3, alpha=5, dtype=torch.float32, **fields):
    """A pair (state_dict, config) with standard normal factors; the head holds the embedding's transposes."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    state = {}
    for name, (m, n) in LINEAR.items():
        state[f"{PREFIX}{name}.lora_A.weight"], state[f"{PREFIX}{name}.lora_B.weight"] = (
            normal(rank, n),
            normal(m, rank),
        )
    for name, (m, *kernel) in CONVOLUTIONS.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = normal(rank, *kernel)
        state[f"{PREFIX}{name}.lora_B.weight"] = normal(m, rank, *(1 for _ in kernel[1:]))
    for name, (m, n) in EMBEDDING.items():
        A, B = normal(rank, n), normal(m, rank)
        state[f"{PREFIX}{name}.lora_embedding_A"], state[f"{PREFIX}{name}.lora_embedding_B"] = A, B
        state[f"{PREFIX}lm_head.lora_A.weight"], state[f"{PREFIX}lm_head.lora_B.weight"] = B.t().clone(), A.t().clone()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": TARGETS,
        "ensure_weight_tying": True,
    }
    return state, {**config, **fields}


def clients(ranks=(3, 1, 4)):
    return [client(seed, rank, 5 + seed) for seed, rank in enumerate(ranks)]


def dense(state, scale):
    """By module and in the shape of its weight: s times B A, element by element; the keys and shapes are PEFT's."""
    found = {}
    for key, A in state.items():
        if ".lora_A." in key:
            B = state[key.replace("lora_A", "lora_B")].double().flatten(1)
            found[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = scale * torch.tensordot(B, A.double(), 1)
        elif key.endswith("lora_embedding_A"):
            B = state[key.replace("_A", "_B")].double()
            found[key.removeprefix(PREFIX).removesuffix(".lora_embedding_A")] = scale * (B @ A.double()).t()
    return found


def updates(pair):
    """The dense updates of a client."""
    state, config = pair
    return dense(state, config["lora_alpha"] / config["r"])


def weighted(pairs, weights):
    """The dense weighted sum of clients."""
    every = [updates(pair) for pair in pairs]
    return {name: sum(w * one[name] for w, one in zip(weights, every, strict=True)) for name in every[0]}


def tensors(adapter):
    """What an adapter stores, by key."""
    return {key: adapter.source.read(key) for key in adapter.source.tensors}


def distance(found, wanted):
    """Largest relative Frobenius distance over modules."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)
