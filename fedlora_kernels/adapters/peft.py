"""PEFT's LoRA configuration: what it says about scales and extra tensors, and the layout of a whole adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedlora_kernels.adapters.keys import TensorKey, canonical_keys
from fedlora_kernels.adapters.model import ExtraSpec, Form, ModuleSpec, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.patterns import PatternTable
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.adapters.variants import GROUPS, check_variant, refuse_variant
from fedlora_kernels.errors import FormatError, LimitError

__all__ = ["Layout", "LoRAConfig", "read_layout"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EMBEDDINGS = ("embed_tokens", "lm_head")
Findings = dict[tuple[str, str], list[str]]
"""Names by what was found ("module" or "tensor", text)."""


@dataclass
class LoRAConfig:
    """The fields of ``adapter_config.json`` that decide scales and extra tensors, checked.

    Raises UnsupportedVariantError for variants and initialisations that are not aggregated here, FormatError for fields
    of a wrong type or range.
    """

    raw: Mapping[str, Any]
    who: str
    rank: int = field(init=False)
    alpha: float = field(init=False)
    rslora: bool = field(init=False)
    bias: str = field(init=False)
    modules_to_save: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_variant(self.raw, self.who)
        self.rank = self._rank(self.raw.get("r", 8), "r")
        self.alpha = self._number(self.raw.get("lora_alpha", 8), "lora_alpha")
        self.rslora = self._flag("use_rslora")
        self._flag("lora_bias")
        self._flag("fan_in_fan_out")
        self.bias = self.raw.get("bias") or "none"
        if self.bias not in ("none", "all", "lora_only"):
            raise FormatError(f"{self.who}: bias is {printable(self.bias)!r}; 'none', 'all' or 'lora_only' needed")
        self.modules_to_save = self._names("modules_to_save")
        self._ranks = self._table("rank_pattern", self._rank)
        self._alphas = self._table("alpha_pattern", self._number)

    def resolve(self, name: str) -> tuple[int, float]:
        """Return (rank, alpha) of the module ``name``, the path in the base model."""
        return self._ranks.resolve(name, self.rank), self._alphas.resolve(name, self.alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """Return s = alpha / r, or alpha / sqrt(r) with rsLoRA; r is the module's own rank."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def warnings(self) -> list[str]:
        """Texts on patterns that contradict each other, after all modules were resolved."""
        return self._ranks.warnings() + self._alphas.warnings()

    def notes(self) -> list[str]:
        """Texts on patterns that match nothing, after all modules were resolved."""
        return self._ranks.notes() + self._alphas.notes()

    def saves(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to one of ``modules_to_save``."""
        return self.covers(self.modules_to_save, name)

    @staticmethod
    def covers(modules: Sequence[str], name: str) -> bool:
        """Whether the tensor ``name`` lies in one of ``modules``: PEFT takes every module whose path ends like that."""
        segments = name.split(".")
        paths = [".".join(segments[: i + 1]) for i in range(len(segments) - 1)]
        return any(path.endswith(module) for path in paths for module in modules)

    def _flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{self.who}: {key} is {printable(value)}; true or false needed")
        return bool(value)

    def _rank(self, value: Any, key: str) -> int:
        if type(value) is not int or value < 1:
            raise FormatError(f"{self.who}: {key} is {printable(value)}; an integer of at least 1 needed")
        return value

    def _number(self, value: Any, key: str) -> float:
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise FormatError(f"{self.who}: {key} is {printable(value)}; a finite number needed")
        return number

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or ()
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
            raise FormatError(f"{self.who}: {key} is {printable(value)}; a list of names needed")
        return tuple(value)

    def _table(self, key: str, check: Any) -> PatternTable:
        value = self.raw.get(key) or {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise FormatError(f"{self.who}: {key} is {printable(value)}; a mapping from patterns to numbers needed")
        values = {name: check(entry, f"{key}[{printable(name)!r}]") for name, entry in value.items()}
        return PatternTable(values, f"{self.who}: {key}")


@dataclass(frozen=True)
class Layout:
    """What an adapter's header and configuration say together."""

    modules: Mapping[str, ModuleSpec]
    extras: Mapping[str, ExtraSpec]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def read_layout(
    tensors: Mapping[str, TensorSpec],
    raw: Mapping[str, Any],
    who: str,
    *,
    adapter_name: str | None = None,
    rank_from: str = "config",
    extras: str = "strict",
    limits: Limits | None = None,
) -> Layout:
    """Match tensors with configuration: modules with their scales, extra tensors with their rules.

    Args:
        tensors: what the file or state dict holds, by its own keys.
        raw: the configuration as PEFT writes it.
        who: the beginning of every message.
        adapter_name: which adapter, where keys carry several adapter names.
        rank_from: "config" refuses a rank that differs from the tensor's; "tensor" takes the tensor's and warns.
        extras: "ignore" drops unknown tensors with a warning; anything else refuses them.
        limits: caps; the number of modules counts here, before each is looked up in the patterns.
    """
    if not tensors:
        raise FormatError(f"{who}: no tensors; an adapter needs at least one pair of lora_A and lora_B")
    config = LoRAConfig(raw, who)
    keys = canonical_keys(tensors, who, adapter_name)
    findings: Findings = {}
    modules = _modules(keys, tensors, config, rank_from, findings, limits or Limits())
    found = _extras(keys, tensors, config, modules, extras == "ignore", findings)
    return Layout(modules, found, tuple(_warnings(who, findings) + config.warnings()), tuple(config.notes()))


def _warnings(who: str, findings: Findings) -> list[str]:
    """One text for each finding, however many modules or tensors it was made in."""
    texts = []
    for (kind, text), names in findings.items():
        where = f"{kind} {printable(names[0])!r}"
        texts.append(
            f"{who}, {where}: {text}" if len(names) == 1 else f"{who}, {where} and {len(names) - 1} more: {text}"
        )
    return texts


def _modules(
    keys: list[TensorKey],
    tensors: Mapping[str, TensorSpec],
    config: LoRAConfig,
    rank_from: str,
    findings: Findings,
    limits: Limits,
) -> dict[str, ModuleSpec]:
    factors: dict[str, dict[str, TensorSpec]] = {}
    for key in keys:
        if key.part in ("A", "B"):
            factors.setdefault(key.name, {})[key.part] = tensors[key.key]
    if not factors:
        raise FormatError(f"{config.who}: no lora_A and lora_B among {len(keys)} tensors; is this a LoRA adapter?")
    if len(factors) > limits.modules_per_client:
        raise LimitError(f"{config.who}: {limits.over('modules_per_client', len(factors))}")
    modules = [module for path, pair in factors.items() for module in _pairs(path, pair, config, rank_from, findings)]
    return {module.name: module for module in modules}


def _pairs(
    path: str, pair: Mapping[str, TensorSpec], config: LoRAConfig, rank_from: str, findings: Findings
) -> list[ModuleSpec]:
    """The modules whose factors two tensors hold."""
    A, B = pair.get("A"), pair.get("B")
    if A is None or B is None or not _fit(A, B):
        raise _misfit(f"{config.who}, module {printable(path)!r}", A, B)
    rank = A.shape[0]
    scale = _scale(path, rank, config, rank_from, findings)
    return [ModuleSpec(path, _form(path, A), B.shape[0], math.prod(A.shape[1:]), rank, scale, B, A)]


def _form(path: str, A: TensorSpec) -> Form:
    if "lora_embedding_A" in A.key.split("."):
        return Form("embedding", path, path)
    if len(A.shape) > 2:
        return Form(f"conv{len(A.shape) - 2}d", path, path, A.shape[1:])
    return Form("linear", path, path)


def _fit(A: TensorSpec, B: TensorSpec) -> bool:
    """Whether these are a pair (r, n), (m, r) or (r, c_in, *k), (m, r, 1, ...) that can take part."""
    paired = 2 <= len(A.shape) == len(B.shape) <= 5 and 0 not in A.shape + B.shape and set(B.shape[2:]) <= {1}
    return paired and B.shape[1] == A.shape[0] and A.dtype in FLOATS and B.dtype in FLOATS


def _misfit(where: str, A: TensorSpec | None, B: TensorSpec | None) -> FormatError:
    """What is wrong with a pair; raises UnsupportedVariantError for a grouped convolution."""
    if A is None or B is None:
        letter, other = ("A", "B") if A is None else ("B", "A")
        return FormatError(f"{where}: lora_{other} without lora_{letter}; both needed. The file is incomplete")
    for spec in (A, B):
        check_float(spec, where)
    convolution = len(A.shape) == len(B.shape) > 2 and 0 not in A.shape + B.shape
    if convolution and B.shape[1] < A.shape[0] and A.shape[0] % B.shape[1] == 0:
        refuse_variant("a grouped convolution", f"lora_A {A.shape}, lora_B {B.shape}", GROUPS, where)
    if not 2 <= len(A.shape) == len(B.shape) <= 5 or 0 in A.shape + B.shape or not set(B.shape[2:]) <= {1}:
        needed = "(r, c_in, *k) and (m, r, 1, ...)" if convolution else "(r, n) and (m, r)"
        return FormatError(f"{where}: lora_A {A.shape}, lora_B {B.shape}; {needed} needed. Sharded export?")
    return FormatError(
        f"{where}: lora_A {A.shape} has {A.shape[0]} rows, lora_B {B.shape} has {B.shape[1]} columns; equal needed"
    )


def _scale(name: str, rank: int, config: LoRAConfig, rank_from: str, findings: Findings) -> float:
    resolved, alpha = config.resolve(name)
    if resolved != rank:
        found = f"the configuration says rank {resolved}, the tensors have {rank}"
        if rank_from != "tensor":
            raise FormatError(
                f"{config.who}, module {printable(name)!r}: {found}; equal ranks needed. Mend r or rank_pattern, or read with "
                "rank_from='tensor'"
            )
        findings.setdefault(("module", f"{found}; the tensors' rank is used"), []).append(name)
    if alpha == 0:
        findings.setdefault(("module", "lora_alpha is 0, so the update is zero"), []).append(name)
    return config.scale(alpha, rank)


def check_float(spec: TensorSpec, where: str) -> None:
    """Refuse a tensor that takes part in the aggregate with a dtype other than float64, 32, 16 and bfloat16."""
    if spec.dtype not in FLOATS:
        raise FormatError(
            f"{where}: tensor {printable(spec.key)!r} is {str(spec.dtype).removeprefix('torch.')}; "
            "float64, float32, float16 or bfloat16 needed. Dequantise the adapter first"
        )


def _extras(
    keys: list[TensorKey],
    tensors: Mapping[str, TensorSpec],
    config: LoRAConfig,
    modules: Mapping[str, ModuleSpec],
    ignore: bool,
    findings: Findings,
) -> dict[str, ExtraSpec]:
    found: dict[str, ExtraSpec] = {}
    for key in keys:
        spec = tensors[key.key]
        if key.part == "lora_bias":
            extra = _lora_bias(key, spec, config, modules)
        elif key.part == "extra" and _is_absolute(key.name, config):
            owner = key.name.removesuffix(".base_layer.bias")
            extra = ExtraSpec(key.name, "absolute", spec, owner if owner in modules else None)
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


def _is_absolute(name: str, config: LoRAConfig) -> bool:
    """modules_to_save, biases that were trained, and embeddings saved along: values, not changes."""
    segments = name.split(".")
    bias = {"none": False, "all": segments[-1] == "bias", "lora_only": name.endswith(".bias")}[config.bias]
    path = segments[:-1][:-1] if segments[-2:-1] == ["base_layer"] else segments[:-1]
    embedding = segments[-1] == "weight" and path[-1:] and path[-1] in EMBEDDINGS
    return bool(bias or embedding or config.saves(name))
