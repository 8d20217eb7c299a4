"""From PEFT folder to kohya file and back: the same update, the same numbers, other names."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.base_names import base_paths, names_in_base, read_names
from fedlora_kernels.adapters.config import peft_config, rank_patterns
from fedlora_kernels.adapters.folder import OutputFolder, check_inputs, check_out
from fedlora_kernels.adapters.forms import stored_shapes
from fedlora_kernels.adapters.kohya import ALPHA, alpha_tensor
from fedlora_kernels.adapters.kohya_metadata import kept_metadata, network_facts
from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import WRITTEN_HERE, ReadOptions
from fedlora_kernels.adapters.output_file import names_file
from fedlora_kernels.adapters.reader import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from fedlora_kernels.adapters.renaming import Renamed, rename_to_kohya, rename_to_peft
from fedlora_kernels.adapters.safetensors_writer import SafetensorsWriter
from fedlora_kernels.adapters.writer import write_config
from fedlora_kernels.errors import InputError, NonFiniteError, RunError

__all__ = ["alpha_of", "convert"]

FORMATS = ("peft", "kohya")
CLOSE = 4 * 2.0**-52


def convert(
    source: Any,
    out: str | os.PathLike[str],
    to: str,
    *,
    prefix: str | None = None,
    names: Mapping[str, str] | str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    read: ReadOptions | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Write a PEFT adapter as a kohya file, or a kohya file as a PEFT folder: the same update, tensors bit by bit.

    Args:
        source: a path, an Adapter or a (state_dict, config) pair.
        out: ``FILE.safetensors`` for kohya, a folder for PEFT; appears complete or not at all.
        to: "peft" or "kohya".
        prefix: to kohya: what loaders know the model by, such as ``lora_unet_``, before every name. To PEFT: take only modules that
            begin with it; one that ends in a dot is cut off.
        names: mapping from kohya name to module path, or the path of a JSON file that holds one. Nothing else can say where
            the dots were.
        base: to PEFT: the base model, a folder or a ``.safetensors`` file, whose keys give the module paths; no tensor is read.
        read: how ``source`` is read; ``extras="ignore"`` leaves out what a kohya file cannot hold.
        overwrite: replace an existing ``out`` that was written here, or is a LoRA file.

    Returns:
        The adapter as written. Texts worth a warning stand first in its ``warnings``.

    Raises:
        InputError: wrong arguments, names that are missing, ambiguous or not unique; UnsupportedVariantError for what the other
            format has no form for; NonFiniteError for NaN or Inf; RunError for failures of the disc.
    """
    read = read or ReadOptions()
    if to not in FORMATS:
        raise InputError(f"to is {printable(to)!r}; one of {', '.join(FORMATS)} needed")
    if base is not None and (names is not None or to == "kohya"):
        raise InputError("base gives the names for to='peft' where names= does not; leave it out")
    check_out(out, overwrite)
    check_inputs(out, {"what is converted": source, "init_factors": read.init_factors, "names": names, "base": base})
    if isinstance(names, str | os.PathLike):
        names = read_names(names)
    adapter = open_adapter(source, read)
    try:
        if to == "kohya":
            renamed = rename_to_kohya(adapter, prefix=prefix, names=names, drop_extras=read.extras == "ignore")
        else:
            if base is not None and adapter.spelling is not None:
                names = names_in_base(adapter.modules, base_paths(base), prefix)
            renamed = rename_to_peft(adapter, prefix=prefix, names=names)
        _write(renamed, out, overwrite)
    finally:
        if adapter is not source:
            adapter.close()
    again = open_adapter(out, WRITTEN_HERE)
    return dataclasses.replace(again, warnings=(*adapter.warnings, *renamed.warnings, *again.warnings))


