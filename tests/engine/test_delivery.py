"""What a run hands over on disc: a folder for each client, the residual, the state; complete or not at all."""

import json
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from adapter_problems import FIRST, SHAPES, client, clients, distance, products, without
from hypothesis import given, settings
from hypothesis import strategies as st
from make_adapters import write
from round_problems import federation, files_below, registered, report_of, same, same_adapter

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.engine.delivery import client_folders
from fedlora_kernels.engine.state import STATE_NAME, State, StateWriter
from fedlora_kernels.errors import InputError, LimitError, OutputOverflowError, RunError
from fedlora_kernels.methods.contract import Memory, Pair
from fedlora_kernels.methods.fedit import FedIT

pytestmark = pytest.mark.usefixtures("unsynced")
HOSTILE = [
    "../x",
    "..",
    ".",
    "",
    "a/b",
    "a_b",
    "A_B",
    "a\\b",
    "ä",
    "é",
    "ﬀ",
    "\u202egnp",
    "\0",
    "con",
    "x" * 300,
    "x" * 301,
]


def test_hostile_names_stay_within_the_output():
    folders = client_folders(HOSTILE)
    assert len({folder.lower() for folder in folders}) == len(HOSTILE)
    for folder in folders:
        above, name = os.path.split(folder)
        assert above == "clients"
        assert name not in ("", ".", "..")
        assert not name.startswith((".", "-"))
        assert len(name) <= 140
        assert name.isascii()
        assert not set(name) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.text(st.sampled_from("aA._-2/é"), max_size=4), unique=True, max_size=12))
def test_no_two_clients_share_a_folder_on_any_file_system(names):
    folders = client_folders(names)
    assert len({folder.lower() for folder in folders}) == len(names)
    assert folders == client_folders(names)


def test_a_harmless_name_is_kept():
    assert client_folders(["client_1", "site-2.eu"]) == ["clients/client_1", "clients/site-2.eu"]


