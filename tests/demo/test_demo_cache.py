"""The cache: its key changes with everything that decides a result, and its entries are whole."""

import dataclasses
import itertools

import pytest

from fedlora_kernels.demo.cache import ADAPTER_FILES, Cache, cache_key, files_digest
from fedlora_kernels.demo.data import Domain, Sentence
from fedlora_kernels.demo.settings import Client, Settings

GOOD, BAD = Sentence("good", 1), Sentence("bad", 0)
DATA = [Domain("movies", (GOOD, BAD), (GOOD,))]
OTHER_DATA = [
    [Domain("movies", (BAD, GOOD), (GOOD,))],
    [Domain("movies", (GOOD,), (BAD, GOOD))],
    [Domain("movies", (GOOD, Sentence("bad", 1)), (GOOD,))],
]
VERSIONS = {"torch": "2.13.0", "peft": "0.21.2"}


def test_the_key_changes_with_every_setting_data_model_and_version():
    settings = Settings()
    others = [dataclasses.replace(settings, clients=settings.clients[:3])]
    others += [dataclasses.replace(settings, clients=(Client("tweets", 16, 17), *settings.clients[1:]))]
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        if isinstance(value, (int, float)):
            others.append(dataclasses.replace(settings, **{field.name: value * 2 + 1}))
    keys = [cache_key(each, DATA, "model", VERSIONS) for each in [settings, *others]]
    keys += [cache_key(settings, data, "model", VERSIONS) for data in OTHER_DATA]
    keys += [cache_key(settings, DATA, "other", VERSIONS)]
    keys += [cache_key(settings, DATA, "model", VERSIONS | {"peft": "0.22.0"})]
    assert len(others) == 2 + len(dataclasses.fields(Settings)) - 1
    assert all(a != b for a, b in itertools.combinations(keys, 2))
    assert keys[0] == cache_key(Settings(), DATA, "model", dict(reversed(VERSIONS.items())))


def fill(folder):
    folder.mkdir()
    for name in ADAPTER_FILES:
        (folder / name).write_bytes(name.encode())


def test_an_adapter_is_made_once_and_a_failure_leaves_nothing(tmp_path):
    cache = Cache(tmp_path, "k")

    def fail(folder):
        fill(folder)
        raise OSError("disc full")

    with pytest.raises(OSError, match="disc full"):
        cache.adapter("movies", fail)
    assert list(cache.folder.iterdir()) == []
    folder, known = cache.adapter("movies", fill)
    assert not known
    assert cache.adapter("movies", fail) == (folder, True)
    (folder / ADAPTER_FILES[1]).unlink()
    assert cache.adapter("movies", fill) == (folder, False)


def test_scores_are_computed_once_per_content(tmp_path):
    cache = Cache(tmp_path, "k")
    assert cache.scores("a", lambda: {"movies": 0.5}) == ({"movies": 0.5}, False)
    assert Cache(tmp_path, "k").scores("a", dict) == ({"movies": 0.5}, True)
    assert cache.scores("b", lambda: {"movies": 0.7}) == ({"movies": 0.7}, False)
    assert Cache(tmp_path, "other").scores("a", lambda: {"movies": 0.1}) == ({"movies": 0.1}, False)
    assert sorted(p.name for p in cache.folder.iterdir()) == ["scores.json"]


def test_the_digest_sees_names_and_contents(tmp_path):
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    digest = files_digest(tmp_path / "a", ADAPTER_FILES)
    assert files_digest(tmp_path / "b", ADAPTER_FILES) == digest
    assert files_digest(tmp_path / "b", ADAPTER_FILES[:1]) != digest
    (tmp_path / "b" / ADAPTER_FILES[1]).write_bytes(b"x")
    assert files_digest(tmp_path / "b", ADAPTER_FILES) != digest
