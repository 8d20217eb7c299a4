"""Rank rules: how many singular values to keep. Frozen, checked when made; boundaries as in docs/numerics.md, Rank rules."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedlora_kernels.backends.contract import RuleCode, RuleSpec
from fedlora_kernels.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Absolute",
    "Budget",
    "Energy",
    "Frobenius",
    "Rank",
    "RankRule",
    "SingularValueRatio",
    "SingularValueSum",
    "parse_size",
    "spec_of",
]


def _real(rule: RankRule, name: str) -> float:
    """Return a field as a Python float and store it so, whatever real number type it came in."""
    value = getattr(rule, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{type(rule).__name__}: {name} is {value!r}; a number is needed")
    number = float(value)
    object.__setattr__(rule, name, number)
    return number


def _count(rule: RankRule, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise InputError(f"{type(rule).__name__}: {name} is {value!r}; an integer >= 1 is needed")
    return int(value)


@dataclass(frozen=True)
class RankRule:
    """Base of all rank rules; use a subclass. ``cap`` bounds the answer, last."""

    cap: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if type(self) is RankRule:
            raise TypeError("RankRule is a base class; use Energy, Rank, Frobenius, ...")
        if self.cap is not None:
            object.__setattr__(self, "cap", _count(self, "cap", self.cap))

    def capped(self, k: int) -> Self:
        """Return this rule with its answer bounded by ``k`` (the tighter cap wins)."""
        count = _count(self, "cap", k)
        return dataclasses.replace(self, cap=count if self.cap is None else min(count, self.cap))

    def spec(self) -> RuleSpec:
        """Return the rule as plain numbers for a backend."""
        raise NotImplementedError

    def _spec(self, code: RuleCode, value: float) -> RuleSpec:
        return RuleSpec(code, value, self.cap or 0)

    def __str__(self) -> str:
        first = dataclasses.fields(self)[-1].name
        text = f"{type(self).__name__}({getattr(self, first)!r})"
        return text if self.cap is None else f"{text}.capped({self.cap})"


def _unit_interval(rule: RankRule, name: str) -> None:
    value = _real(rule, name)
    if not 0.0 < value <= 1.0:
        raise InputError(f"{type(rule).__name__}: {name} is {value!r}; 0 < {name} <= 1 is needed")


@dataclass(frozen=True)
class Energy(RankRule):
    """Smallest p with ``s_1^2 + ... + s_p^2 >= threshold * |W|_F^2``; reaching the threshold counts. 1 keeps the numerical rank."""

    threshold: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _unit_interval(self, "threshold")

    def spec(self) -> RuleSpec:
        """Return the rule as plain numbers for a backend."""
        return self._spec(RuleCode.ENERGY, self.threshold)


@dataclass(frozen=True)
class Frobenius(RankRule):
    """As ``Energy(fraction ** 2)``: keep this fraction of the Frobenius norm."""

    fraction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _unit_interval(self, "fraction")

    def spec(self) -> RuleSpec:
        """Return the rule as plain numbers for a backend."""
        return self._spec(RuleCode.ENERGY, self.fraction**2)


@dataclass(frozen=True)
class Rank(RankRule):
    """Keep ``k`` singular values, never more than the numerical rank."""

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "k", _count(self, "k", self.k))

    def spec(self) -> RuleSpec:
        """Return the rule as plain numbers for a backend."""
        return self._spec(RuleCode.RANK, float(self.k))


@dataclass(frozen=True)
class SingularValueSum(RankRule):
    """Smallest p with ``s_1 + ... + s_p >= threshold * (s_1 + ... + s_q)``. 1 keeps the numerical rank."""

    threshold: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _unit_interval(self, "threshold")

    def spec(self) -> RuleSpec:
        """Return the rule as plain numbers for a backend."""
        return self._spec(RuleCode.SV_SUM, self.threshold)


@dataclass(frozen=True)
class SingularValueRatio(RankRule):
    """Keep the values with ``s_i > s_1 / ratio`` (strict, except that s_1 itself always counts)."""

    ratio: float

    def __post_init__(self) -> None:
        super().__post_init__()
        number = _real(self, "ratio")
        if not 1.0 <= number < math.inf:
            raise InputError(f"SingularValueRatio: ratio is {self.ratio!r}; 1 <= ratio < inf is needed")

    def spec(self) -> RuleSpec:
        """Return the rule as plain numbers for a backend."""
        return self._spec(RuleCode.SV_RATIO, self.ratio)


@dataclass(frozen=True)
class Absolute(RankRule):
    """Keep the values with ``s_i > cutoff`` (strict). Depends on scale and weights."""

    cutoff: float

    def __post_init__(self) -> None:
        super().__post_init__()
        number = _real(self, "cutoff")
        if not 0.0 <= number < math.inf:
            raise InputError(f"Absolute: cutoff is {self.cutoff!r}; 0 <= cutoff < inf is needed")

    def spec(self) -> RuleSpec:
        """Return the rule as plain numbers for a backend."""
        return self._spec(RuleCode.ABSOLUTE, self.cutoff)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?")
_UNIT = {
    None: 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def parse_size(text: int | str) -> int:
    """Bytes from an integer or a text such as ``10MB`` (10^7) or ``10MiB`` (10 * 2^20). InputError on anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    elif isinstance(text, str) and (match := _SIZE.fullmatch(text.strip())):
        size = int(float(match[1]) * _UNIT[match[2]])
    else:
        raise InputError(f"size {text!r} is not understood; write bytes or a number with kB, MB, GB, KiB, MiB or GiB")
    if size < 1:
        raise InputError(f"size {text!r} must be at least one byte")
    return size


@dataclass(frozen=True)
class Budget(RankRule):
    """One size in bytes, or a text such as ``10MB``, shared over the factors of all modules of an adapter as they are written.

    It needs all their spectra, so `aggregate` and `resize` take it, but no call on one matrix. A module whose rank is bounded,
    by a cap or by its numerical rank, leaves its share to the others (docs/algorithms.md, Budget).
    """

    size: int | str

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.size)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return parse_size(self.size)

    def spec(self) -> RuleSpec:
        """Raise: a budget is no rule for one matrix."""
        raise InputError(
            f"{self} needs the spectra of all modules, which only aggregate and resize have; use a rule for one matrix, such as "
            "Energy(0.9)"
        )


def spec_of(rule: object) -> RuleSpec:
    """Return the plain numbers of a rule for one matrix. TypeError for anything but a `RankRule`, InputError for `Budget`."""
    if not isinstance(rule, RankRule):
        raise TypeError(f"rule is {rule!r}; a rank rule is needed, such as Energy(0.9) or Rank(8)")
    return rule.spec()
