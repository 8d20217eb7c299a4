"""Tensors and configuration to an adapter of plain pairs: variants are folded or stripped as the options allow, else refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora_kernels.adapters.adalora import fold_adalora
from fedlora_kernels.adapters.inits import kept_init, kept_warning
from fedlora_kernels.adapters.kohya import kohya_config, read_kohya
from fedlora_kernels.adapters.model import Adapter, TensorSource, TensorSpec
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.peft import read_layout
from fedlora_kernels.adapters.variants import STATE

__all__ = ["assemble"]


def assemble(
    label: str,
    tensors: TensorSource,
    config: dict[str, Any] | None,
    metadata: Mapping[str, str],
    who: str,
    options: ReadOptions,
) -> Adapter:
    """Make an adapter of a source; without a configuration its tensors carry their scales, as kohya's do.

    One whose initialisation changed the base weight stands as it is where the options choose that. Raises FormatError and
    UnsupportedVariantError, beginning with ``who``.
    """
    common = {name: getattr(options, name) for name in ("adapter_name", "rank_from", "extras", "limits")}
    if config is None:
        layout = read_kohya(tensors, metadata, who, **common)
        config = kohya_config(metadata)
        return Adapter(label, layout.modules, layout.extras, config, tensors, metadata, layout.warnings, layout.notes)
    if options.adalora == "fold" and str(config.get("peft_type")).upper() == "ADALORA":
        tensors, config = fold_adalora(tensors, config, who, options.adapter_name)
    specs: Mapping[str, TensorSpec] = tensors.tensors
    warnings: list[str] = []
    if options.drop_state:
        specs, config, warnings = _without_state(specs, config, who)
    chosen = kept_init(config) is not None and (options.init is not None or options.init_factors is not None)
    read = {**config, "init_lora_weights": True} if chosen else config
    layout = read_layout(specs, read, who, parameter_order=options.parameter_order, **common)
    warnings += layout.warnings
    if chosen and options.init is not None:
        warnings.append(kept_warning(config, who))
    return Adapter(label, layout.modules, layout.extras, config, tensors, metadata, tuple(warnings), layout.notes)


def _without_state(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], who: str
) -> tuple[dict[str, TensorSpec], dict[str, Any], list[str]]:
    """Tensors and configuration without what a variant of plain update keeps beside its factors, and a warning for it."""
    fields = [field for field in STATE if config.get(field)]
    names = [STATE[field] for field in fields]
    left = {key: spec for key, spec in specs.items() if not any(name in key.split(".") for name in names)}
    texts = [f"{who}: {field}: {len(specs) - len(left)} tensors beside the factors were dropped" for field in fields]
    return left, {key: value for key, value in config.items() if key not in fields}, texts
