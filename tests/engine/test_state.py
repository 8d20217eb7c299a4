"""`State`: what a round leaves for the next, read when asked for, and whose it is."""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from adapter_problems import FIRST, SHAPES, client, clients, without
from round_problems import federation, registered, same, same_result

import fedlora_kernels as fk
from fedlora_kernels.adapters.safetensors import SafetensorsFile
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.engine.state import STATE_NAME, State, StateWriter, check_state, previous_state
from fedlora_kernels.errors import FormatError, InputError, MismatchError, NonFiniteError
from fedlora_kernels.methods.contract import Memory, make_method
from fedlora_kernels.methods.factors import mean_outcome
from fedlora_kernels.methods.fedit import FedIT

pytestmark = pytest.mark.usefixtures("unsynced")


@dataclass(frozen=True)
class Counting(FedIT):
    """FedIT that counts its rounds and sums what it was sent, of each module and of the whole model."""

    name: ClassVar[str] = "counting"
    equal_ranks: ClassVar[bool] = False
    reads_previous: ClassVar[str | None] = "state"
    needs_previous: ClassVar[bool] = True
    needs_decision: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("common", "state")

    def surveys(self, memory):
        return memory is None

    def decide(self, stats, census):
        if census.memory is None:
            assert census.round == 0
            return 0, len(census.modules)
        assert int(census.memory.tensors["rounds"]) == census.round - 1
        return census.round, json.loads(census.memory.facts["modules"])

    def combine(self, group, plan, previous):
        outcome = mean_outcome(group)
        state = []
        for i in range(group.batch):
            old = (
                previous.state[i]
                if previous is not None
                else {"sum": torch.zeros(group.m, dtype=torch.float64), "n": 0}
            )
            assert (previous is None) == (group.round == 0)
            assert previous is None or previous.round == group.round - 1
            total = old["sum"] + outcome.B[i].double().sum(1)
            state.append(
                {"sum": total, "n": torch.tensor(int(old["n"]) + 1), "half": total.bfloat16(), "none": torch.zeros(0)}
            )
        finite = torch.stack([torch.isfinite(s["sum"]).all() for s in state])
        info = outcome.info | (~finite * int(fk.Info.NONFINITE)).to(outcome.info.dtype)
        return outcome.__class__(**{**vars(outcome), "state": tuple(state), "info": info})

    def remember(self, plan):
        return Memory({"rounds": torch.tensor(plan[0])}, {"modules": json.dumps(plan[1]), "text": 'é\n"\\ \u202e'})


@pytest.fixture
def counting(monkeypatch):
    return registered(monkeypatch, Counting)


def test_state_goes_from_round_to_round_the_same_on_disc_and_in_memory(tmp_path, counting):
    memory = disc = None
    for number in range(4):
        pairs = federation(number, present=range(5) if number % 2 else (3, 1))
        memory = aggregate(pairs, "counting", previous=memory)
        disc = aggregate(pairs, "counting", previous=disc and tmp_path / str(number - 1), out=tmp_path / str(number))
        assert same_result(memory, disc)
        state = disc.state.of_module(FIRST)
        assert list(state) == ["sum", "n", "half", "none"]
        assert int(state["n"]) == number + 1
        assert disc.state.memory.facts["text"] == 'é\n"\\ \u202e'


def test_memory_of_one_slab_or_many_is_the_same(tmp_path, counting):
    first = [aggregate(federation(0), "counting", memory=memory) for memory in (None, 1)]
    assert same_result(*first)
    second = [aggregate(federation(1), "counting", memory=memory, previous=first[0]) for memory in (None, 1)]
    assert same_result(*second)


def test_a_module_may_be_named_like_what_is_kept_of_the_whole_model(tmp_path, counting):
    shapes = {"memory:rounds": (5, 7), "memory:x.q_proj": (5, 7), "a": (5, 7), "a.b": (5, 7)}
    pairs = [client(k, shapes=shapes, target_modules=list(shapes)) for k in range(2)]
    memory = aggregate(pairs, "counting")
    disc = aggregate(pairs, "counting", out=tmp_path / "out")
    assert same_result(memory, disc)
    assert same_result(
        aggregate(pairs, "counting", previous=memory), aggregate(pairs, "counting", previous=tmp_path / "out")
    )
    for name in shapes:
        assert int(disc.state.of_module(name)["n"]) == 1


def test_tensors_are_read_when_asked_for(tmp_path, counting, monkeypatch):
    aggregate(federation(0), "counting", out=tmp_path / "out")
    reads = []
    inner = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, key, out=None: reads.append(key) or inner(self, key, out))
    state = State.load(tmp_path / "out")
    assert reads == ["memory:rounds"]
    assert len(state.tensors) == 4 * len(SHAPES)
    state.of_module(FIRST)
    assert reads[1:] == [f"{FIRST}.{name}" for name in ("sum", "n", "half", "none")]


def test_files_of_a_previous_given_as_a_path_are_closed(tmp_path, counting):
    aggregate(federation(0), "counting", out=tmp_path / "out")
    aggregate(federation(0), "fedrot", out=tmp_path / "rot")
    held = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        aggregate(federation(1), "counting", previous=tmp_path / "out")
        aggregate(federation(1), "fedrot", previous=tmp_path / "rot")
        assert len(os.listdir("/proc/self/fd")) == held


