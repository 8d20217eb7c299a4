"""The layout of a PEFT adapter: what its header and its configuration say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora_kernels.adapters.expert_check import swapped
from fedlora_kernels.adapters.extras import FLOATS, Findings, check_float, read_extras
from fedlora_kernels.adapters.keys import TensorKey, canonical_keys, is_embedding
from fedlora_kernels.adapters.lora_config import LoRAConfig
from fedlora_kernels.adapters.model import ExtraSpec, Form, ModuleSpec, TensorSpec
from fedlora_kernels.adapters.moe import Stored, expert_modules, nesting
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.adapters.tied import tie
from fedlora_kernels.adapters.variants import GROUPS, refuse_variant
from fedlora_kernels.errors import FormatError, LimitError

__all__ = ["Layout", "read_layout"]

ATTENTION_OUTPUT = ".base_layer.out_proj"
"""Where MultiheadAttention keeps its output projection; PEFT gives both projections one rank."""
ALPHA_ZERO = "lora_alpha is 0, so the update is zero"


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
    parameter_order: Sequence[str] | None = None,
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
        parameter_order: target parameters of a module in the order in which the model registers them.
    """
    if not tensors:
        raise FormatError(f"{who}: no tensors; an adapter needs at least one pair of lora_A and lora_B")
    config = LoRAConfig(raw, who, parameter_order)
    keys = canonical_keys(tensors, who, adapter_name)
    findings: Findings = {}
    modules = tie(_modules(keys, tensors, config, rank_from, findings, limits or Limits()), config)
    found = read_extras(keys, tensors, config, modules, extras == "ignore", findings)
    notes = config.notes()
    if swapped(raw.get("peft_version")) and any(module.form.parameters for module in modules.values()):
        notes.append(
            f"{who}: saved by PEFT {printable(raw['peft_version'])}; from 0.19 on PEFT has the two sides of an expert the other way "
            "round unless the model is_transposed, and the result loads where this adapter does"
        )
    return Layout(modules, found, tuple(_warnings(who, findings) + config.warnings()), tuple(notes))


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
    nested = {nesting(path)[0] for path in factors if nesting(path)[1]}
    targets: dict[str, list[ModuleSpec]] = {}
    experts: dict[str, dict[int, Stored]] = {}
    for path, pair in factors.items():
        module, depth = nesting(path)
        target = _target(module, factors, next(iter(pair.values())).key, config.who)
        A, B = _checked(pair, f"{config.who}, module {printable(path)!r}")
        if module in nested or config.is_parameter(module, A.shape[0]):
            experts.setdefault(module, {})[depth] = A, B
            targets.setdefault(module, [])
        else:
            targets.setdefault(target, []).append(_module(path, target, A, B, config, rank_from, findings))
    count = len(factors)
    for module, pairs in experts.items():
        targets[module] += _experts(module, pairs, config, findings, limits)
        count += len(targets[module]) - len(pairs)
        if count > limits.modules_per_client:
            raise LimitError(f"{config.who}: {limits.over('modules_per_client', count)}")
    # the pairs of one target side by side, as the writer wants them
    modules: dict[str, ModuleSpec] = {}
    for made in (module for group in targets.values() for module in group):
        if made.name in modules:
            raise FormatError(
                f"{config.who}: module {printable(made.name)!r} is ambiguous: two pairs mean it. Rename one"
            )
        modules[made.name] = made
    return modules


def _target(path: str, factors: Mapping[str, Mapping[str, TensorSpec]], key: str, who: str) -> str:
    """The name by which the configuration knows a path: that of MultiheadAttention for its output projection."""
    attention = path.removesuffix(ATTENTION_OUTPUT)
    if attention != path and attention in factors:
        return attention
    if "base_layer" in path.split("."):
        refuse_variant("nested base layers", printable(key), GROUPS, who)
    return path


