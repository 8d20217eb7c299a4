"""Sums taken while factors are read: the same bits as of factors that were read before, and the same errors."""

import json
import os
from contextlib import closing

import expert_problems
import pytest
import torch
from adapter_problems import FIRST, SHAPES, changed, client, clients, poison, without
from safetensors.torch import save_file

from fedlora_kernels import backends
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.engine import walk
from fedlora_kernels.engine.sums import Summing
from fedlora_kernels.errors import FormatError, MismatchError, NonFiniteError, OutputOverflowError

AVAILABLE, REASON = backends.status()["cpu"]
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"no cpu backend: {REASON}")
METHODS = ["fedit", "zero_pad", "hetlora", "ffa", "rolora"]


@pytest.fixture
def stored(tmp_path):
    """Writes clients as folders."""

    def write(pairs):
        folders = []
        for k, (state, config) in enumerate(pairs):
            folder = tmp_path / f"client_{k}"
            folder.mkdir(exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config))
            folders.append(folder)
        return {f"client_{k}": folder for k, folder in enumerate(folders)}

    return write


@pytest.fixture
def made(monkeypatch):
    """What was summed on the way, and what was read after all."""
    seen = {"summed": 0, "read": 0}
    call, load = Summing.__call__, walk.load_block

    def summed(self, plan):
        answer = call(self, plan)
        seen["summed"] += answer is not None
        return answer

    def read(*args):
        seen["read"] += 1
        return load(*args)

    monkeypatch.setattr(Summing, "__call__", summed)
    monkeypatch.setattr(walk, "load_block", read)
    return seen


def problem(method, round=0):  # noqa: A002
    """Clients that a method takes: of one rank, with one A or one B, or of several ranks."""
    pairs = clients((4, 4, 4) if method in ("fedit", "rolora") else (4, 2, 5))
    if method in ("ffa", "rolora"):
        letter = "B" if round % 2 else "A"
        state, _ = max(pairs, key=lambda pair: pair[1]["r"])
        for own, config in pairs:
            config["lora_alpha"] = 2 * config["r"]
            for key in own:
                if f".lora_{letter}." in key:
                    own[key] = state[key][: config["r"]].clone() if letter == "A" else state[key].clone()
    return pairs


def in_memory(pairs):
    """The same clients without files, their tensors in the order of the file."""
    return {f"client_{k}": (dict(sorted(state.items())), config) for k, (state, config) in enumerate(pairs)}


def same(found, wanted):
    assert list(found.adapter) == list(wanted.adapter)
    for name in found.adapter:
        own, other = found.adapter[name], wanted.adapter[name]
        assert own.B.dtype == other.B.dtype
        assert torch.equal(own.B, other.B)
        assert torch.equal(own.A, other.A)
    assert found.report["modules"] == wanted.report["modules"]
    assert found.report["totals"] == wanted.report["totals"]


@pytest.mark.parametrize("memory", [1, "1GiB"])
@pytest.mark.parametrize(("method", "round"), [*((m, 0) for m in METHODS), ("rolora", 1)])
def test_the_bits_are_those_of_factors_that_were_read(method, round, memory, stored, made):  # noqa: A002
    pairs = problem(method, round)
    weights = None if method == "hetlora" else [3.0, 1.0, 2.0]
    options = {"weights": weights, "measure": False, "round": round, "memory": memory}
    wanted = aggregate(in_memory(pairs), method, **options)
    assert made["summed"] == 0
    made["read"] = 0
    same(aggregate(stored(pairs), method, **options), wanted)
    # hetlora looks at all norms first, and keeps what fits in memory
    surveyed = method == "hetlora"
    assert made["summed"] == (0 if surveyed and memory != 1 else 4 if memory == 1 else 2)
    assert made["read"] == (0 if not surveyed else 4 if memory == 1 else 2)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [1.0, 0.0, 2.0]},
        {"weights": [1.0, -0.5, 2.0], "normalize": False},
        {"policy": Policy("clip", max_update_norm=3.0)},
        {"robust": "trimmed_mean", "method": "zero_pad"},
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"backend": "cpu"},
    ],
    ids=str,
)
def test_weights_policies_and_dtypes_change_nothing_of_that(options, stored, made):
    options = {"method": "zero_pad", "measure": False, "memory": 1, **options}
    pairs = clients((4, 2, 5))
    pairs[1] = client(seed=1, rank=2, alpha=9, dtype=torch.bfloat16)
    wanted = aggregate(in_memory(pairs), **options)
    same(aggregate(stored(pairs), **options), wanted)
    assert made["summed"] == 4


