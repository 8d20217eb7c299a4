"""What a LoRA adapter is: pairs of factors by canonical module name, other tensors, and a configuration.

Nothing here knows a file format: `reader` makes these objects, `writer` consumes them. Factors stay in their source (a
file read with pread, or a state dict) until they are asked for, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora_kernels.adapters.names import printable

__all__ = ["Adapter", "ExtraSpec", "Form", "LoRAFactors", "ModuleSpec", "TensorSource", "TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor, known without reading it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Where tensors live: a safetensors file, or a state dict."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """What is stored, by the source's own keys, in file order."""

    def read(self, key: str, out: Tensor | None = None) -> Tensor:
        """Return the tensor in its stored dtype; into ``out`` (contiguous, same shape and dtype) if given."""

    def read_rows(self, key: str, start: int, out: Tensor) -> None:
        """Read rows of a tensor from ``start`` on, as many as ``out`` (contiguous, of its dtype, on the host) has."""

    def check_unchanged(self) -> None:
        """Raise FormatError where the content is no longer what it was on opening."""

    def fingerprint(self) -> str:
        """Text that differs for any other content."""

    def close(self) -> None:
        """Release the file, if there is one. Idempotent."""


@dataclass(frozen=True, slots=True)
class LoRAFactors:
    """One pair: ``update = scale * B @ A`` with B (m, r) and A (r, n), both in their stored dtype."""

    B: Tensor
    A: Tensor
    scale: float
    kind: str = "linear"


