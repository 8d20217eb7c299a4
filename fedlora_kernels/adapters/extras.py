"""Tensors of a PEFT file that are no factors: what they mean, and which of them belong to the adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedlora_kernels.adapters.keys import TOKENS, TensorKey
from fedlora_kernels.adapters.lora_config import LoRAConfig
from fedlora_kernels.adapters.model import ExtraSpec, ModuleSpec, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError

__all__ = ["FLOATS", "Findings", "check_float", "read_extras"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")
"""What models call their embedding and their head, which PEFT saves whole where the vocabulary has changed."""
Findings = dict[tuple[str, str], list[str]]
"""Names by what was found ("module" or "tensor", text)."""


def check_float(spec: TensorSpec, where: str) -> None:
    """Refuse a tensor that takes part in the aggregate with a dtype other than float64, 32, 16 and bfloat16."""
    if spec.dtype not in FLOATS:
        raise FormatError(
            f"{where}: tensor {printable(spec.key)!r} is {str(spec.dtype).removeprefix('torch.')}; "
            "float64, float32, float16 or bfloat16 needed. Dequantise the adapter first"
        )


def read_extras(
    keys: list[TensorKey],
    tensors: Mapping[str, TensorSpec],
    config: LoRAConfig,
    modules: Mapping[str, ModuleSpec],
    ignore: bool,
    findings: Findings,
) -> dict[str, ExtraSpec]:
    """The tensors beside the factors by their names, with what they mean. FormatError for one that means nothing here.

    Args:
        keys: all keys of the adapter, parsed.
        tensors: what is stored, by the source's own keys.
        config: says which values were trained beside the factors.
        modules: the adapter's pairs.
        ignore: drop what means nothing here, and note it in ``findings``.
        findings: texts for warnings.
    """
    found: dict[str, ExtraSpec] = {}
    for key in keys:
        spec = tensors[key.key]
        if key.part == "lora_bias":
            extra = _lora_bias(key, spec, config, modules)
        elif key.part == "extra" and _is_absolute(key.name, spec, config, modules):
            owner, base, _ = key.name.rpartition(".base_layer.")
            extra = ExtraSpec(key.name, "absolute", spec, owner if base and owner in modules else None)
        elif key.part == "extra":
            if not ignore:
                raise FormatError(
                    f"{config.who}: unknown tensor {printable(key.key)!r}; neither a factor nor named by modules_to_save or "
                    "bias. Remove it, or drop such tensors with extras='ignore'"
                )
            findings.setdefault(("tensor", "not understood, dropped"), []).append(key.key)
            continue
        else:
            continue
        check_float(spec, config.who)
        if 0 in spec.shape:
            raise FormatError(f"{config.who}: tensor {printable(key.key)!r} {spec.shape} is empty. Sharded export?")
        found[extra.name] = extra
    return found


def _lora_bias(key: TensorKey, spec: TensorSpec, config: LoRAConfig, modules: Mapping[str, ModuleSpec]) -> ExtraSpec:
    module = modules.get(key.name)
    if module is None or spec.shape != (module.m,):
        needed = "a lora_B of the same module" if module is None else f"({module.m},)"
        raise FormatError(f"{config.who}, module {printable(key.name)!r}: lora_B.bias {spec.shape}; {needed} needed")
    return ExtraSpec(f"{key.name}.lora_B.bias", "lora_bias", spec, key.name)


def _is_absolute(name: str, spec: TensorSpec, config: LoRAConfig, modules: Mapping[str, ModuleSpec]) -> bool:
    """modules_to_save, biases and token rows that were trained, and embeddings saved along: values, not changes."""
    path, _, last = name.rpartition(".")
    if last == TOKENS:
        return _are_token_rows(path.removesuffix(".token_adapter"), spec, config)
    # in_proj_bias of MultiheadAttention is one too
    bias = {"none": False, "all": "bias" in last, "lora_only": last == "bias"}[config.bias]
    return bias or config.saves(name) or (last == "weight" and _is_embedding(path.removesuffix(".base_layer"), modules))


def _are_token_rows(module: str, spec: TensorSpec, config: LoRAConfig) -> bool:
    """Whether the configuration says which rows of the embedding these are."""
    count = config.tokens(module)
    if count is not None and spec.shape[:1] != (count,):
        raise FormatError(
            f"{config.who}, module {printable(module)!r}: {TOKENS} {spec.shape}, but trainable_token_indices names {count} "
            "tokens; a row for each needed"
        )
    return count is not None


def _is_embedding(path: str, modules: Mapping[str, ModuleSpec]) -> bool:
    """Whether this is an embedding or a head, whose weights PEFT saves along."""
    module = modules.get(path)
    return path.rpartition(".")[2] in EMBEDDINGS or (module is not None and module.kind == "embedding")
