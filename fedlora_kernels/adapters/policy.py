"""What is allowed of clients, and what happens to one that fails a check."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import InputError, LimitError

__all__ = ["Limits", "Policy"]


@dataclass(frozen=True)
class Limits:
    """Size caps on untrusted input; raise one with ``ReadOptions(limits=Limits(...))``.

    Ranks are columns, sizes bytes, names characters, ``output_elements`` counts numbers in one factor of the output.
    """

    rank_per_client: int = 4096
    stacked_rank: int = 16384
    modules_per_client: int = 65536
    clients: int = 65536
    output_elements: int = 1 << 31
    bytes_per_client: int = 32 << 30
    bytes_total: int = 4 << 40
    name_length: int = 1024

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value) is not int or value < 1:
                raise InputError(f"Limits: {item.name} is {printable(value)}; an integer of at least 1 needed")

    def over(self, cap: str, found: int) -> LimitError:
        """Return the error of a cap that was exceeded, with how to raise it."""
        words = cap.replace("_", " ")
        return LimitError(
            f"{words} is {found}; at most {getattr(self, cap)}. Raise it with ReadOptions(limits=Limits({cap}={found}))"
        )


@dataclass(frozen=True)
class Policy:
    """What happens to a client that fails a check (docs/algorithms.md, Policies); checked on creation.

    Args:
        kind: "strict" stops, "drop" leaves the client out, "clip" drops and scales updates down to a norm bound.
        max_update_norm: bound of the Frobenius norm of an update: a number, or for "clip" also the "median" of the clients' norms, which
            None means there. A client beyond it fails the check, under "clip" it is scaled down.
        per: whether norms are taken over the whole "model" or per "module".
        min_clients: fewest clients that must remain.
        min_weight: smallest share of the total weight that must remain, 0 to 1.
    """

    kind: str = "strict"
    max_update_norm: float | str | None = None
    per: str = "model"
    min_clients: int = 1
    min_weight: float = 0.5

    def __post_init__(self) -> None:
        norm = self.max_update_norm
        checks = (
            ("kind", self.kind in ("strict", "drop", "clip"), "strict, drop or clip"),
            ("max_update_norm", norm is None or norm == "median" or _positive(norm), "a positive number or 'median'"),
            ("per", self.per in ("model", "module"), "model or module"),
            ("min_clients", type(self.min_clients) is int and self.min_clients >= 1, "an integer of at least 1"),
            ("min_weight", _share(self.min_weight), "a number from 0 to 1"),
        )
        for name, good, needed in checks:
            if not good:
                raise InputError(f"Policy: {name} is {printable(getattr(self, name))!r}; {needed} needed")

        if norm == "median" and self.kind != "clip":
            raise InputError(
                f"Policy: max_update_norm is 'median', beyond which half of the clients are; kind 'clip' needed, not {self.kind!r}"
            )

    @property
    def measures(self) -> bool:
        """Whether the norms of updates decide."""
        return self.kind == "clip" or self.max_update_norm is not None

    @classmethod
    def of(cls, value: Policy | str) -> Policy:
        """Return a Policy as it is; a string means ``Policy(kind)``."""
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, cls):
            return value
        raise InputError(f"policy is of type {type(value).__name__}; a name or Policy(...) needed")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
