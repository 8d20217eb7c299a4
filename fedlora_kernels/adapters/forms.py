"""How pairs are laid out in a PEFT file: keys and shapes by kind, and which pairs must share one rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedlora_kernels.adapters.flat import interleaved
from fedlora_kernels.adapters.keys import PREFIX, canonical_keys
from fedlora_kernels.adapters.model import ExtraSpec, ModuleSpec
from fedlora_kernels.errors import FedLoRAError

__all__ = [
    "NamedPair",
    "Pad",
    "Units",
    "factor_keys",
    "own_keys",
    "pattern_ranks",
    "spelled",
    "stored_pieces",
    "stored_shapes",
    "stored_tensors",
    "target_ranks",
    "whole_units",
    "written_numbers",
]

NamedPair = tuple[str, Tensor, Tensor]
"""A module's name, its B (m, p) and its A (p, n), scale in the factors."""
Pieces = tuple[str, tuple[int, ...], Iterable[Tensor]]
"""A tensor's key, its shape, and its numbers in pieces of any shape."""
Pad = Callable[[NamedPair, int], NamedPair]
"""Brings a pair to a larger rank without changing its product."""


def factor_keys(module: ModuleSpec) -> tuple[str, str]:
    """Keys of B and A of a module in a PEFT file, or in a kohya file of its spelling."""
    if module.form.spelling is not None:
        up, down = module.form.spelling
        return f"{module.form.path}{up}", f"{module.form.path}{down}"
    if module.kind == "embedding":
        return f"{PREFIX}{module.form.path}.lora_embedding_B", f"{PREFIX}{module.form.path}.lora_embedding_A"
    return _linear_keys(module.form.path)


def own_keys(modules: Mapping[str, ModuleSpec], extras: Mapping[str, ExtraSpec]) -> dict[str, str]:
    """The keys of tensors where these specs come from, such as `lora_A.default.weight` of a live model, by their keys in a PEFT file.

    Empty for kohya files, whose keys stay as they are, and where the keys mean something else, as AdaLoRA's do.
    """
    keys: dict[str, str] = {}
    for module in modules.values():
        if module.form.spelling is None:
            keys.update(zip(factor_keys(module), (module.B.key, module.A.key), strict=True))
        if module.form.tied:
            keys.update(zip(_linear_keys(module.form.tied), (head.key for head in module.heads), strict=True))
    keys.update({f"{PREFIX}{name}": extra.tensor.key for name, extra in extras.items()})
    try:
        parsed = canonical_keys(keys.values(), "")
    except FedLoRAError:
        return {}
    meant = canonical_keys(keys, "")
    return keys if [(key.part, key.name) for key in parsed] == [(key.part, key.name) for key in meant] else {}


def spelled(modules: Mapping[str, ModuleSpec], spelling: tuple[str, str] | None) -> dict[str, ModuleSpec]:
    """The modules with their keys in one spelling: that of a kohya file, or PEFT's (None)."""
    return {
        name: dataclasses.replace(module, form=dataclasses.replace(module.form, spelling=spelling))
        for name, module in modules.items()
    }


