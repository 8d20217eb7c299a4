"""Tensors that are no factors, in pieces of some rows: the same bits, the same errors."""

import json

import pytest
import torch
from adapter_problems import client, poison
from safetensors.torch import save_file

from fedlora_kernels import ReadOptions, WriteOptions, aggregate
from fedlora_kernels.engine import extras
from fedlora_kernels.errors import NonFiniteError, OutputOverflowError

SHAPES = {"score.weight": (11, 7), "score.bias": (11,), "score.scale": (), "score.cube": (3, 5, 2)}


def with_extras(seed, change=None):
    state, config = client(seed)
    made = torch.Generator().manual_seed(seed)
    for name, shape in SHAPES.items():
        state[f"base_model.model.{name}"] = torch.randn(shape, generator=made)
    if change is not None:
        change(state["base_model.model.score.weight"])
    return state, {**config, "modules_to_save": ["score"]}


def values(pairs, **options):
    adapter = aggregate(pairs, weights=[1.0, 2.0, 4.0][: len(pairs)], **options).adapter
    return {name: adapter.extra(name) for name in adapter.extras}


@pytest.mark.parametrize("rule", ["strict", "first"])
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_pieces_change_no_bit(monkeypatch, rule, rows):
    pairs = [with_extras(seed) for seed in range(3)]
    whole = values(pairs, read=ReadOptions(extras=rule))
    monkeypatch.setattr(extras, "PIECE", rows * 7 * 8)
    pieces = values(pairs, read=ReadOptions(extras=rule))
    assert whole.keys() == pieces.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        assert whole[name].shape == shape
        assert torch.equal(whole[name], pieces[name])
        wanted = sum(
            w * state[f"base_model.model.{name}"].double()
            for w, (state, _) in zip((1 / 7, 2 / 7, 4 / 7), pairs, strict=True)
        )
        wanted = pairs[0][0][f"base_model.model.{name}"].double() if rule == "first" else wanted
        assert torch.allclose(whole[name].double(), wanted, atol=1e-7)


def test_files_are_read_in_pieces_too(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "PIECE", 3 * 7 * 8)
    pairs = [with_extras(seed) for seed in range(2)]
    for k, (state, config) in enumerate(pairs):
        (tmp_path / f"c{k}").mkdir()
        save_file(state, str(tmp_path / f"c{k}" / "adapter_model.safetensors"))
        (tmp_path / f"c{k}" / "adapter_config.json").write_text(json.dumps(config))
    files, memory = values([tmp_path / "c0", tmp_path / "c1"]), values(pairs)
    assert all(torch.equal(files[name], memory[name]) for name in SHAPES)


@pytest.mark.parametrize("policy", ["strict", "drop"])
def test_the_place_of_a_number_that_is_none_counts_from_the_first_row(monkeypatch, policy):
    monkeypatch.setattr(extras, "PIECE", 3 * 7 * 8)
    pairs = [with_extras(0), with_extras(1, poison(at=(7, 2))), with_extras(2)]
    found = r"client 'client_1', tensor 'score.weight': nan at index \(7, 2\)"
    if policy == "strict":
        with pytest.raises(NonFiniteError, match=found):
            aggregate(pairs)
        return
    with pytest.warns(UserWarning, match=found.replace(", tensor", " was dropped: tensor")):
        result = aggregate(pairs, policy="drop")
    assert [row["status"] for row in result.report["clients"]] == ["used", "dropped", "used"]


def test_values_beyond_the_dtype_of_the_answer_end_the_run(monkeypatch):
    monkeypatch.setattr(extras, "PIECE", 3 * 7 * 8)
    with pytest.raises(
        OutputOverflowError, match=r"tensor 'score.weight': max\|x\| is 1e\+06; torch.float16 cannot hold it"
    ):
        aggregate([with_extras(0, poison(1e6, (9, 4)))], dtype=torch.float16, write=WriteOptions(output="balanced"))
