"""kohya, ComfyUI and diffusers files: one safetensors file, modules by verbatim names, scales in ``alpha`` tensors.

Names have their dots turned into underscores (``lora_unet_down_blocks_0_...``), which nothing turns back: they are kept as they
are. Diffusers files hold dotted names, and their configuration as JSON in the metadata.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedlora_kernels.adapters.extras import check_float
from fedlora_kernels.adapters.keys import KEPT, PREFIX
from fedlora_kernels.adapters.kohya_scales import DIFFUSERS, Alphas, Configured, Scales
from fedlora_kernels.adapters.model import Form, ModuleSpec, TensorSource, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.peft import Layout
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.adapters.variants import CONVERT, GROUPS, MERGE, refuse_variant
from fedlora_kernels.errors import FormatError, LimitError

__all__ = ["ALPHA", "FILE_SUFFIX", "KOHYA", "alpha_tensor", "carries_scales", "is_factor", "kohya_config", "read_kohya"]

KOHYA = (".lora_up.weight", ".lora_down.weight")
"""What kohya's own scripts write after a module's name: B, A."""
NAMED = (".lora_B.{}.weight", ".lora_A.{}.weight")
SPELLINGS = (
    KOHYA,
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B", ".lora_A"),
)
ALPHA = ".alpha"
FILE_SUFFIX = ".safetensors"

NO_PAIRS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "boft_": "BOFT"}
"""Variants by what the tensor's own name begins with: nothing of them could be left out."""
NO_SUM = {
    "lora_mid.weight": ("a Tucker decomposition", CONVERT),
    "dora_scale": ("DoRA", MERGE),
    "lora_magnitude_vector": ("DoRA", MERGE),
    "lora_magnitude_vector.weight": ("DoRA", MERGE),
}
APART = {
    "diff": "full weight differences",
    "diff_b": "bias differences",
    "set_weight": "replaced weights",
    "w_norm": "norm weights",
    "b_norm": "norm biases",
    "reshape_weight": "reshaped weights",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
}
"""Tensors beside the pairs, which extras='ignore' drops."""


def carries_scales(keys: Iterable[str]) -> bool:
    """Whether these keys say all that is needed without a configuration: kohya's own, or any with alphas."""
    keys = list(keys)
    found = [parsed for parsed in map(_factor, keys) if parsed is not None]
    if any(name.startswith(PREFIX) for name, _, _ in found):
        return False
    others = any("lora_B" not in spelling[0] for _, spelling, _ in found)
    return others or (bool(found) and any(key.endswith(ALPHA) for key in keys))


def is_factor(key: str) -> bool:
    """Whether a key is that of an A or B, in any spelling, PEFT's included."""
    return _factor(key) is not None


def alpha_tensor(alpha: float) -> torch.Tensor:
    """An alpha as it is stored: float32 where that holds it, else float64."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if float(single.double()) == alpha else torch.tensor(alpha, dtype=torch.float64)


def kohya_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a PEFT configuration would say of a file without one."""
    base = metadata.get("ss_sd_model_name")
    return {"base_model_name_or_path": base} if base else {}


