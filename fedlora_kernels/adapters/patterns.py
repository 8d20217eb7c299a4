"""`rank_pattern` and `alpha_pattern`: which entry applies to a module, decided in bounded time.

Patterns come from untrusted clients. Keys without operators are compared directly; any other pattern is a regular expression for an
automaton (docs/formats.md, Scale).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fedlora_kernels.adapters.expressions import Expressions
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import LimitError

__all__ = ["PatternTable"]

MOST_LOOKUPS = 1 << 18
"""Of keys that have dots elsewhere than the names."""
AT_ONCE = 16
"""Keys whose dots are compared in the time of one lookup."""


class PatternTable:
    """One pattern dictionary, in file order; the first entry that applies to a module wins.

    Keys without operators are grouped by where their dots are: without the characters under the dots, which match any
    one, the end of a name is looked up in its group. So thousands of full names cost a few lookups per module.
    """

    def __init__(self, patterns: Mapping[str, Any], what: str) -> None:
        self._what = what
        self._values = dict(patterns)
        self._keys = list(patterns)
        plain = [position for position, key in enumerate(self._keys) if _PLAIN.fullmatch(key)]
        self._special = sorted(set(range(len(self._keys))).difference(plain))
        self._expressions = Expressions([self._keys[position] for position in self._special], what)
        self._entries: dict[tuple[Dots, str], list[_Entry]] = {}
        self._shapes: dict[int, dict[Dots, int]] = {}
        for position in plain:
            entry = _Entry.of(self._keys[position], position)
            self._entries.setdefault((entry.dots, entry.letters), []).append(entry)
            self._shapes.setdefault(entry.length, {})[entry.dots] = _mask(entry.dots)
        self._lookups = 0
        self._used: set[str] = set()
        self._conflicts: dict[tuple[str, str], str] = {}

    def resolve(self, name: str, default: Any) -> Any:
        """Return the value for module ``name`` (path in the base model), ``default`` where no entry applies."""
        if not self._keys:
            return default
        hits = self.hits(name)
        self._used.update(hits)
        for other in hits[1:]:
            if self._values[other] != self._values[hits[0]]:
                self._conflicts.setdefault((hits[0], other), name)
        return self._values[hits[0]] if hits else default

    def hits(self, name: str) -> list[str]:
        """Return the keys of all entries that apply to ``name``, in file order. LimitError where that takes too long."""
        found = [self._special[number] for number in self._expressions.hits(name)]
        found.extend(entry.position for entry in self._plain_hits(name))
        return [self._keys[position] for position in sorted(found)]

    def warnings(self) -> list[str]:
        """Texts on entries that hit one module with different values."""
        return [
            f"{self._what}: {printable(first)!r} and {printable(other)!r} both match module {printable(name)!r} with different "
            f"values ({self._values[first]} and {self._values[other]}); the first one in the file is used"
            for (first, other), name in self._conflicts.items()
        ]

    def notes(self) -> list[str]:
        """Texts on entries that hit nothing."""
        return [f"{self._what}: {printable(key)!r} matches no module" for key in self._values if key not in self._used]

    def _plain_hits(self, name: str) -> Iterator[_Entry]:
        dots = [at for at, char in enumerate(name) if char == "."]
        for passed, begin in enumerate([0, *(at + 1 for at in dots)]):
            tail = name[begin:]
            inside = tuple(at - begin for at in dots[passed:])
            for shape in self._fitting(len(tail), inside):
                for entry in self._entries.get((shape, _letters(tail, shape)), ()):
                    if not (entry.anchored and begin) and all(tail[at] == "." for at in entry.literal):
                        yield entry

    def _fitting(self, length: int, inside: Dots) -> list[Dots]:
        """Where keys of this length have dots, if they have one wherever the name does."""
        shapes = self._shapes.get(length, {})
        if len(shapes) == 1:
            return list(shapes)
        wanted = _mask(inside)
        fitting = [shape for shape, mask in shapes.items() if not wanted & ~mask]
        self._lookups += len(shapes) // AT_ONCE + len(fitting)
        if self._lookups > MOST_LOOKUPS:
            raise LimitError(
                f"{self._what}: {len(self._keys)} entries on these modules take more than {MOST_LOOKUPS} comparisons; write full "
                "module names"
            )
        return fitting


Dots = tuple[int, ...]
"""Where the dots of a key or of a name are."""


class _Entry(NamedTuple):
    """A key without operators: its length, where its dots are, its other characters, which dots are escaped, ``^`` before it."""

    position: int
    length: int
    dots: Dots
    letters: str
    literal: Dots
    anchored: bool

    @classmethod
    def of(cls, key: str, position: int) -> _Entry:
        anchored = key.startswith("^")
        chars = _CHAR.findall(key[anchored:])
        text = "".join(char[-1] for char in chars)
        dots = tuple(at for at, char in enumerate(text) if char == ".")
        literal = tuple(at for at in dots if chars[at] != ".")
        return cls(position, len(text), dots, _letters(text, dots), literal, anchored)


_PLAIN = re.compile(r"\^?(?:[^\\^$*+?{}\[\]()|]|\\[^A-Za-z0-9\\])+")
_CHAR = re.compile(r"\\?.", re.DOTALL)


def _letters(text: str, dots: Dots) -> str:
    """The text without the characters at ``dots``."""
    pieces, begin = [], 0
    for at in dots:
        pieces.append(text[begin:at])
        begin = at + 1
    return "".join((*pieces, text[begin:]))


def _mask(dots: Dots) -> int:
    """The set of places as the bits of a number."""
    return sum(1 << at for at in dots)
