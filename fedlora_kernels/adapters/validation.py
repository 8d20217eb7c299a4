"""Do these clients fit each other? Checks that need only headers and configurations, all failures reported together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora_kernels.adapters.expert_check import expert_misfits
from fedlora_kernels.adapters.inits import kept_init, kept_misfits
from fedlora_kernels.adapters.majority import majority
from fedlora_kernels.adapters.model import Adapter, ExtraSpec, ModuleSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.errors import FedLoRAError, InputError, LimitError, MismatchError

__all__ = ["ClientCheck", "Failure", "failure_text", "validate_clients"]

MOST_LINES = 20
EQUAL_FIELDS = (
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "layer_replication",
    "init_lora_weights",
    "target_parameters",
    "trainable_token_indices",
    "ensure_weight_tying",
)
"""Of ``init_lora_weights`` only what changes the base weight counts."""
Said = Mapping[str, frozenset[str]]
"""Modules by client of which nothing more needs to be said."""


@dataclass(frozen=True)
class Failure:
    """One finding: the whole message is ``client 'c3', module 'x': <found>; <needed>. <what to do>``."""

    client: str
    where: str
    error: type[FedLoRAError]
    text: str

    def __str__(self) -> str:
        where = f", {self.where}" if self.where else ""
        return f"client {printable(self.client)!r}{where}: {self.text}"


@dataclass(frozen=True)
class ClientCheck:
    """What the checks found.

    ``modules`` maps each module of the output, in order, to the spec of the first client that agrees with most;
    ``extras`` likewise for tensors that are no factors. ``failures`` are per client; ``warnings`` are texts.
    """

    modules: Mapping[str, ModuleSpec]
    extras: Mapping[str, ExtraSpec]
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> dict[str, list[Failure]]:
        """Failures by client, in the caller's order."""
        by_client: dict[str, list[Failure]] = {}
        for failure in self.failures:
            by_client.setdefault(failure.client, []).append(failure)
        return by_client


def failure_text(failures: Iterable[Failure | FedLoRAError]) -> str:
    """Join failures line by line, at most 20 lines, the last one counting the rest."""
    lines = [str(failure) for failure in failures]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [f"... and {len(lines) - MOST_LINES + 1} more"]
    return "\n".join(lines)


def validate_clients(
    adapters: Mapping[str, Adapter],
    *,
    missing: str = "error",
    extras: str = "strict",
    limits: Limits | None = None,
) -> ClientCheck:
    """Check clients against each other by their headers: same modules, shapes, kinds, extra tensors, configuration, caps.

    What most clients have is the reference; ties go to the earlier client. With ``missing`` "renormalize" or "zero" the
    modules are the union in order of first appearance. Nothing is raised for a client's fault: the caller decides on
    ``failures``. Raises InputError without clients and LimitError for caps on all clients together.
    """
    limits = limits or Limits()
    if not adapters:
        raise InputError("no clients; at least one needed")
    if len(adapters) > limits.clients:
        raise limits.over("clients", len(adapters))
    failures: list[Failure] = []
    warnings = _duplicates(adapters) + _bases(adapters)
    _check_limits(adapters, limits, failures)
    _check_fields(adapters, extras, failures)
    said = _check_experts(adapters, failures)
    modules = _check_modules(adapters, missing, failures, said)
    for client, name, text in kept_misfits(adapters, modules):
        failures.append(Failure(client, _at(name), MismatchError, text))
    _check_stack(adapters, modules, limits)
    found = _check_extras(adapters, modules, missing, extras, failures, warnings)
    position = {name: i for i, name in enumerate(adapters)}
    failures.sort(key=lambda failure: position[failure.client])
    return ClientCheck(modules, found, tuple(failures), tuple(warnings))


def _check_limits(adapters: Mapping[str, Adapter], limits: Limits, failures: list[Failure]) -> None:
    total = 0
    for client, adapter in adapters.items():
        size = adapter.nbytes
        total += size
        if size > limits.bytes_per_client:
            failures.append(Failure(client, "", LimitError, str(limits.over("bytes_per_client", size))))
        for name, module in adapter.modules.items():
            if module.rank > limits.rank_per_client:
                text = str(limits.over("rank_per_client", module.rank))
                failures.append(Failure(client, _at(name), LimitError, text))
        for name in (*adapter.modules, *adapter.extras):
            if len(name) > limits.name_length:
                text = str(limits.over("name_length", len(name)))
                failures.append(Failure(client, _at(name), LimitError, text))
    if total > limits.bytes_total:
        raise limits.over("bytes_total", total)


