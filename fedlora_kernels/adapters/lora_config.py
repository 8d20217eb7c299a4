"""PEFT's LoRA configuration: what it says about scales and extra tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora_kernels.adapters.moe import TargetParameters
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.patterns import PatternTable
from fedlora_kernels.adapters.variants import check_variant
from fedlora_kernels.errors import FormatError

__all__ = ["LoRAConfig"]


@dataclass
class LoRAConfig:
    """The fields of ``adapter_config.json`` that decide scales and extra tensors, checked.

    Raises UnsupportedVariantError for variants and initialisations that are not aggregated here, FormatError for fields
    of a wrong type or range.
    """

    raw: Mapping[str, Any]
    who: str
    parameter_order: Sequence[str] | None = None
    rank: int = field(init=False)
    alpha: float = field(init=False)
    rslora: bool = field(init=False)
    bias: str = field(init=False)
    modules_to_save: tuple[str, ...] = field(init=False)
    parameters: TargetParameters = field(init=False)
    tied: bool = field(init=False)

    def __post_init__(self) -> None:
        check_variant(self.raw, self.who)
        self.rank = self._rank(self.raw.get("r", 8), "r")
        self.alpha = self._number(self.raw.get("lora_alpha", 8), "lora_alpha")
        self.rslora = self._flag("use_rslora")
        self._flag("lora_bias")
        self._flag("fan_in_fan_out")
        self.bias = self.raw.get("bias") or "none"
        if self.bias not in ("none", "all", "lora_only"):
            raise FormatError(f"{self.who}: bias is {printable(self.bias)!r}; 'none', 'all' or 'lora_only' needed")
        self.modules_to_save = self._names("modules_to_save")
        self.tied = self._flag("ensure_weight_tying")
        self._tokens = self._token_counts()
        self.parameters = TargetParameters(self._names("target_parameters"), self.parameter_order)
        self._ranks = self._table("rank_pattern", self._rank)
        self._alphas = self._table("alpha_pattern", self._number)

    def resolve(self, name: str) -> tuple[int, float]:
        """Return (rank, alpha) of the module ``name``, the path in the base model."""
        return self._ranks.resolve(name, self.rank), self._alphas.resolve(name, self.alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """Return s = alpha / r, or alpha / sqrt(r) with rsLoRA; r is the module's own rank."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def warnings(self) -> list[str]:
        """Texts on patterns that contradict each other, after all modules were resolved."""
        return self._ranks.warnings() + self._alphas.warnings()

    def notes(self) -> list[str]:
        """Texts on patterns that match nothing, after all modules were resolved."""
        return self._ranks.notes() + self._alphas.notes()

    def saves(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to one of ``modules_to_save``."""
        return self.covers(self.modules_to_save, name)

    def tokens(self, module: str) -> int | None:
        """How many token rows of ``module`` are trained; None where the configuration does not say."""
        return next(
            (count for end, count in self._tokens.items() if f".{module}".endswith(f".{end}" if end else "")), None
        )

    @staticmethod
    def covers(modules: Sequence[str], name: str) -> bool:
        """Whether the tensor ``name`` lies in one of ``modules``: PEFT takes every module whose path ends like that."""
        segments = name.split(".")
        paths = [".".join(segments[: i + 1]) for i in range(len(segments) - 1)]
        return any(path.endswith(module) for path in paths for module in modules)

    def is_parameter(self, module: str, rows: int) -> bool:
        """Whether a pair on ``module`` with ``rows`` rows in A belongs to one of its parameters, not to the module itself.

        An entry of ``target_parameters`` without a module may mean any; then ``target_modules`` decides.
        """
        if self.parameters.names(module) or not self.parameters.of(module):
            return self.parameters.names(module)
        targets = self.raw.get("target_modules")
        if isinstance(targets, list | tuple):
            return not any(module == name or module.endswith(f".{name}") for name in targets)
        return targets is None or self.resolve(module)[0] != rows

    def _flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{self.who}: {key} is {printable(value)}; true or false needed")
        return bool(value)

    def _rank(self, value: Any, key: str) -> int:
        if type(value) is not int or value < 1:
            raise FormatError(f"{self.who}: {key} is {printable(value)}; an integer of at least 1 needed")
        return value

    def _number(self, value: Any, key: str) -> float:
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise FormatError(f"{self.who}: {key} is {printable(value)}; a finite number needed")
        return number

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or ()
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
            raise FormatError(f"{self.who}: {key} is {printable(value)}; a list of names needed")
        return tuple(value)

    def _token_counts(self) -> dict[str, int]:
        """Numbers of token indices by the module they are for; a plain list is for the input embedding, by any name."""
        value = self.raw.get("trainable_token_indices") or {}
        lists = value if isinstance(value, Mapping) else {"": value}
        for indices in lists.values():
            whole = isinstance(indices, list | tuple) and all(type(index) is int and index >= 0 for index in indices)
            if not whole:
                raise FormatError(
                    f"{self.who}: trainable_token_indices is {printable(value)}; a list of token numbers, or one for each "
                    "module, needed"
                )
        return {str(name): len(indices) for name, indices in lists.items()}

    def _table(self, key: str, check: Any) -> PatternTable:
        value = self.raw.get(key) or {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise FormatError(f"{self.who}: {key} is {printable(value)}; a mapping from patterns to numbers needed")
        values = {name: check(entry, f"{key}[{printable(name)!r}]") for name, entry in value.items()}
        return PatternTable(values, f"{self.who}: {key}")
