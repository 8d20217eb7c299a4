"""The ``adapter_config.json`` of an aggregate: scale 1 in every module, and nothing that old PEFT does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, TypeVar

from fedlora_kernels.adapters.forms import pattern_ranks, target_ranks
from fedlora_kernels.adapters.inits import kept_fields
from fedlora_kernels.adapters.keys import TOKENS
from fedlora_kernels.adapters.lora_config import LoRAConfig
from fedlora_kernels.adapters.model import Adapter, ExtraSpec, ModuleSpec
from fedlora_kernels.adapters.patterns import PatternTable
from fedlora_kernels.errors import InputError

__all__ = ["peft_config", "rank_patterns"]

N = TypeVar("N", int, float)


def peft_config(
    adapters: Sequence[Adapter],
    ranks: Mapping[str, int],
    extras: Mapping[str, ExtraSpec] | None = None,
    *,
    modules: Mapping[str, ModuleSpec] | None = None,
    uniform_rank: int | None = None,
) -> dict[str, Any]:
    """Return the configuration of an output adapter whose factors carry their scale (docs/formats.md, What is written).

    Args:
        adapters: the clients, the first one giving what they share.
        ranks: rank of every module that is written, by name; the largest of a target counts.
        extras: tensors written beside the factors, by name.
        modules: what ``ranks`` speaks of, where it is more than the clients have.
        uniform_rank: the rank all modules are padded to, if they are.

    The top-level r is the largest rank and lora_alpha equals it; modules of another rank stand in rank_pattern and
    alpha_pattern under their full path. Clients that keep an initialisation give its fields too. Raises InputError without modules.
    """
    if not ranks:
        raise InputError("no modules to write; every module was zero or left out")
    extras = extras or {}
    if modules is None:
        modules = {name: module for adapter in reversed(adapters) for name, module in adapter.modules.items()}
    forms = [modules[name].form for name in ranks]
    common, ranks = target_ranks(ranks, modules), pattern_ranks(ranks, modules)
    configs = [adapter.config for adapter in adapters]
    largest = uniform_rank or max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _text(_common(configs, "task_type", None)),
        "base_model_name_or_path": _text(configs[0].get("base_model_name_or_path")),
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": _dropout(_common(configs, "lora_dropout", 0.0)),
        "bias": _bias(configs[0], extras),
        "fan_in_fan_out": bool(configs[0].get("fan_in_fan_out")),
        "target_modules": _target_modules(adapters, {form.target for form in forms if not form.parameters}),
        "modules_to_save": _modules_to_save(adapters, extras),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    patterns = {} if uniform_rank else rank_patterns(ranks, largest)
    if patterns:
        config["rank_pattern"] = patterns
        config["alpha_pattern"] = dict(patterns)
    if any(extra.rule == "lora_bias" for extra in extras.values()):
        config["lora_bias"] = True
    parameters = {form.target: form.parameters for form in forms if form.parameters}
    if parameters:
        config["target_parameters"] = _target_parameters(adapters, parameters)
        config["lora_dropout"] = 0.0  # PEFT refuses any other on parameters
        if isinstance(version := configs[0].get("peft_version"), str):
            config["peft_version"] = version  # says which axis of an expert A belongs to
    if any(name.endswith(f".{TOKENS}") for name in extras):
        config["trainable_token_indices"] = configs[0]["trainable_token_indices"]
    for key in ("layer_replication", "ensure_weight_tying"):
        if configs[0].get(key):
            config[key] = configs[0][key]
    return {**config, **kept_fields(adapters, common)}


def rank_patterns(ranks: Mapping[str, N], default: N) -> dict[str, N]:
    """Entries for all modules whose rank is not ``default``: full paths, made exact where one would hit another module.

    No module is hit by an entry of another value, so the order of entries does not matter: PEFT sorts them on saving.
    """
    special = {name: rank for name, rank in ranks.items() if rank != default}
    if not special:
        return {}
    keys = {name: name if re.fullmatch(r"[^\\^$*+?{}\[\]()|]+", name) else re.escape(name) for name in special}
    for escape in (False, True):
        owner = {key: name for name, key in keys.items()}
        table = PatternTable({key: special[name] for key, name in owner.items()}, "rank_pattern")
        wrong = {owner[key] for name in ranks for key in table.hits(name) if special[owner[key]] != ranks[name]}
        keys.update({name: "^" + (re.escape(name) if escape else keys[name]) for name in wrong})
    return {keys[name]: special[name] for name in sorted(special)}


def _common(configs: Sequence[Mapping[str, Any]], key: str, default: Any) -> Any:
    values = [config.get(key) for config in configs]
    return values[0] if values[0] is not None and all(value == values[0] for value in values) else default


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _dropout(value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    return float(value) if good else 0.0


def _bias(config: Mapping[str, Any], extras: Mapping[str, ExtraSpec]) -> Any:
    trained = any(extra.rule == "absolute" and name.endswith("bias") for name, extra in extras.items())
    return config.get("bias") or "none" if trained else "none"


def _modules_to_save(adapters: Sequence[Adapter], extras: Mapping[str, ExtraSpec]) -> list[str] | None:
    names = dict.fromkeys(name for adapter in adapters for name in adapter.config.get("modules_to_save") or ())
    absolute = [name for name, extra in extras.items() if extra.rule == "absolute"]
    kept = [name for name in names if any(LoRAConfig.covers((name,), tensor) for tensor in absolute)]
    return kept or None


def _target_parameters(adapters: Sequence[Adapter], parameters: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the clients' own value if nothing that it selects is left out, else the full names."""
    known = {
        module.form.target for adapter in adapters for module in adapter.modules.values() if module.form.parameters
    }
    if known == set(parameters):
        return _as_list(adapters[0].config.get("target_parameters")) or []
    return sorted(name for names in parameters.values() for name in names)


def _target_modules(adapters: Sequence[Adapter], written: Set[str]) -> Any:
    """Return the clients' own value if it is one list that selects exactly what is written, else the full paths."""
    first = adapters[0].config
    wanted = _as_list(first.get("target_modules"))
    same = wanted is not None and all(_as_list(adapter.config.get("target_modules")) == wanted for adapter in adapters)
    narrowed = any(
        adapter.config.get(key) for adapter in adapters for key in ("layers_to_transform", "exclude_modules")
    )
    if same and not narrowed and wanted is not None:
        known = {module.form.target for adapter in adapters for module in adapter.modules.values()} | written
        if all(_selects(wanted, name) == (name in written) for name in known):
            return wanted
    return sorted(written)


def _as_list(value: Any) -> list[str] | None:
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(name, str) for name in value):
        return sorted(value)
    return None


def _selects(targets: Sequence[str], name: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