def _check_stack(adapters: Mapping[str, Adapter], modules: Mapping[str, ModuleSpec], limits: Limits) -> None:
    for name, module in modules.items():
        stacked = sum(adapter.modules[name].rank for adapter in adapters.values() if name in adapter.modules)
        if stacked > limits.stacked_rank:
            raise LimitError(f"module {printable(name)!r}: {limits.over('stacked_rank', stacked)}")
        elements = max(module.m, module.n) * min(stacked, module.m, module.n)
        if elements > limits.output_elements:
            raise LimitError(f"module {printable(name)!r}: {limits.over('output_elements', elements)}")


def _check_fields(adapters: Mapping[str, Adapter], extras: str, failures: list[Failure]) -> None:
    names = (*EQUAL_FIELDS, "modules_to_save") if extras == "strict" else EQUAL_FIELDS
    for name in names:
        values = {client: _field(adapter.config, name) for client, adapter in adapters.items()}
        _, holder, reference = majority(values)
        for client, value in values.items():
            if value != reference:
                text = f"{name} is {printable(value)} but {printable(reference)} in client {printable(holder)!r}; equal values needed"
                failures.append(Failure(client, "configuration", MismatchError, text))


def _field(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name) or False
    if name == "init_lora_weights":
        value = kept_init(config) or False
    if name == "bias" and value == "none":
        value = False
    if name in ("modules_to_save", "target_parameters") and isinstance(value, list | tuple):
        value = sorted(set(value))
    return json.dumps(value, sort_keys=True, default=str)


def _check_experts(adapters: Mapping[str, Adapter], failures: list[Failure]) -> Said:
    said: dict[str, frozenset[str]] = {}
    for misfit in expert_misfits(adapters):
        failures.append(Failure(misfit.client, misfit.where, MismatchError, misfit.text))
        said[misfit.client] = said.get(misfit.client, frozenset()) | misfit.modules
    return said


def _check_modules(
    adapters: Mapping[str, Adapter], missing: str, failures: list[Failure], said: Said
) -> dict[str, ModuleSpec]:
    names = _reference_names(adapters, missing == "error", lambda adapter: adapter.modules)
    disjoint = _check_disjoint(adapters, missing == "error", names, failures, said)
    modules: dict[str, ModuleSpec] = {}
    for name in names:
        owners = {client: adapter.modules[name] for client, adapter in adapters.items() if name in adapter.modules}
        modules[name], holder, shape = majority(owners, lambda spec: spec.signature)
        for client, spec in owners.items():
            # what holds of one expert holds of all
            if spec.signature != shape and not spec.form.part and name not in said.get(client, ()):
                text = f"{spec.shape_text} but {modules[name].shape_text} in client {printable(holder)!r}; equal shapes needed"
                failures.append(Failure(client, _at(name), MismatchError, text))
    if missing == "error":
        _check_missing(adapters, names, disjoint, failures, said)
    return modules


def _check_missing(
    adapters: Mapping[str, Adapter], names: list[str], disjoint: set[str], failures: list[Failure], said: Said
) -> None:
    known = set(names)
    for client, adapter in adapters.items():
        if client in disjoint:
            continue
        silent = said.get(client, frozenset())
        for name in names:
            if name not in adapter.modules and name not in silent:
                text = "missing here, present in most clients; the same modules needed. Allow it with missing='renormalize'"
                failures.append(Failure(client, _at(name), MismatchError, text))
        for name in adapter.modules:
            if name not in known and name not in silent:
                text = "present here, missing in most clients; the same modules needed. Allow it with missing='renormalize'"
                failures.append(Failure(client, _at(name), MismatchError, text))


def _check_disjoint(
    adapters: Mapping[str, Adapter], most: bool, names: list[str], failures: list[Failure], said: Said
) -> set[str]:
    """Clients that share no module with the others: nearly always another prefix."""
    main = [c for c, adapter in adapters.items() if adapter.modules.keys() & names] if most else _largest(adapters)
    disjoint = set(adapters).difference(main)
    theirs = next(iter(adapters[main[0]].modules))
    for client in disjoint.difference(said):
        mine = next(iter(adapters[client].modules))
        text = _formats_text(adapters[client], adapters[main[0]], main[0]) or (
            f"no module in common with client {printable(main[0])!r}: {printable(mine)!r} here, {printable(theirs)!r} there; "
            "the same names needed. Check the key prefixes"
        )
        failures.append(Failure(client, "", MismatchError, text))
    return disjoint


def _formats_text(mine: Adapter, theirs: Adapter, holder: str) -> str | None:
    """What to say of a kohya file among PEFT adapters, or the reverse: a key of each shows it best."""
    if (mine.spelling is None) == (theirs.spelling is None):
        return None
    here, there = (next(iter(adapter.modules.values())).A.key for adapter in (mine, theirs))
    formats = ("a PEFT adapter", "a kohya file") if mine.spelling is None else ("a kohya file", "a PEFT adapter")
    return (
        f"{formats[0]}, as its key {printable(here)!r} says, beside {formats[1]} in client {printable(holder)!r}, as {printable(there)!r} "
        "says; one format needed. Convert one side first (fedlora convert)"
    )


