"""Heads tied to an embedding (``ensure_weight_tying``): stored as the transposes of its factors, aggregated with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedlora_kernels.adapters.lora_config import LoRAConfig
from fedlora_kernels.adapters.model import ModuleSpec, TensorSource, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError

__all__ = ["check_tied", "tie"]

MOST_PAIRS = 64
"""Layers that are compared with an embedding: a model has one or two, a hostile file may claim thousands."""
Shape = tuple[int, int, int]


def tie(modules: Mapping[str, ModuleSpec], config: LoRAConfig) -> dict[str, ModuleSpec]:
    """Take heads that are tied to an embedding out of ``modules`` and note them in its form.

    PEFT does not say which they are. It takes them out of ``target_modules``, and they have the shape of the embedding's
    transpose. FormatError where a head has another scale.
    """
    found = dict(modules)
    if not config.tied:
        return found
    heads = _linear_by_shape(modules, config.raw, chosen=False)
    for embedding in _embeddings(modules):
        alike = heads.get(_transposed(embedding))
        if not alike:
            continue
        head = alike.popleft()
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


def check_tied(modules: Mapping[str, ModuleSpec], config: Mapping[str, Any], source: TensorSource, who: str) -> None:
    """Raise FormatError where a tied head does not hold its embedding's transposes, or a layer of its own does."""
    if not config.get("ensure_weight_tying"):
        return
    for embedding in _embeddings(modules):
        for stored, head in zip((embedding.A, embedding.B), embedding.heads, strict=False):
            if not _are_transposes(stored, head, source):
                raise FormatError(
                    f"{who}, module {printable(embedding.form.tied)!r}: {printable(head.key)!r} is not the transpose of "
                    f"{printable(stored.key)!r}, although ensure_weight_tying says so; equal numbers needed. Remove the "
                    "tensors of the head, or set ensure_weight_tying to false"
                )
    others = _linear_by_shape(modules, config, chosen=True)
    pairs = ((one, other) for one in _embeddings(modules) for other in others.get(_transposed(one), ()))
    for one, other in itertools.islice(pairs, MOST_PAIRS):
        if _are_transposes(one.A, other.B, source) and _are_transposes(one.B, other.A, source):
            raise FormatError(
                f"{who}, module {printable(other.name)!r}: holds the transposes of {printable(one.name)!r}, as a head that "
                "ensure_weight_tying ties, but target_modules names it as a layer of its own; one of both needed. Take it out "
                "of target_modules, or set ensure_weight_tying to false"
            )


def _embeddings(modules: Mapping[str, ModuleSpec]) -> list[ModuleSpec]:
    return [module for module in modules.values() if module.kind == "embedding"]


def _transposed(module: ModuleSpec) -> Shape:
    return module.n, module.m, module.rank


def _linear_by_shape(
    modules: Mapping[str, ModuleSpec], config: Mapping[str, Any], *, chosen: bool
) -> dict[Shape, deque[ModuleSpec]]:
    """Linear layers by (m, n, r): those in a list of ``target_modules``, or all the others."""
    targets = config.get("target_modules")
    listed = set(map(str, targets)) if isinstance(targets, Sequence) and not isinstance(targets, str) else set()
    found: dict[Shape, deque[ModuleSpec]] = {}
    for module in modules.values():
        ends = itertools.accumulate(reversed(module.name.split(".")), lambda end, segment: f"{segment}.{end}")
        if module.kind == "linear" and any(end in listed for end in ends) == chosen:
            found.setdefault((module.m, module.n, module.rank), deque()).append(module)
    return found


def _are_transposes(mine: TensorSpec, other: TensorSpec, source: TensorSource) -> bool:
    """Whether two tensors hold the same numbers; NaN is left to those who look for it."""
    one, two = source.read(mine.key), source.read(other.key)
    return torch.equal(torch.nan_to_num(one.mT), torch.nan_to_num(two.to(one.dtype)))
