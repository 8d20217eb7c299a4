"""Where modules stand: by kind and layer, for the names of PEFT, of kohya, of experts, and for any other."""

import time

import pytest

from fedlora_kernels.reporting.layers import by_kind, layer_map


def test_layers_in_the_order_of_numbers_and_kinds_without_what_they_share():
    names = [f"model.layers.{i}.{kind}" for i in (0, 1, 10, 2) for kind in ("mlp.up", "attn.q")]
    rows, columns, cells = layer_map(names)
    assert rows == ["mlp.up", "attn.q"]
    assert columns == ["0", "1", "2", "10"]
    assert cells[:2] == [(0, 0), (1, 0)]
    assert cells[4:6] == [(0, 3), (1, 3)]
    assert by_kind(names) == [f"model.layers.{i}.{kind}" for kind in ("mlp.up", "attn.q") for i in (0, 1, 2, 10)]


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        (["lora_unet_down_blocks_0_attn1", "lora_unet_down_blocks_3_attn1"], ["lora_unet_down_blocks_*_attn1"], ["0", "3"]),
        (["encoder.block.0.q", "decoder.block.0.q"], ["encoder.block.*.q", "decoder.block.*.q"], ["0"]),
        (["lm_head", "model.layers.4.q"], ["lm_head", "model.layers.*.q"], ["4", ""]),
        (["a.q", "a.v"], ["q", "v"], [""]),
        (["layers.1.experts.0.w1", "layers.1.experts.1.w1"], ["experts.0.w1", "experts.1.w1"], ["1"]),
        (["layer12.q"], ["layer12.q"], [""]),
        ([], [], []),
    ],
)  # fmt: skip
def test_names_of_all_kinds(names, rows, columns):
    found = layer_map(names)
    assert found.rows == rows
    assert found.columns == columns
    assert len(found.cells) == len(names)


def test_many_experts_share_rows():
    names = [f"layers.{i}.experts.{e}.w" for i in range(2) for e in range(60)]
    found = layer_map(names)
    assert found.rows == ["layers.*.experts.*.w"]
    assert set(found.cells) == {(0, 0), (0, 1)}


def test_many_experts_of_one_parameter_share_a_row():
    names = [
        f"model.layers.{i}.mlp.experts{inner}[{e}]"
        for i in range(3)
        for inner in (".base_layer", "")
        for e in range(40)
    ]
    found = layer_map(names)
    assert found.rows == ["mlp.experts.base_layer[*]", "mlp.experts[*]"]
    assert found.columns == ["0", "1", "2"]
    few = layer_map(names[:1] + names[40:41])
    assert len(few.rows) == 2


def test_numbers_and_kinds_of_strangers_take_no_time():
    numbers = ["9" * 5000, "10", "010", "2", "0"]
    assert layer_map([f"l.{number}.q" for number in numbers]).columns == ["0", "2", "010", "10", "9" * 5000]
    started = time.process_time()
    names = [f"module_of_its_own_kind_{k:x}z.q" for k in range(60000)]
    assert len(layer_map(names).rows) == len(names)
    assert time.process_time() - started < 3.0
