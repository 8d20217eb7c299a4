"""save_adapter and pad_to_uniform: the update survives, the scale is in the factors."""

import json

import pytest
import torch
from adapter_files import config, dense, folder, one, same_updates, state
from safetensors import safe_open

from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.adapters.writer import pad_to_uniform, verify_adapter
from fedlora_kernels.errors import InputError, OutputOverflowError, RunError


def test_write_and_read_is_the_identity_with_scale_one(tmp_path):
    before = open_adapter((state(), config(use_rslora=True, alpha_pattern={"layers.1.q_proj": 5})))
    before.save(tmp_path / "out")
    after = open_adapter(tmp_path / "out")
    assert same_updates(before, after, 1e-6)
    assert list(after) == list(before)
    assert {spec.scale for spec in after.modules.values()} == {1.0}
    assert "use_rslora" not in after.config
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept_where_all_scales_are_one(tmp_path, dtype):
    tensors = state(dtype=dtype)
    open_adapter((tensors, config(lora_alpha=3, alpha_pattern={"v_proj": 2}))).save(tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("dtype", "written"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_half_factors_are_widened_where_a_scale_is_folded_in(tmp_path, dtype, written):
    before = open_adapter((state(dtype=dtype), config()))
    before.save(tmp_path / "out")
    after = open_adapter(tmp_path / "out")
    assert after["layers.0.q_proj"].B.dtype == written
    assert same_updates(before, after, 1e-6)


def test_extra_tensors_keep_their_values_and_lora_bias_takes_the_scale(tmp_path):
    tensors, settings = one(lora_alpha=6, lora_bias=True, bias="lora_only", modules_to_save=["score", "unused"])
    tensors |= {
        "q.lora_B.bias": torch.arange(5.0),
        "q.base_layer.bias": torch.ones(5),
        "score.weight": torch.ones(3, 5),
    }
    open_adapter((tensors, settings)).save(tmp_path / "out")
    after = open_adapter(tmp_path / "out")
    assert torch.equal(after.extra("q.lora_B.bias"), 3 * torch.arange(5.0))
    assert torch.equal(after.extra("q.base_layer.bias"), torch.ones(5))
    assert torch.equal(after.extra("score.weight"), torch.ones(3, 5))
    assert after.config["modules_to_save"] == ["score"]
    assert (after.config["bias"], after.config["lora_bias"]) == ("lora_only", True)


def test_a_scale_that_overflows_is_named_and_nothing_is_written(tmp_path):
    tensors, settings = one(lora_alpha=1e38)
    with pytest.raises(OutputOverflowError, match="module 'q': times its scale 5e\\+37"):
        open_adapter(({key: 1e3 * tensor for key, tensor in tensors.items()}, settings)).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_needs_overwrite(tmp_path):
    made = folder(tmp_path / "out")
    adapter = open_adapter(one())
    with pytest.raises(InputError, match="exists; replace it with overwrite"):
        adapter.save(made)
    adapter.save(made, overwrite=True)
    assert list(open_adapter(made)) == ["q"]


def test_verify_finds_wrong_scales_and_wrong_ranks(tmp_path):
    open_adapter((state(), config())).save(tmp_path / "out")
    ranks = {"layers.0.q_proj": 3, "layers.0.v_proj": 2, "layers.1.q_proj": 3}
    verify_adapter(tmp_path / "out", ranks)
    with pytest.raises(RunError, match="differ from those written"):
        verify_adapter(tmp_path / "out", {**ranks, "layers.0.v_proj": 3})
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 4}))
    with pytest.raises(RunError, match=r"reads back with scale 1.3333"):
        verify_adapter(tmp_path / "out", ranks)


@pytest.mark.parametrize("fill", ["zero", "random"])
def test_padding_changes_ranks_and_not_the_update(tmp_path, fill):
    before = open_adapter((state(), config()))
    before.save(tmp_path / "out")
    assert pad_to_uniform(tmp_path / "out", fill=fill) == 3
    after = open_adapter(tmp_path / "out")
    assert same_updates(before, after)
    assert {spec.rank for spec in after.modules.values()} == {3}
    assert "rank_pattern" not in after.config
    pair = after["layers.0.v_proj"]
    assert pair.B[:, 2:].abs().max() == 0
    assert (pair.A[2:].abs().min() > 0) == (fill == "random")
    assert pair.A[2:].abs().max() <= 13**-0.5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_padding_to_a_given_rank_and_never_below(tmp_path):
    open_adapter((state(), config())).save(tmp_path / "out")
    with pytest.raises(InputError, match="rank 2 is below the largest rank 3"):
        pad_to_uniform(tmp_path / "out", 2)
    before = dense(open_adapter(tmp_path / "out"))
    assert pad_to_uniform(tmp_path / "out", 8, "random", seed=5, round=2) == 8
    after = open_adapter(tmp_path / "out")
    assert after["layers.0.q_proj"].A.shape == (8, 7)
    assert all(torch.allclose(dense(after)[name], before[name]) for name in before)


def test_metadata_is_kept(tmp_path):
    adapter = open_adapter(folder(tmp_path / "c"))
    object.__setattr__(adapter, "metadata", {"fedlora.method": "florist"})
    adapter.save(tmp_path / "out")
    pad_to_uniform(tmp_path / "out", 4)
    assert open_adapter(tmp_path / "out").metadata == {"format": "pt", "fedlora.method": "florist"}
