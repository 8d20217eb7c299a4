"""Where a module stands in a model: its layer by the first number of its name, and what layers of one kind share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["LayerMap", "by_kind", "layer_map"]

NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")
"""A segment that is a number, between the dots of PEFT's names or the underscores of kohya's."""
EXPERT = re.compile(r"\[\d+\]$")
"""The number of an expert."""
ROWS = 48
"""More kinds of modules than this, as of many experts, share rows."""


class LayerMap(NamedTuple):
    """Modules as cells: ``rows`` are kinds of modules, ``columns`` layers, ``cells[i]`` the (row, column) of module i."""

    rows: list[str]
    columns: list[str]
    cells: list[tuple[int, int]]


def layer_map(modules: Sequence[str]) -> LayerMap:
    """Arrange modules by kind and layer; names without a number are in a column of their own."""
    kinds = [NUMBER.sub("*", name, count=1) for name in modules]
    if len(set(kinds)) > ROWS:
        kinds = [NUMBER.sub("*", EXPERT.sub("[*]", name)) for name in modules]
    layers = [found.group() if (found := NUMBER.search(name)) else "" for name in modules]
    rows = list(dict.fromkeys(kinds))
    columns = sorted(set(layers), key=_in_order)
    row_of, column_of = ({name: i for i, name in enumerate(names)} for names in (rows, columns))
    cells = [(row_of[kind], column_of[layer]) for kind, layer in zip(kinds, layers, strict=True)]
    return LayerMap(_short(rows), columns, cells)


def by_kind(modules: Sequence[str]) -> list[str]:
    """Return the names by kind, and within a kind by layer: 2 before 10, unlike in files."""
    cells = dict(zip(modules, layer_map(modules).cells, strict=True))
    return sorted(modules, key=lambda name: cells[name])


def _in_order(layer: str) -> tuple[bool, int, str, str]:
    """Numbers by their size, "" last: Python makes no number of more than 4300 digits, and names are text of strangers."""
    digits = layer.lstrip("0")
    return layer == "", len(digits), digits, layer


def _short(rows: Sequence[str]) -> list[str]:
    """Names without the segments that all of them start with, as far as the number of the layer."""
    split = [row.split(".") for row in rows]
    most = split[0].index("*") + 1 if split and "*" in split[0] else max(map(len, split), default=0)
    shared = 0
    while shared < most and len(rows) > 1 and all(row[shared:-1][:1] == split[0][shared : shared + 1] for row in split):
        shared += 1
    return [".".join(row[shared:]) for row in split]