@pytest.mark.parametrize("missing", ["renormalize", "zero"])
def test_modules_that_a_client_lacks(missing, stored, made):
    pairs = clients((4, 2, 5))
    pairs[0] = without(pairs[0], FIRST)
    options = {"method": "zero_pad", "measure": False, "read": ReadOptions(missing=missing)}
    wanted = aggregate(in_memory(pairs), **options)
    same(aggregate(stored(pairs), **options), wanted)
    assert made["summed"] == 3


@pytest.mark.parametrize("why", ["measure", "backend", "memory"])
def test_what_takes_more_is_read(why, stored, made):
    pairs = problem("fedit")
    options = {"measure": why == "measure", "backend": "torch" if why == "backend" else "auto"}
    aggregate(in_memory(pairs) if why == "memory" else stored(pairs), "fedit", **options)
    assert made["summed"] == 0
    assert made["read"] == 2


def test_out_of_files_into_a_file(stored, made, tmp_path):
    pairs = problem("fedit")
    wanted = aggregate(in_memory(pairs), "fedit", measure=False)
    aggregate(stored(pairs), "fedit", measure=False, out=tmp_path / "out")
    adapter = open_adapter(tmp_path / "out")
    assert made["summed"] == 2
    for name in SHAPES:
        assert torch.equal(adapter[name].B, wanted.adapter[name].B)
        assert torch.equal(adapter[name].A, wanted.adapter[name].A)


def raised(kind, source, method, **options):
    with pytest.raises(kind) as caught:
        aggregate(source, method, measure=False, **options)
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named_as_ever(value, stored):
    pairs = problem("fedit")
    pairs[1] = changed(pairs[1], "B", poison(value))
    text = raised(NonFiniteError, stored(pairs), "fedit")
    assert text == raised(NonFiniteError, in_memory(pairs), "fedit")
    assert "client_1" in text
    assert FIRST in text


def test_a_result_beyond_its_dtype_is_named_as_ever(stored):
    pairs = [changed(pair, "B", lambda B: B * 1e30) for pair in problem("fedit")]
    text = raised(OutputOverflowError, stored(pairs), "fedit", dtype="float16")
    assert text == raised(OutputOverflowError, in_memory(pairs), "fedit", dtype="float16")


@pytest.mark.parametrize(("method", "letter", "round"), [("ffa", "A", 0), ("rolora", "A", 0), ("rolora", "B", 1)])
def test_frozen_factors_that_differ_are_named_as_ever(method, letter, round, stored):  # noqa: A002
    pairs = problem(method, round)
    pairs[1] = changed(pairs[1], letter, lambda x: x * 1.5)
    text = raised(MismatchError, stored(pairs), method, round=round)
    assert text == raised(MismatchError, in_memory(pairs), method, round=round)
    assert FIRST in text


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_frozen_factor_may_have_zeros_of_two_signs(letter, stored, made):
    pairs = problem("rolora", 0 if letter == "A" else 1)

    def zeros(sign):
        def change(x):
            x[1] = sign * 0.0
            return x

        return change

    pairs = [changed(pair, letter, zeros(1.0 if k else -1.0)) for k, pair in enumerate(pairs)]
    options = {"measure": False, "round": 0 if letter == "A" else 1}
    wanted = aggregate(in_memory(pairs), "rolora", **options)
    same(aggregate(stored(pairs), "rolora", **options), wanted)
    assert made["summed"] == 1  # the modules of the other shape


def test_scales_that_differ_make_another_frozen_B(stored):
    pairs = problem("rolora", 1)
    pairs[1][1]["lora_alpha"] = 16
    text = raised(MismatchError, stored(pairs), "rolora", round=1)
    assert text == raised(MismatchError, in_memory(pairs), "rolora", round=1)


def test_a_file_that_is_cut_off_meanwhile_is_named(stored, monkeypatch):
    folders = stored(problem("fedit"))
    call = Summing.__call__

    def cut(self, plan):
        os.truncate(folders["client_1"] / "adapter_model.safetensors", 4096)
        return call(self, plan)

    monkeypatch.setattr(Summing, "__call__", cut)
    text = raised(FormatError, folders, "fedit")
    assert "client_1" in text
    assert "truncated" in text


@pytest.fixture
def previous(tmp_path):
    """The pair of round 0, in a folder."""
    aggregate(in_memory(clients((4, 4, 4), shapes=SHAPES)), "fedrot", round=0, out=tmp_path / "previous")
    return tmp_path / "previous"


