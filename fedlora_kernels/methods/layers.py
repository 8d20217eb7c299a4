"""Layers of a model, told by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

__all__ = ["layer_number", "layers_of"]

_INTEGER = re.compile("[0-9]{1,18}")


def layer_number(module: str) -> int | None:
    """The first integer in the path of a module, None without one.

    An integer is a whole part between dots (``t5.block.3.q`` is in layer 3); in names without dots, between underscores
    (``lora_te_layers_3_q``).
    """
    parts = module.split("." if "." in module else "_")
    return next((int(part) for part in parts if _INTEGER.fullmatch(part)), None)


def layers_of(modules: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the layers from shallow to deep, and the layer of each module, (L,) int64.

    Modules of one number form a layer, named by it. A module without a number is a layer of its own name, after all others, in
    the order given.
    """
    numbers = [layer_number(module) for module in modules]
    numbered = [str(number) for number in sorted({number for number in numbers if number is not None})]
    bare = [module for module, number in zip(modules, numbers, strict=True) if number is None]
    names = (*numbered, *dict.fromkeys(bare))
    place = {name: i for i, name in enumerate(names)}
    keys = [module if number is None else str(number) for module, number in zip(modules, numbers, strict=True)]
    return names, np.array([place[key] for key in keys], dtype=np.int64)