def _experts(
    module: str, pairs: Mapping[int, Stored], config: LoRAConfig, findings: Findings, limits: Limits
) -> list[ModuleSpec]:
    """The experts of the parameters of one module."""
    made = expert_modules(module, pairs, config.parameters, config, limits)
    if any(expert.scale == 0.0 for expert in made):
        findings.setdefault(("module", ALPHA_ZERO), []).append(module)
    return made


def _module(
    path: str, target: str, A: TensorSpec, B: TensorSpec, config: LoRAConfig, rank_from: str, findings: Findings
) -> ModuleSpec:
    rank = A.shape[0]
    scale = _scale(path, target, rank, config, rank_from, findings)
    return ModuleSpec(path, _form(path, target, A), B.shape[0], math.prod(A.shape[1:]), rank, scale, B, A)


def _form(path: str, target: str, A: TensorSpec) -> Form:
    if is_embedding(A):
        return Form("embedding", path, target)
    if len(A.shape) > 2:
        return Form(f"conv{len(A.shape) - 2}d", path, target, A.shape[1:])
    return Form("linear", path, target)


def _checked(pair: Mapping[str, TensorSpec], where: str) -> Stored:
    A, B = pair.get("A"), pair.get("B")
    if A is None or B is None or not _fit(A, B):
        raise _misfit(where, A, B)
    return A, B


def _fit(A: TensorSpec, B: TensorSpec) -> bool:
    """Whether these are a pair (r, n), (m, r) or (r, c_in, *k), (m, r, 1, ...) that can take part."""
    return _paired(A, B) and B.shape[1] == A.shape[0] and A.dtype in FLOATS and B.dtype in FLOATS


def _paired(A: TensorSpec, B: TensorSpec) -> bool:
    """Whether these have the dimensions of a pair of one kind."""
    known = (2,) if is_embedding(A) else (2, 3, 4, 5)
    same = is_embedding(A) == is_embedding(B) and len(A.shape) == len(B.shape)
    return same and len(A.shape) in known and 0 not in A.shape + B.shape and set(B.shape[2:]) <= {1}


def _misfit(where: str, A: TensorSpec | None, B: TensorSpec | None) -> FormatError:
    """What is wrong with a pair; raises UnsupportedVariantError for a grouped convolution."""
    if A is None or B is None:
        letter, other = ("A", "B") if A is None else ("B", "A")
        return FormatError(f"{where}: lora_{other} without lora_{letter}; both needed. The file is incomplete")
    for spec in (A, B):
        check_float(spec, where)
    if is_embedding(A) != is_embedding(B):
        return FormatError(f"{where}: {printable(A.key)!r} beside {printable(B.key)!r}; two factors of one kind needed")
    convolution = not is_embedding(A) and len(A.shape) == len(B.shape) > 2 and 0 not in A.shape + B.shape
    if convolution and B.shape[1] < A.shape[0] and A.shape[0] % B.shape[1] == 0:
        refuse_variant("a grouped convolution", f"lora_A {A.shape}, lora_B {B.shape}", GROUPS, where)
    if not _paired(A, B):
        needed = "(r, c_in, *k) and (m, r, 1, ...)" if convolution else "(r, n) and (m, r)"
        return FormatError(f"{where}: lora_A {A.shape}, lora_B {B.shape}; {needed} needed. Sharded export?")
    return FormatError(
        f"{where}: lora_A {A.shape} has {A.shape[0]} rows, lora_B {B.shape} has {B.shape[1]} columns; equal needed"
    )


def _scale(name: str, target: str, rank: int, config: LoRAConfig, rank_from: str, findings: Findings) -> float:
    resolved, alpha = config.resolve(target)
    if resolved != rank:
        found = f"the configuration says rank {resolved}, the tensors have {rank}"
        if rank_from != "tensor":
            raise FormatError(
                f"{config.who}, module {printable(name)!r}: {found}; equal ranks needed. Mend r or rank_pattern, or read with "
                "rank_from='tensor'"
            )
        findings.setdefault(("module", f"{found}; the tensors' rank is used"), []).append(name)
    if alpha == 0:
        findings.setdefault(("module", ALPHA_ZERO), []).append(name)
    return config.scale(alpha, rank)
