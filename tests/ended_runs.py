"""Runs `fedlora aggregate` again and again in forked children and ends each by a signal, at moments spread over a run
and around the exchange of old and new.

Called by test_cli_ended.py as ``python ended_runs.py SIGNAL RUNS ROOT CLIENT...``; prints one JSON line per run. One process imports
torch once and forks before it computes anything: OpenMP does not survive a fork once its threads exist.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import fedlora_kernels.reporting.json
import fedlora_kernels.reporting.tables
import fedlora_kernels.request  # noqa: F401 - every import before the first fork
from fedlora_kernels.cli import main


def start(argv, log):
    """Fork a child that runs the command line and exits with its status."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 99
    try:
        status = main(argv)
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


def state(found, old, new):
    if found is None:
        return "none"
    if found == old:
        return "old"
    # the report tells seconds, so only its completeness can be compared
    same = found.keys() == new.keys() and all(found[name] == new[name] for name in new if name != "report.json")
    return "new" if same and json.loads(found["report.json"]) else "torn"


def run(number, runs, root, clients):
    root, moments = Path(root), random.Random(number * 1000 + runs)
    out, log = root / "out", root.parent / "stderr"
    command = ["aggregate", *clients, "-o", str(out), "--quiet", "--backend", "torch", "--memory", "8MiB"]
    for _ in range(2):
        begin = time.perf_counter()
        assert wait(start([*command, "--rank", "1", "--overwrite"], log)) == 0, log.read_text()
        length = time.perf_counter() - begin
    old = content(out)
    shutil.copytree(out, root.parent / "old")
    shutil.rmtree(out)
    assert wait(start([*command, "--rank", "2"], log)) == 0
    new = content(out)
    hits = attempts = 0
    window = 0.02
    while hits < runs and attempts < 4 * runs:
        for path in root.iterdir():
            shutil.rmtree(path)
        fresh = attempts % 2 == 0
        if not fresh:
            shutil.copytree(root.parent / "old", out)
        child = start([*command, "--rank", "2", "--overwrite"], log)
        moment = moments.random()
        # four of ten are aimed at the exchange: the report is written last of all
        aimed = attempts % 10 >= 6
        if aimed:
            begin = time.perf_counter()
            while not list(root.glob(".out.partial-*/report.json")) and time.perf_counter() - begin < 3 * length:
                time.sleep(0.0002)
            time.sleep(moment * window)
        else:
            time.sleep(moment * length)
        os.kill(child, number)
        status = wait(child)
        attempts += 1
        hits += status != 0
        # the machine is shared: a run that ended before its signal says that runs are shorter now
        if aimed:
            window *= 0.8 if status == 0 else 1.2
        else:
            length *= 0.9 if status == 0 else 1.02
        leftovers = sorted(path.name for path in root.iterdir() if path != out)
        row = {"moment": moment, "aimed": aimed, "fresh": fresh, "status": status, "leftovers": leftovers}
        row |= {"state": state(content(out), old, new), "stderr": log.read_text()}
        print(json.dumps(row), flush=True)
    assert wait(start([*command, "--rank", "2", "--overwrite"], log)) == 0, log.read_text()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
