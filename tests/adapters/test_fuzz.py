"""Hostile adapters: thousands of mutations of files, configurations and state dicts, each of which opens or is refused by name.

Every input is a number: the same number makes the same bytes, and a failure prints it. They run in processes of their own, with a
limit on memory, so that a crash, a hang or an allocation is a failure of that input and not of the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKERS = min(2, os.cpu_count() or 1)
SECONDS = 1.0
"""An input that takes longer is a hang, on a machine of its own; four times as much is allowed on a busy one."""
MEMORY = 24 << 20
"""Bytes that opening a small file may take beyond its size."""


def run(first, count, tmp_path):
    """What ``fuzz_inputs.py`` says of these inputs: one record for each that went wrong, and counts."""
    batches = []
    share = -(-count // WORKERS)
    for k in range(WORKERS):
        folder = tmp_path / f"w{first + k * share}"
        folder.mkdir()
        arguments = [first + k * share, min(share, count - k * share), folder, SECONDS * 4, MEMORY]
        command = [sys.executable, HERE / "fuzz_inputs.py", *map(str, arguments)]
        batches.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    failures, counts = [], {}
    for batch in batches:
        out, err = batch.communicate()
        lines = [json.loads(line) for line in out.splitlines()]
        done = [line for line in lines if "counts" in line]
        assert batch.returncode == 0, f"the process died: {batch.returncode}, last input {lines[-1:]}\n{err[-2000:]}"
        assert done, err[-2000:]
        for name, number in done[0]["counts"].items():
            counts[name] = counts.get(name, 0) + number
        failures += [line for line in lines if "seed" in line]
    return failures, counts


def check(failures, counts, total):
    assert not failures, "reproduce with: python tests/adapters/fuzz_inputs.py SEED 1 FOLDER 4 25165824\n" + "\n".join(
        map(json.dumps, failures[:10])
    )
    assert sum(counts.values()) == total
    # mutations that are all refused, or all harmless, would test nothing
    assert counts["opened"] > total // 50
    assert counts["FormatError"] > total // 5
    for kind in ("UnsupportedVariantError", "LimitError"):
        assert counts[kind] > 0, kind


def test_hostile_inputs_open_or_are_refused_by_name(tmp_path):
    failures, counts = run(0, 5000, tmp_path)
    check(failures, counts, 5000)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_hostile_inputs(tmp_path):
    failures, counts = run(1_000_000, 100_000, tmp_path)
    check(failures, counts, 100_000)
