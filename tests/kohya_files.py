"""kohya files for tests, and what they amount to by the definition of the format: D = up @ down * alpha / rank, in float64."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SPELLINGS = {
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "diffusers_old": ("_lora.up.weight", "_lora.down.weight"),
    "diffusers_dots": (".lora.up.weight", ".lora.down.weight"),
    "transformers": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "peft": (".lora_B.weight", ".lora_A.weight"),
    "mochi": (".lora_B", ".lora_A"),
    "qwen": (".lora_B.default.weight", ".lora_A.default.weight"),
}
SHAPES = {
    "lora_unet_down_blocks_0_attn1_to_q": (11, 7),
    "lora_unet_mid_block_proj_in": (9, (5, 1, 1)),
    "lora_unet_down_blocks_0_resnets_0_conv1": (6, (4, 3, 3)),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (13, 8),
}
FIRST = next(iter(SHAPES))
RANKS = (3, 2, 4, 3)


def tensors(shapes=SHAPES, ranks=RANKS, spelling="kohya", alpha=1.5, dtype=torch.float32, seed=0, alpha_dtype=None):
    """Tensors by key; ``alpha`` is that of the first module, doubled from one to the next, or None for no alphas at all."""
    generator = torch.Generator().manual_seed(seed)
    up, down = SPELLINGS[spelling]
    made = {}
    for k, (name, (m, n)) in enumerate(shapes.items()):
        rank, kernel = ranks[k % len(ranks)], (n,) if isinstance(n, int) else n
        ones = (1,) * (len(kernel) - 1)
        made[f"{name}{down}"] = torch.randn(rank, *kernel, generator=generator, dtype=torch.float64).to(dtype)
        made[f"{name}{up}"] = torch.randn(m, rank, *ones, generator=generator, dtype=torch.float64).to(dtype)
        if alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(alpha * 2**k, dtype=alpha_dtype or dtype)
    return made


def kohya_file(path, made=None, metadata=None, **options):
    """Write a file by the public library."""
    path = Path(path)
    save_file(tensors(**options) if made is None else made, path, metadata=metadata)
    return path


def updates(source):
    """The update of every module of a file or of tensors by key, as a kohya loader adds it to the flattened weight."""
    made = source if isinstance(source, dict) else load_file(source)
    ups, downs = {}, {}
    for key, tensor in made.items():
        for up, down in SPELLINGS.values():
            if key.endswith(up):
                ups[key[: len(key) - len(up)]] = tensor.double()
            if key.endswith(down):
                downs[key[: len(key) - len(down)]] = tensor.double()
    assert ups.keys() == downs.keys()
    found = {}
    for name, up in ups.items():
        rank = up.shape[1]
        alpha = float(made[f"{name}.alpha"].double()) if f"{name}.alpha" in made else rank
        found[name] = up.flatten(1) @ downs[name].flatten(1) * (alpha / rank)
    return found


def weighted(files, weights=None):
    """The weighted mean of the updates of files of the same modules."""
    weights = [1.0] * len(files) if weights is None else weights
    each = [updates(file) for file in files]
    return {name: sum(w * one[name] for w, one in zip(weights, each, strict=True)) / sum(weights) for name in each[0]}


def distance(found, wanted):
    """Largest relative Frobenius distance over modules."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)