def _largest(adapters: Mapping[str, Adapter]) -> list[str]:
    """The largest set of clients linked by modules that they share; ties go to the earliest."""
    left = list(adapters)
    best: list[str] = []
    while left:
        linked, names, grown = {left[0]: None}, set(adapters[left[0]].modules), True
        while grown:
            more = [c for c in left if c not in linked and not names.isdisjoint(adapters[c].modules)]
            names.update(*(adapters[c].modules for c in more))
            linked.update(dict.fromkeys(more))
            grown = bool(more)
        best = list(linked) if len(linked) > len(best) else best
        left = [client for client in left if client not in linked]
    return best


def _check_extras(
    adapters: Mapping[str, Adapter],
    modules: Mapping[str, ModuleSpec],
    missing: str,
    rule: str,
    failures: list[Failure],
    warnings: list[str],
) -> dict[str, ExtraSpec]:
    first = next(iter(adapters.values()))
    if rule == "first":
        return dict(first.extras)

    def expected(adapter: Adapter, spec: ExtraSpec) -> bool:
        """A bias of a module that a client may lack is not asked of it."""
        return missing == "error" or spec.module is None or spec.module in adapter.modules

    found: dict[str, ExtraSpec] = {}
    for name in _union(adapters, lambda adapter: adapter.extras):
        owners = {client: adapter.extras[name] for client, adapter in adapters.items() if name in adapter.extras}
        spec, holder, shape = majority(owners, lambda extra: (extra.rule, extra.tensor.shape))
        if spec.module is not None and spec.module not in modules:
            continue
        lacking = [c for c, adapter in adapters.items() if c not in owners and expected(adapter, spec)]
        if lacking and rule == "ignore":
            warnings.append(
                f"tensor {printable(name)!r} is missing in client {printable(lacking[0])!r} and was dropped"
            )
            continue
        if lacking and rule == "strict":
            few = len(owners) <= len(lacking) and next(iter(adapters)) not in owners
            for client in owners if few else lacking:
                text = _lacking_text(present=few)
                failures.append(Failure(client, _tensor(name), MismatchError, text))
            if few:
                continue
        found[name] = spec
        for client, extra in owners.items():
            if (extra.rule, extra.tensor.shape) != shape:
                text = (
                    f"shape {extra.tensor.shape} but {spec.tensor.shape} in client {printable(holder)!r}; equal shapes needed "
                    "(vocabulary sizes?)"
                )
                failures.append(Failure(client, _tensor(name), MismatchError, text))
    return found


def _lacking_text(present: bool) -> str:
    found = "present here, missing in other clients" if present else "missing here, present in other clients"
    return f"{found}; the same extra tensors needed. Allow it with extras='owners'"


def _reference_names(
    adapters: Mapping[str, Adapter], most: bool, names: Callable[[Adapter], Mapping[str, Any]]
) -> list[str]:
    if not most:
        return _union(adapters, names)
    first, _, _ = majority({client: names(adapter) for client, adapter in adapters.items()}, frozenset)
    return list(first)


def _union(adapters: Mapping[str, Adapter], names: Callable[[Adapter], Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters.values() for name in names(adapter)))


def _duplicates(adapters: Mapping[str, Adapter]) -> list[str]:
    seen: dict[Any, str] = {}
    texts = []
    for client, adapter in adapters.items():
        path = getattr(adapter.source, "path", None)
        other = seen.setdefault(os.path.realpath(path) if path else id(adapter.source), client)
        if other != client:
            texts.append(
                f"clients {printable(other)!r} and {printable(client)!r} are the same adapter; it counts twice"
            )
    return texts


def _bases(adapters: Mapping[str, Adapter]) -> list[str]:
    names = {client: adapter.config.get("base_model_name_or_path") for client, adapter in adapters.items()}
    given = {client: name for client, name in names.items() if isinstance(name, str) and name}
    if len(set(given.values())) < 2:
        return []
    (client, name), (other, second) = next(
        (pair, item) for pair in [next(iter(given.items()))] for item in given.items() if item[1] != pair[1]
    )
    return [
        f"base_model_name_or_path differs: {printable(name)!r} in client {printable(client)!r}, {printable(second)!r} in client "
        f"{printable(other)!r}; the same base model is assumed"
    ]


def _at(name: str) -> str:
    return f"module {printable(name)!r}"


def _tensor(name: str) -> str:
    return f"tensor {printable(name)!r}"
