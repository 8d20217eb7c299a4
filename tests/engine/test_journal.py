"""The journal: what it tells after its process is gone, slab by slab, and what it no longer tells."""

import errno
import os

import pytest

from fedlora_kernels.adapters.folder import KeptFolder
from fedlora_kernels.backends import Choice, Fallback
from fedlora_kernels.engine.journal import Journal
from fedlora_kernels.errors import InputError, RunError

KEY = "0123456789abcdef" * 2
SEEN = {Choice("core_svd", "cpu"): None, Fallback("core_svd", "cuda", "no GPU"): None}
NUMBERS = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, float("inf")]


class Ended(Exception):
    pass


def opened(tmp_path, work, key=KEY):
    """Do ``work`` with the journal of a run that then ends before its time."""

    def run():
        with KeptFolder(tmp_path / "out", key) as folder:
            journal = Journal(folder, key)
            try:
                work(folder, journal)
            finally:
                journal.close()
            raise Ended

    with pytest.raises(Ended):
        run()
    return sorted(path.name for path in tmp_path.iterdir())


def test_rows_and_backends_come_back_to_the_last_bit(tmp_path):
    rows = [{"name": "a", "rank": 3, "energy": None, "singular_values": NUMBERS, "notes": ["ZERO"]}]
    told = {"modules": {"a": {"norm": 1.5}}, "sums": {"gram": [[0.1]]}}

    def begin(folder, journal):
        assert (journal.done, journal.seen, journal.compared) == ([], [], [])
        journal.append(rows, told, {}, SEEN)
        journal.append([], None, {}, SEEN)

    def go_on(folder, journal):
        assert journal.done == [rows, []]
        assert journal.seen == list(SEEN)
        assert journal.compared == [told, None]
        assert journal.warning is None

    assert opened(tmp_path, begin) == [f"out.partial-{KEY[:16]}"]
    opened(tmp_path, go_on)


def test_a_slab_of_which_pairs_are_held_back_is_noted_with_the_next(tmp_path):
    def begin(folder, journal):
        journal.append([{"name": "a"}], None, {}, {})
        journal.append([{"name": "b"}], None, None, {})
        journal.append([{"name": "c"}], None, None, {})

    def go_on(folder, journal):
        assert journal.done == [[{"name": "a"}]]
        journal.append([{"name": "b"}], None, None, {})
        journal.append([{"name": "c"}], None, {}, {})

    def end(folder, journal):
        assert journal.done == [[{"name": "a"}], [{"name": "b"}], [{"name": "c"}]]

    for work in (begin, go_on, end):
        opened(tmp_path, work)


def test_what_was_begun_after_the_last_line_is_removed(tmp_path):
    def begin(folder, journal):
        (folder.path / "clients" / "c0").mkdir(parents=True)
        (folder.path / "clients" / "c0" / "adapter_model.safetensors").write_bytes(b"x")
        (folder.path / "report.json").write_text("{}")
        journal.append([], None, {}, {})

    def go_on(folder, journal):
        assert [path for path in folder.path.rglob("*") if path.is_file()] == []

    opened(tmp_path, begin)
    opened(tmp_path, go_on)


def test_a_run_that_noted_nothing_leaves_nothing(tmp_path):
    assert opened(tmp_path, lambda folder, journal: None) == []


def test_files_that_are_gone_after_the_end_are_no_damage(tmp_path):
    mark = {"begin": 8, "start": 0, "end": 4, "checksum": 1, "entries": {}}

    def begin(folder, journal):
        journal.append([], None, {"x": mark}, {})
        journal.finish()

    def go_on(folder, journal):
        assert journal.warning is None
        assert journal.done == []

    opened(tmp_path, begin)
    opened(tmp_path, go_on)


def test_a_journal_of_another_key_is_not_used(tmp_path):
    """Two keys of one beginning share a folder."""
    other = KEY[:16] + "f" * 16
    opened(tmp_path, lambda folder, journal: journal.append([], None, {}, {}))

    def go_on(folder, journal):
        assert journal.done == []
        assert "is damaged (its journal is of another run)" in journal.warning

    opened(tmp_path, go_on, other)


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path):
    def second(folder, journal):
        with pytest.raises(InputError, match="another run is at work on"), KeptFolder(tmp_path / "out", KEY):
            pass
        journal.append([], None, {}, {})

    assert opened(tmp_path, second) == [f"out.partial-{KEY[:16]}"]


def test_a_file_in_the_place_of_the_folder_is_a_failure(tmp_path):
    (tmp_path / f"out.partial-{KEY[:16]}").write_text("")
    with pytest.raises(RunError, match="cannot be written"), KeptFolder(tmp_path / "out", KEY):
        pass


def test_a_run_that_failed_to_begin_lets_go_of_the_folder(tmp_path):
    """In the same process: once the reason is gone, the next one begins."""
    place = tmp_path / f"out.partial-{KEY[:16]}"
    place.mkdir()
    (place / "out").write_text("")
    with pytest.raises(RunError, match="cannot be written"), KeptFolder(tmp_path / "out", KEY):
        pass
    (place / "out").unlink()
    assert opened(tmp_path, lambda folder, journal: journal.append([], None, {}, {})) == [place.name]


def test_a_journal_that_cannot_be_begun_holds_no_file(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = os.listdir("/proc/self/fd")
    with KeptFolder(tmp_path / "out", KEY) as folder:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="free some space"):
            Journal(folder, KEY)
        monkeypatch.undo()
    assert os.listdir("/proc/self/fd") == before
