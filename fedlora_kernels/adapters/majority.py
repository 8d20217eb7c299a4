"""What most clients have: the reference that the others are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["majority"]

T = TypeVar("T")


def majority(values: Mapping[str, T], key: Callable[[T], Any] = lambda value: value) -> tuple[T, str, Any]:
    """First value whose key is the most common one (ties: the earliest), its holder, and that key."""
    keys = {holder: key(value) for holder, value in values.items()}
    common = Counter(keys.values()).most_common(1)[0][0]
    holder = next(holder for holder in keys if keys[holder] == common)
    return values[holder], holder, common
