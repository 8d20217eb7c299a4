"""Mixtures of experts: pairs on parameters of shape (experts, rows, columns), which PEFT names in ``target_parameters``.

The E pairs of a parameter lie in two flat tensors, A (E*r, n) with the expert slowest and B (m, r*E) with the expert fastest:
``D[e, o, i] = s * sum_j B[o, j*E + e] A[e*r + j, i]``. Each expert is a module of its own here, ``path[e]``. The keys carry no
name of a parameter: pairs on one module are nested, the first registered parameter innermost (``experts.base_layer.lora_A``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedlora_kernels.adapters.model import Form, ModuleSpec, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.errors import FormatError, LimitError

__all__ = ["Stored", "TargetParameters", "expert_modules", "nesting"]

NESTED = ".base_layer"
Stored = tuple[TensorSpec, TensorSpec]
"""The tensors A and B of a parameter."""


class Resolver(Protocol):
    """What a configuration says of ranks and scales."""

    who: str

    def resolve(self, name: str) -> tuple[int, float]:
        """Rank and alpha."""

    def scale(self, alpha: float, rank: int) -> float:
        """The scale s."""


class TargetParameters:
    """The entries of ``target_parameters``, and the order in which modules register their parameters if the caller says it."""

    def __init__(self, names: Sequence[str], order: Sequence[str] | None = None) -> None:
        self._by_module: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            module, _, parameter = name.rpartition(".")
            self._by_module.setdefault(module, []).append(parameter)
        self._places = {parameter: place for place, parameter in enumerate(order or ())}

    def of(self, module: str) -> tuple[str, ...]:
        """Full names of the parameters of ``module`` that may carry a pair: PEFT takes each whose name ends with an entry."""
        return self._found(module, ("",))

    def names(self, module: str) -> bool:
        """Whether an entry names this module with its parameter; one without a module may mean any."""
        return bool(self._found(module, ()))

    def ordered(self, names: Sequence[str]) -> list[str] | None:
        """Full names of one module in the order of registration; None where the caller did not say it of all of them."""
        places = {name: self._places.get(name.rpartition(".")[2]) for name in names}
        known = {name: place for name, place in places.items() if place is not None}
        return sorted(known, key=lambda name: known[name]) if len(known) == len(names) else None

    def _found(self, module: str, more: Sequence[str]) -> tuple[str, ...]:
        if not self._by_module:  # most configurations have none, and each module of each client asks
            return ()
        parts = module.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        found = [name for end in (*ends, *more) for name in self._by_module.get(end, ())]
        return tuple(f"{module}.{name}" for name in dict.fromkeys(found))


def nesting(path: str) -> tuple[str, int]:
    """The module that a path of a key belongs to, and how many pairs are wrapped around this one."""
    depth = 0
    while path.endswith(NESTED):
        path, depth = path[: -len(NESTED)], depth + 1
    return path, depth


def expert_modules(
    target: str, pairs: Mapping[int, Stored], parameters: TargetParameters, config: Resolver, limits: Limits
) -> list[ModuleSpec]:
    """The experts of all parameters of the module ``target``, whose tensors A and B are given by their nesting.

    Raises FormatError where a nested pair is missing, where it is open which rank and alpha belong to which pair, or where A and
    B do not hold a whole number of pairs; LimitError for more experts than ``limits`` has modules.
    """
    where = f"{config.who}, module {printable(target)!r}"
    names = parameters.of(target)
    if sorted(pairs) != list(range(len(pairs))) or len(pairs) > len(names):
        found = ", ".join(repr(printable(target + NESTED * depth)) for depth in sorted(pairs))
        raise FormatError(
            f"{where}: pairs on {found}, and target_parameters names {len(names)} parameters of it; for each at most one pair, "
            "nested without gaps, needed. Is the file complete, and the configuration its own?"
        )
    resolved = _resolved(where, names, len(pairs), parameters, config)
    counts = {
        depth: _count(f"{config.who}, module {printable(target + NESTED * depth)!r}", *pair, resolved[depth][0])
        for depth, pair in pairs.items()
    }
    if len({rank for rank, _ in resolved}) > 1 and len(set(counts.values())) > 1:
        listing = ", ".join(str(counts[depth]) for depth in sorted(counts, reverse=True))
        raise FormatError(
            f"{where}: in the order of parameter_order its parameters have {listing} experts; equal numbers needed. Name them "
            "in the order in which the model registers them"
        )
    if sum(counts.values()) > limits.modules_per_client:
        raise LimitError(f"{where}: {limits.over('modules_per_client', sum(counts.values()))}")
    made = []
    for depth, (A, B) in pairs.items():
        path, parts, (rank, alpha) = target + NESTED * depth, counts[depth], resolved[depth]
        for part in range(parts):
            name = f"{path}[{part}]" if parts > 1 else path
            form = Form("expert" if parts > 1 else "linear", path, target, part=part, parts=parts, parameters=names)
            made.append(ModuleSpec(name, form, B.shape[0], A.shape[1], rank, config.scale(alpha, rank), B, A))
    return made


def _resolved(
    where: str, names: Sequence[str], count: int, parameters: TargetParameters, config: Resolver
) -> list[tuple[int, float]]:
    """Rank and alpha of each pair, the outermost one, of the last registered parameter, first."""
    found = {name: config.resolve(name) for name in names}
    if len(set(found.values())) == 1:
        return [found[names[0]]] * count
    ordered = parameters.ordered(names)
    if ordered is not None and len(ordered) == count:
        return [found[name] for name in reversed(ordered)]
    listing = ", ".join(f"{printable(name)} rank {rank} and alpha {alpha:g}" for name, (rank, alpha) in found.items())
    short = ",".join(name.rpartition(".")[2] for name in names)
    remedy = f"Name its parameters in the order in which the model registers them, such as parameter_order={printable(short)}"
    if ordered is not None:
        remedy = f"Only {count} of them carry a pair: leave the others out of target_parameters"
    raise FormatError(
        f"{where}: the configuration gives {listing}, and no key says which pair is whose; one rank and alpha for all parameters "
        f"of a module needed. {remedy}"
    )


def _count(where: str, A: TensorSpec, B: TensorSpec, rank: int) -> int:
    """Number of experts in a flat pair."""
    if len(A.shape) != 2 or len(B.shape) != 2:
        raise FormatError(f"{where}: lora_A {A.shape}, lora_B {B.shape}; (experts * r, n) and (m, r * experts) needed")
    if A.shape[0] % rank:
        raise FormatError(
            f"{where}: lora_A has {A.shape[0]} rows, which rank {rank} of the configuration does not divide; experts * r rows "
            "needed. Mend r or rank_pattern"
        )
    return A.shape[0] // rank