def test_hostile_names_through_the_engine(tmp_path):
    (tmp_path / "x").write_text("a stranger's")
    pairs = dict(zip(HOSTILE, (client(k) for k in range(len(HOSTILE))), strict=True))
    result = aggregate(pairs, "fedsa", out=tmp_path / "out", per_client=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x"]
    assert (tmp_path / "x").read_text() == "a stranger's"
    assert list(result.personal) == HOSTILE
    memory = aggregate(pairs, "fedsa")
    for row in report_of(tmp_path / "out")["clients"]:
        opened = fk.open_adapter(tmp_path / "out" / row["folder"])
        assert same_adapter(opened, memory.personal[row["name"]])


def test_what_is_where(tmp_path):
    plain = ["adapter_config.json", "adapter_model.safetensors"]
    everyone = [f"clients/{name}/{file}" for name in "ab" for file in plain]
    pairs = {"a": client(0), "b": client(1)}
    for method, wanted in (
        ("fedit", [*plain, *everyone, "report.json"]),
        ("fedex", [*plain, *everyone, "report.json", *(f"residual/{file}" for file in plain)]),
        ("fedsa", [*everyone, "report.json"]),
        ("fedtree", [*everyone, STATE_NAME, "report.json"]),
        ("clair", [*plain, *everyone, "report.json"]),
    ):
        aggregate(pairs, method, out=tmp_path / method, per_client=True)
        assert files_below(tmp_path / method) == sorted(wanted), method
    aggregate(pairs, "clair", out=tmp_path / "common")
    assert files_below(tmp_path / "common") == [*plain, "report.json"]


@dataclass(frozen=True)
class Everything(FedIT):
    """Gives all there is, or fails in its last module."""

    name: ClassVar[str] = "everything"
    gives: ClassVar[tuple[str, ...]] = ("common", "personal", "residual", "state")
    fails: str = "no"

    def combine(self, group, plan, previous):
        made = super().combine(group, plan, previous)
        last = list(SHAPES)[-1] in group.modules
        if self.fails == "raise" and last:
            raise RunError("as asked")
        if self.fails == "interrupt" and last:
            raise KeyboardInterrupt
        pairs = tuple(Pair(B.clone() * 2, A.clone(), made.rank) for B, A in zip(group.B, group.A, strict=True))
        fields = {
            "personal": pairs,
            "residual": Pair(made.B, made.A, made.rank),
            "state": tuple({"mean": made.B[i].clone(), "n": torch.tensor(i)} for i in range(group.batch)),
        }
        return made.__class__(**{**vars(made), **fields})

    def remember(self, plan):
        return Memory({"labels": torch.arange(3)}, {"text": "x" if self.fails != "header" else "x" * (3 << 20)})


@pytest.fixture
def everything(monkeypatch):
    return registered(monkeypatch, Everything)


def test_everything_on_disc_is_everything_in_memory(tmp_path, everything):
    pairs = federation(0)
    memory = aggregate(pairs, "everything", memory=4096)
    disc = aggregate(pairs, "everything", memory=4096, out=tmp_path / "out", per_client=True)
    assert same_adapter(memory.adapter, disc.adapter)
    assert same_adapter(memory.residual, disc.residual)
    assert memory.personal.keys() == disc.personal.keys() == pairs.keys()
    assert all(same_adapter(memory.personal[name], disc.personal[name]) for name in pairs)
    loaded = State.load(tmp_path / "out")
    for state in (disc.state, loaded):
        assert state.tensors.keys() == memory.state.tensors.keys()
        assert all(same(state.tensors[key], memory.state.tensors[key]) for key in memory.state.tensors)
        assert state.of_module(FIRST).keys() == {"mean", "n"}
        assert state.memory.facts == memory.state.memory.facts == {"text": "x"}
        assert same(state.memory.tensors["labels"], torch.arange(3))


@pytest.mark.parametrize("fails", ["raise", "interrupt", "header"])
@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_fails_leaves_the_old_output_or_none(tmp_path, everything, fails, old):
    out = tmp_path / "out"
    if old:
        aggregate(federation(0), "everything", out=out, per_client=True)
    before = {name: (out / name).read_bytes() for name in files_below(out)} if old else None
    held = len(os.listdir("/proc/self/fd"))
    with pytest.raises((RunError, InputError, KeyboardInterrupt)):
        aggregate(federation(1), "everything", fails=fails, out=out, per_client=True, overwrite=old, memory=1)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if old else [])
    if old:
        assert {name: (out / name).read_bytes() for name in files_below(out)} == before
    assert len(os.listdir("/proc/self/fd")) <= held


@pytest.mark.parametrize("file", ["adapter_model.safetensors", STATE_NAME, "adapter_config.json", "report.json"])
def test_a_full_disc_at_any_file_leaves_nothing(tmp_path, everything, monkeypatch, file):
    import errno

    def full(path, *args, **kwargs):
        if os.path.basename(os.fspath(path)) == file and (args[:1] == ("w",) or "O_WRONLY" in str(args) or args):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **kwargs)

    if file.endswith("safetensors"):
        real = os.open
        monkeypatch.setattr(os, "open", full)
    else:
        real = open
        monkeypatch.setattr("builtins.open", full)
    with pytest.raises(RunError, match="No space left on device"):
        aggregate(federation(0), "everything", out=tmp_path / "out", per_client=True)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_clients_and_residual_of_the_old_run(tmp_path, everything):
    out = tmp_path / "out"
    aggregate(federation(0), "everything", out=out, per_client=True)
    with pytest.raises(InputError, match="exists; replace it with overwrite"):
        aggregate(federation(1), "fedit", out=out)
    aggregate(federation(1, present=(0, 1)), "everything", out=out, per_client=True, overwrite=True)
    assert sorted(path.name for path in (out / "clients").iterdir()) == ["ada", "ben"]
    aggregate(federation(1), "fedit", out=out, overwrite=True)
    assert files_below(out) == ["adapter_config.json", "adapter_model.safetensors", "report.json"]
    assert sorted(path.name for path in out.iterdir()) == files_below(out)


