"""Adapters for the tests of this folder: state dicts, configurations, folders, raw safetensors bytes."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
SHAPES = {"layers.0.q_proj": (11, 7, 3), "layers.0.v_proj": (5, 13, 2), "layers.1.q_proj": (11, 7, 3)}


def state(shapes=None, prefix=PREFIX, adapter="", dtype=torch.float32, seed=0):
    """Tensors by key for modules given as name -> (m, n, r)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (m, n, r) in (shapes or SHAPES).items():
        tensors[f"{prefix}{name}.lora_A{adapter}.weight"] = torch.randn(r, n, generator=generator).to(dtype)
        tensors[f"{prefix}{name}.lora_B{adapter}.weight"] = torch.randn(m, r, generator=generator).to(dtype)
    return tensors


def config(**fields):
    """A LoRA configuration whose rank_pattern fits `SHAPES`."""
    base = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    return {**base, "rank_pattern": {"v_proj": 2}, **fields}


def one(name="q", m=5, n=7, rank=2, /, **fields):
    """A (state_dict, config) pair of one module."""
    return state({name: (m, n, rank)}), {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **fields}


def folder(path, tensors=None, configuration=None):
    """Write a PEFT folder by the public library."""
    path = Path(path)
    path.mkdir(parents=True)
    save_file(tensors or state(), str(path / "adapter_model.safetensors"), metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(configuration or config()))
    return path


def raw_safetensors(header, data=b""):
    """Bytes of a safetensors file with any header: an object or ready bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def dense(adapter):
    """The update s B A of every module, in float64."""
    return {name: adapter[name].scale * (adapter[name].B.double() @ adapter[name].A.double()) for name in adapter}


def same_updates(first, second, limit=1e-6):
    """Whether two adapters have the same modules and updates, relative to each update's norm."""
    one, two = dense(first), dense(second)
    return one.keys() == two.keys() and all((one[k] - two[k]).norm() <= limit * one[k].norm() for k in one)
