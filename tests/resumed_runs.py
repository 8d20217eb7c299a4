"""Runs `fedlora aggregate --resume` in forked children that die by SIGKILL, and lets the next ones go on.

Called by test_cli_resume.py as ``python resumed_runs.py MODE COUNT ROOT OPTIONS CLIENT...``; prints one JSON line per death or per run.
MODE is "points": a child dies before, or in the middle of, the n-th call that changes the disc, for COUNT values of n spread over
all, and the next child ends the run; or "moments": children die one after the other at random moments, COUNT times in all.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from ended_runs import start, wait

import fedlora_kernels.reporting.json
import fedlora_kernels.reporting.tables
import fedlora_kernels.request  # noqa: F401 - every import before the first fork
from fedlora_kernels.adapters import folder
from fedlora_kernels.cli import main

CALLS = ("write", "fsync", "rename", "replace", "link", "unlink", "ftruncate", "mkdir", "rmdir")


# a process that dies takes nothing back from the system: only a machine that fails needs this, and it takes long
os.fsync = lambda fd: None


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def count_calls(last):
    """Count the calls that change the disc; die in the ``last``-th, a write when half is written. Return the counter."""
    counter = itertools.count(1)
    seen = [0]

    def counted(name, real):
        def call(*arguments, **more):
            seen[0] = next(counter)
            if seen[0] == last:
                if name == "write":
                    real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
                die()
            return real(*arguments, **more)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    folder._exchange = counted("exchange", folder._exchange)
    return seen


def content(path):
    """Every file of an output by its path; of the report what is the same in every run."""
    if not path.is_dir():
        return None
    found = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    report = json.loads(found.pop("report.json"))
    report.pop("seconds")
    report["notes"] = [note for note in report["notes"] if not note.startswith("resumed: ")]
    for client in report["clients"]:
        client.pop("source", None)
    return found | {"report.json": json.dumps(report, sort_keys=True)}


def resumed(path):
    notes = json.loads((path / "report.json").read_text())["notes"]
    return next((int(note.split()[1]) for note in notes if note.startswith("resumed: ")), 0)


class Runs:
    def __init__(self, root, options, clients):
        self.root, self.out, self.log = Path(root), Path(root) / "out", Path(root).parent / "stderr"
        self.argv = ["aggregate", *clients, "-o", str(self.out), "--quiet", "--memory", "1kB", *options]
        begin = time.perf_counter()
        self.finish()
        self.length = time.perf_counter() - begin
        self.wanted = content(self.out)

    def clear(self):
        for path in self.root.iterdir():
            shutil.rmtree(path)

    def finish(self, *more):
        status = wait(start([*self.argv, *more], self.log))
        assert status == 0, self.log.read_text()

    def child(self, last):
        """A run that dies in its ``last``-th call."""
        child = os.fork()
        if child == 0:
            try:
                seen = count_calls(last)
                status = main([*self.argv, "--resume"])
                (self.root.parent / "calls").write_text(str(seen[0]))
            finally:
                os._exit(status)
        return wait(child)

    def row(self, **more):
        leftovers = sorted(path.name for path in self.root.iterdir() if path != self.out)
        return {"out": self.out.is_dir(), "leftovers": leftovers, **more}

    def end(self, **more):
        self.finish("--resume")
        return self.row(
            same=content(self.out) == self.wanted, resumed=resumed(self.out), stderr=self.log.read_text(), **more
        )


def points(runs, count):
    runs.clear()
    assert runs.child(-1) == 0
    calls = int((runs.root.parent / "calls").read_text())
    for k in range(min(count, calls)):
        last = 1 + k * calls // min(count, calls)
        runs.clear()
        status = runs.child(last)
        died = runs.row()
        if died["out"]:
            # in place already: only what was kept is still to be removed
            assert content(runs.out) == runs.wanted
            runs.argv.append("--overwrite")
        print(json.dumps(runs.end(point=last, calls=calls, status=status, died=died)), flush=True)
        runs.argv = [part for part in runs.argv if part != "--overwrite"]


def moments(runs, count):
    draw = random.Random(count)
    deaths = 0
    while deaths < count:
        runs.clear()
        before = deaths
        length = runs.length
        while True:
            child = start([*runs.argv, "--resume"], runs.log)
            time.sleep(draw.random() * length)
            os.kill(child, signal.SIGKILL)
            if wait(child) != -signal.SIGKILL:
                break
            deaths += 1
            length *= 1.1
            if runs.out.is_dir() or deaths - before >= 8:
                break
        # a child that was too fast has ended the run itself
        there = runs.out.is_dir()
        row = runs.row(same=content(runs.out) == runs.wanted, resumed=resumed(runs.out)) if there else runs.end()
        print(json.dumps({**row, "deaths": deaths - before}), flush=True)


if __name__ == "__main__":
    mode, number, where, asked, *folders = sys.argv[1:]
    {"points": points, "moments": moments}[mode](Runs(where, json.loads(asked), folders), int(number))
