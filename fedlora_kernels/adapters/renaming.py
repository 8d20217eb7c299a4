"""Adapters under the names of the other format: from module paths to kohya names and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from fedlora_kernels.adapters.inits import kept_init
from fedlora_kernels.adapters.kohya import KOHYA
from fedlora_kernels.adapters.model import Adapter, Form, ModuleSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import InputError, UnsupportedVariantError

__all__ = ["Renamed", "rename_to_kohya", "rename_to_peft"]

IN_KOHYA = ("linear", "conv1d", "conv2d", "conv3d")
"""Kinds of layer that kohya files know."""


@dataclass(frozen=True)
class Renamed:
    """An adapter under the names of the other format: ``modules`` by new name, each with the keys it is read by."""

    adapter: Adapter
    modules: Mapping[str, ModuleSpec]
    warnings: tuple[str, ...] = ()


def rename_to_kohya(
    adapter: Adapter, *, prefix: str | None = None, names: Mapping[str, str] | None = None, drop_extras: bool = False
) -> Renamed:
    """Give the modules of a PEFT adapter the names of a kohya file.

    Args:
        adapter: in PEFT's form.
        prefix: what loaders know the model by, such as ``lora_unet_``; the path follows, its dots as underscores.
        names: from kohya name to module path, in place of the prefix.
        drop_extras: leave out tensors that are no factors, with a warning.

    Raises InputError or UnsupportedVariantError, naming it, for what a kohya file cannot say.
    """
    _refuse_format(adapter, "kohya")
    _refuse_without_words(adapter)
    warnings = _dropped_extras(adapter, drop=drop_extras)
    if names is not None:
        by_path = _inverse(names)
        given = {path: by_path.get(path) for path in adapter.modules}
        _refuse_unnamed(given, "module path", adapter.label)
    elif prefix is None or "." in prefix:
        found = "no prefix" if prefix is None else f"prefix {printable(prefix)!r} holds a dot"
        raise InputError(
            f"{found}; what loaders know the model by needed, such as --prefix lora_unet_ or --prefix lora_te_"
        )
    else:
        given = {path: f"{prefix}{path.replace('.', '_')}" for path in adapter.modules}
    taken: dict[str, str] = {}
    for path, name in given.items():
        if (other := taken.setdefault(str(name), path)) != path:
            raise InputError(
                f"modules {printable(other)!r} and {printable(path)!r} both become {printable(name)!r}; different names needed. "
                "Give --names"
            )
    modules = {name: _as(adapter.modules[path], name, KOHYA) for name, path in taken.items()}
    return Renamed(adapter, modules, tuple(warnings))


def rename_to_peft(adapter: Adapter, *, prefix: str | None = None, names: Mapping[str, str] | None = None) -> Renamed:
    """Give the modules of a kohya file the names of a PEFT folder.

    Args:
        adapter: a kohya or diffusers file.
        prefix: takes only modules that begin with it; one that ends in a dot is cut off.
        names: from kohya name to module path; without it names stay as they are, which is warned of.

    Raises InputError where a name is missing or two modules would get the same one.
    """
    _refuse_format(adapter, "peft")
    taken = {name: module for name, module in adapter.modules.items() if name.startswith(prefix or "")}
    left = [name for name in adapter.modules if name not in taken]
    if not taken:
        raise InputError(f"no module begins with {printable(prefix)!r}; the first one is {printable(left[0])!r}")
    warnings = (
        [f"{len(left)} modules without prefix {printable(prefix)!r} left out, {printable(left[0])!r} first"]
        if left
        else []
    )
    paths: dict[str, str | None]
    if names is not None:
        paths = {name: names.get(name) for name in taken}
        _refuse_unnamed(paths, "kohya name", adapter.label)
        _inverse({name: path for name, path in paths.items() if path is not None})
    else:
        cut = len(prefix) if prefix and prefix.endswith(".") else 0
        paths = {name: name[cut:] for name in taken}
        if not any("." in path for path in paths.values() if path):
            first = printable(next(iter(taken)))
            warnings.append(
                f"names stay as they are in the file, {first!r} first: PEFT finds no such modules in a model. Give --names or --base"
            )
    modules = {path: _as(taken[name], path, None) for name, path in paths.items() if path is not None}
    return Renamed(adapter, modules, tuple(warnings))


def _as(module: ModuleSpec, name: str, spelling: tuple[str, str] | None) -> ModuleSpec:
    form = Form(module.kind, name, name, module.form.kernel, spelling=spelling)
    return dataclasses.replace(module, name=name, form=form)


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    """From module path to kohya name; InputError where two names mean one path."""
    inverse: dict[str, str] = {}
    for name, path in names.items():
        other = inverse.setdefault(path, name)
        if other != name:
            raise InputError(
                f"{printable(other)!r} and {printable(name)!r} both mean module {printable(path)!r}; one name each needed"
            )
    return inverse


def _refuse_unnamed(found: Mapping[str, str | None], what: str, label: str) -> None:
    unnamed = [name for name, other in found.items() if not other]
    if unnamed:
        raise InputError(
            f"module {printable(unnamed[0])!r} of {printable(label)}: not among the names ({len(unnamed)} of {len(found)} lack one); "
            f"every {what} needed"
        )


def _refuse_format(adapter: Adapter, to: str) -> None:
    if (adapter.spelling is not None) == (to == "kohya"):
        found = "a kohya file" if to == "kohya" else "a PEFT adapter"
        raise InputError(f"{printable(adapter.label)} is {found} already; nothing to convert")


def _refuse_without_words(adapter: Adapter) -> None:
    """Raise for what a PEFT adapter holds and a kohya file has no words for."""
    where = printable(adapter.label)
    if (init := kept_init(adapter.config)) is not None:
        raise UnsupportedVariantError(
            f"{where}: init_lora_weights is {printable(init)!r}, so the update belongs to a residual base, which a kohya file cannot say. "
            "Subtract what it started from with --init-factors"
        )
    if adapter.config.get("fan_in_fan_out"):
        raise UnsupportedVariantError(
            f"{where}: fan_in_fan_out says that base weights are stored transposed (Conv1D), which a kohya file cannot say"
        )
    for module in adapter.modules.values():
        attention = "base_layer" in module.form.path.split(".") and not module.form.parameters
        if module.kind not in IN_KOHYA or attention or module.form.parameters:
            kind = "nn.MultiheadAttention" if attention else f"a layer of kind {module.kind}"
            kind = "a parameter of target_parameters" if module.form.parameters else kind
            raise UnsupportedVariantError(
                f"module {printable(module.name)!r}: {kind} has no form in a kohya file. Leave this module out of the adapter"
            )
        if module.scale == 0.0:
            raise UnsupportedVariantError(
                f"module {printable(module.name)!r}: its scale is 0; an alpha of 0 in a kohya file is the rank to some loaders. "
                "Leave this module out of the adapter"
            )


def _dropped_extras(adapter: Adapter, *, drop: bool) -> list[str]:
    names = list(adapter.extras)
    if not names:
        return []
    first = printable(names[0])
    if not drop:
        raise UnsupportedVariantError(
            f"tensor {first!r}: a kohya file holds factors only ({len(names)} such tensors). Drop them with extras='ignore'"
        )
    return [f"{len(names)} tensors that are no factors left out, {first!r} first"]
