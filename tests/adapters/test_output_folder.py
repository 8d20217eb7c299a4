"""OutputFolder: the output appears complete or not at all, and never in place of a stranger's files."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from fedlora_kernels.adapters import folder as folder_module
from fedlora_kernels.adapters.folder import OutputFolder, check_out
from fedlora_kernels.errors import InputError, RunError


def put(folder, text="new"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(text)
    (folder / "clients" / "c0").mkdir(parents=True, exist_ok=True)
    (folder / "clients" / "c0" / "adapter_config.json").write_text(text)


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def replace(out, overwrite=True, error=None):
    """A whole run: fill the temporary folder, fail with ``error`` if given, commit."""
    with OutputFolder(out, overwrite) as output:
        put(output.path)
        if error:
            raise error
        output.commit()


NEW = {"clients/c0/adapter_config.json": "new", "report.json": "new"}
OLD = {"clients/c0/adapter_config.json": "old", "report.json": "old"}


@pytest.fixture(params=["exchange", "two renames"])
def system(request, monkeypatch):
    """With RENAME_EXCHANGE and without."""
    if request.param == "two renames":
        monkeypatch.setattr(folder_module, "_exchange", lambda new, old: False)
    return request.param


def test_a_new_output_appears_on_commit_only(tmp_path):
    with OutputFolder(tmp_path / "out") as output:
        assert output.path.parent == tmp_path
        put(output.path)
        assert not (tmp_path / "out").exists()
        output.commit()
    assert content(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_output_is_replaced_in_one_step(tmp_path, system):
    put(tmp_path / "out", "old")
    with OutputFolder(tmp_path / "out", overwrite=True) as output:
        put(output.path)
        assert content(tmp_path / "out") == OLD
        output.commit()
    assert content(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_this_system_exchanges(tmp_path):
    (tmp_path / "a").mkdir()
    put(tmp_path / "b")
    assert folder_module._exchange(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "a") == NEW
    with pytest.raises(OSError, match="No such file"):
        folder_module._exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_output_and_no_temporary_folder(tmp_path, system, error):
    put(tmp_path / "out", "old")
    with pytest.raises(error):
        replace(tmp_path / "out", error=error)
    assert content(tmp_path / "out") == OLD
    assert os.listdir(tmp_path) == ["out"]


def test_leaving_without_commit_writes_nothing(tmp_path):
    with OutputFolder(tmp_path / "out") as output:
        put(output.path)
    assert os.listdir(tmp_path) == []


def failing_rename(monkeypatch, failures):
    """os.rename fails at the calls counted in ``failures``."""
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) in failures:
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(folder_module, "_exchange", lambda new, old: False)
    monkeypatch.setattr(os, "rename", rename)


def test_a_failed_second_rename_puts_the_old_output_back(tmp_path, monkeypatch):
    put(tmp_path / "out", "old")
    failing_rename(monkeypatch, {2})
    with pytest.raises(RunError, match="could not be replaced: Permission denied; the old one is in place again"):
        replace(tmp_path / "out")
    assert content(tmp_path / "out") == OLD
    assert os.listdir(tmp_path) == ["out"]


def test_where_even_that_fails_the_message_says_where_the_old_output_is(tmp_path, monkeypatch):
    put(tmp_path / "out", "old")
    failing_rename(monkeypatch, {2, 3})
    with pytest.raises(RunError, match="the old one is at ") as caught:
        replace(tmp_path / "out")
    (left,) = os.listdir(tmp_path)
    assert str(caught.value).endswith(left)
    assert content(tmp_path / left) == OLD


def test_an_old_output_that_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    put(tmp_path / "out", "old")

    def stuck(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    with OutputFolder(tmp_path / "out", overwrite=True) as output:
        put(output.path)
        monkeypatch.setattr(folder_module.shutil, "rmtree", stuck)
        with pytest.raises(RunError, match=r"is complete, but the old one could not be deleted from .*partial"):
            output.commit()
    assert content(tmp_path / "out") == NEW


def test_an_interrupt_while_the_old_output_is_deleted_leaves_nothing_behind(tmp_path, system, monkeypatch):
    put(tmp_path / "out", "old")
    real = folder_module.shutil.rmtree

    def interrupted(path, ignore_errors=False):
        if not ignore_errors:
            raise KeyboardInterrupt
        real(path, ignore_errors=True)

    monkeypatch.setattr(folder_module.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(tmp_path / "out")
    assert content(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disc_on_commit_is_a_run_error_and_keeps_the_old_output(tmp_path, monkeypatch):
    put(tmp_path / "out", "old")

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="free some space"):
        replace(tmp_path / "out")
    assert content(tmp_path / "out") == OLD
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "stranger",
    [
        "notes.txt",
        ".git/config",
        "clients/readme",
        "clients/c0/model.bin",
        "residual/x",
        "clients/c0/clients/c1/report.json",
    ],
)
def test_a_folder_with_strangers_files_is_never_replaced(tmp_path, stranger):
    put(tmp_path / "out", "old")
    path = tmp_path / "out" / stranger
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=r"holds '[^']*', which was not written here"):
        OutputFolder(tmp_path / "out", overwrite=True)
    assert path.read_text() == "mine"


def test_links_are_strangers(tmp_path):
    put(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="is a symbolic link"):
        check_out(tmp_path / "out", overwrite=True)
    (tmp_path / "real" / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"holds 'README.md', which was not written here"):
        check_out(tmp_path / "real", overwrite=True)


def test_a_file_that_appears_while_we_write_is_not_destroyed(tmp_path):
    with OutputFolder(tmp_path / "out") as output:
        put(output.path)
        put(tmp_path / "out", "old")
        with pytest.raises(InputError, match="exists"):
            output.commit()
    assert content(tmp_path / "out") == OLD


def test_outputs_that_cannot_be_written_are_seen_beforehand(tmp_path):
    put(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    for path, text in (
        (tmp_path / "out", "exists; replace it with overwrite"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "file is no folder; create it or choose another place"),
        (tmp_path / "absent" / "deep" / "out", "deep does not exist; create it or choose another place"),
        ("/", "no folder that can be replaced"),
        ("/proc/out", "is not a folder that can be written"),
        (tmp_path / ("\u6f22" * 86), "at most 255 bytes is needed"),
        ("", "is not a path"),
        ("a\0b", "is not a path"),
    ):
        if path == "/proc/out" and os.access("/proc", os.W_OK):
            continue
        with pytest.raises(InputError, match=text) as caught:
            check_out(path)
        assert "\n" not in str(caught.value)


def test_the_current_folder_of_a_stranger_is_safe(tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"holds 'thesis.tex'"):
        check_out(".", overwrite=True)


@pytest.mark.parametrize("name", ["x" * 250, "\u6f22" * 85], ids=["ascii", "wide"])
def test_long_names_work(tmp_path, name, system):
    for _ in range(2):
        replace(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert content(tmp_path / name) == NEW


KILLED = """
import sys, time
from fedlora_kernels.adapters.folder import OutputFolder
with OutputFolder(sys.argv[1], overwrite=True) as output:
    (output.path / "report.json").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_the_old_output_and_the_next_run_sweeps(tmp_path):
    put(tmp_path / "out", "old")
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"ready\n"
        with OutputFolder(tmp_path / "out", overwrite=True) as output:
            put(output.path)
            output.commit()
        assert len(os.listdir(tmp_path)) == 2, "a living run's folder must stay"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    (left,) = [name for name in os.listdir(tmp_path) if name != "out"]
    assert left.startswith(f".out.partial-{child.pid}-")
    (tmp_path / f".out.partial-{child.pid}-notours").mkdir()
    time.sleep(0.05)
    with OutputFolder(tmp_path / "out", overwrite=True) as output:
        put(output.path)
        output.commit()
    assert sorted(os.listdir(tmp_path)) == [f".out.partial-{child.pid}-notours", "out"]


def test_a_temporary_folder_stays_while_its_process_lives_or_anyone_holds_its_lock(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    living, locked, stale = (tmp_path / f".out.partial-{name}" for name in (
        f"{os.getpid()}-00000000", f"{done.pid}-00000001", f"{done.pid}-00000002"
    ))  # fmt: skip
    for path in (living, locked, stale):
        put(path, "half")
    fd = os.open(locked, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    replace(tmp_path / "out")
    os.close(fd)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, locked.name, "out"])
