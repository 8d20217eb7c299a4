r"""Regular expressions from strangers, matched in time that grows with the text alone: an automaton never goes back.

What is read is the part of Python's syntax that module names need: characters, sets, classes such as ``\d``, groups, alternatives,
repeated single characters, and anchors at the ends. The rest is refused by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.errors import FormatError, LimitError

__all__ = ["Expressions"]

LONGEST = 256
LONGEST_TOGETHER = 1 << 14
MOST_ENTRIES = 4096
MOST_UNBOUNDED = 3
MOST_WAYS = 4096
MOST_PLACES = 1 << 17
MOST_STEPS = 1 << 20
"""Work on states of the automaton that no name has led to before, in places looked at."""
STEP = 16
"""What a new state costs beside its places."""

Places = tuple[int, ...]
"""Where an expression may go on; number k as ``-k - 1`` means that expression k has ended."""


class Expressions:
    """Regular expressions, each of which applies to the end of a name from its beginning or from just after a dot on.

    Args:
        keys: the expressions.
        what: the beginning of messages.

    Raises FormatError for one that is invalid, LimitError for one that is not read here or for too many of them.
    """

    def __init__(self, keys: Sequence[str], what: str) -> None:
        self._keys, self._what = keys, what
        if len(keys) > MOST_ENTRIES:
            raise LimitError(
                f"{what}: {len(keys)} regular expressions; at most {MOST_ENTRIES}. Write plain module names"
            )
        if (length := sum(map(len, keys))) > LONGEST_TOGETHER and all(len(key) <= LONGEST for key in keys):
            raise LimitError(
                f"{what}: {length} characters of regular expressions; at most {LONGEST_TOGETHER}. Write plain module names"
            )
        self._atoms: list[str | re.Pattern[str]] = []
        self._follow: list[Places] = []
        self._classes: dict[str, re.Pattern[str]] = {}
        self._known: dict[tuple[re.Pattern[str], str], bool] = {}
        starts = [self._compiled(k) for k in range(len(keys))]
        self._after_dot = tuple(place for _, later in starts for place in later)
        self._first: dict[str, Places] = {}
        self._states: list[tuple[Places, bool]] = [(tuple(place for start, _ in starts for place in start), False)]
        self._numbers = {self._states[0]: 0}
        self._moves: dict[tuple[int, str], int] = {}
        self._steps = 0

    def hits(self, name: str) -> list[int]:
        """Return the numbers of the expressions that apply to ``name``. LimitError where names and expressions take too long."""
        if not self._keys:
            return []
        state, moves = 0, self._moves
        for char in name:
            following = moves.get((state, char))
            state = self._move(state, char) if following is None else following
        places, dotted = self._states[state]
        ended = {-place - 1 for place in places if place < 0}
        return sorted(ended | {-place - 1 for place in self._after_dot if place < 0} if dotted else ended)

    def _move(self, state: int, char: str) -> int:
        """The state after ``char``: where its places go, and, after a dot, every expression anew."""
        places, dotted = self._states[state]
        reached = self._reached(places, char)
        if dotted:
            if char not in self._first:
                self._spend(len(self._after_dot))
                self._first[char] = self._reached(self._after_dot, char)
            reached = tuple(sorted({*reached, *self._first[char]}))
        self._spend(len(places) + len(reached) + STEP)
        made = reached, char == "."
        number = self._numbers.setdefault(made, len(self._states))
        if number == len(self._states):
            self._states.append(made)
        self._moves[state, char] = number
        return number

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise LimitError(
                f"{self._what}: {len(self._keys)} regular expressions on these modules take more than {MOST_STEPS} steps; write plain "
                "module names"
            )

    def _reached(self, places: Places, char: str) -> Places:
        found: set[int] = set()
        for place in places:
            if place >= 0 and self._takes(self._atoms[place], char):
                found.update(self._follow[place])
        return tuple(sorted(found))

    def _takes(self, atom: str | re.Pattern[str], char: str) -> bool:
        if isinstance(atom, str):
            return atom == char
        known = self._known.get((atom, char))
        if known is None:
            known = self._known[atom, char] = atom.fullmatch(char) is not None
        return known

    def _compiled(self, k: int) -> tuple[Places, Places]:
        """The first places of expression k at the beginning of a name, and after a dot."""
        key = self._keys[k]
        if problem := _danger(key):
            raise self._refused(key, problem)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(key)
        except (re.error, OverflowError, RecursionError) as error:
            text = f"{self._what}: entry {printable(key)!r} is not a regular expression: {printable(error)}"
            raise FormatError(text) from None
        tree, _ = _alternatives(list(_tokens(key)), 0)
        if problem := _misplaced(tree, True, True):
            raise self._refused(key, problem)
        start = self._built(tree, (-k - 1,), True)
        return start, self._built(tree, (-k - 1,), False) if _anchored(tree) else start

    def _refused(self, key: str, problem: str) -> LimitError:
        return LimitError(f"{self._what}: entry {printable(key)!r} {problem}; write plain module names instead")

    def _built(self, node: _Node, following: Places, at_start: bool) -> Places:
        """Add the places of a node, after which ``following`` come; return the first ones."""
        if node.kind == "any of":
            return tuple(
                dict.fromkeys(place for part in node.parts for place in self._built(part, following, at_start))
            )
        if node.kind == "all of":
            for part in reversed(node.parts):
                following = self._built(part, following, at_start)
            return following
        if node.kind == "^":
            return following if at_start else ()
        if node.kind == "$":
            return following
        return self._repeated(node, following)

    def _repeated(self, node: _Node, following: Places) -> Places:
        """Add a single character that is taken from ``low`` to ``high`` times, without end where that is None."""
        high = node.low if node.high is None else node.high
        if len(self._atoms) + high + 1 > MOST_PLACES:
            raise LimitError(
                f"{self._what}: regular expressions of more than {MOST_PLACES} characters; write plain module names"
            )
        first = following
        if node.high is None:
            place = self._place(node.text, ())
            first = (place, *following)
            self._follow[place] = first
        for optional in range(high, node.low, -1):
            first = (self._place(node.text, first if optional < high else following), *following)
        for _ in range(node.low):
            first = (self._place(node.text, first),)
        return first

    def _place(self, atom: str, follow: Places) -> int:
        single = atom if len(atom) == 1 else atom[1:] if _ESCAPED.fullmatch(atom) else ""
        if not single or atom == ".":
            if atom not in self._classes:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._classes[atom] = re.compile(atom)
            self._atoms.append(self._classes[atom])
        else:
            self._atoms.append(single)
        self._follow.append(follow)
        return len(self._atoms) - 1


@dataclass(frozen=True)
class _Token:
    """``kind`` is "(", "|", ")", "quantifier", "^", "$", or "atom" for what takes one character; "refused" says why in ``text``."""

    kind: str
    text: str = ""
    low: int = 1
    high: int | None = 1


@dataclass(frozen=True)
class _Node:
    """What matches "any of" or "all of" its parts, an anchor, or an "atom", ``low`` to ``high`` times."""

    kind: str
    parts: tuple[_Node, ...] = ()
    text: str = ""
    low: int = 1
    high: int | None = 1


_TOKEN = re.compile(
    r"(?P<escape>\\(?P<escaped>x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}|.))"
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<special>\(\?(?!:))"
    r"|(?P<open>\((?:\?:)?)"
    r"|(?P<quantifier>[*+?]|\{(?P<low>[0-9]*)(?P<comma>,?)(?P<high>[0-9]*)\})(?P<lazy>[?+]?)"
    r"|(?P<other>.)",
    re.DOTALL,
)
_ESCAPED = re.compile(r"\\[^A-Za-z0-9]", re.DOTALL)


def _tokens(pattern: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(pattern):
        text = match[0]
        if match["special"]:
            yield _Token("refused", "uses a special group; only (...) and (?:...) are read")
        elif match["escape"]:
            yield _escape(text, match["escaped"])
        elif match["open"]:
            yield _Token("(")
        elif match["quantifier"] and match["quantifier"] != "{}":
            yield _quantifier(match)
        elif text in ("|", ")", "^", "$"):
            yield _Token(text)
        elif text.startswith("{}"):  # two characters, and a quantifier of the second
            yield _Token("atom", r"\{")
            yield _Token("atom", r"\}")
            if match["lazy"]:
                yield _Token(
                    "quantifier", match["lazy"], int(match["lazy"] == "+"), None if match["lazy"] == "+" else 1
                )
        else:
            yield _Token("atom", text if match["set"] or text == "." else re.escape(text))


def _escape(text: str, escaped: str) -> _Token:
    if escaped in "123456789":
        return _Token("refused", "uses a back reference")
    if escaped in ("b", "B"):
        return _Token("refused", f"uses {text}")
    return _Token({"A": "^", "Z": "$"}.get(escaped, "atom"), text)


def _quantifier(match: re.Match[str]) -> _Token:
    text = match["quantifier"]
    if text in "*+?":
        low, high = int(text == "+"), 1 if text == "?" else None
    else:
        low = int(match["low"] or 0)
        high = int(match["high"]) if match["high"] else None if match["comma"] else low
    if match["lazy"] == "+" and (high is None or low <= high):
        return _Token("refused", f"uses {match[0]}")
    return _Token("quantifier", text, low, high)


def _danger(pattern: str) -> str | None:
    """Say what is not read: too long, quantified groups, many quantifiers or alternatives, special groups.

    ``MOST_WAYS`` bounds the paths through alternatives and bounded quantifiers; a high bound counts as none.
    """
    if len(pattern) > LONGEST:
        return f"has {len(pattern)} characters, at most {LONGEST}"
    unbounded, ways, group_open = 0, 1, [1]
    tokens = list(_tokens(pattern))
    for at, token in enumerate(tokens):
        if token.kind == "refused":
            return token.text
        if token.kind == "(":
            group_open.append(1)
        elif token.kind == "|":
            group_open[-1] += 1
        elif token.kind == ")":
            ways *= group_open.pop() if len(group_open) > 1 else 1
            if tokens[at + 1 : at + 2] and tokens[at + 1].kind == "quantifier":
                return "repeats a group"
        elif token.kind == "quantifier" and (token.high is None or token.high > STEP):
            unbounded += 1
        elif token.kind == "quantifier" and token.high is not None:
            ways *= abs(token.high - token.low) + 1
    for alternatives in group_open:
        ways *= alternatives
    if unbounded > MOST_UNBOUNDED:
        return f"has {unbounded} unbounded quantifiers, at most {MOST_UNBOUNDED}"
    return f"can match in more than {MOST_WAYS} ways" if ways > MOST_WAYS else None


def _alternatives(tokens: Sequence[_Token], at: int) -> tuple[_Node, int]:
    """The node that begins at token ``at``, up to the end of its group, and where that is."""
    branches: list[_Node] = []
    parts: list[_Node] = []
    while at < len(tokens) and tokens[at].kind != ")":
        token = tokens[at]
        if token.kind == "|":
            branches.append(_Node("all of", tuple(parts)))
            parts = []
        elif token.kind == "(":
            node, at = _alternatives(tokens, at + 1)
            parts.append(node)
        elif token.kind == "quantifier":
            parts[-1] = _Node("atom", text=parts[-1].text, low=token.low, high=token.high)
        else:
            parts.append(_Node(token.kind, text=token.text))
        at += 1
    return _Node("any of", (*branches, _Node("all of", tuple(parts)))), at


def _anchored(node: _Node) -> bool:
    return node.kind == "^" or any(map(_anchored, node.parts))


def _misplaced(node: _Node, first: bool, last: bool) -> str | None:
    """Say where an anchor stands with something before or after it that it forbids."""
    if node.kind == "^" and not first:
        return "uses ^ within"
    if node.kind == "$" and not last:
        return "uses $ within"
    if node.kind == "any of":
        return next(filter(None, (_misplaced(part, first, last) for part in node.parts)), None)
    for i, part in enumerate(node.parts):
        before, after = (all(other.kind in "^$" for other in side) for side in (node.parts[:i], node.parts[i + 1 :]))
        if problem := _misplaced(part, first and before, last and after):
            return problem
    return None
