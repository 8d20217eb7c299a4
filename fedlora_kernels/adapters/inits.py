"""Initialisations that change the base weight: what an adapter is beside the one it started from.

PiSSA and its kin subtract ``s0 B0 A0`` from the base, so the stored pair alone fits no base model that anybody else has.
What fits the original base is the difference ``s B A - s0 B0 A0``, a pair of the summed rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.adapters.majority import majority
from fedlora_kernels.adapters.model import Adapter, ModuleSpec, TensorSource, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.variants import changes_base
from fedlora_kernels.errors import FormatError, InputError, MismatchError

__all__ = ["KEEPS_ALPHA", "check_kept_rank", "kept_fields", "kept_init", "kept_misfits", "kept_warning", "since_start"]

KEEPS_ALPHA = "olora"
"""Its residual depends on the scale, so the output must keep the clients'."""
REPLAYED = ("pissa", "olora")
"""What loading does again, and alike each time, on the original base."""
SCALE_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def kept_init(config: Mapping[str, Any]) -> str | None:
    """The initialisation of a configuration if it changes the base weight."""
    init = config.get("init_lora_weights", True)
    return str(init) if changes_base(init) else None


def kept_fields(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """What the configuration of an output takes over from clients that keep their initialisation; nothing for others.

    ``ranks`` are by target. Raises InputError as `check_kept_rank`.
    """
    first = adapters[0]
    init = kept_init(first.config)
    if init is None:
        return {}
    for module in first.modules.values():
        check_kept_rank(module, ranks.get(module.form.target, 0), init)
    kept = {name: first.config[name] for name in SCALE_FIELDS if name in first.config} if init == KEEPS_ALPHA else {}
    return {**kept, "init_lora_weights": init}


def check_kept_rank(module: ModuleSpec, rank: int, init: str) -> None:
    """Raise InputError where a module comes out at another rank than the clients': its residual base would be another one."""
    if rank != module.rank:
        raise InputError(
            f"module {printable(module.name)!r}: rank {rank} in the output, {module.rank} in the clients; init='keep' needs the same, as "
            f"{printable(init)} changes the base by its rank. Take rule=Rank({module.rank}), or init_factors="
        )


def kept_misfits(adapters: Mapping[str, Adapter], modules: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Client, module and text where clients that keep an initialisation have not one residual base: one rank, for OLoRA one scale."""
    kept = {client: adapter for client, adapter in adapters.items() if kept_init(adapter.config) is not None}
    scaled = any(kept_init(adapter.config) == KEEPS_ALPHA for adapter in kept.values())
    for name in modules if kept else ():
        owners = {client: adapter.modules[name] for client, adapter in kept.items() if name in adapter.modules}
        for what in ("rank", "scale") if scaled else ("rank",):
            values = {client: getattr(spec, what) for client, spec in owners.items()}
            _, holder, common = majority(values)
            for client, value in values.items():
                if value != common:
                    text = f"{what} {value} but {common} in client {printable(holder)!r}"
                    yield client, name, f"{text}; init='keep' needs one. Use init_factors="


def kept_warning(config: Mapping[str, Any], who: str) -> str:
    """What a client that keeps its initialisation is warned of."""
    init = kept_init(config)
    base = "replays it on the original base" if init in REPLAYED else "does not give back that base: keep it yourself"
    return (
        f"{who}: init_lora_weights is {printable(init)!r}, which changes the base weights; kept as it is. The result fits the "
        f"residual base of this initialisation, and loading {base}"
    )


def since_start(adapter: Adapter, initial: Adapter, who: str) -> Adapter:
    """The adapter whose update is what ``adapter`` has learned since ``initial``: it fits the original base.

    Raises MismatchError where a module of the adapter is missing in ``initial`` or has another shape or rank there.
    """
    init = kept_init(adapter.config)
    _check(adapter, initial, who)
    source = _Difference(adapter, initial)
    modules = {name: source.module(spec) for name, spec in adapter.modules.items()}
    quantised = "; what its quantisation took from the base is not in it" if init == "loftq" else ""
    text = f"{who}: init_lora_weights is {init!r}, which changes the base weights; what it started from was subtracted{quantised}"
    config = {**adapter.config, "init_lora_weights": True}
    warnings = (*adapter.warnings, text)
    return dataclasses.replace(adapter, modules=modules, config=config, source=source, warnings=warnings)


def _check(adapter: Adapter, initial: Adapter, who: str) -> None:
    for name, spec in adapter.modules.items():
        where = f"{who}, module {printable(name)!r}"
        start = initial.modules.get(name)
        if start is None:
            raise MismatchError(f"{where}: missing in init_factors; every module of the adapter needed")
        if (start.m, start.n, start.rank) != (spec.m, spec.n, spec.rank) or not (start.whole and spec.whole):
            raise MismatchError(
                f"{where}: {spec.shape_text} of rank {spec.rank}, but {start.shape_text} of rank {start.rank} in init_factors; the "
                "adapter that this client started from needed"
            )
        if spec.scale == 0.0:
            raise FormatError(
                f"{where}: lora_alpha is 0, so nothing can be subtracted in its scale; another alpha needed"
            )


class _Difference:
    """Pairs ``[B, -(s0 / s) B0]`` and ``[A; A0]``, which keep the adapter's scale s; every other tensor as it is."""

    def __init__(self, adapter: Adapter, initial: Adapter) -> None:
        self._adapter, self._initial = adapter, initial
        self._source: TensorSource = adapter.source
        self.path = getattr(adapter.source, "path", None)
        self._pairs: dict[str, tuple[ModuleSpec, str]] = {}
        self.tensors: dict[str, TensorSpec] = dict(adapter.source.tensors)
        for name, spec in adapter.modules.items():
            shapes = {"B": (spec.m, 2 * spec.rank), "A": (2 * spec.rank, spec.n)}
            dtypes = self._dtypes(spec, initial.modules[name])
            for letter, stored in (("B", spec.B), ("A", spec.A)):
                self._pairs[stored.key] = spec, letter
                self.tensors[stored.key] = TensorSpec(stored.key, shapes[letter], dtypes[letter])

    def module(self, spec: ModuleSpec) -> ModuleSpec:
        """The module of the difference."""
        B, A = self.tensors[spec.B.key], self.tensors[spec.A.key]
        return dataclasses.replace(spec, rank=2 * spec.rank, B=B, A=A, start=spec.rank)

    def read(self, key: str, out: Tensor | None = None) -> Tensor:
        """Return the tensor, both halves of a pair; into ``out`` if given."""
        if key not in self._pairs:
            return self._source.read(key, out)
        spec, letter = self._pairs[key]
        pair, start = self._adapter[spec.name], self._initial[spec.name]
        dtype = self.tensors[key].dtype
        if letter == "A":
            value = torch.cat([pair.A.to(dtype), start.A.to(dtype)])
        else:
            change = start.B.to(torch.float64) * (-start.scale / spec.scale)
            value = torch.cat([pair.B.to(dtype), change.to(dtype)], 1)
        return value if out is None else out.copy_(value)

    def read_rows(self, key: str, start: int, out: Tensor) -> None:
        """Copy rows of a tensor from ``start`` on, as many as ``out`` has."""
        out.copy_(self.read(key)[start : start + len(out)])

    def check_unchanged(self) -> None:
        """Raise FormatError where one of both files was written into since it was opened."""
        self._source.check_unchanged()
        self._initial.source.check_unchanged()

    def fingerprint(self) -> str:
        """What tells this content from another: the scales of the start come from its configuration, not from its file."""
        scales = {name: spec.scale for name, spec in self._initial.modules.items()}
        return f"{self._source.fingerprint()}-{self._initial.source.fingerprint()}-{scales}"

    def close(self) -> None:
        """Close the adapter's file; the initial one belongs to all clients."""
        self._source.close()

    @staticmethod
    def _dtypes(spec: ModuleSpec, start: ModuleSpec) -> dict[str, torch.dtype]:
        """The stored dtypes where both halves keep every digit in them, else float32, or float64 where one is."""
        dtypes = {}
        for letter, one, other in (("B", spec.B, start.B), ("A", spec.A, start.A)):
            exact = one.dtype == other.dtype and (letter == "A" or spec.scale == start.scale)
            wide = torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32
            dtypes[letter] = one.dtype if exact else wide
        return dtypes