@pytest.mark.parametrize("missing", ["previous", "state", "module"])
def test_what_is_missing_is_named(tmp_path, counting, missing):
    out = tmp_path / "out"
    pairs = [client(0), client(1)]
    first = [without(pair, FIRST) for pair in pairs] if missing == "module" else pairs
    aggregate(first, "counting", out=out)
    if missing == "state":
        (out / STATE_NAME).unlink()
    arguments, text = {
        "previous": ({"round": 1}, "method 'counting' in round 1 needs previous="),
        "state": ({"previous": out}, r"previous holds no fedlora_state\.safetensors, which method 'counting' needs"),
        "module": (
            {"previous": out},
            rf"module '{FIRST}': not in the state of round 0; method 'counting' needs the same modules",
        ),
    }[missing]
    with pytest.raises((InputError, MismatchError), match=text):
        aggregate(pairs, "counting", **arguments)


def test_a_number_in_the_state_that_is_not_finite_is_named_as_such(counting):
    first = aggregate(clients(), "counting")
    tensors = dict(first.state.tensors)
    tensors[f"{FIRST}.sum"] = torch.full((37,), float("inf"), dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=rf"previous, module '{FIRST}', sum: inf at index \(0,\)"):
        aggregate(clients(), "counting", previous=State("counting", 0, tensors, first.state.memory))


def test_every_form_of_previous():
    state = State("fedit", 3)
    assert previous_state(None) is None
    assert previous_state(state) is state
    result = aggregate(clients((4, 4)), "fedit", round=3)
    assert previous_state(result) is result.state
    found = previous_state(result.adapter)
    assert (found.method, found.round, found.adapter) == ("fedit", 3, result.adapter)
    found = previous_state(fk.open_adapter(client()))
    assert (found.method, found.round) == ("", -1)
    for wrong in (3, 1.5, [], {}, b"x", object()):
        with pytest.raises(
            InputError, match=f"previous is of type {type(wrong).__name__}; an output folder, an Adapter"
        ):
            previous_state(wrong)


def test_an_adapter_in_a_file_says_whose_it_is(tmp_path):
    aggregate(clients((4, 4)), "fedrot", out=tmp_path / "out", round=0)
    found = previous_state(fk.open_adapter(tmp_path / "out"))
    assert (found.method, found.round) == ("fedrot", 0)


@pytest.mark.parametrize("text", ["-1", "1.5", "x", "", "²", "9" * 5000])
def test_an_adapter_of_an_unreadable_round_asks_for_it(text):
    adapter = dataclasses.replace(fk.open_adapter(client()), metadata={"fedlora.round": text})
    with pytest.raises(InputError, match="does not say its round; give round=, counted from 0"):
        aggregate(clients((4, 4)), previous=adapter)
    assert aggregate(clients((4, 4)), previous=adapter, round=2).report["round"] == 2


def test_who_reads_nothing_gets_nothing():
    assert check_state(State("other", 3), make_method("florist", {}), 4) is None
    assert check_state(None, make_method("prelort", {}), 4) is None
    with pytest.raises(InputError, match=r"result of method 'o\?ther'"):
        check_state(State("o\u202ether", 3), make_method("prelort", {}), 4)


def test_a_state_file_without_metadata_is_refused_by_name(tmp_path, counting):
    from safetensors.torch import save_file

    aggregate(clients(), "counting", out=tmp_path / "out")
    (tmp_path / "out" / STATE_NAME).unlink()
    save_file({"a.n": torch.zeros(1)}, tmp_path / "out" / STATE_NAME)
    with pytest.raises(
        FormatError, match=r"fedlora_state\.safetensors: of method 'None', but report\.json says 'counting'"
    ):
        aggregate(clients(), "counting", previous=tmp_path / "out")


def test_a_name_comes_once(tmp_path):
    writer = StateWriter(tmp_path / STATE_NAME, "other", 0, 1)
    writer.add_module("a", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a\.x: .*or came before"):
        writer.add_module("a", {"x": torch.zeros(1)})
    writer.abandon()


def test_the_file_is_safetensors_that_others_can_read(tmp_path, counting):
    from safetensors import safe_open

    result = aggregate(clients(), "counting", out=tmp_path / "out")
    with safe_open(tmp_path / "out" / STATE_NAME, "pt") as file:
        assert file.metadata()["fedlora.method"] == "counting"
        assert file.metadata()["fedlora.round"] == "0"
        for key in result.state.tensors:
            assert same(file.get_tensor(key), result.state.tensors[key])
        assert int(file.get_tensor("memory:rounds")) == 0


def test_the_state_of_a_run_survives_its_folder(tmp_path, counting):
    """Open files outlive their names: the next round may replace the folder."""
    first = aggregate(federation(0), "counting", out=tmp_path / "out")
    kept = aggregate(federation(1), "counting", previous=first)
    shutil.rmtree(Path(tmp_path) / "out")
    assert same_result(aggregate(federation(1), "counting", previous=first), kept)


def test_what_is_kept_does_not_keep_its_batch_alive():
    """State and pairs of many modules are cut from batches; each has a memory of its own."""
    result = aggregate(federation(0), "fedtree")
    tensors = [*result.state.tensors.values(), *(result.personal["ada"][name].B for name in SHAPES)]
    assert len(tensors) > 8
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in tensors)


def test_hostile_names_of_clients_go_from_round_to_round(tmp_path):
    names = ["../x", "a\nb", "\ud800", "ä", ""]
    pairs = [dict(zip(names, federation(number, present=range(5)).values(), strict=True)) for number in range(2)]
    memory = aggregate(pairs[0], "fedtree")
    aggregate(pairs[0], "fedtree", out=tmp_path / "out", per_client=True)
    now = {name: pairs[1][name] for name in names[2:]}
    assert same_result(aggregate(now, "fedtree", previous=memory), aggregate(now, "fedtree", previous=tmp_path / "out"))
