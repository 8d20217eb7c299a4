"""Runs aggregations in forked children and prints the most memory that each held above what it held before, one JSON line per case.

Called by test_peak_memory.py as ``python peak_runs.py MEMORY ROOT WARM CASES CLIENT...``; CASES is a JSON list of [name, options]. The
children are forked before anything is computed; each loads its libraries in a small run first.
"""

import json
import os
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import torch

import fedlora_kernels as fk

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kib(name):
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def call(folders, out, options):
    options = dict(options)
    if "rule" in options:
        options["rule"] = fk.Budget(options["rule"]) if isinstance(options["rule"], str) else fk.Rank(options["rule"])
    if options.pop("padded", False):
        options["write"] = fk.WriteOptions(uniform_rank=True, fill="random")
    return fk.aggregate(folders, out=out, **options)


def run(memory, root, warm, name, options, clients):
    """Peak above the small run, in bytes, the bytes of the data, and how often they were read."""
    torch.set_num_threads(1)
    call([warm] * len(clients), root / f"{name}-warm", options)
    before = kib("VmRSS:")
    PEAK.write_text("5")
    result = call(clients, root / name, {**options, "memory": memory})
    size = sum(row["bytes"] or 0 for row in result.report["clients"])
    return {"name": name, "above": (kib("VmHWM:") - before) << 10, "read": size, "passes": result.report["passes"]}


def main(memory, root, warm, cases, *clients):
    warnings.simplefilter("ignore")  # the same folder several times
    for name, options in json.loads(cases):
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            status = 1
            try:
                print(json.dumps(run(int(memory), Path(root), warm, name, options, clients)), flush=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{name} failed")
        shutil.rmtree(Path(root) / name)
        shutil.rmtree(Path(root) / f"{name}-warm")


if __name__ == "__main__":
    main(*sys.argv[1:])
