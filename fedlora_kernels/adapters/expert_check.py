"""Do the experts of these clients fit each other? The same number, nested alike, fused or not, and of one layout of PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedlora_kernels.adapters.majority import majority
from fedlora_kernels.adapters.model import Adapter, ModuleSpec
from fedlora_kernels.adapters.names import printable

__all__ = ["Misfit", "expert_misfits", "swapped"]

SWAPPED_BEFORE = (0, 19)
"""Older versions of PEFT make A as wide as the second axis of a parameter and B as high as its third, whatever the model."""
Experts = Mapping[str, Mapping[str, ModuleSpec]]
"""Expert modules by client and name."""


@dataclass(frozen=True)
class Misfit:
    """What does not fit in a client, and the ``modules`` of which nothing more needs to be said."""

    client: str
    where: str
    text: str
    modules: frozenset[str]


def expert_misfits(adapters: Mapping[str, Adapter]) -> list[Misfit]:
    """Everything that keeps the experts of a client from being aggregated with those of most others, whatever may be missing."""
    experts = {
        client: {name: module for name, module in adapter.modules.items() if module.form.parameters}
        for client, adapter in adapters.items()
    }
    if not any(experts.values()):
        return []
    return [*_versions(adapters, experts), *_layouts(experts), *_unfused(adapters, experts)]


def swapped(version: object) -> bool | None:
    """Whether a version of PEFT swaps the two sides of an expert; None where it is missing or a build between releases."""
    found = (
        re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})(\.[0-9]{1,4})?(\.post[0-9]{1,4})?", version)
        if isinstance(version, str)
        else None
    )
    return None if found is None else (int(found[1]), int(found[2])) < SWAPPED_BEFORE


def _versions(adapters: Mapping[str, Adapter], experts: Experts) -> list[Misfit]:
    """Clients on the other side of the change of layout, or on no known one where square experts do not show it."""
    versions = {client: adapters[client].config.get("peft_version") for client, own in experts.items() if own}
    sides = {client: side for client in versions if (side := swapped(versions[client])) is not None}
    if not sides:
        return []
    _, holder, reference = majority(sides)
    there = f"{versions[holder]!r} in client {printable(holder)!r}"
    misfits = []
    for client, version in versions.items():
        square = next((name for name, module in experts[client].items() if module.m == module.n), None)
        if client in sides and sides[client] != reference:
            remedy = "so one layout needed. Train and save all clients with one version"
        elif client not in sides and square is not None:
            shape = f"which the shape of module {printable(square)!r} does not show"
            remedy = f"{shape}; a release needed. Write the one that saved it into the configuration"
        else:
            continue
        text = f"peft_version is {printable(version)!r} but {there}; PEFT before 0.19 swaps the two sides of an expert, {remedy}"
        misfits.append(Misfit(client, "configuration", text, frozenset(experts[client])))
    return misfits


def _layouts(experts: Experts) -> list[Misfit]:
    """Clients that have another number of experts, or of parameters, in a module than most."""
    layouts: dict[str, dict[str, tuple[tuple[str, int], ...]]] = {}
    for client, own in experts.items():
        for module in own.values():
            if module.form.part == 0:
                by_client = layouts.setdefault(module.form.target, {})
                by_client[client] = (*by_client.get(client, ()), (module.form.path, module.form.parts))
    misfits = []
    for target, by_client in layouts.items():
        reference, holder, common = majority(by_client, frozenset)
        for client, layout in by_client.items():
            if frozenset(layout) != common:
                text = (
                    f"{_described(layout)} but {_described(reference)} in client {printable(holder)!r}; the same parameters with "
                    "the same number of experts needed. The number is the rows of lora_A over the configured rank"
                )
                modules = frozenset(_names(experts.values(), target))
                misfits.append(Misfit(client, f"module {printable(target)!r}", text, modules))
    return misfits


def _described(layout: Iterable[tuple[str, int]]) -> str:
    counts = [parts for _, parts in layout]
    listing = str(counts[0]) if len(set(counts)) == 1 else " and ".join(map(str, counts))
    return f"{len(counts)} parameter{'s' * (len(counts) > 1)} of {listing} expert{'s' * (listing != '1')}"


def _unfused(adapters: Mapping[str, Adapter], experts: Experts) -> list[Misfit]:
    """Clients that have a layer for each expert where others have one tensor for all: another form of the same update."""
    targets = {module.form.target for own in experts.values() for module in own.values()}
    ends = "|".join(sorted({re.escape(target.rpartition(".")[2]) for target in targets}))
    layer = re.compile(rf"(?:.*\.)?(?:{ends})\.[0-9]+\..*")
    fused = {client: own for client, own in experts.items() if own}
    shared = set.intersection(*(set(adapters[client].modules) for client in fused))
    apart = {
        client: [name for name in adapters[client].modules if name not in shared and layer.fullmatch(name)]
        for client in adapters
        if client not in fused
    }
    apart = {client: names for client, names in apart.items() if names}
    if not apart:
        return []
    first = next(iter(adapters))
    blamed = apart if len(apart) < len(fused) or (len(apart) == len(fused) and first in fused) else fused
    example, other = next(iter(next(iter(apart.values())))), min(targets)
    one, two = next(iter(apart)), next(iter(fused))
    modules = frozenset(name for names in (*apart.values(), *experts.values()) for name in names)
    misfits = []
    for client in blamed:
        if blamed is apart:
            found = (
                f"a layer for each expert, but one tensor for all in client {printable(two)!r} ({printable(other)!r})"
            )
            where = apart[client][0]
        else:
            found = f"one tensor for all experts, but a layer for each in client {printable(one)!r} ({printable(example)!r})"
            where = next(iter(fused[client].values())).form.target
        text = f"{found}; one form needed. Load the layers into the fused model with PEFT and save them again"
        misfits.append(Misfit(client, f"module {printable(where)!r}", text, modules))
    return misfits


def _names(experts: Iterable[Mapping[str, ModuleSpec]], target: str) -> Iterable[str]:
    return (name for own in experts for name, module in own.items() if module.form.target == target)