@dataclass(frozen=True, slots=True)
class Form:
    """How a pair is stored and named, beyond its matrices B (m, r) and A (r, n): what writing restores.

    ``kind`` is "linear" (whatever stores a pair as its matrices), "embedding", "conv1d", "conv2d", "conv3d" or "expert".
    ``path`` stands in the keys, ``target`` in the configuration; all pairs of one target are written at one rank.
    ``kernel`` is (c_in, *k) of a convolution, ``tied`` the path of a head that holds an embedding's transposes. Where
    ``parts`` pairs share one flat tensor, A holds them one after another and B interleaved, and this is number ``part``.
    ``spelling`` is what follows ``path`` in the keys of B and A of a kohya file; None in PEFT's own. ``parameters``: full names of
    what ``target_parameters`` may mean by the target.
    """

    kind: str
    path: str
    target: str
    kernel: tuple[int, ...] = ()
    tied: str = ""
    part: int = 0
    parts: int = 1
    spelling: tuple[str, str] | None = None
    parameters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that ``rank_pattern`` and ``alpha_pattern`` are matched with; PEFT looks up a tied head by its own."""
        return self.parameters or ((self.target, self.tied) if self.tied else (self.target,))


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """A module's pair as its header describes it. ``name`` is the path in the base model, and unique.

    ``B`` and ``A`` are the tensors as stored; `matrix` makes the (m, r) and (r, n) of them. ``heads`` are those of a tied
    head, which are the transposes of A and B. Of the ``rank`` columns the last ``start`` are what the client started from, subtracted.
    """

    name: str
    form: Form
    m: int
    n: int
    rank: int
    scale: float
    B: TensorSpec
    A: TensorSpec
    heads: tuple[TensorSpec, ...] = ()
    start: int = 0

    @property
    def trained(self) -> int:
        """The rank that the client trained."""
        return self.rank - self.start

    @property
    def kind(self) -> str:
        """Kind of layer."""
        return self.form.kind

    @property
    def signature(self) -> tuple[str, int, int, tuple[int, ...], int, str]:
        """What must be equal among clients."""
        return self.form.kind, self.m, self.n, self.form.kernel, self.form.parts, self.form.tied

    @property
    def shape_text(self) -> str:
        """Kind and shape for messages."""
        shape = " x ".join(str(size) for size in (self.m, *(self.form.kernel or (self.n,))))
        parts = f", {self.form.parts} of them" if self.form.parts > 1 else ""
        tied = f", tied to {printable(self.form.tied)!r}" if self.form.tied else ""
        return shape if self.kind == "linear" else f"{self.kind} {shape}{parts}{tied}"

    @property
    def whole(self) -> bool:
        """Whether the stored tensors hold this pair alone, number after number as its matrices do."""
        return self.form.parts == 1

    def matrix(self, letter: str, stored: Tensor) -> Tensor:
        """The matrix B (m, r) or A (r, n) in the stored tensor: a view where its strides allow."""
        part, parts = self.form.part, self.form.parts
        if letter == "A":
            return stored.reshape(parts, self.rank, self.n)[part]
        return stored.reshape(self.m, self.rank, parts)[:, :, part]


@dataclass(frozen=True, slots=True)
class ExtraSpec:
    """A tensor that is no factor.

    ``rule`` is "absolute" (modules_to_save, bias: a weighted mean) or "lora_bias" (a change of the bias: times the scale).
    """

    name: str
    rule: str
    tensor: TensorSpec
    module: str | None = None


@dataclass(frozen=True)
class Adapter:
    """Ordered mapping from canonical module name to `LoRAFactors`, plus extras and configuration. Opens lazily.

    ``label`` says where it came from, for messages; ``config`` is the adapter configuration as PEFT writes it;
    ``warnings`` and ``notes`` are texts collected while reading: to warn of, and for the report only.
    """

    label: str
    modules: Mapping[str, ModuleSpec]
    extras: Mapping[str, ExtraSpec]
    config: Mapping[str, Any]
    source: TensorSource
    metadata: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _flat: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()})
        rank = "-".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "none"
        return f"Adapter({printable(self.label)!r}, {len(self)} modules, rank {rank}, {self.nbytes} bytes)"

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def __getitem__(self, name: str) -> LoRAFactors:
        """Read one pair: B (m, r), A (r, n). Tensors that hold many pairs are kept until one in others is asked for."""
        module = self.modules[name]
        if module.whole:
            return _factors(module, self.source.read(module.B.key), self.source.read(module.A.key))
        keys = (module.B.key, module.A.key)
        if tuple(self._flat) != keys:
            self._flat.clear()
            self._flat.update({key: self.source.read(key) for key in keys})
        return _factors(module, *self._flat.values())

    def pairs(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, LoRAFactors]]:
        """Read pairs in order, all or those of ``names``; a tensor that holds several in a row is read once."""
        for name in self.modules if names is None else names:
            yield name, self[name]
        self._flat.clear()

    def extra(self, name: str) -> Tensor:
        """Read one tensor that is no factor."""
        return self.source.read(self.extras[name].tensor.key)

    def extra_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor that is no factor, on the host."""
        spec = self.extras[name].tensor
        rows = torch.empty(stop - start, *spec.shape[1:], dtype=spec.dtype)
        self.source.read_rows(spec.key, start, rows)
        return rows

    def keys(self) -> Iterator[str]:
        """Canonical module names, in file order."""
        return iter(self.modules)

    @property
    def spelling(self) -> tuple[str, str] | None:
        """How a kohya file spells its keys; None for an adapter in PEFT's form."""
        return next((module.form.spelling for module in self.modules.values()), None)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.source.tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Read all tensors, by their keys: those of its file, or for results in memory those of the first client or of `for_client`'s."""
        return {key: self.source.read(key) for key in self.source.tensors}

    def save(self, path: Any, *, overwrite: bool = False) -> None:
        """Write a PEFT folder, or a kohya file where this was one, atomically: it appears complete or not at all.

        Raises InputError where ``path`` exists (unless ``overwrite=True`` and it holds only files written here, or is a LoRA file),
        or does not end in ``.safetensors`` where a file is to be written.
        """
        from fedlora_kernels.adapters.writer import save_adapter

        save_adapter(self, path, overwrite=overwrite)

    def close(self) -> None:
        """Close the file behind the adapter."""
        self._flat.clear()
        self.source.close()


def _factors(module: ModuleSpec, B: Tensor, A: Tensor) -> LoRAFactors:
    return LoRAFactors(module.matrix("B", B), module.matrix("A", A), module.scale, module.kind)
