"""AdaLoRA checkpoints as plain pairs: ``alpha / (init_r + 1e-5) * B diag(E) A``, with E and the factor folded into B."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.adapters.config import rank_patterns
from fedlora_kernels.adapters.extras import check_float
from fedlora_kernels.adapters.keys import canonical_keys
from fedlora_kernels.adapters.model import TensorSource, TensorSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError

__all__ = ["fold_adalora"]

EPSILON = 1e-5
"""What PEFT adds to the rank before it divides by it."""
LETTERS = ("lora_A", "lora_B", "lora_E")
RANK = "ranknum"
"""The rank as a tensor, which old PEFT stored beside the factors."""


def fold_adalora(
    source: TensorSource, raw: Mapping[str, Any], who: str, adapter_name: str | None = None
) -> tuple[TensorSource, dict[str, Any]]:
    """Return tensors and configuration of the LoRA adapter with the same update.

    The factor of the update is ``alpha / (init_r + 1e-5)``: alpha is not divided by the rank that is left. A module whose mask
    leaves nothing becomes a pair of rank 1 that is zero. Raises FormatError, beginning with ``who``, where tensors, masks and
    configuration do not fit each other.
    """
    factor = _factor(raw, who)
    masks = _masks(raw, who)
    found: dict[tuple[str, str], dict[str, TensorSpec]] = {}
    for key, spec in source.tensors.items():
        stem, letter, name = _split(key)
        if letter in LETTERS and (adapter_name is None or name in ("", f".{adapter_name}")):
            found.setdefault((stem, name), {})[letter] = spec
    modules = {place: canonical_keys([f"{place[0]}.lora_A.weight"], who)[0].name for place in found}
    triples = {
        place: _triple(specs, masks.get(modules[place]), f"{who}, module {printable(modules[place])!r}")
        for place, specs in found.items()
    }
    ranks = {modules[place]: max(triple.rank, 1) for place, triple in triples.items()}
    largest = max(ranks.values(), default=1)
    patterns = rank_patterns(ranks, largest)
    config = {key: value for key, value in raw.items() if key != "use_rslora"}
    config |= {"peft_type": "LORA", "r": largest, "lora_alpha": largest, "rank_pattern": patterns}
    return _FoldedSource(source, triples, factor), {**config, "alpha_pattern": dict(patterns)}


@dataclass(frozen=True)
class _Triple:
    """The stored tensors of one module; ``rows`` are what its mask leaves of them, None where they were cut on saving."""

    A: TensorSpec
    B: TensorSpec
    E: TensorSpec
    rows: tuple[int, ...] | None

    @property
    def rank(self) -> int:
        """Components that are left, maybe none."""
        return self.A.shape[0] if self.rows is None else len(self.rows)

    @property
    def wide(self) -> torch.dtype:
        """Half precision would round the product with E."""
        return torch.float64 if torch.float64 in (self.B.dtype, self.E.dtype) else torch.float32


class _FoldedSource:
    """The tensors of AdaLoRA as pairs under the keys of LoRA; every other tensor as it is."""

    def __init__(self, source: TensorSource, triples: Mapping[tuple[str, str], _Triple], factor: float) -> None:
        self._source, self._factor = source, factor
        self.path = getattr(source, "path", None)
        self.tensors: dict[str, TensorSpec] = {}
        self._of: dict[str, tuple[_Triple, str]] = {}
        for (stem, name), triple in triples.items():
            rank = max(triple.rank, 1)
            shapes = {"A": (rank, triple.A.shape[1]), "B": (triple.B.shape[0], rank)}
            for letter, dtype in (("A", triple.A.dtype), ("B", triple.wide)):
                key = f"{stem}.lora_{letter}{name}.weight"
                self.tensors[key] = TensorSpec(key, shapes[letter], dtype)
                self._of[key] = triple, letter
        for key, spec in source.tensors.items():
            if _split(key)[1] not in (*LETTERS, RANK):
                self.tensors[key] = spec

    def read(self, key: str, out: Tensor | None = None) -> Tensor:
        """Return the tensor, of a pair as folded; into ``out`` if given."""
        if key not in self._of:
            return self._source.read(key, out)
        value = self._folded(*self._of[key]).to(self.tensors[key].dtype)
        return value if out is None else out.copy_(value)

    def read_rows(self, key: str, start: int, out: Tensor) -> None:
        """Copy rows of a tensor from ``start`` on, as many as ``out`` has."""
        out.copy_(self.read(key)[start : start + len(out)])

    def check_unchanged(self) -> None:
        """Raise FormatError where somebody wrote into the file since it was opened."""
        self._source.check_unchanged()

    def fingerprint(self) -> str:
        """What tells this content from another."""
        return f"{self._source.fingerprint()}-{self._factor!r}"

    def close(self) -> None:
        """Close the file behind it."""
        self._source.close()

    def _folded(self, triple: _Triple, letter: str) -> Tensor:
        if not triple.rank:
            return torch.zeros(1, triple.A.shape[1]) if letter == "A" else torch.zeros(triple.B.shape[0], 1)
        rows = slice(None) if triple.rows is None else list(triple.rows)
        if letter == "A":
            return self._source.read(triple.A.key)[rows]
        B, E = (self._source.read(spec.key).to(torch.float64) for spec in (triple.B, triple.E))
        return B[:, rows] * (E[rows].T * self._factor)


def _split(key: str) -> tuple[str, str, str]:
    """(path, tensor's name, adapter's name with a dot before it) of a key; empty where there is none."""
    segments = key.removesuffix(".weight").split(".")
    for back in (1, 2):
        if len(segments) > back and segments[-back] in (*LETTERS, RANK):
            name = "".join(f".{segment}" for segment in segments[len(segments) - back + 1 :])
            return ".".join(segments[:-back]), segments[-back], name
    return key, "", ""


def _factor(raw: Mapping[str, Any], who: str) -> float:
    rank, alpha = raw.get("init_r", 12), raw.get("lora_alpha", 8)
    if type(rank) is not int or not 1 <= rank < 1 << 31:
        raise FormatError(f"{who}: init_r is {printable(rank)}; an integer of at least 1 needed")
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < 1e300
    if not number or not math.isfinite(alpha) or alpha <= 0:
        raise FormatError(
            f"{who}: lora_alpha is {printable(alpha)}; a positive number needed. AdaLoRA reads any other as the rank"
        )
    return float(alpha) / (rank + EPSILON)


def _masks(raw: Mapping[str, Any], who: str) -> dict[str, Sequence[bool]]:
    """What ``rank_pattern`` leaves of each module, by canonical name: one truth value for each initial component."""
    given = raw.get("rank_pattern") or {}
    good = isinstance(given, Mapping) and all(
        isinstance(key, str) and isinstance(mask, list | tuple) and all(isinstance(kept, bool) for kept in mask)
        for key, mask in given.items()
    )
    if not good:
        raise FormatError(f"{who}: rank_pattern is {printable(given)}; a mapping from AdaLoRA tensors to masks needed")
    masks: dict[str, Sequence[bool]] = {}
    for key, mask in given.items():
        stem, letter, _ = _split(key)
        if letter != "lora_E":
            raise FormatError(f"{who}: rank_pattern: entry {printable(key)!r} names no lora_E; AdaLoRA's masks needed")
        masks[canonical_keys([f"{stem}.lora_A.weight"], who)[0].name] = mask
    return masks


def _triple(specs: Mapping[str, TensorSpec], mask: Sequence[bool] | None, where: str) -> _Triple:
    lacking = [letter for letter in LETTERS if letter not in specs]
    if lacking:
        raise FormatError(
            f"{where}: {next(iter(specs))} without {lacking[0]}; lora_A, lora_B and lora_E needed. The file is incomplete"
        )
    A, B, E = (specs[letter] for letter in LETTERS)
    for spec in (A, B, E):
        check_float(spec, where)
    r = A.shape[0] if A.shape else 0
    if len(A.shape) != 2 or E.shape != (r, 1) or len(B.shape) != 2 or B.shape[1] != r or 0 in (A.shape[1], B.shape[0]):
        raise FormatError(
            f"{where}: lora_A {A.shape}, lora_B {B.shape}, lora_E {E.shape}; (r, n), (m, r) and (r, 1) needed"
        )
    if mask is None or sum(mask) == r:
        return _Triple(A, B, E, None)
    if len(mask) != r:
        raise FormatError(
            f"{where}: rank {r}, but its mask in rank_pattern keeps {sum(mask)} of {len(mask)}; one of both needed. Save the adapter again"
        )
    return _Triple(A, B, E, tuple(i for i, kept in enumerate(mask) if kept))
