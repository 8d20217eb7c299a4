"""Layers of a model, told by names."""

import numpy as np
import pytest

from fedlora_kernels.methods.layers import layer_number, layers_of


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("model.layers.11.self_attn.q_proj", 11),
        ("model.layers.2.mlp.experts.7.w1", 2),
        ("t5.encoder.block.3.layer.0.q", 3),
        ("conv2d.layers.4", 4),
        ("layers.007.q", 7),
        ("lora_te_text_model_encoder_layers_5_self_attn_q_proj", 5),
        ("classifier.fc_1", None),
        ("lm_head", None),
        ("layers.9999999999999999999999.q", None),
        ("layers.².q", None),
        ("", None),
    ],
)
def test_the_layer_is_the_first_integer_of_the_path(module, number):
    assert layer_number(module) == number


def test_layers_run_from_shallow_to_deep_whatever_the_order_of_modules():
    modules = ("head", "layers.10.q", "layers.2.q", "embed", "layers.10.v", "layers.0.q")
    names, layer = layers_of(modules)
    assert names == ("0", "2", "10", "head", "embed")
    np.testing.assert_array_equal(layer, [3, 2, 1, 4, 2, 0])


def test_no_modules_are_no_layers():
    names, layer = layers_of(())
    assert names == ()
    assert layer.shape == (0,)