def alpha_of(scale: float, rank: int) -> float:
    """The alpha whose quotient by the rank is the scale: one that float32 holds before any other."""
    near = scale * rank
    single = float(np.float32(near))
    for alpha in (single, near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if abs(alpha - near) <= CLOSE * abs(near) and alpha / rank == scale:
            return alpha
    return near


def _write(renamed: Renamed, out: str | os.PathLike[str], overwrite: bool) -> None:
    """Write stored tensors bit by bit, and scales where the format has them."""
    kohya = next(iter(renamed.modules.values())).form.spelling is not None
    if kohya != names_file(out):
        needed = "a kohya file ends in .safetensors" if kohya else "a PEFT adapter is a folder, without .safetensors"
        raise InputError(f"output {printable(out)}: {needed}; name another one")
    alphas = {name: alpha_of(module.scale, module.rank) for name, module in renamed.modules.items()}
    with OutputFolder(out, overwrite) as folder:
        tensors = dict(_stored(renamed))
        entries = {key: (dtype, shape) for key, (_, dtype, shape) in tensors.items()}
        scales = {f"{name}{ALPHA}": alpha_tensor(alpha) for name, alpha in alphas.items()} if kohya else {}
        entries.update({key: (alpha.dtype, ()) for key, alpha in scales.items()})
        with SafetensorsWriter(folder.path / WEIGHTS_NAME, entries, _metadata(renamed, alphas, kohya=kohya)) as file:
            for key, (source, _, shape) in tensors.items():
                tensor = renamed.adapter.source.read(source)
                _check_finite(renamed.adapter.label, source, tensor)
                file.add(key, tensor.reshape(shape))
            for key, alpha in scales.items():
                file.add(key, alpha)
        if not kohya:
            write_config(folder.path / CONFIG_NAME, _config(renamed, alphas))
        _verify(folder.path, renamed)
        folder.commit()


def _check_finite(label: str, key: str, tensor: Tensor) -> None:
    bad = torch.isfinite(tensor).logical_not()
    if bool(bad.any()):
        place = ", ".join(str(int(index)) for index in bad.nonzero()[0])
        raise NonFiniteError(
            f"{printable(label)}, tensor {printable(key)!r}: NaN or Inf at [{place}]; finite numbers needed. Train or export it again"
        )


def _stored(renamed: Renamed) -> Iterator[tuple[str, tuple[str, torch.dtype, tuple[int, ...]]]]:
    """Of each factor, by its new key: its old key, dtype and new shape; A before B."""
    for module in renamed.modules.values():
        for (key, shape), spec in zip(stored_shapes(module, module.rank).items(), (module.A, module.B), strict=True):
            yield key, (spec.key, spec.dtype, shape)


def _metadata(renamed: Renamed, alphas: Mapping[str, float], *, kohya: bool) -> dict[str, str]:
    origin = renamed.adapter.metadata
    ours = {key: text for key, text in origin.items() if key.startswith("fedlora.")}
    plain = {key: text for key, text in origin.items() if key.startswith(("ss_", "modelspec."))}
    kept = kept_metadata(plain, f"converted from PEFT by fedlora_kernels {__version__}")
    if not kohya:
        return {**plain, **ours}
    facts = network_facts(
        {name: module.rank for name, module in renamed.modules.items()}, origin.get("ss_network_module")
    )
    different = set(alphas.values())
    facts["ss_network_alpha"] = f"{different.pop():.17g}" if len(different) == 1 else "Dynamic"
    return {**kept, **facts, **ours}


def _config(renamed: Renamed, alphas: Mapping[str, float]) -> dict[str, Any]:
    """A PEFT configuration with the alphas of the file."""
    ranks = {name: module.rank for name, module in renamed.modules.items()}
    adapter = dataclasses.replace(renamed.adapter, modules=renamed.modules, extras={})
    config = peft_config([adapter], ranks)
    (common, _), *_ = Counter(alphas.values()).most_common(1)
    config["lora_alpha"] = int(common) if common == int(common) else common
    config.pop("alpha_pattern", None)
    patterns = rank_patterns(dict(alphas), common)
    return {**config, "alpha_pattern": patterns} if patterns else config


def _verify(folder: Path, renamed: Renamed) -> None:
    """Read back what was written: the same modules and scales, and the numbers of the first and the last module."""
    again = open_adapter(folder, WRITTEN_HERE)
    try:
        if list(again) != list(renamed.modules):
            raise RunError(f"{printable(folder)}: modules read back differ from those written")
        for name, module in renamed.modules.items():
            found = again.modules[name]
            if found.signature != module.signature or not math.isclose(found.scale, module.scale, rel_tol=1e-15):
                raise RunError(f"{printable(folder)}: module {printable(name)!r} reads back otherwise")
        for name in (next(iter(again)), list(again)[-1]):
            if not all(map(torch.equal, _bits(again[name]), _bits_of(renamed, name))):
                raise RunError(f"{printable(folder)}: module {printable(name)!r} reads back with other numbers")
    finally:
        again.close()


def _bits(pair: Any) -> tuple[Tensor, Tensor]:
    return _bytes(pair.B), _bytes(pair.A)


def _bits_of(renamed: Renamed, name: str) -> tuple[Tensor, Tensor]:
    module, source = renamed.modules[name], renamed.adapter.source
    return _bytes(source.read(module.B.key)), _bytes(source.read(module.A.key))


def _bytes(tensor: Tensor) -> Tensor:
    """NaN equals itself byte by byte."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
