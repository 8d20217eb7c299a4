"""Adapter variants and initialisations that are refused by name (docs/formats.md, What is refused)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError, UnsupportedVariantError

__all__ = ["GROUPS", "STATE", "changes_base", "check_variant", "refuse_key", "refuse_variant"]

MERGE = "Merge it into the base model first, or train plain LoRA"
CONVERT = "Convert it to LoRA first (peft.tuners.lora.conversion.convert_to_lora)"
GROUPS = "Merge these modules into the base model first, or leave them out of the adapter"
KOHYA = "Convert it to a PEFT folder first"
FOLD = "Fold its singular values into B with adalora='fold'"
DROP = "Its factors are plain LoRA: leave its other state out with drop_state=True"
TRAIN = "It is no pair of factors for a weight matrix; train plain LoRA"

PEFT_TYPES = {"LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "ADALORA": "AdaLoRA"}
NO_PAIRS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
    "LN_TUNING",
    "POLY",
    "XLORA",
    "TRAINABLE_TOKENS",
)
CONFIG_MARKERS = {
    "use_dora": ("DoRA", MERGE),
    "kasa_config": ("KaSA", MERGE),
    "use_qalora": ("QALoRA", MERGE),
    "use_bdlora": ("BD-LoRA", MERGE),
    "alora_invocation_tokens": ("aLoRA", "It is active on some tokens only; train plain LoRA"),
    "arrow_config": ("Arrow", "It routes between adapters; aggregate those instead"),
    "monteclora_config": ("MonteCLoRA", "Its factors are sampled; train plain LoRA"),
    "velora_config": ("VeLoRA", DROP),
}
KEY_MARKERS = {
    "lora_magnitude_vector": ("DoRA", MERGE),
    "lora_diag": ("KaSA", MERGE),
    "lora_E": ("AdaLoRA", FOLD),
    "lora_ranknum": ("AdaLoRA", FOLD),
    "lora_arrow": ("Arrow", "It routes between adapters; aggregate those instead"),
    "lora_monteclora_sampler": ("MonteCLoRA", "Its factors are sampled; train plain LoRA"),
    "lora_velora_embed": ("VeLoRA", DROP),
    "lora_down": ("the kohya format", KOHYA),
    "lora_up": ("the kohya format", KOHYA),
    "lora_mid": ("a Tucker decomposition of kohya", CONVERT),
    "dora_scale": ("DoRA", MERGE),
}
KEY_PREFIXES = {
    "hada_": ("LoHa", CONVERT),
    "lokr_": ("LoKr", CONVERT),
    "oft_": ("OFT", CONVERT),
    "boft_": ("BOFT", CONVERT),
    "ia3_": ("IA3", CONVERT),
    "vera_": ("VeRA", CONVERT),
}
_PREFIXES = tuple(KEY_PREFIXES)
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
STATE = {"velora_config": "lora_velora_embed"}
"""Variants whose update is plain, by their field: the tensors that they keep beside the factors."""
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def check_variant(config: Mapping[str, Any], who: str) -> None:
    """Refuse a configuration that asks for another update than ``scale * B @ A``, naming the variant."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise FormatError(
            f"{who}: peft_type is {printable(kind)}; 'LORA' needed. Is this the configuration of an adapter?"
        )
    if kind.upper() != "LORA":
        variant = PEFT_TYPES.get(kind.upper(), printable(kind))
        remedy = FOLD if kind.upper() == "ADALORA" else TRAIN if kind.upper() in NO_PAIRS else CONVERT
        refuse_variant(variant, f"peft_type {printable(kind)}", remedy, who)
    for marker, (variant, remedy) in CONFIG_MARKERS.items():
        if config.get(marker):
            refuse_variant(variant, marker, remedy, who)
    _check_init(config.get("init_lora_weights", True), who)


def refuse_key(segments: list[str], key: str, who: str) -> None:
    """Refuse a tensor whose key belongs to a known variant; return for any other."""
    for segment in segments:
        if segment in KEY_MARKERS:
            refuse_variant(*_marked(KEY_MARKERS[segment], key), who)
        if segment.startswith(_PREFIXES):
            known = next(known for prefix, known in KEY_PREFIXES.items() if segment.startswith(prefix))
            refuse_variant(*_marked(known, key), who)


def refuse_variant(variant: str, marker: str, remedy: str, who: str) -> None:
    """Raise UnsupportedVariantError in the one form of all refusals."""
    reason = "its update is not s*B*A, so it cannot be aggregated here"
    if remedy == DROP:
        reason = "its tensors are more than B and A, so it cannot be aggregated here"
    if remedy == KOHYA:
        reason = "this version does not aggregate it"
    raise UnsupportedVariantError(f"{who}: adapter uses {variant} ({marker}); {reason}. {remedy}")


def _marked(known: tuple[str, str], key: str) -> tuple[str, str, str]:
    variant, remedy = known
    return variant, printable(key), remedy


def changes_base(init: Any) -> bool:
    """Whether this ``init_lora_weights`` takes the initial update out of the base weight."""
    return isinstance(init, str) and init.startswith(BASE_CHANGING_INITS)


def _check_init(init: Any, who: str) -> None:
    if init is None or isinstance(init, bool) or init in PLAIN_INITS:
        return
    name = printable(init)
    if changes_base(init):
        raise UnsupportedVariantError(
            f"{who}: init_lora_weights is {name!r}, which changes the base weights; the stored factors belong to a residual base. "
            "Subtract the adapter as it was initialised with init_factors=, or stay on that base with init='keep'"
        )
    raise UnsupportedVariantError(
        f"{who}: init_lora_weights={name!r} is not known here; it may change the base weights. "
        f"Known: true, false, {', '.join(PLAIN_INITS)}"
    )