def stored_shapes(module: ModuleSpec, rank: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the tensors that hold a module's pair at this rank, in the order of the file."""
    key_B, key_A = factor_keys(module)
    kernel, parts = module.form.kernel, module.form.parts
    ones = (1,) * len(kernel[1:])
    shapes = {key_A: (parts * rank, *(kernel or (module.n,))), key_B: (module.m, parts * rank, *ones)}
    if module.form.tied:
        head_B, head_A = _linear_keys(module.form.tied)
        shapes |= {head_A: (rank, module.m), head_B: (module.n, rank)}
    return shapes


def written_numbers(module: ModuleSpec) -> int:
    """Numbers that one component of a module's pair adds to a file: m + n, and as many for a tied head."""
    return sum(math.prod(shape) for shape in stored_shapes(module, 1).values()) // module.form.parts


def stored_pieces(unit: Sequence[NamedPair], modules: Mapping[str, ModuleSpec]) -> Iterator[Pieces]:
    """Tensors of a PEFT file for pairs that `Units` gave back together, flat ones in pieces."""
    paths: dict[str, list[NamedPair]] = {}
    for pair in unit:
        paths.setdefault(modules[pair[0]].form.path, []).append(pair)
    for pairs in paths.values():
        pairs.sort(key=lambda pair: modules[pair[0]].form.part)
        module, (_, B, A) = modules[pairs[0][0]], pairs[0]
        shapes = stored_shapes(module, A.shape[0]).items()
        factors: list[Iterable[Tensor]] = [[A], [B]]
        if len(pairs) > 1:
            factors = [[A for _, _, A in pairs], interleaved([B for _, B, _ in pairs])]
        if module.form.tied:
            factors += [[x.mT.clone(memory_format=torch.contiguous_format)] for x in (B, A)]
        for (key, shape), pieces in zip(shapes, factors, strict=True):
            yield key, shape, pieces


def stored_tensors(unit: Sequence[NamedPair], modules: Mapping[str, ModuleSpec]) -> Iterator[tuple[str, Tensor]]:
    """The same as whole tensors."""
    for key, shape, pieces in stored_pieces(unit, modules):
        whole = list(pieces)
        yield key, (whole[0] if len(whole) == 1 else torch.cat([piece.reshape(-1) for piece in whole])).reshape(shape)


class Units:
    """Pairs on their way out, held back until all pairs of their target are there: these are written at one rank.

    Args:
        modules: everything that may come, by name, the pairs of a target one after another.
        pad: brings a pair to a larger rank; with zeros where not given.
        written: the ranks of what was written before.
    """

    def __init__(
        self, modules: Mapping[str, ModuleSpec], pad: Pad | None = None, written: Mapping[str, int] | None = None
    ) -> None:
        self._modules, self._pad = modules, pad or _padded
        self._members: dict[str, list[str]] = {}
        for name, module in modules.items():
            self._members.setdefault(module.form.target, []).append(name)
        self._held: dict[str, NamedPair] = {}
        self.found = dict(written or {})

    @property
    def holds(self) -> bool:
        """Whether pairs wait for others of their target."""
        return bool(self._held)

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks at which the modules so far are written; a target of which something has come is written whole."""
        common = target_ranks(self.found, self._modules)
        return {name: rank for target, rank in common.items() for name in self._members[target]}

    def add(self, pair: NamedPair) -> Iterator[list[NamedPair]]:
        """Take a pair; yield the pairs of each target that is complete by now."""
        name, _, A = pair
        target = self._modules[name].form.target
        if self._held and self._modules[next(iter(self._held))].form.target != target:
            yield from self.rest()
        self.found[name] = A.shape[0]
        self._held[name] = pair
        if len(self._held) == len(self._members[target]):
            yield from self.rest()

    def rest(self) -> Iterator[list[NamedPair]]:
        """Yield the pairs of the last target; those that never came are zero."""
        held, self._held = self._held, {}
        if not held:
            return
        _, B, A = next(iter(held.values()))
        rank = max(A.shape[0] for _, _, A in held.values())
        yield [
            self._at_rank(held.get(name) or self._zero(name, B, A), rank)
            for name in self._members[self._modules[next(iter(held))].form.target]
        ]

    def _at_rank(self, pair: NamedPair, rank: int) -> NamedPair:
        return pair if pair[2].shape[0] == rank else self._pad(pair, rank)

    def _zero(self, name: str, B: Tensor, A: Tensor) -> NamedPair:
        module = self._modules[name]
        return name, B.new_zeros(module.m, 1), A.new_zeros(1, module.n)


def target_ranks(ranks: Mapping[str, int], modules: Mapping[str, ModuleSpec]) -> dict[str, int]:
    """The largest rank of each target, by the target's name; a module that is not in ``modules`` is one of its own."""
    common: dict[str, int] = {}
    for name, rank in ranks.items():
        target = modules[name].form.target if name in modules else name
        common[target] = max(rank, common.get(target, 0))
    return common


def pattern_ranks(ranks: Mapping[str, int], modules: Mapping[str, ModuleSpec]) -> dict[str, int]:
    """The largest rank of each target, by the names that patterns are matched with."""
    common = target_ranks(ranks, modules)
    forms = {form.target: form for form in (modules[name].form for name in ranks)}
    return {name: common[target] for target, form in forms.items() for name in form.names}


def whole_units(pairs: Iterable[NamedPair], modules: Mapping[str, ModuleSpec]) -> Iterator[list[NamedPair]]:
    """All pairs by target, each target at one rank."""
    units = Units(modules)
    for pair in pairs:
        yield from units.add(pair)
    yield from units.rest()


def _linear_keys(path: str) -> tuple[str, str]:
    return f"{PREFIX}{path}.lora_B.weight", f"{PREFIX}{path}.lora_A.weight"


def _padded(pair: NamedPair, rank: int) -> NamedPair:
    name, B, A = pair
    wide, tall = B.new_zeros(B.shape[0], rank), A.new_zeros(rank, A.shape[1])
    wide[:, : A.shape[0]] = B
    tall[: A.shape[0]] = A
    return name, wide, tall
