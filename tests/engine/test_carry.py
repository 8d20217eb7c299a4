"""What a survey carries to the second pass: the same in memory and on disc, of the last survey only, and nothing is left behind."""

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from adapter_problems import SHAPES, client, clients, poison
from adapter_problems import changed as changed_client
from round_problems import registered, same, same_adapter

import fedlora_kernels as fk
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.engine import walk
from fedlora_kernels.engine.carry import Carry, spilled
from fedlora_kernels.errors import NonFiniteError, RunError
from fedlora_kernels.methods.contract import Survey
from fedlora_kernels.methods.fedit import FedIT

TENSORS = {
    "float64": torch.randn(3, 5, dtype=torch.float64),
    "bfloat16": torch.randn(7, dtype=torch.bfloat16),
    "int64": torch.arange(4),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(4, 3).T,
    "nan": torch.tensor([float("nan"), -0.0]),
}


def open_temporary_files():
    """Files without a name that this process holds in the temporary folder."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [link for link in links if "(deleted)" in link and link.startswith(tempfile.gettempdir())]


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Spills go to a folder of their own, in which no file ever stays, open or not."""
    place = tmp_path / "spill"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert list(place.iterdir()) == []
    assert open_temporary_files() == []


@pytest.mark.parametrize("limit", [1 << 20, 0, 130])
def test_every_dtype_and_shape_comes_back_bit_by_bit(limit):
    carry = Carry(limit)
    for module in ("a", "b"):
        carry.put(module, TENSORS)
    for module in ("b", "a", "b"):
        found = carry.get(module)
        assert list(found) == list(TENSORS)
        assert all(same(found[name], tensor) for name, tensor in TENSORS.items())
    assert carry.get("c") == {}
    carry.close()
    carry.close()
    assert carry.get("a") == {}


def test_beyond_the_limit_there_is_one_file_without_a_name():
    carry = Carry(100)
    carry.put("fits", {"x": torch.zeros(25)})
    assert open_temporary_files() == []
    carry.put("spilled", {"x": torch.ones(1)})
    carry.put("spilled too", {"x": torch.ones(2)})
    assert len(open_temporary_files()) == 1
    carry.close()
    assert open_temporary_files() == []


@pytest.mark.parametrize("limit", [0, 16, 1 << 20])
def test_a_second_survey_replaces_the_first(limit):
    """What was put first must not come back because it had found room in memory."""
    carry = Carry(limit)
    for value in (1.0, 2.0, 3.0):
        carry.clear()
        carry.put("a", {"x": torch.full((4,), value)})
        assert carry.get("a")["x"].tolist() == [value] * 4
    carry.clear()
    assert carry.get("a") == {}
    carry.close()


def test_a_view_does_not_keep_its_batch_alive():
    carry = Carry(1 << 20)
    carry.put("a", {"x": torch.zeros(1000, 4)[3]})
    assert carry.get("a")["x"].untyped_storage().nbytes() == 16
    carry.close()