def read_kohya(
    source: TensorSource,
    metadata: Mapping[str, str],
    who: str,
    *,
    adapter_name: str | None = None,
    rank_from: str = "config",
    extras: str = "strict",
    limits: Limits | None = None,
) -> Layout:
    """Match the tensors of a kohya file: modules under their verbatim names, each with the scale of its own alpha.

    Args:
        source: the file or state dict; of its tensors only the alphas are read.
        metadata: strings of the file's header.
        who: the beginning of every message.
        adapter_name: which adapter, where keys carry several adapter names.
        rank_from: as in `read_layout`, for diffusers files, which have a configuration.
        extras: "ignore" drops tensors beside the pairs with a warning; anything else refuses them.
        limits: caps.

    Raises FormatError and UnsupportedVariantError as `read_layout`.
    """
    if not source.tensors:
        raise FormatError(f"{who}: no tensors; an adapter needs at least one pair of lora_up and lora_down")
    limits = limits or Limits()
    pairs, spelling, rest = _pairs(source.tensors, who, adapter_name)
    alphas = {key: key.removesuffix(ALPHA) for key in rest if key.endswith(ALPHA)}
    dropped = _check_rest([key for key in rest if alphas.get(key) not in pairs], who, ignore=extras == "ignore")
    if not pairs:
        raise FormatError(f"{who}: no pairs of factors among {len(source.tensors)} tensors; is this a LoRA adapter?")
    if len(pairs) > limits.modules_per_client:
        raise LimitError(f"{who}: {limits.over('modules_per_client', len(pairs))}")
    scales: Scales
    given = {name: key for key, name in alphas.items() if name in pairs}
    if DIFFUSERS in metadata:
        if given:
            key = next(iter(given.values()))
            raise FormatError(
                f"{who}: both {DIFFUSERS} in the metadata and alpha tensors, as {printable(key)!r}; two scales. Remove one of them"
            )
        scales = Configured(metadata[DIFFUSERS], who, rank_from)
    else:
        scales = Alphas(source, given, who)
    modules = {name: _module(name, pair, spelling, scales, who) for name, pair in pairs.items()}
    return Layout(modules, {}, (*scales.warnings(modules), *dropped), tuple(scales.notes(modules)))


Pairs = dict[str, dict[str, TensorSpec]]


def _pairs(
    tensors: Mapping[str, TensorSpec], who: str, adapter_name: str | None
) -> tuple[Pairs, tuple[str, str], list[str]]:
    """Factors by module, the one spelling of the file, and the keys that are no factors."""
    rest: list[str] = []
    spelled: dict[tuple[str, str], Pairs] = {}
    for key, spec in tensors.items():
        parsed = _factor(key)
        if parsed is None:
            rest.append(key)
            continue
        name, spelling, letter = parsed
        _check_name(name, spelling, key, who)
        spelled.setdefault(spelling, {}).setdefault(name, {})[letter] = spec
    chosen = _chosen(spelled, who, adapter_name)
    return spelled.get(chosen, {}), chosen, rest


def _chosen(spelled: Mapping[tuple[str, str], Pairs], who: str, adapter_name: str | None) -> tuple[str, str]:
    named = {_adapter_of(spelling): spelling for spelling in spelled if _adapter_of(spelling) is not None}
    listing = ", ".join(printable(name) for name in list(named)[:10])
    if adapter_name is not None and spelled:
        if adapter_name in named:
            return named[adapter_name]
        there = f"there are {listing}" if named else "keys carry no adapter name. Leave out adapter_name="
        raise FormatError(f"{who}: no adapter {printable(adapter_name)!r}; {there}")
    if len(spelled) > 1 and len(named) == len(spelled):
        raise FormatError(f"{who}: several adapters in one file ({listing}); choose one with adapter_name=")
    if len(spelled) > 1:
        (one, first), (two, second) = list(spelled.items())[:2]
        texts = [printable(_some_key(pairs)) for pairs in (first, second)]
        raise FormatError(
            f"{who}: two spellings in one file, {texts[0]!r} ({one[0]}) and {texts[1]!r} ({two[0]}); one needed. "
            "Rename one part's keys, or split the file"
        )
    return next(iter(spelled), KOHYA)


def _some_key(pairs: Pairs) -> str:
    return next(spec.key for pair in pairs.values() for spec in pair.values())


def _adapter_of(spelling: tuple[str, str]) -> str | None:
    """The adapter name in a spelling such as ``.lora_B.default.weight``."""
    segments = spelling[0].split(".")
    return segments[2] if len(segments) == 4 and segments[1] == "lora_B" else None


