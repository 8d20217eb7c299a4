"""What the header of a kohya or diffusers file says beside its tensors, kept or made anew: never stale."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from fedlora_kernels.adapters.config import rank_patterns
from fedlora_kernels.adapters.kohya_scales import DIFFUSERS
from fedlora_kernels.adapters.safetensors import disc_errors

__all__ = ["HASH", "data_hash", "diffusers_config", "kept_metadata", "network_facts"]

COMMENT = "ss_training_comment"
HASH = "sshs_model_hash"
KEPT = ("ss_", "modelspec.")
STALE = ("modelspec.hash_sha256",)
CHUNK = 1 << 22


def kept_metadata(origin: Mapping[str, str], comment: str) -> dict[str, str]:
    """What an output takes over from its first client: facts of training, with a comment before the old one.

    A configuration and a hash stay as places to be filled by the writer: they belong to other tensors.
    """
    kept = {key: text for key, text in origin.items() if key.startswith(KEPT) and key not in STALE}
    kept.update({key: "" for key in (HASH, DIFFUSERS) if key in origin})
    if DIFFUSERS not in origin:
        kept[COMMENT] = "; ".join(text for text in (comment, origin.get(COMMENT)) if text)
    return kept


def network_facts(ranks: Mapping[str, int], module: str | None) -> dict[str, str]:
    """Rank and alpha of the whole network as loaders show them; alphas equal ranks here."""
    different = set(ranks.values())
    rank = str(different.pop()) if len(different) == 1 else "Dynamic"
    return {"ss_network_module": module or "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def diffusers_config(ranks: Mapping[str, int]) -> str:
    """A PEFT configuration of scale 1 for each component, the first segment of a name, as diffusers keeps it."""
    components: dict[str, dict[str, int]] = {}
    for name, rank in ranks.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path] = rank
    entries: dict[str, object] = {}
    for component, paths in components.items():
        largest = max(paths.values())
        patterns = rank_patterns(paths, largest)
        fields = {"r": largest, "lora_alpha": largest, "rank_pattern": patterns, "alpha_pattern": patterns}
        fields |= {"target_modules": sorted(paths), "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True}
        entries.update({f"{component}.{key}": value for key, value in fields.items()})
    return json.dumps(entries, indent=2, sort_keys=True)


def data_hash(path: str | os.PathLike[str], begin: int) -> str:
    """SHA-256 of all bytes from ``begin`` on: ``sshs_model_hash`` where that is the end of the header."""
    found = hashlib.sha256()
    with disc_errors(path), open(path, "rb") as file:
        file.seek(begin)
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
