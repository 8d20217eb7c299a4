"""`rank_pattern` and `alpha_pattern`: which entry applies to a module, decided in bounded time.

Patterns come from untrusted clients. Keys without operators are compared directly; any other pattern must be a regular expression
without the constructs that make matching exponential (docs/formats.md, Scale).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError, LimitError

__all__ = ["PatternTable", "compile_pattern"]

LONGEST = 256
MOST_ENTRIES = 4096
MOST_UNBOUNDED = 3
MOST_WAYS = 4096


class PatternTable:
    """One pattern dictionary, in file order; the first entry that applies to a module wins.

    Keys without operators are grouped by where their dots are: without the characters under the dots, which match any
    one, the end of a name is looked up in its group. So thousands of full names cost a few lookups per module.
    """

    def __init__(self, patterns: Mapping[str, Any], what: str) -> None:
        self._what = what
        self._values = dict(patterns)
        self._keys = list(patterns)
        self._groups: dict[_Shape, dict[str, list[int]]] = {}
        special = [position for position, key in enumerate(self._keys) if not _PLAIN.fullmatch(key)]
        if len(special) > MOST_ENTRIES:
            raise LimitError(
                f"{what}: {len(special)} regular expressions; at most {MOST_ENTRIES}. Write plain module names"
            )
        self._expressions = [(position, compile_pattern(self._keys[position], what)) for position in special]
        for position in sorted(set(range(len(self._keys))).difference(special)):
            shape, letters = _plain(self._keys[position])
            self._groups.setdefault(shape, {}).setdefault(letters, []).append(position)
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
        """Return the keys of all entries that apply to ``name``, in file order."""
        found = [position for position, pattern in self._expressions if pattern.fullmatch(name)]
        for shape, group in self._groups.items():
            letters = shape.letters(name)
            if letters is not None:
                found.extend(group.get(letters, ()))
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


def compile_pattern(key: str, what: str) -> re.Pattern[str]:
    """Compile an untrusted regular expression. FormatError where it is invalid, LimitError where it may run for ever."""
    problem = _danger(key)
    if problem:
        raise LimitError(f"{what}: entry {printable(key)!r} {problem}; write plain module names instead")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(rf"(?:.*\.)?(?:{key})")
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{what}: entry {printable(key)!r} is not a regular expression: {printable(error)}") from None


@dataclass(frozen=True)
class _Shape:
    """Lengths of the pieces between the dots of a key, and whether it is anchored by ``^``."""

    lengths: tuple[int, ...]
    anchored: bool

    def letters(self, name: str) -> str | None:
        """Return the end of ``name`` without the characters under the dots; None where a key cannot start there."""
        begin = len(name) - sum(self.lengths) - len(self.lengths) + 1
        if begin < 0 or (begin and (self.anchored or name[begin - 1] != ".")):
            return None
        pieces = []
        for length in self.lengths:
            pieces.append(name[begin : begin + length])
            begin += length + 1
        return "".join(pieces)


_PLAIN = re.compile(r"\^?(?:[^\\^$*+?{}\[\]()|]|\\[^A-Za-z0-9\\])+")
_DOT = re.compile(r"(?<!\\)\.")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def _plain(key: str) -> tuple[_Shape, str]:
    """Shape and letters of a key without operators; an escaped character is itself."""
    anchored = key.startswith("^")
    pieces = [_ESCAPE.sub(r"\1", piece) for piece in _DOT.split(key[anchored:])]
    return _Shape(tuple(map(len, pieces)), anchored), "".join(pieces)


def _danger(pattern: str) -> str | None:
    """Say what may make matching slow: too long, quantified groups, many quantifiers or alternatives, special groups.

    ``MOST_WAYS`` bounds the paths through alternatives and bounded quantifiers, which backtrack as a product.
    """
    if len(pattern) > LONGEST:
        return f"has {len(pattern)} characters, at most {LONGEST}"
    unbounded, ways, group_open = 0, 1, [1]
    tokens = list(_tokens(pattern))
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if token == "(?":
            return "uses a special group; only (...) and (?:...) are read"
        if token == "backreference":
            return "uses a back reference"
        if token == "(":
            group_open.append(1)
        elif token == "|":
            group_open[-1] += 1
        elif token == ")":
            ways *= group_open.pop() if len(group_open) > 1 else 1
            if following.startswith("quantifier"):
                return "repeats a group"
        elif token == "quantifier unbounded":
            unbounded += 1
        elif token.startswith("quantifier"):
            ways *= int(token.split()[1]) + 1
    for alternatives in group_open:
        ways *= alternatives
    if unbounded > MOST_UNBOUNDED:
        return f"has {unbounded} unbounded quantifiers, at most {MOST_UNBOUNDED}"
    return f"can match in more than {MOST_WAYS} ways" if ways > MOST_WAYS else None


_TOKEN = re.compile(
    r"(?P<escape>\\(?P<escaped>.))"
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<special>\(\?(?!:))"
    r"|(?P<open>\((?:\?:)?)"
    r"|(?P<quantifier>[*+?]|\{(?P<low>[0-9]*)(?P<comma>,?)(?P<high>[0-9]*)\})(?P<lazy>[?+]?)"
    r"|(?P<other>.)",
    re.DOTALL,
)


def _tokens(pattern: str) -> Iterator[str]:
    for match in _TOKEN.finditer(pattern):
        if match["special"]:
            yield "(?"
        elif match["escaped"] and match["escaped"] in "123456789":
            yield "backreference"
        elif match["open"]:
            yield "("
        elif match["quantifier"]:
            yield _quantifier(match)
        else:
            yield match["other"] or "literal"


def _quantifier(match: re.Match[str]) -> str:
    text = match["quantifier"]
    if text == "{}":
        return "literal"
    if text == "?":
        return "quantifier 1"
    if text in "*+" or (match["comma"] and not match["high"]):
        return "quantifier unbounded"
    low, high = int(match["low"] or 0), int(match["high"] or match["low"])
    return "quantifier unbounded" if high > 16 else f"quantifier {high - low if high >= low else high}"
