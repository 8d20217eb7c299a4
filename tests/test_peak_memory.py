"""Peak memory of every method that streams: two slabs and 256 MiB, whatever the clients hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_problems import client
from make_adapters import write

from fedlora_kernels.methods.contract import method_names

SCRIPT = Path(__file__).parent / "peak_runs.py"
MIB = 1 << 20
ALLOWANCE = 256 * MIB
COMMON = "fedex fedit fedmomentum fedrot fedsvd ffa flexlora flora hetlora lora_fair prelort raflora rolora zero_pad"
RULES = ("geometric_median", "krum", "multi_krum", "norm_clip", "trimmed_mean")
CASES = {
    **{name: {"method": name} for name in COMMON.split()},
    **{name: {"method": name, "per_client": True} for name in ("clair", "fedsa", "fedtree")},
    "florist": {"rule": 8},
    "each its own": {"rule": 8, "per_client": True},
    "two passes": {"rule": 8, "policy": "drop"},
    "robust": {"method": "fedit", "robust": "geometric_median"},
    "budget": {"rule": "50MB"},
    "compared": {"method": "fedit", "compare": True},
    "padded": {"rule": 8, "padded": True},
    "resumed": {"method": "flora", "resume": True},
}

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs of Linux"
)


def peaks(tmp_path, cases, *, memory, count, rank, shapes):
    """Peak of each case in bytes, with ``count`` clients that share one file on disc."""
    one = write(tmp_path / "c0", *client(0, rank=rank, shapes=shapes))
    folders = [one]
    for k in range(1, count):
        folders.append(tmp_path / f"c{k}")
        folders[k].mkdir()
        for path in one.iterdir():
            os.link(path, folders[k] / path.name)
    warm = write(tmp_path / "warm", *client(1, shapes={"a.q_proj": (37, 23)}))
    argv = [str(memory), str(tmp_path), str(warm), json.dumps(list(cases.items())), *map(str, folders)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, timeout=290, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == list(cases)
    print({row["name"]: row["above"] // MIB for row in rows})
    return rows


def test_a_module_larger_than_memory_is_held_once_and_its_update_never(tmp_path):
    """D alone would take 1 GiB; factors of all clients and an answer of the stacked rank are one slab of 27 MiB."""
    m, n, rank, count = 32771, 8191, 16, 5
    slab = 2 * (m + n) * rank * count * 4
    cases = {name: CASES[name] for name in ("florist", "fedex", "two passes")}
    for row in peaks(tmp_path, cases, memory=1 * MIB, count=count, rank=rank, shapes={"a.q_proj": (m, n)}):
        assert row["above"] < 2 * slab + ALLOWANCE < m * n * 4, row


@pytest.mark.full
@pytest.mark.parametrize("names", [list(CASES)[i::3] for i in range(3)], ids=["first", "second", "third"])
def test_twenty_clients_larger_than_memory_by_every_method(tmp_path, names):
    memory, shapes = 64 * MIB, {f"layers.{k}.q_proj": (12289, 8191) for k in range(60)}
    cases = {name: CASES[name] for name in names}
    for row in peaks(tmp_path, cases, memory=memory, count=20, rank=4, shapes=shapes):
        assert row["read"] > memory // 2 + ALLOWANCE, "too small to see a run that reads everything"
        assert row["above"] < memory // 2 + ALLOWANCE, row


def test_no_method_is_left_out():
    assert {case.get("method", "florist") for case in CASES.values()} | set(RULES) == set(method_names())
