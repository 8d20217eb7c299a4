"""Text from strangers: names of clients, modules and files enter messages, tables and terminals."""

from __future__ import annotations

import unicodedata

__all__ = ["harmless"]


def harmless(value: object) -> str:
    """Return ``value`` as one line: a question mark for each control, format, surrogate, unassigned or line-breaking character."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join("?" if unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" else char for char in text)
