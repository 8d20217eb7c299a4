"""What the arguments ask of the engine: clients, weights, rule, method, policy, each checked before any data is read."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlora_kernels import backends
from fedlora_kernels.adapters.convert import convert
from fedlora_kernels.adapters.folder import check_out
from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.adapters.policy import Limits, Policy
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.arguments import RULE_FLAGS
from fedlora_kernels.engine.settings import check_delivery, method_of
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg import rules
from fedlora_kernels.methods.contract import Method, make_method, method_class
from fedlora_kernels.methods.florist import DEFAULT_RULE, Florist
from fedlora_kernels.resize import resize, resize_all

if TYPE_CHECKING:
    from fedlora_kernels.engine.result import Result

__all__ = ["aggregate_request", "check_backend", "convert_request", "named_paths", "read_options", "resize_request"]

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def aggregate_request(options: argparse.Namespace) -> Callable[[Callable[[str, int, int], None]], Result]:
    """Return the engine call that ``fedlora aggregate`` asks for, waiting for its progress callback. Reads no tensor.

    Raises InputError, or the ValueError of an option, naming the flag.
    """
    check_backend(options.backend)
    check_out(options.out, options.overwrite)
    cls = method_class(options.method)
    rule = _rule(options, cls)
    settings, robust = _options(cls, options)
    write = _write_options(options)
    made = _named("--set", lambda: method_of(options.method, rule, write, settings))
    _named("--per-client", lambda: check_delivery(made, options.out, options.per_client))
    call: dict[str, Any] = {
        **_run_options(options),
        "weights": options.weights,
        "normalize": options.normalize,
        "previous": _previous(options.previous),
        "round": options.round,
        "robust": robust,
        "client_state": _client_state(options.client_state),
        "policy": _policy(options),
        "read": read_options(options, missing=options.missing, extras=options.extras),
        "write": write,
        "resume": options.resume,
        "per_client": options.per_client,
        "measure": options.measure,
        "compare": options.compare or _pages(options),
    }
    clients = named_paths(options.clients)
    return lambda progress: aggregate(clients, made, progress=progress, **call)


def resize_request(options: argparse.Namespace) -> Callable[[Callable[[str, int, int], None]], dict[str, Result]]:
    """Return the call that ``fedlora resize`` asks for, waiting for its progress callback: results by name. Reads no tensor.

    Raises InputError, or the ValueError of an option, naming the flag.
    """
    check_backend(options.backend)
    check_out(options.out, options.overwrite)
    call = {
        **_run_options(options),
        "rule": _rule(options, Florist),
        "read": read_options(options, extras=options.extras),
        "write": _write_options(options),
    }
    adapters = named_paths(options.adapters)
    if len(adapters) > 1:
        return lambda progress: resize_all(adapters, progress=progress, **call)
    ((name, path),) = adapters.items() if isinstance(adapters, dict) else [(None, adapters[0])]

    def one(progress: Callable[[str, int, int], None]) -> dict[str, Result]:
        result = resize(path, name=name, progress=progress, compare=_pages(options), **call)
        return {result.report["clients"][0]["name"]: result}

    return one


def _pages(options: argparse.Namespace) -> bool:
    """Whether a page is asked for: its charts show whole spectra and clients beside each other."""
    return any(path.lower().endswith(".html") for path in options.report)


def _run_options(options: argparse.Namespace) -> dict[str, Any]:
    """What aggregate and resize have in common: where to write, and how to compute."""
    return {
        "out": options.out,
        "overwrite": options.overwrite,
        "seed": options.seed,
        "backend": options.backend,
        "device": None if options.device == "auto" else options.device,
        "dtype": None if options.dtype is None else getattr(torch, options.dtype),
        "memory": None if options.memory is None else _named("--memory", lambda: rules.parse_size(options.memory)),
    }


def convert_request(options: argparse.Namespace) -> Adapter:
    """Do what ``fedlora convert`` asks for; the adapter as written."""
    return convert(
        options.adapter,
        options.out,
        options.to,
        prefix=options.prefix,
        names=options.names,
        base=options.base,
        read=read_options(options, extras=options.extras),
        overwrite=options.overwrite,
    )


def check_backend(name: str) -> None:
    """Raise InputError if there is no such backend, BackendError if it cannot run here."""
    if name != "auto":
        backends.get(name)


def named_paths(arguments: Sequence[str]) -> list[str] | dict[str, str]:
    """Return the clients as given: a list of paths, or a mapping from name to path if any is written ``name=path``.

    A path that exists as it stands is never split. InputError for a name given twice or an empty one.
    """
    if not all(arguments):
        raise InputError("a path is empty; a folder, or name=folder, is needed")
    split = [(None, text) if os.path.exists(text) or "=" not in text else text.split("=", 1) for text in arguments]
    if all(name is None for name, _ in split):
        return list(arguments)
    named: dict[str, str] = {}
    for name, path in split:
        label = Path(os.path.abspath(path)).name if name is None else name
        if not label or not path:
            raise InputError(f"client {name}={path!r}: a name and a folder are needed; write name=folder")
        if label in named:
            raise InputError(f"client name {label!r} is given twice; names must differ. Write name=folder for each")
        named[label] = path
    return named


def read_options(options: argparse.Namespace, **more: Any) -> ReadOptions:
    """Return the reading options of a command."""
    names = ("adapter_name", "rank_from", "parameter_order", "adalora", "drop_state", "init", "init_factors")
    given = {name: getattr(options, name) for name in names}
    return ReadOptions(**given, limits=_limits(options.limit), **more)


def _limits(settings: Sequence[str]) -> Limits:
    """The caps, with those that ``cap=number`` texts raise."""
    known = {field.name: field.default for field in dataclasses.fields(Limits)}
    given: dict[str, int] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        name = name.replace("-", "_")
        if name not in known or not (text.isascii() and text.isdigit()):
            listing = ", ".join(f"{cap} ({default})" for cap, default in known.items())
            raise InputError(f"--limit {setting}: CAP=N needed; the caps are {listing}")
        given[name] = int(text[:19])
    limits: Limits = _named("--limit", lambda: Limits(**given))
    return limits


def _options(cls: type[Method], options: argparse.Namespace) -> tuple[dict[str, Any], Method | None]:
    """The options of the method, and the robust rule in front of it with its own: ``--set krum.f=2``."""
    if options.robust is None:
        return method_options(cls, options.set), None
    rule = _named("--robust", lambda: method_class(options.robust))
    prefix = f"{options.robust}."
    own = [text for text in options.set if not text.startswith(prefix)]
    of_rule = [text[len(prefix) :] for text in options.set if text.startswith(prefix)]
    settings = method_options(cls, own)
    where = f"--robust {options.robust}, --set {prefix}OPTION=VALUE"
    return settings, _named(where, lambda: make_method(options.robust, method_options(rule, of_rule)))


def _client_state(path: str | None) -> Any:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"--client-state {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--client-state {path}: no JSON: {error}") from None


def method_options(cls: type[Method], settings: Sequence[str]) -> dict[str, Any]:
    """Return ``option=value`` texts as values of the types that the method's fields declare.

    InputError names the option, what was found and what is needed.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.name != "rule"}
    values: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        name = name.replace("-", "_")
        if not separator:
            raise InputError(f"--set {setting}: write option=value")
        if name == "rule" and cls.takes_rule:
            raise InputError("--set rule: the rule has flags of its own: --energy, --rank, ...")
        if name not in known:
            listing = ", ".join(known) or "none"
            raise InputError(f"--set {setting}: method {cls.name!r} has no option {name!r}; known options: {listing}")
        if name in values:
            raise InputError(f"--set {setting}: option {name!r} is given twice")
        try:
            values[name] = _typed(known[name], text)
        except ValueError as error:
            raise InputError(f"--set {setting}: {error}") from None
    return values


