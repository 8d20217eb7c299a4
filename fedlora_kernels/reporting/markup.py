"""HTML from untrusted text: whatever is not markup already is made harmless and escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from fedlora_kernels.reporting.json import plain
from fedlora_kernels.text import harmless

__all__ = ["Markup", "element", "embedded", "join", "table"]

VOID = frozenset({"meta", "link", "br", "hr"})
DIGITS = 6
"""Significant digits of numbers that charts are drawn from."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element. Children and attributes are escaped unless they are `Markup`; None and False are left out.

    Attributes are written as Python names: ``class_``, ``aria_label``, ``data_kind``.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    texts = [
        key if value is True else f'{key}="{_escaped(value)}"'
        for key, value in given.items()
        if value is not None and value is not False
    ]
    head = " ".join([tag, *texts])
    return Markup(f"<{head}>" if tag in VOID else f"<{head}>{join(children)}</{tag}>")


def join(parts: Iterable[object]) -> Markup:
    """Return several parts one after the other, escaped unless they are `Markup`; None is left out."""
    return Markup("".join(_escaped(part) for part in parts if part is not None))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table that scrolls in itself; a column is a number's if its name starts with ``>``."""
    right = ["number" if column.startswith(">") else None for column in columns]
    head = [
        element("th", column.removeprefix(">"), scope="col", class_=side)
        for column, side in zip(columns, right, strict=True)
    ]
    body = [
        element("tr", *(_cell(i, cell, side) for i, (cell, side) in enumerate(zip(row, right, strict=True))))
        for row in rows
    ]
    whole = element(
        "table", element("caption", caption), element("thead", element("tr", *head)), element("tbody", *body)
    )
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def embedded(data: Any) -> Markup:
    """Return data as JSON for a script element: strict, names made harmless, and no character that could end the element."""
    text = json.dumps(_rounded(plain(data)), allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _cell(position: int, cell: object, side: str | None) -> Markup:
    if position == 0:
        return element("th", cell, scope="row", class_=side)
    return element("td", cell, class_=side)


def _escaped(value: object) -> str:
    return value if isinstance(value, Markup) else html.escape(harmless(value), quote=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {harmless(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return harmless(value) if isinstance(value, str) else value