@functools.lru_cache(KEPT)
def _factor(key: str) -> tuple[str, tuple[str, str], str] | None:
    """Module name, spelling and letter of a key; None for one that is no factor."""
    for spelling in SPELLINGS:
        for suffix, letter in zip(spelling, "BA", strict=True):
            if key.endswith(suffix):
                return key[: -len(suffix)], spelling, letter
    path, *tail = key.rsplit(".", 3)
    if len(tail) == 3 and tail[0] in ("lora_A", "lora_B") and tail[1] and tail[2] == "weight":
        return path, (NAMED[0].format(tail[1]), NAMED[1].format(tail[1])), tail[0][-1]
    return None


def _check_name(name: str, spelling: tuple[str, str], key: str, who: str) -> None:
    if not name or not all(name.split(".")) or any("\ud800" <= char <= "\udfff" for char in key):
        raise FormatError(f"{who}: malformed key {printable(key)!r}; a module name needed before {spelling[0]}")
    if name.startswith(PREFIX):
        raise FormatError(
            f"{who}: {printable(key)!r} is a key of a PEFT folder, whose scale stands in its adapter_config.json. "
            "Give the folder, or its configuration as config="
        )
    if name.startswith("lora_") and "." in name:
        raise FormatError(
            f"{who}: malformed key {printable(key)!r}: the name before {spelling[0]} holds a dot, where loaders cut it; "
            "underscores needed"
        )


def _check_rest(keys: list[str], who: str, *, ignore: bool) -> list[str]:
    """Refuse what is neither a factor nor its alpha; the text of a warning where it is dropped."""
    for key in keys:
        segments = key.split(".")
        last, last_two = segments[-1], ".".join(segments[-2:])
        for tail in (last, last_two):
            if tail in NO_SUM:
                variant, remedy = NO_SUM[tail]
                refuse_variant(variant, printable(key), remedy, who)
        for prefix, variant in NO_PAIRS.items():
            if any(segment.startswith(prefix) for segment in segments[1:]):
                refuse_variant(variant, printable(key), CONVERT, who)
        if ignore:
            continue
        if known := APART.get(last) or APART.get(last_two):
            refuse_variant(known, printable(key), "Drop such tensors with extras='ignore'", who)
        found = "an alpha without its pair" if last == "alpha" else "neither a factor nor an alpha"
        raise FormatError(
            f"{who}: tensor {printable(key)!r} is {found}. Remove it, or drop such tensors with extras='ignore'"
        )
    if not keys:
        return []
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return [f"{who}, tensor {printable(keys[0])!r}{more}: not understood, dropped"]


def _module(
    name: str, pair: Mapping[str, TensorSpec], spelling: tuple[str, str], scales: Scales, who: str
) -> ModuleSpec:
    where = f"{who}, module {printable(name)!r}"
    if len(pair) < 2:
        found, lacking = spelling if "B" in pair else spelling[::-1]
        raise FormatError(f"{where}: {found[1:]} without {lacking[1:]}; both needed. The file is incomplete")
    B, A = pair["B"], pair["A"]
    for spec in (B, A):
        check_float(spec, where)
    if not 2 <= len(A.shape) == len(B.shape) <= 5 or 0 in A.shape + B.shape or set(B.shape[2:]) - {1}:
        raise FormatError(
            f"{where}: down {A.shape}, up {B.shape}; (r, n) and (m, r), or (r, c_in, *kernel) and (m, r, 1, ...) needed"
        )
    if B.shape[1] != A.shape[0]:
        if len(A.shape) > 2 and A.shape[0] % B.shape[1] == 0:
            refuse_variant("a grouped convolution", f"down {A.shape}, up {B.shape}", GROUPS, who)
        raise FormatError(
            f"{where}: down {A.shape} has {A.shape[0]} rows, up {B.shape} has {B.shape[1]} columns; equal needed"
        )
    rank, kernel = A.shape[0], A.shape[1:] if len(A.shape) > 2 else ()
    kind = f"conv{len(kernel) - 1}d" if kernel else "linear"
    form = Form(kind, name, name, kernel, spelling=spelling)
    return ModuleSpec(name, form, B.shape[0], math.prod(A.shape[1:]), rank, scales.of(name, rank), B, A)
