"""Where the scales of kohya and diffusers files come from: alpha tensors, or a configuration in the metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from fedlora_kernels.adapters.extras import FLOATS
from fedlora_kernels.adapters.lora_config import LoRAConfig
from fedlora_kernels.adapters.model import ModuleSpec, TensorSource, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.safetensors import parse_json
from fedlora_kernels.errors import FormatError

__all__ = ["DIFFUSERS", "Alphas", "Configured", "Scales"]

DIFFUSERS = "lora_adapter_metadata"
"""Metadata key under which diffusers keeps the configuration, its entries prefixed by component."""
LONGEST_CONFIG = 1 << 20


class Scales(Protocol):
    """Where the scale of a module comes from."""

    def of(self, name: str, rank: int) -> float:
        """Scale of a module."""

    def warnings(self, modules: Mapping[str, ModuleSpec]) -> list[str]:
        """Texts to warn of, after all modules were asked for."""

    def notes(self, modules: Mapping[str, ModuleSpec]) -> list[str]:
        """Texts for the report only."""


class Alphas:
    """Scale alpha / r where a module has an alpha, else 1."""

    def __init__(self, source: TensorSource, keys: Mapping[str, str], who: str) -> None:
        self._source, self._keys, self._who = source, keys, who

    def of(self, name: str, rank: int) -> float:
        """Scale of a module."""
        key = self._keys.get(name)
        return 1.0 if key is None else self._read(self._source.tensors[key], name) / rank

    def warnings(self, modules: Mapping[str, ModuleSpec]) -> list[str]:
        """Texts to warn of."""
        lacking = [name for name in modules if name not in self._keys]
        if not lacking or not self._keys:
            return []
        return [
            f"{self._who}, module {printable(lacking[0])!r}: no alpha here and in {len(lacking) - 1} more of {len(modules)} "
            "modules; scale 1 there"
        ]

    def notes(self, modules: Mapping[str, ModuleSpec]) -> list[str]:
        """Texts for the report only."""
        return [] if self._keys else [f"{self._who}: no alpha in any of {len(modules)} modules; scale 1"]

    def _read(self, spec: TensorSpec, name: str) -> float:
        where = f"{self._who}, module {printable(name)!r}"
        whole = not spec.dtype.is_floating_point and not spec.dtype.is_complex and spec.dtype != torch.bool
        if spec.shape not in ((), (1,)) or not (whole or spec.dtype in FLOATS):
            dtype = str(spec.dtype).removeprefix("torch.")
            raise FormatError(f"{where}: alpha is {dtype} of shape {spec.shape}; one number needed")
        alpha = float(self._source.read(spec.key).reshape(()).to(torch.float64))
        if not math.isfinite(alpha):
            raise FormatError(f"{where}: alpha is {alpha}; a finite number needed")
        if alpha == 0.0:
            raise FormatError(
                f"{where}: alpha is 0, which some loaders read as the rank and others as 0; a number needed. "
                "Write the alpha that was trained with, or remove the module"
            )
        return alpha


class Configured:
    """Scales of a diffusers file: a PEFT configuration for each component, the first segment of a name."""

    def __init__(self, text: str, who: str, rank_from: str) -> None:
        self._who, self._rank_from = who, rank_from
        if len(text) > LONGEST_CONFIG:
            raise FormatError(f"{who}: {DIFFUSERS} of {len(text)} characters; a configuration is smaller")
        fields: dict[str, dict[str, Any]] = {}
        for key, value in parse_json(text.encode("utf-8"), f"{who}: {DIFFUSERS}").items():
            component, _, field = key.rpartition(".")
            fields.setdefault(component, {})[field] = value
        self._configs = {
            component: LoRAConfig({"peft_type": "LORA", **entries}, f"{who}: {DIFFUSERS} of {printable(component)!r}")
            for component, entries in fields.items()
        }
        self._mended: list[str] = []

    def of(self, name: str, rank: int) -> float:
        """Scale of a module."""
        component, _, path = name.partition(".")
        if component not in self._configs:
            component, path = "", name
        where = f"{self._who}, module {printable(name)!r}"
        if component not in self._configs:
            known = ", ".join(map(printable, self._configs)) or "none"
            raise FormatError(f"{where}: {DIFFUSERS} has nothing for it; components there: {known}")
        config = self._configs[component]
        resolved, alpha = config.resolve(path)
        if resolved != rank:
            found = f"{DIFFUSERS} says rank {resolved}, the tensors have {rank}"
            if self._rank_from != "tensor":
                raise FormatError(f"{where}: {found}; equal ranks needed. Mend it, or read with rank_from='tensor'")
            self._mended.append(f"{where}: {found}; the tensors' rank is used")
        return config.scale(alpha, rank)

    def warnings(self, modules: Mapping[str, ModuleSpec]) -> list[str]:
        """Texts to warn of."""
        zero = [name for name, module in modules.items() if module.scale == 0.0]
        texts = [
            f"{self._who}, module {printable(name)!r}: lora_alpha is 0, so the update is zero" for name in zero[:1]
        ]
        return self._mended + texts + [text for config in self._configs.values() for text in config.warnings()]

    def notes(self, modules: Mapping[str, ModuleSpec]) -> list[str]:
        """Texts for the report only."""
        return [text for config in self._configs.values() for text in config.notes()]
