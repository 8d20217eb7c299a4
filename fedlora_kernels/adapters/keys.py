"""Tensor keys of PEFT checkpoints: from every spelling in use to one canonical name."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedlora_kernels.adapters.model import TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.variants import refuse_key, refuse_variant
from fedlora_kernels.errors import FedLoRAError, FormatError, UnsupportedVariantError

__all__ = ["PREFIX", "TOKENS", "TensorKey", "canonical_keys", "is_embedding"]

PREFIX = "base_model.model."
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
TOKENS = "trainable_tokens_delta"
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")
KEPT = 1 << 14
"""Parsed keys that are kept: the clients of a round have the same ones."""


@dataclass(frozen=True, slots=True)
class TensorKey:
    """A parsed key: ``part`` is "A", "B", "lora_bias" or "extra"; ``name`` is the module path, or the extra's own name."""

    key: str
    part: str
    name: str
    adapter: str | None = None


def is_embedding(tensor: TensorSpec) -> bool:
    """Whether this is a factor of an embedding: the key says so, not a shape."""
    return ".lora_embedding_" in f".{tensor.key}"


def canonical_keys(keys: Iterable[str], who: str, adapter_name: str | None = None) -> list[TensorKey]:
    """Parse all keys of one adapter, in order; with ``adapter_name`` only that adapter's.

    Raises FormatError for two adapter names without a choice and for two keys of one meaning ("ambiguous"), and
    UnsupportedVariantError for tensors of other variants and unknown ``lora_`` tensors, naming them.
    """
    parsed = list(_chosen([_parsed(key, who) for key in keys], adapter_name, who))
    seen: dict[tuple[str, str], str] = {}
    for item in parsed:
        other = seen.setdefault((item.part, item.name), item.key)
        if other != item.key:
            raise FormatError(
                f"{who}: keys {printable(other)!r} and {printable(item.key)!r} are ambiguous: both mean "
                f"{printable(item.name)!r}. Remove one of them"
            )
    return parsed


def _chosen(parsed: list[TensorKey], adapter_name: str | None, who: str) -> Iterator[TensorKey]:
    names = sorted({item.adapter for item in parsed if item.adapter is not None})
    if adapter_name is None and len(names) > 1:
        listing = ", ".join(printable(name) for name in names[:10])
        raise FormatError(f"{who}: several adapters in one file ({listing}); choose one with adapter_name=")
    if adapter_name is not None and parsed and not names:
        raise FormatError(
            f"{who}: no adapter {printable(adapter_name)!r}; there is one without a name, as in {printable(parsed[0].key)!r}. "
            "Leave out adapter_name="
        )
    if adapter_name is not None and adapter_name not in names:
        listing = ", ".join(printable(name) for name in names[:10])
        raise FormatError(f"{who}: no adapter {printable(adapter_name)!r}; there are {listing}")
    return (item for item in parsed if adapter_name is None or item.adapter in (None, adapter_name))


def _parsed(key: str, who: str) -> TensorKey:
    try:
        return _known(key)
    except FedLoRAError:
        return _parse(key, who)


@functools.lru_cache(KEPT)
def _known(key: str) -> TensorKey:
    return _parse(key, "")


def _parse(key: str, who: str) -> TensorKey:
    segments = _strip(key)
    if not all(segments) or not (key.isascii() or _is_text(key)):
        raise FormatError(f"{who}: malformed key {printable(key)!r}; dotted names needed")
    at = next((i for i in reversed(range(len(segments))) if segments[i] in FACTORS), None)
    if at is None:
        refuse_key(segments, key, who)
        if any("lora_" in segment for segment in segments):
            raise UnsupportedVariantError(
                f"{who}: unknown tensor {printable(key)!r}; only lora_A and lora_B can be aggregated"
            )
        return _extra(key, segments)
    refuse_key(segments[:at] + segments[at + 1 :], key, who)
    return _factor(key, segments[:at], segments[at], segments[at + 1 :], who)


def _is_text(key: str) -> bool:
    """Whether a key holds no half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in key)


def _factor(key: str, path: list[str], factor: str, tail: list[str], who: str) -> TensorKey:
    module = ".".join(path)
    if not path:
        raise FormatError(f"{who}: malformed key {printable(key)!r}; a module path needed")
    letter = factor[-1]
    if factor.startswith("lora_embedding_"):
        if len(tail) > 1 or tail == ["weight"]:
            raise UnsupportedVariantError(f"{who}: unknown tensor {printable(key)!r}; {factor} has no .weight")
        return TensorKey(key, letter, module, tail[0] if tail else None)
    kind, adapter = (tail[-1] if tail else ""), (tail[0] if len(tail) == 2 else None)
    if kind not in ("weight", "bias") and len(tail) <= 1:
        refuse_variant("AdaLoRA or another form", f"{printable(key)} without .weight", "Train plain LoRA", who)
    if len(tail) > 2 or kind not in ("weight", "bias") or (kind, letter) == ("bias", "A"):
        raise UnsupportedVariantError(
            f"{who}: unknown tensor {printable(key)!r}; only lora_A and lora_B can be aggregated"
        )
    return TensorKey(key, letter if kind == "weight" else "lora_bias", module, adapter)


def _extra(key: str, segments: list[str]) -> TensorKey:
    """``score.modules_to_save.default.weight`` of a live model is ``score.weight`` of a file; token rows likewise."""
    if segments[-2:-1] == [TOKENS]:
        return TensorKey(key, "extra", ".".join(segments[:-1]), segments[-1])
    if "modules_to_save" in segments[1:-2]:
        at = segments.index("modules_to_save", 1)
        return TensorKey(key, "extra", ".".join(segments[:at] + segments[at + 2 :]), segments[at + 1])
    return TensorKey(key, "extra", ".".join(segments))


def _strip(key: str) -> list[str]:
    """Segments of a key without wrappers and prefix; ``model.`` goes only where ``base_model.`` follows it."""
    segments = [segment for segment in key.split(".") if segment not in WRAPPERS]
    if segments[:1] == ["module"] and len(segments) > 1:
        segments = segments[1:]
    if segments[:2] == ["model", "base_model"]:
        segments = segments[1:]
    return segments[2:] if segments[:2] == ["base_model", "model"] else segments
