"""Files that fail or change under a run: one clear error, the old output or none, nothing left behind."""

import errno
import os
import shutil

import pytest
from make_adapters import make_adapter, make_clients

import fedlora_kernels as fk
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.cli import main
from fedlora_kernels.engine import run as engine
from fedlora_kernels.errors import FormatError, RunError

WEIGHTS = "adapter_model.safetensors"


def make_adapter_again(path):
    shutil.rmtree(path)
    make_adapter(path, rank=4, seed=1)


def failing_preadv(monkeypatch, error, after):
    """Reads into stacks of tensors fail after some; headers are read."""
    read, calls = os.preadv, []

    def preadv(fd, buffers, offset, *more):
        calls.append(offset)
        if len(calls) > after:
            raise error
        return read(fd, buffers, offset, *more)

    monkeypatch.setattr(os, "preadv", preadv)


def test_an_error_of_the_disc_names_file_and_tensor(tmp_path, monkeypatch, capsys):
    clients = make_clients(tmp_path / "clients")
    failing_preadv(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)), 9)
    assert main(["aggregate", *clients, "-o", str(tmp_path / "out"), "--memory", "1kB"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("fedlora: error: client 'c")
    assert told.count("\n") == 1
    assert WEIGHTS in told
    assert "tensor 'base_model.model." in told
    assert "cannot be read: Input/output error" in told
    assert os.listdir(tmp_path) == ["clients"]


def test_reads_cut_short_are_completed(tmp_path, monkeypatch):
    """A signal or a network file system may answer any read with fewer bytes than asked for."""
    path = make_adapter(tmp_path / "c")
    wanted = fk.aggregate([path], rule=fk.Energy(1.0))
    read = os.preadv

    def short(fd, buffers, offset, *more):
        buffer = next(buffer for buffer in buffers if len(buffer))
        return read(fd, [buffer[: max(1, len(buffer) // 3)]], offset, *more)

    monkeypatch.setattr(os, "preadv", short)
    found = fk.aggregate([path], rule=fk.Energy(1.0))
    for name in wanted.adapter:
        assert found.adapter[name].B.equal(wanted.adapter[name].B)
        assert found.adapter[name].A.equal(wanted.adapter[name].A)


def during(monkeypatch, change):
    """Call ``change`` after everything was read, before anything is put in place."""
    combine = engine.combine

    def changed(*arguments, **more):
        rows = combine(*arguments, **more)
        change()
        return rows

    monkeypatch.setattr(engine, "combine", changed)


def rewrite(path):
    """Other numbers of the same size in the same place, as a client that uploads again over its file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [rewrite, lambda path: os.truncate(path, 3000)], ids=["rewritten", "truncated"])
def test_a_file_that_changes_under_the_run_is_an_error_and_nothing_is_put_in_place(
    tmp_path, monkeypatch, capsys, change
):
    clients = make_clients(tmp_path / "clients")
    argv = ["aggregate", *clients, "-o", str(tmp_path / "out"), "--overwrite", "--quiet"]
    assert main(argv) == 0
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    during(monkeypatch, lambda: change(tmp_path / "clients" / "c1" / WEIGHTS))
    assert main([*argv, "--rank", "1"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "client 'c1': " in told
    assert "changed while it was being read" in told
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["clients", "out"]


@pytest.mark.parametrize(("method", "file"), [("fedrot", WEIGHTS), ("fedtree", "fedlora_state.safetensors")])
def test_a_round_before_that_changes_under_the_run_is_an_error_too(tmp_path, monkeypatch, capsys, method, file):
    clients = make_clients(tmp_path / "clients", ranks=(4,))
    argv = ["aggregate", *clients, "--method", method, "--quiet"] + ["--per-client"] * (method == "fedtree")
    assert main([*argv, "-o", str(tmp_path / "first")]) == 0
    during(monkeypatch, lambda: rewrite(tmp_path / "first" / file))
    assert main([*argv, "-o", str(tmp_path / "second"), "--previous", str(tmp_path / "first")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fedlora: error: previous: ")
    assert f"{file}: changed while it was being read" in told
    assert sorted(os.listdir(tmp_path)) == ["clients", "first"]


def test_a_file_cut_short_under_the_run_is_an_error_that_says_whose_it_is(tmp_path, capsys, monkeypatch):
    clients = make_clients(tmp_path / "clients", ranks=(4,))
    survey = engine.combine

    def cut(*arguments, **more):
        os.truncate(tmp_path / "clients" / "c1" / WEIGHTS, 3000)
        return survey(*arguments, **more)

    monkeypatch.setattr(engine, "combine", cut)
    for method in ("florist", "flora", "fedit", "fedrot"):
        assert main(["aggregate", *clients, "-o", str(tmp_path / "out"), "--method", method, "--quiet"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert told.startswith("fedlora: error: client 'c1': ")
        assert "the file is truncated" in told
        assert os.listdir(tmp_path) == ["clients"]
        make_adapter_again(tmp_path / "clients" / "c1")


def test_a_file_that_is_replaced_as_a_whole_is_read_to_its_end(tmp_path, monkeypatch):
    """The file that was opened lives on: what was read is of one version."""
    clients = make_clients(tmp_path / "clients")
    other = make_adapter(tmp_path / "other", rank=2, seed=9)
    wanted = fk.aggregate(clients)
    during(monkeypatch, lambda: os.replace(other / WEIGHTS, tmp_path / "clients" / "c1" / WEIGHTS))
    found = fk.aggregate(clients)
    assert all(found.adapter[name].B.equal(wanted.adapter[name].B) for name in wanted.adapter)


def test_inspect_refuses_a_file_that_changes(tmp_path, capsys, monkeypatch):
    import fedlora_kernels.inspection as inspection

    path = make_adapter(tmp_path / "c")
    report = inspection._report

    def changed(*arguments):
        made = report(*arguments)
        rewrite(path / WEIGHTS)
        return made

    monkeypatch.setattr(inspection, "_report", changed)
    assert main(["inspect", str(path)]) == 2
    assert "changed while it was being read" in capsys.readouterr().err


def test_fingerprints_tell_contents_apart(tmp_path):
    one, other = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", alpha=9)
    os.utime(one / WEIGHTS, ns=(0, 10**18))
    os.utime(other / WEIGHTS, ns=(0, 10**18))
    first = open_adapter(one).source.fingerprint()
    assert open_adapter(other).source.fingerprint() == first, "same tensors, same size, same time"
    os.utime(one / WEIGHTS, ns=(0, 10**18 + 1))
    assert open_adapter(one).source.fingerprint() != first
    state = {"base_model.model.q.lora_A.weight": open_adapter(one)["model.layers.0.mlp.down_proj"].A}
    from fedlora_kernels.adapters.reader import StateDict

    mine = StateDict(state).fingerprint()
    changed = {key: tensor.clone() for key, tensor in state.items()}
    assert StateDict(changed).fingerprint() == mine
    next(iter(changed.values()))[0, 0] += 1
    assert StateDict(changed).fingerprint() != mine


def test_errors_of_reading_are_of_their_families(tmp_path, monkeypatch):
    source = open_adapter(make_adapter(tmp_path / "c")).source
    key = next(iter(source.tensors))
    failing_preadv(monkeypatch, OSError(errno.ESTALE, os.strerror(errno.ESTALE)), 0)
    with pytest.raises(RunError, match="Stale file handle"):
        source.read(key)
    monkeypatch.undo()
    os.truncate(source.path, 2000)
    with pytest.raises(FormatError, match="truncated"):
        [source.read(key) for key in source.tensors]
