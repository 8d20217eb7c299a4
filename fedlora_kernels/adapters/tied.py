"""Heads tied to an embedding (``ensure_weight_tying``): stored as the transposes of its factors, aggregated with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from fedlora_kernels.adapters.lora_config import LoRAConfig
from fedlora_kernels.adapters.model import ModuleSpec, TensorSource
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError

__all__ = ["check_tied", "tie"]


def tie(modules: Mapping[str, ModuleSpec], config: LoRAConfig) -> dict[str, ModuleSpec]:
    """Take heads that are tied to an embedding out of ``modules`` and note them in its form.

    PEFT does not say which they are. It takes them out of ``target_modules``, and they have the shape of the embedding's
    transpose. FormatError where a head has another scale.
    """
    found = dict(modules)
    if not config.tied:
        return found
    for embedding in [module for module in modules.values() if module.kind == "embedding"]:
        heads = [module for module in found.values() if _is_head(module, embedding, config.raw.get("target_modules"))]
        for head in heads[:1]:
            if head.scale != embedding.scale:
                raise FormatError(
                    f"{config.who}, module {printable(head.name)!r}: scale {head.scale:g}, but {embedding.scale:g} in "
                    f"{printable(embedding.name)!r}, to which ensure_weight_tying ties it; one scale needed. Mend "
                    "lora_alpha and alpha_pattern"
                )
            del found[head.name]
            form = dataclasses.replace(embedding.form, tied=head.form.path)
            found[embedding.name] = dataclasses.replace(embedding, form=form, heads=(head.B, head.A))
    return found


def check_tied(modules: Mapping[str, ModuleSpec], source: TensorSource, who: str) -> None:
    """Raise FormatError where the tensors of a tied head are not the transposes of its embedding's."""
    for module in modules.values():
        for stored, head in zip((module.A, module.B), module.heads, strict=False):
            mine, theirs = source.read(stored.key), source.read(head.key)
            if not torch.equal(torch.nan_to_num(mine.mT), torch.nan_to_num(theirs.to(mine.dtype))):
                raise FormatError(
                    f"{who}, module {printable(module.form.tied)!r}: {printable(head.key)!r} is not the transpose of "
                    f"{printable(stored.key)!r}, although ensure_weight_tying says so; equal numbers needed. Remove the "
                    "tensors of the head, or set ensure_weight_tying to false"
                )


def _is_head(module: ModuleSpec, embedding: ModuleSpec, targets: object) -> bool:
    transposed = (module.m, module.n, module.rank) == (embedding.n, embedding.m, embedding.rank)
    chosen = isinstance(targets, Sequence) and not isinstance(targets, str) and _names(module.name, targets)
    return module.kind == "linear" and transposed and not chosen


def _names(module: str, targets: Sequence[object]) -> bool:
    return any(f".{module}".endswith(f".{target}") for target in targets)