def rotated(folders, pairs, previous, made, times=(2, 0), **options):
    """Both ways of FedRot."""
    options = {"measure": False, "previous": previous, **options}
    wanted = aggregate(in_memory(pairs), "fedrot", **options)
    assert made["summed"] == 0
    made["read"] = 0
    same(aggregate(folders, "fedrot", **options), wanted)
    assert (made["summed"], made["read"]) == times


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"round": 2},
        {"round": 2, "first": "B"},
        {"lam": 1.0},
        {"lam": 1.0, "group": "O"},
        {"lam": 1.0, "group": "O", "round": 2},
        {"lam": 0.0},
        {"weights": [3.0, 0.0, 2.0]},
        {"weights": [3.0, -1.0, 2.0], "normalize": False},
        {"dtype": "float64"},
        {"dtype": "bfloat16", "round": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("stored_as", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_turned_pairs_have_the_bits_of_those_that_were_read(options, stored_as, stored, previous, made):
    pairs = clients((4, 4, 4), dtype=stored_as)
    rotated(stored(pairs), pairs, previous, made, **options)


def test_rotations_and_means_of_many_rows_and_clients(stored, tmp_path, made):
    shapes = {"layers.0.q_proj": (5001, 37), "layers.1.down_proj": (41, 4500)}
    pairs = [client(seed=k, rank=12, alpha=9 + k, shapes=shapes) for k in range(11)]
    aggregate(in_memory(pairs[:3]), "fedrot", round=0, out=tmp_path / "previous")
    folders = stored(pairs)
    for number in (1, 2):
        made.update(summed=0, read=0)
        rotated(folders, pairs, tmp_path / "previous", made, round=number)


def test_who_has_nothing_to_turn_to_gets_plain_means(stored, previous, made):
    pairs = [changed(pair, "A", torch.zeros_like) for pair in clients((4, 4, 4))]
    rotated(
        stored(pairs), pairs, previous, made, times=(1, 1)
    )  # one module stands still, so those of its shape are read


def test_turned_pairs_that_a_client_lacks(stored, previous, made):
    pairs = clients((4, 4, 4))
    pairs[1] = without(pairs[1], FIRST)
    options = {"read": ReadOptions(missing="zero"), "weights": [1.0, 2.0, 3.0]}
    rotated(stored(pairs), pairs, previous, made, times=(3, 0), **options)


@pytest.mark.parametrize("why", ["scale", "dtypes", "memory"])
def test_pairs_that_are_not_alike_are_read(why, stored, previous, made):
    pairs, options = clients((4, 4, 4)), {}
    if why == "scale":
        pairs[1][1]["lora_alpha"] = -8
        options = {"round": 2}
    if why == "dtypes":
        pairs[1] = client(seed=1, rank=4, alpha=9, dtype=torch.bfloat16)
    if why == "memory":
        options = {"memory": 1}
    rotated(stored(pairs), pairs, previous, made, times=(0, 4 if why == "memory" else 2), **options)


def test_trouble_of_turned_pairs_is_named_as_ever(stored, previous):
    pairs = clients((4, 4, 4))
    for letter in "AB":
        bad = list(pairs)
        bad[1] = changed(bad[1], letter, poison())
        text = raised(NonFiniteError, stored(bad), "fedrot", previous=previous)
        assert text == raised(NonFiniteError, in_memory(bad), "fedrot", previous=previous)
        assert "client_1" in text


def test_a_previous_pair_of_another_rank_is_refused_as_ever(stored, previous):
    pairs = clients((3, 3, 3))
    text = raised(MismatchError, stored(pairs), "fedrot", previous=previous)
    assert text == raised(MismatchError, in_memory(pairs), "fedrot", previous=previous)


@pytest.mark.parametrize("alpha", [8, -8])
def test_a_previous_pair_with_a_scale_is_read(alpha, stored, tmp_path, made):
    pairs = clients((4, 4, 4))
    state, config = client(seed=9, rank=4, alpha=alpha)
    folder = tmp_path / "before"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with closing(open_adapter(folder)) as previous:
        rotated(stored(pairs), pairs, previous, made, times=(0, 2), round=2)


def test_parts_of_flat_tensors_are_read(stored, made):
    pairs = expert_problems.clients((3, 2, 4))
    wanted = aggregate(in_memory(pairs), "zero_pad", measure=False)
    made["read"] = 0
    same(aggregate(stored(pairs), "zero_pad", measure=False), wanted)
    assert made["read"] > 0


def test_the_frozen_factor_of_a_client_that_does_not_count_is_not_taken(stored, made):
    pairs, options = problem("ffa"), {"weights": [1.0, 2.0, 0.0], "measure": False}
    wanted = aggregate(in_memory(pairs), "ffa", **options)
    assert {row["rank"] for row in wanted.report["modules"]} == {4}
    same(aggregate(stored(pairs), "ffa", **options), wanted)
