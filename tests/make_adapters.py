"""Small PEFT folders for tests, written without peft: healthy ones, and ones broken in a chosen way."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "model.layers.0.self_attn.q_proj": (37, 23),
    "model.layers.0.mlp.down_proj": (19, 53),
    "model.layers.1.self_attn.q_proj": (37, 23),
    "model.layers.1.mlp.down_proj": (19, 53),
}
PREFIX = "base_model.model."


def factors(shapes=SHAPES, rank=4, seed=0, dtype=torch.float32):
    """Tensors as PEFT stores them: lora_A (rank, n) and lora_B (m, rank) of every module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (m, n) in shapes.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, n, generator=generator).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(m, rank, generator=generator).to(dtype)
    return tensors


def config(rank=4, alpha=8, **more):
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base/model",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["q_proj", "down_proj"],
        "inference_mode": True,
        "init_lora_weights": True,
        **more,
    }


def write(folder, tensors, configuration):
    folder = Path(folder)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(configuration))
    return folder


def make_adapter(folder, *, rank=4, alpha=8, seed=0, shapes=SHAPES, dtype=torch.float32, change=None, **configuration):
    """Write an adapter folder; ``change(tensors)`` may alter its tensors in place first."""
    tensors = factors(shapes, rank, seed, dtype)
    if change:
        change(tensors)
    return write(folder, tensors, config(rank, alpha, **configuration))


def make_clients(root, count=3, ranks=(4, 2, 5), **options):
    """Write ``count`` healthy clients under ``root`` and return their folders as texts."""
    return [
        str(make_adapter(Path(root) / f"c{k}", rank=ranks[k % len(ranks)], seed=k, **options)) for k in range(count)
    ]


def first(tensors, factor):
    """Key of the first module's lora_A or lora_B."""
    return next(key for key in tensors if f".{factor}." in key)


def poison(factor="lora_B", value=float("nan")):
    """A change that puts one bad number into the first module's factor."""

    def change(tensors):
        tensors[first(tensors, factor)][1, 2] = value

    return change


def dense(folder):
    """D = s B A of every module of a written folder, by module name, float64; scale resolved with patterns."""
    from safetensors.torch import load_file

    folder = Path(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    updates = {}
    for key, A in tensors.items():
        if ".lora_A." in key:
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            alpha = settings.get("alpha_pattern", {}).get(module, settings["lora_alpha"])
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            updates[module] = alpha / A.shape[0] * (B.double() @ A.double())
    return updates
