"""Module paths of a base model, from the keys of its files alone, and the kohya names that they become."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.safetensors import SafetensorsFile, read_json
from fedlora_kernels.errors import FormatError, InputError

__all__ = ["base_paths", "names_in_base", "read_names"]

PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_", "")
"""What stands before a path in a kohya name."""
LONGEST_JSON = 1 << 26


def read_names(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a JSON object from kohya name to module path. FormatError for anything else."""
    names = read_json(path, LONGEST_JSON)
    for name, module in names.items():
        if not isinstance(module, str) or not all(module.split(".")):
            raise FormatError(
                f"{printable(path)}: {printable(name)!r} maps to {printable(module)!r}; a module path such as 'blocks.0.attn' needed"
            )
    return names


def base_paths(base: str | os.PathLike[str]) -> list[str]:
    """Paths of all modules with a weight in a model: a ``.safetensors`` file, or a folder with its index or its files.

    Only headers are read. Raises FormatError where there is neither.
    """
    keys = _keys(Path(base))
    paths = dict.fromkeys(key.removesuffix(".weight") for key in keys if key.endswith(".weight"))
    if not paths:
        raise FormatError(f"{printable(base)}: no weights among {len(keys)} tensors; a base model needed")
    return list(paths)


def names_in_base(modules: Iterable[str], paths: Iterable[str], prefix: str | None = None) -> dict[str, str]:
    """Module path of each kohya name: the one that becomes it when its dots turn into underscores.

    Args:
        modules: kohya names; with ``prefix`` only those that begin with it count.
        paths: of the base model's modules.
        prefix: what stands before the path; None tries the usual ones.

    Raises InputError for a name without a path, one with two, and names of two models.
    """
    flat: dict[str, list[str]] = {}
    for path in paths:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    found: dict[str, str] = {}
    used: dict[str, str] = {}
    for name in modules:
        if prefix is not None and not name.startswith(prefix):
            continue
        begin = next((known for known in _tried(prefix) if name.startswith(known) and name[len(known) :] in flat), None)
        if begin is None:
            raise InputError(
                f"module {printable(name)!r}: no module of the base model has this name; another --base, or --names needed"
            )
        hits = flat[name[len(begin) :]]
        if len(hits) > 1:
            raise InputError(
                f"module {printable(name)!r} may be {printable(hits[0])!r} or {printable(hits[1])!r} of the base model; --names needed"
            )
        used.setdefault(begin, name)
        found[name] = hits[0]
    _refuse_two_models(used)
    return found


def _tried(prefix: str | None) -> tuple[str, ...]:
    return PREFIXES if prefix is None else (prefix,)


def _refuse_two_models(used: Mapping[str, str]) -> None:
    if len(used) > 1:
        (first, one), (second, other) = list(used.items())[:2]
        raise InputError(
            f"modules of two models, {printable(one)!r} and {printable(other)!r}; a PEFT folder is for one. Convert each with "
            f"--prefix {printable(first)!r}, --prefix {printable(second)!r}"
        )


def _keys(base: Path) -> list[str]:
    where = printable(base)
    if base.is_file():
        with SafetensorsFile(base) as file:
            return list(file.tensors)
    try:
        entries = sorted(os.listdir(base))
    except OSError as error:
        raise FormatError(f"{where}: cannot be read: {error.strerror or error}") from None
    for index in (entry for entry in entries if entry.endswith(".safetensors.index.json")):
        table = read_json(base / index, LONGEST_JSON).get("weight_map")
        if not isinstance(table, dict):
            raise FormatError(f"{printable(base / index)}: no weight_map; the index of a sharded model needed")
        return list(table)
    keys: list[str] = []
    for entry in (entry for entry in entries if entry.endswith(".safetensors")):
        with SafetensorsFile(base / entry) as file:
            keys += file.tensors
    if not keys:
        inside = [entry for entry in entries if any((base / entry).glob("*.safetensors"))]
        hint = f"; give the folder of one model, such as {printable(base / inside[0])}" if inside else ""
        raise FormatError(f"{where}: neither a .safetensors.index.json nor a .safetensors file{hint}")
    return keys
