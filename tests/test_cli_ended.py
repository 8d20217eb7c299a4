"""Killed and interrupted runs: the old output or none or the new one, never half of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from make_adapters import make_clients

from fedlora_kernels.cli import main

SCRIPT = Path(__file__).parent / "ended_runs.py"
SHAPES = {
    f"model.layers.{i}.{name}": shape for i in range(10) for name, shape in (("q", (1031, 411)), ("d", (499, 1023)))
}


def ended(tmp_path, number, runs):
    clients = make_clients(tmp_path / "clients", 4, ranks=(8, 16, 4), shapes=SHAPES)
    root = tmp_path / "root"
    root.mkdir()
    command = [sys.executable, str(SCRIPT), str(int(number)), str(runs), str(root), *clients]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_killed_run_leaves_the_old_output_or_none_or_the_new_one(tmp_path):
    rows = ended(tmp_path, signal.SIGKILL, 20)
    for row in rows:
        assert row["state"] in (("none", "new") if row["fresh"] else ("old", "new")), row
    # the moments must really fall into runs: before the exchange, many with a folder half written
    assert sum(row["status"] == -signal.SIGKILL for row in rows) >= 20
    assert sum(bool(row["leftovers"]) for row in rows) >= 3
    assert {row["state"] for row in rows} >= {"none", "old"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, number, status):
    rows = ended(tmp_path, number, 6)
    for row in rows:
        assert row["leftovers"] == [], row
        if row["status"] == 0:
            assert row["state"] == "new"
        else:
            assert row["status"] == status, row
            assert row["state"] in (("none", "new") if row["fresh"] else ("old", "new")), row
            assert row["stderr"] == ("fedlora: error: interrupted\n" if number == signal.SIGINT else ""), row
    assert sum(row["status"] == status for row in rows) >= 6


def test_an_interrupt_while_the_old_output_is_deleted_leaves_nothing_behind(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    argv = ["aggregate", *make_clients(tmp_path / "clients"), "-o", str(root / "out"), "--quiet", "--overwrite"]
    assert main([*argv, "--rank", "1"]) == 0
    delete, calls = shutil.rmtree, []

    def interrupted(path, **more):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        delete(path, **more)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    assert main([*argv, "--rank", "2"]) == 130
    assert os.listdir(root) == ["out"]
    assert json.loads((root / "out" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("fresh", [True, False])
def test_a_full_disc_is_a_failure_of_the_run_and_leaves_nothing(tmp_path, fresh):
    root = tmp_path / "root"
    root.mkdir()
    argv = ["aggregate", *make_clients(tmp_path / "clients", shapes=SHAPES), "-o", str(root / "out"), "--quiet"]
    if not fresh:
        assert main([*argv, "--rank", "1"]) == 0
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    # no file may grow beyond 64 KiB: the same path through the code as a disc without space
    command = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", sys.executable, "-m", "fedlora_kernels"]
    done = subprocess.run([*command, *argv, "--rank", "3", "--overwrite"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("fedlora: error: ")
    assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert os.listdir(root) == ([] if fresh else ["out"])