@pytest.mark.parametrize(
    "place",
    [
        "notes.txt",
        "clients/notes.txt",
        "clients/ada/notes.txt",
        "residual/notes.txt",
        "clients/ada/sub/x.txt",
        "more/x",
    ],
)
def test_a_stranger_anywhere_in_the_output_protects_it(tmp_path, everything, place):
    out = tmp_path / "out"
    aggregate(federation(0), "everything", out=out, per_client=True)
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text("mine")
    with pytest.raises(InputError, match="was not written here"):
        aggregate(federation(0), "everything", out=out, per_client=True, overwrite=True)
    assert (out / place).read_text() == "mine"


def test_a_client_that_lives_in_the_old_output_is_not_destroyed(tmp_path):
    out = tmp_path / "out"
    aggregate({"a": client(0), "b": client(1)}, "fedsa", out=out, per_client=True)
    with pytest.raises(InputError, match=r"client 'a': the output .* would replace it"):
        aggregate([out / "clients" / "a", out / "clients" / "b"], "fedsa", out=out, per_client=True, overwrite=True)
    assert fk.open_adapter(out / "clients" / "a")[FIRST].B.any()


def test_more_clients_than_open_files(tmp_path):
    """Each client has a file that is read and one that is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    pairs = [client(k, rank=1, shapes={FIRST: (5, 3)}) for k in range(40)]
    folders = [write(tmp_path / str(k), *pair) for k, pair in enumerate(pairs)]
    held = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 20, hard))
        result = aggregate(folders, "fedsa", out=tmp_path / "out", per_client=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(result.personal) == 40


def test_more_files_than_the_system_has(tmp_path, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (150, 150))
    pairs = [client(k, rank=1, shapes={FIRST: (5, 3)}) for k in range(60)]
    folders = [write(tmp_path / str(k), *pair) for k, pair in enumerate(pairs)]
    with pytest.raises(LimitError, match=r"60 clients need \d+ open files; the system allows 150"):
        aggregate(folders, "fedsa", out=tmp_path / "out", per_client=True)


def test_the_state_has_room_for_long_names(tmp_path):
    """The header is reserved before the names are known."""
    modules = [f"model.{'very_' * 30}long.{k}.q_proj" for k in range(300)]
    path = tmp_path / STATE_NAME
    writer = StateWriter(path, "other", 3, len(modules))
    for module in modules:
        writer.add_module(module, {f"tensor_{i}": torch.zeros(1) for i in range(6)})
    names = json.dumps(["客" * 100 for _ in range(1000)])
    writer.finish(Memory({"x": torch.ones(2)}, {"modules": json.dumps(modules), "clients": names}))
    (tmp_path / "report.json").write_text(json.dumps({"round": 3, "method": {"name": "other"}}))
    state = State.load(tmp_path)
    assert state.memory.facts["clients"] == names
    assert len(state.tensors) == 6 * len(modules)
    assert state.of_module(modules[7]).keys() == {f"tensor_{i}" for i in range(6)}


def test_modules_whose_names_begin_alike_keep_their_own_state():
    tensors = {"a.q.mean": torch.ones(1), "a.mean": torch.zeros(1), "a.q.n": torch.ones(1), "a.q.x.n": torch.zeros(1)}
    state = State("other", 0, tensors)
    assert state.of_module("a").keys() == {"mean"}
    assert state.of_module("a.q").keys() == {"mean", "n"}
    assert state.of_module("b") == {}


def test_the_folders_of_clients_hold_their_own_modules_only(tmp_path):
    pairs = {"all": client(0), "some": without(client(1), FIRST)}
    read = ReadOptions(missing="zero")
    result = aggregate(pairs, "zero_pad", read=read, out=tmp_path / "out", per_client=True)
    assert FIRST in result.adapter
    assert FIRST in result.personal["all"]
    assert FIRST not in result.personal["some"]
    sent = result.for_client("some", scale=1.0)
    for name in result.personal["some"]:
        assert same(sent[name].B, result.personal["some"][name].B)


def test_drop_zero_leaves_a_module_out_everywhere_but_in_the_residual(tmp_path):
    """The mean of B is zero, the sum of updates is not: what the pair lacks is in the residual."""
    state, config = client(0)
    key = f"base_model.model.{FIRST}.lora_"
    mirrored = {k: -v if k.startswith(key) else v for k, v in state.items()}
    pairs = {"a": (state, config), "b": (mirrored, config)}
    whole = aggregate(pairs, "fedex")
    for place in ({}, {"out": tmp_path / "out", "per_client": True}):
        result = aggregate(pairs, "fedex", write=WriteOptions(drop_zero=True), **place)
        assert list(result.adapter) == [name for name in SHAPES if name != FIRST]
        assert FIRST in result.residual
        assert all(FIRST not in adapter for adapter in result.personal.values())
        row = next(row for row in result.report["modules"] if row["name"] == FIRST)
        assert (row["rank"], "ZERO" in row["notes"]) == (0, True)
        assert distance(products(result.residual), products(whole.residual)) == 0.0


@pytest.mark.parametrize("method", ["fedit", "fedsa", "fedtree"])
def test_an_output_without_any_module_is_refused(tmp_path, method):
    zero = [({k: torch.zeros_like(v) for k, v in s.items()}, c) for s, c in clients((4, 4))]
    for place in ({}, {"out": tmp_path / "out", "per_client": True}):
        with pytest.raises(InputError, match="no modules to write; every module was zero or left out"):
            aggregate(zero, method, write=WriteOptions(drop_zero=True), **place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["fedit", "fedsa", "prelort", "florist", "clair", "flexlora"])
@pytest.mark.parametrize(
    "write",
    [WriteOptions(uniform_rank=True), WriteOptions(target="vllm"), WriteOptions(uniform_rank=True, fill="random")],
)
def test_uniform_rank_holds_in_every_folder(tmp_path, method, write):
    ranks = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}}
    pairs = {}
    for k, name in enumerate("abc"):
        state, settings_ = client(k, rank=6, alpha=6)
        state = {
            key: (v[:4] if "lora_A" in key else v[:, :4]).clone() if "q_proj" in key else v for key, v in state.items()
        }
        pairs[name] = (state, {**settings_, **ranks})
    plain = aggregate(pairs, method, out=tmp_path / "plain", per_client=True)
    result = aggregate(pairs, method, write=write, out=tmp_path / "out", per_client=True)
    memory = aggregate(pairs, method, write=write)
    for name in pairs:
        found = result.personal[name]
        assert len({spec.rank for spec in found.modules.values()}) == 1
        assert "rank_pattern" not in found.config
        assert distance(products(found), products(plain.personal[name])) < 1e-6
        if "personal" in memory.method.gives:
            assert same_adapter(found, memory.personal[name])


def test_an_overflow_of_a_residual_or_a_personal_pair_names_its_size():
    """Not that of the common pair, which would fit."""
    pairs = [client(0), client(1)]
    state, settings_ = pairs[0]
    big = {k: v * 3e5 if "lora_B" in k else v for k, v in state.items()}
    with pytest.raises(
        OutputOverflowError,
        match=r"max\|x\| of the result is [1-9]\.\d+e\+0[67]; float16 holds 6\.55e\+04\. Use bfloat16 or",
    ):
        aggregate([(big, settings_), pairs[1]], "fedsa", dtype="float16")
    opposite = {k: -v if "lora_B" in k else v for k, v in big.items()}
    with pytest.raises(OutputOverflowError) as caught:
        aggregate([(big, settings_), (opposite, settings_), pairs[1]], "fedex", dtype="float16")
    assert float(str(caught.value).split("result is ")[1].split(";")[0]) > 6.55e4


def test_progress_and_report_tell_of_folders(tmp_path):
    result = aggregate({"a": client(0), "b": client(1)}, "fedsa", out=tmp_path / "out", per_client=True, weights=[1, 0])
    rows = {row["name"]: row for row in result.report["clients"]}
    assert rows["a"]["folder"] == "clients/a"
    assert rows["b"]["folder"] is None
    assert report_of(tmp_path / "out")["clients"] == result.report["clients"]
    assert not (Path(tmp_path) / "out" / "clients" / "b").exists()
