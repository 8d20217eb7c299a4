"""Two independent checks of an aggregated adapter: PEFT loads exactly its tensors, and they are the weighted dense sum.

Scales and factors are taken from PEFT's own loaded layers, sums are dense float64: nothing of the engine is involved.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.demo.model import Encoder, load_classifier, logits
from fedlora_kernels.errors import RunError

__all__ = ["dense_model", "load_adapter", "logit_gap", "relative_error", "size", "updates", "weighted_sum"]

HEAD = "classifier."


def load_adapter(model_folder: Path, adapter: Path, seed: int) -> Any:
    """Return the encoder with an adapter loaded by PEFT.

    Raises RunError where PEFT warns about missing keys, or holds anything but the tensors of the file, bit for bit.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    base = load_classifier(model_folder, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*", category=UserWarning)
        try:
            model = PeftModel.from_pretrained(base, str(adapter)).eval()
        except UserWarning as warning:
            raise RunError(f"{adapter}: {warning}") from warning
    stored = load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(
        k
        for k in stored.keys() | loaded.keys()
        if k not in stored or k not in loaded or not _same(stored[k], loaded[k])
    )
    if wrong:
        raise RunError(
            f"{adapter}: PEFT did not load {len(wrong)} of {len(stored)} tensors as written, first {wrong[0]!r}"
        )
    return model


def _same(stored: Tensor, loaded: Tensor) -> bool:
    return stored.shape == loaded.shape and torch.equal(stored, loaded.to(stored.dtype))


def updates(model: Any) -> dict[str, Tensor]:
    """Return what a loaded adapter adds, in float64: ``scale * B @ A`` by module, and the head's weights as they are."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            pair = module.lora_B["default"].weight.detach().double() @ module.lora_A["default"].weight.detach().double()
            found[f"{name}.weight"] = module.scaling["default"] * pair
        elif hasattr(module, "modules_to_save"):
            head = module.modules_to_save["default"]
            found.update({f"{name}.{key}": value.detach().double() for key, value in head.named_parameters()})
    return found


def weighted_sum(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return sum_k w_k part_k with weights normalised to sum 1: the ideal update, and the mean head."""
    total = math.fsum(weights)
    return {
        name: torch.stack([w / total * part[name] for w, part in zip(weights, parts, strict=True)]).sum(0)
        for name in parts[0]
    }


def relative_error(ideal: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Return |ideal - found|_F / |ideal|_F over all adapted matrices together; the head is left out."""
    names = [name for name in ideal if not name.startswith(HEAD)]
    missed = math.fsum(float((ideal[n] - found[n]).square().sum()) for n in names)
    return math.sqrt(missed / math.fsum(float(ideal[n].square().sum()) for n in names))


def dense_model(model_folder: Path, ideal: Mapping[str, Tensor], seed: int) -> Any:
    """Return the encoder in float64 with the ideal updates added to its weights and the mean head put in place."""
    model = load_classifier(model_folder, seed).double()
    weights = model.state_dict()
    for name, value in ideal.items():
        weights[name].copy_(value if name.startswith(HEAD) else weights[name] + value)
    return model


def logit_gap(dense: Any, adapted: Any, data: Encoder) -> float:
    """Return the largest |difference| between the logits of two models, both run in float64."""
    return float((logits(dense, data) - logits(adapted.double(), data)).abs().max())


def size(adapter: Path) -> tuple[int, int]:
    """Return the sum of ranks and the bytes of the factors in a PEFT folder's file."""
    from safetensors.torch import load_file

    factors = {k: t for k, t in load_file(adapter / "adapter_model.safetensors").items() if ".lora_" in k}
    rank = sum(t.shape[0] for k, t in factors.items() if k.endswith(".lora_A.weight"))
    return rank, sum(t.nbytes for t in factors.values())
