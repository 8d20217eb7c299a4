"""Slabs: any memory gives the same answer, what fits is read once, and the memory rule holds."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from adapter_problems import FIRST, client, clients, distance, products, weighted

from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.adapters.reader import StateDict, open_adapter
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.linalg.rules import Energy

ALL = Energy(1.0)
LAYERS = {f"layers.{k}.{part}_proj": shape for k in range(7) for part, shape in (("q", (37, 23)), ("down", (19, 53)))}


class Counting(StateDict):
    """Counts how often each tensor is read."""

    def __init__(self, state):
        super().__init__(state)
        self.reads = Counter()

    def read(self, key, out=None):
        assert out is not None, "factors are read into their place"
        self.reads[key] += 1
        return super().read(key, out)


def counted(pairs):
    adapters = [open_adapter(pair) for pair in pairs]
    for adapter, pair in zip(adapters, pairs, strict=True):
        object.__setattr__(adapter, "source", Counting(pair[0]))
    return adapters


@pytest.mark.parametrize("memory", [1, 50_000, "200kB", "1GiB"])
@pytest.mark.parametrize("method", ["florist", "flora", "zero_pad", "hetlora"])
def test_slabs_of_any_size_give_the_same_answer(memory, method):
    pairs = clients(shapes=LAYERS, dtype=torch.float64)
    whole = aggregate(pairs, method)
    part = aggregate(pairs, method, memory=memory)
    assert list(part.adapter) == list(LAYERS)
    assert distance(products(part.adapter), products(whole.adapter)) < 1e-13
    assert [r["rank"] for r in part.report["modules"]] == [r["rank"] for r in whole.report["modules"]]


@pytest.mark.parametrize(
    ("method", "policy", "memory", "times"),
    [
        ("florist", "strict", "1GiB", 1),
        ("florist", "strict", 1, 1),
        ("hetlora", "strict", "1GiB", 1),
        ("hetlora", "strict", 1, 2),
        ("florist", "drop", "1GiB", 1),
        ("florist", "clip", 1, 2),
    ],
)
def test_what_fits_is_read_once(method, policy, memory, times):
    adapters = counted(clients(shapes=LAYERS))
    aggregate(adapters, method, policy=policy, memory=memory)
    for adapter in adapters:
        assert set(adapter.source.reads.values()) == {times}
        assert len(adapter.source.reads) == 2 * len(LAYERS)


def test_two_passes_give_what_one_pass_gives():
    pairs = clients(shapes=LAYERS)
    one = aggregate(pairs)
    for memory in (None, 1):
        two = aggregate(pairs, policy=Policy("clip", max_update_norm=1e12), memory=memory)
        assert distance(products(two.adapter), products(one.adapter)) < 1e-6
        assert (one.report["passes"], two.report["passes"]) == (1, 2)


def test_a_reader_that_fails_ends_the_run_at_once():
    class Failing(StateDict):
        def read(self, key, out=None):
            raise OSError(5, "Input/output error")

    adapter = open_adapter(client())
    object.__setattr__(adapter, "source", Failing(client()[0]))
    with pytest.raises(OSError, match="Input/output"):
        aggregate([client(1), adapter], memory=1)


def test_shapes_and_ranks_may_differ_within_a_slab():
    pairs = clients(shapes={FIRST: (37, 23), "a.down_proj": (11, 41), "b.q_proj": (37, 23)}, dtype=torch.float64)
    result = aggregate(pairs, rule=ALL)
    assert distance(products(result.adapter), weighted(pairs)) < 1e-12


PEAK = """
import json, resource, sys, threading, time
import psutil, torch
torch.set_num_threads(1)
import fedlora_kernels.methods
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.linalg.rules import Rank
me = psutil.Process()
warm, out, memory, *folders = sys.argv[1:]
aggregate([warm], out=out + "-warm")  # libraries load on first use
base = me.memory_info().rss
peak = base
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, me.memory_info().rss)
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
result = aggregate(folders, rule=Rank(8), out=out, memory=int(memory))
done = True
watcher.join()
print(json.dumps({"above": peak - base, "read": sum(row["bytes"] for row in result.report["clients"])}))
"""


def test_memory_stays_below_two_slabs_and_a_quarter_gigabyte(tmp_path):
    """20 clients of 33 MB under a limit of 64 MiB: the data is ten times the limit and more than twice the allowance."""
    from make_adapters import write

    shapes = {f"layers.{k}.q_proj": (12289, 8191) for k in range(100)}
    one = write(tmp_path / "c0", *client(0, rank=4, shapes=shapes))
    folders = [one]
    for k in range(1, 20):
        copy = tmp_path / f"c{k}"
        copy.mkdir()
        (copy / "adapter_config.json").write_bytes((one / "adapter_config.json").read_bytes())
        (copy / "adapter_model.safetensors").hardlink_to(one / "adapter_model.safetensors")
        folders.append(copy)
    warm = write(tmp_path / "warm", *client(1, shapes={"a.q_proj": (37, 23)}))
    memory = 64 << 20
    command = [sys.executable, "-c", PEAK, str(warm), str(tmp_path / "out"), str(memory), *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    found = json.loads(run.stdout)
    print(found["above"] >> 20, "MiB above import")
    assert found["read"] > 9 * memory
    assert found["above"] < memory // 2 + (256 << 20), f"{found['above'] >> 20} MiB above import"
