"""Names from clients are untrusted text: how they enter messages and paths."""

from __future__ import annotations

import re

from fedlora_kernels.text import harmless

__all__ = ["path_name", "printable"]

LONGEST_SHOWN = 200


def printable(name: object) -> str:
    """Return ``name`` as one line without control, format or surrogate characters, cut to 200 characters."""
    text = harmless(name)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def path_name(name: object) -> str:
    """Return ``name`` reduced to [A-Za-z0-9._-], never empty, hidden, ``.`` or ``..``, at most 128 characters."""
    text = re.sub(r"[^A-Za-z0-9._-]", "_", str(name))[:128]
    return "_" + text if not text or text.startswith(".") else text