def test_a_full_disc_is_a_failure_of_the_run(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    carry = Carry(0)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        carry.put("a", {"x": torch.ones(2)})
    carry.close()


def test_a_file_that_was_cut_short_is_a_failure_of_the_run():
    carry = Carry(0)
    carry.put("a", {"x": torch.ones(2)})
    os.ftruncate(carry._file.fileno(), 3)
    with pytest.raises(RunError, match="cut short"):
        carry.get("a")
    carry.close()


@dataclass(frozen=True)
class Carrying(FedIT):
    """FedIT that looks at all data first, carries what it saw, and finds the same again."""

    name: ClassVar[str] = "carrying"
    equal_ranks: ClassVar[bool] = False
    needs_decision: ClassVar[bool] = True
    fails: bool = False

    def survey(self, group):
        assert all(not found for found in group.carry), "an earlier survey is still there"
        return Survey({"rows": np.arange(group.batch)[:, None] + 1.0}, tuple(seen(group)))

    def decide(self, stats, census):
        assert (stats["rows"] > 0.0).all(), "a module was not surveyed"
        assert stats["rows"].shape == (len(census.modules), 1)
        assert len(census.clients) == len(census.weight)
        return census.clients

    def combine(self, group, plan, previous):
        if self.fails:
            raise RunError("as asked")
        for carried, wanted in zip(group.carry, seen(group), strict=True):
            assert carried.keys() == wanted.keys()
            assert all(same(carried[name], wanted[name]) for name in wanted)
        assert len(plan) == len(group.clients)
        return super().combine(group, plan, previous)


def seen(group):
    """What depends on all that policies and rules may change: who is there, the factors, the scales."""
    total = [
        sum(s * b[i].double().sum() for s, b in zip(group.scale[i], group.B, strict=True)) for i in range(group.batch)
    ]
    return [
        {"sum": total[i].reshape(1), "scale": group.scale[i].clone(), "clients": torch.tensor(group.clients)}
        for i in range(group.batch)
    ]


@pytest.fixture
def carrying(monkeypatch):
    return registered(monkeypatch, Carrying)


CARRIED = sum(8 + 8 * 5 + 8 * 5 for _ in SHAPES)
"""Bytes that five clients make the stub carry."""
MEMORIES = [1, 4 * CARRIED, 4 * CARRIED + 200, 8 * CARRIED, 1 << 30]

CHANGES = {
    "nothing": {},
    "drop": {"policy": "drop"},
    "clip": {"policy": Policy("clip", max_update_norm=30.0)},
    "clip_per_module": {"policy": Policy("clip", per="module")},
    "krum": {"robust": fk.Krum(f=1)},
    "multi_krum_clip": {"robust": fk.MultiKrum(f=1), "policy": "clip"},
    "norm_clip": {"robust": fk.NormClip()},
    "krum_per_matrix": {"robust": fk.Krum(f=1, scope="matrix")},
    "clip_per_matrix": {"robust": fk.NormClip(scope="matrix"), "policy": "clip"},
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:client 'bad' was dropped")
def test_the_survey_is_that_of_what_is_combined(carrying, memory, change):
    pairs = dict(zip("abcde", clients((4, 4, 4, 4, 4)), strict=True))
    if change == "drop":
        pairs["bad"] = changed_client(client(9), "A", poison())
    result = aggregate(pairs, "carrying", memory=memory, **CHANGES[change])
    whole = aggregate(pairs, "carrying", **CHANGES[change])
    assert same_adapter(result.adapter, whole.adapter)


def test_what_does_not_fit_twice_is_still_that_of_the_last_survey(carrying):
    """The first survey fills the room in memory, the one after clipping must not find it taken, nor the first one's tensors."""
    for room in range(0, 3 * CARRIED, CARRIED // 2):
        aggregate(clients((4,) * 5), "carrying", memory=max(1, 4 * room), policy=Policy("clip", max_update_norm=30.0))


@pytest.mark.parametrize("memory", [1, None])
def test_nothing_is_left_behind_by_a_run_that_fails(carrying, memory):
    with pytest.raises(RunError, match="as asked"):
        aggregate(clients((4, 4)), "carrying", fails=True, memory=memory)
    bad = [client(0), client(1), changed_client(client(2), "B", poison(), module=list(SHAPES)[-1])]
    with pytest.raises(NonFiniteError):
        aggregate(bad, "carrying", memory=memory)


@pytest.mark.parametrize("robust", [None, fk.MultiKrum(f=1), fk.MultiKrum(f=1, scope="matrix")])
@pytest.mark.parametrize("policy", ["strict", "clip"])
def test_clair_that_spills_equals_clair_that_does_not(monkeypatch, robust, policy):
    """The slabs are the same in both, and so are the batches."""
    pairs = clients((4, 3, 4, 2, 4, 5))
    whole = aggregate(pairs, "clair", robust=robust, policy=policy)
    monkeypatch.setattr(walk, "Carry", lambda limit: Carry(0))
    spilled = aggregate(pairs, "clair", robust=robust, policy=policy)
    assert same_adapter(spilled.adapter, whole.adapter)
    assert whole.personal.keys() == spilled.personal.keys()
    for name in whole.personal:
        assert same_adapter(spilled.personal[name], whole.personal[name])
    assert spilled.report["decision"] == whole.report["decision"]


def test_a_survey_reads_each_module_as_often_as_it_must(carrying):
    """Looking twice is needed only where something has changed in between."""
    for change, passes in (("nothing", 2), ("drop", 3), ("clip", 3), ("krum", 3)):
        pairs = dict(zip("abcde", clients((4,) * 5), strict=True))
        if change == "drop":
            pairs["bad"] = changed_client(client(9), "A", poison())
            with pytest.warns(UserWarning, match="dropped"):
                report = aggregate(pairs, "carrying", **CHANGES[change]).report
        else:
            report = aggregate(pairs, "carrying", **CHANGES[change]).report
        assert report["passes"] == passes, change


def test_adapters_of_the_caller_are_read_not_changed(carrying):
    adapter = open_adapter(client())
    before = {name: (adapter[name].B.clone(), adapter[name].A.clone()) for name in adapter}
    aggregate([adapter, client(1)], "carrying", memory=1)
    assert all(same(adapter[name].B, B) and same(adapter[name].A, A) for name, (B, A) in before.items())


@pytest.mark.parametrize(("limit", "files"), [(240, 0), (239, 1)])
def test_arrays_past_the_limit_lie_in_a_file(limit, files):
    array = spilled((5, 3, 2), np.dtype(np.float64), limit)
    assert array.shape == (5, 3, 2)
    assert not array.any()
    array[3] += 7.5
    assert array.sum() == 45.0
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert sum(tempfile.gettempdir() in line and "(deleted)" in line for line in maps) == files


def test_an_array_that_the_disc_cannot_hold_is_refused_before_it_is_written(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        spilled((5,), np.dtype(np.float64), 0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedit", {"robust": fk.GeometricMedian()}),
        ("florist", {"robust": fk.Krum(f=1), "policy": Policy("clip", max_update_norm=5.0)}),
        ("fedtree", {}),
        ("fedtree", {"metric": "cosine"}),
    ],
)
def test_a_survey_in_files_decides_as_one_in_memory(method, options, monkeypatch):
    pairs = clients(ranks=(4,) * 6)
    sizes = []
    made = spilled

    def watched(shape, dtype, limit):
        sizes.append(limit)
        return made(shape, dtype, limit)

    monkeypatch.setattr("fedlora_kernels.engine.survey.spilled", watched)
    whole = aggregate(pairs, method, **options)
    part = aggregate(pairs, method, memory=1, **options)
    assert {min(sizes), max(sizes)} == {0, 1 << 28}
    assert part.report["decision"] == whole.report["decision"]
    assert part.report["robust"] == whole.report["robust"]
    assert part.report["clients"] == whole.report["clients"]