def _typed(hint: Any, text: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _typed_union(parts, text)
    if origin is typing.Literal:
        for choice in parts:
            if str(choice) == text:
                return choice
        raise ValueError(f"{text!r} is none of {', '.join(map(str, parts))}")
    if origin is tuple:
        return tuple(_typed(parts[0], part) for part in text.split(","))
    if hint is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() in _TRUE
    if hint is str:
        return text
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {'integer' if hint is int else 'number'}") from None
    raise ValueError("this option takes no plain value; use the Python call")


def _typed_union(parts: Sequence[Any], text: str) -> Any:
    if type(None) in parts and text.lower() == "none":
        return None
    # str reads anything, so it comes last
    reasons = []
    for part in sorted((part for part in parts if part is not type(None)), key=lambda part: part is str):
        try:
            return _typed(part, text)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))


def _rule(options: argparse.Namespace, cls: type[Method]) -> rules.RankRule | None:
    given = {name: getattr(options, name) for name in RULE_FLAGS if getattr(options, name) is not None}
    flags = ["--" + name.replace("_", "-") for name in given] + ["--max-rank"] * (options.max_rank is not None)
    if not cls.takes_rule:
        if flags:
            raise InputError(f"{flags[0]}: method {cls.name!r} does not choose its rank by a rule; remove the flag")
        return None
    if not given:
        rule: rules.RankRule = DEFAULT_RULE
    else:
        ((name, value),) = given.items()
        rule = _named(flags[0], lambda: getattr(rules, RULE_FLAGS[name][0])(value))
    return rule if options.max_rank is None else rule.capped(options.max_rank)


def _policy(options: argparse.Namespace) -> Policy:
    if options.max_update_norm == "median" and options.policy != "clip":
        raise InputError(
            "--max-update-norm median: half of the clients are beyond it; add --policy clip, or give a number"
        )
    given = {name: getattr(options, name) for name in ("max_update_norm", "min_clients", "min_weight")}
    return Policy(options.policy, **{name: value for name, value in given.items() if value is not None})


def _write_options(options: argparse.Namespace) -> WriteOptions:
    names = ("target", "output", "uniform_rank", "fill", "drop_zero")
    return WriteOptions(**{name: getattr(options, name) for name in names})


def _previous(path: str | None) -> str | None:
    if path is not None and not os.path.exists(path):
        raise InputError(f"--previous {path}: there is no such folder or file; give the OUT of an earlier round")
    return path


def _named(flag: str, make: Callable[[], Any]) -> Any:
    """Return what ``make`` returns; put the flag before the text of its ValueError."""
    try:
        return make()
    except ValueError as error:
        raise InputError(f"{flag}: {error}") from None
