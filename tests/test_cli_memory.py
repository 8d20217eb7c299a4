"""Memory of the command line: bounded by --memory, not by the clients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_adapters import make_adapter

MIB = 1 << 20
MEMORY, ALLOWANCE, CLIENTS = 64 * MIB, 256 * MIB, 20
SHAPES = {f"model.layers.{i}.proj": (8209, 4099) for i in range(100)}

MEASURE = """
import json, sys
import torch
torch.set_num_threads(1)
import fedlora_kernels.request
from fedlora_kernels.cli import main
from pathlib import Path

def kib(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])

Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS:")
status = main(sys.argv[1:])
print(json.dumps({"status": status, "peak": (kib("VmHWM:") - before) * 1024}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs of Linux")
@pytest.mark.parametrize("policy", ["strict", "drop"])
def test_twenty_clients_larger_than_memory(tmp_path, policy):
    first = make_adapter(tmp_path / "c0", shapes=SHAPES, rank=4)
    clients = [first]
    for k in range(1, CLIENTS):
        client = tmp_path / f"c{k}"
        client.mkdir()
        for path in first.iterdir():
            os.link(path, client / path.name)
        clients.append(client)
    size = CLIENTS * (first / "adapter_model.safetensors").stat().st_size
    bound = 2 * MEMORY // 4 + ALLOWANCE
    assert size > bound, "the test is too small to see a run that reads everything"

    argv = [
        "aggregate",
        *map(str, clients),
        "-o",
        str(tmp_path / "out"),
        "--memory",
        str(MEMORY),
        "--policy",
        policy,
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *argv], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["status"] == 0, done.stderr
    assert measured["peak"] < bound, (
        f"peak {measured['peak'] / MIB:.0f} MiB above import, {bound / MIB:.0f} MiB allowed"
    )
