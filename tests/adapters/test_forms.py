"""Forms: matrices in stored tensors, and stored tensors of matrices, by kind; pairs of one target at one rank."""

import dataclasses

import pytest
import torch

from fedlora_kernels.adapters.forms import Units, factor_keys, stored_shapes, stored_tensors, target_ranks, whole_units
from fedlora_kernels.adapters.model import Form, ModuleSpec, TensorSpec

M, N, R = 5, 18, 2


def module(name="x", kind="linear", n=N, **form):
    tensor = TensorSpec("", (), torch.float32)
    return ModuleSpec(name, Form(kind, name, form.pop("target", name), **form), M, n, R, 1.0, tensor, tensor)


def pair(name, rank=R, n=N, seed=0):
    made = torch.Generator().manual_seed(seed)
    return name, torch.randn(M, rank, generator=made), torch.randn(rank, n, generator=made)


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (module(), {"x.lora_A.weight": (R, N), "x.lora_B.weight": (M, R)}),
        (module(kind="embedding"), {"x.lora_embedding_A": (R, N), "x.lora_embedding_B": (M, R)}),
        (module(kind="conv1d", kernel=(6, 3)), {"x.lora_A.weight": (R, 6, 3), "x.lora_B.weight": (M, R, 1)}),
        (module(kind="conv2d", kernel=(2, 1, 9)), {"x.lora_A.weight": (R, 2, 1, 9), "x.lora_B.weight": (M, R, 1, 1)}),
        (module(kind="expert", parts=4), {"x.lora_A.weight": (4 * R, N), "x.lora_B.weight": (M, 4 * R)}),
    ],
)
def test_keys_and_shapes_of_a_kind(spec, shapes):
    assert stored_shapes(spec, R) == {f"base_model.model.{key}": shape for key, shape in shapes.items()}
    assert set(factor_keys(spec)) == set(stored_shapes(spec, R))


@pytest.mark.parametrize("kernel", [(6, 3), (2, 3, 3), (2, 1, 9, 1)])
def test_a_convolution_is_its_matrix_number_after_number(kernel):
    spec = module(kind=f"conv{len(kernel) - 1}d", kernel=kernel)
    name, B, A = pair("x")
    (_, stored_A), (_, stored_B) = stored_tensors([(name, B, A)], {"x": spec})
    assert torch.equal(spec.matrix("A", stored_A), A)
    assert torch.equal(spec.matrix("B", stored_B), B)
    assert spec.matrix("A", stored_A).data_ptr() == stored_A.data_ptr()


def test_parts_lie_one_after_another_in_A_and_interleaved_in_B():
    modules = {
        f"x[{e}]": dataclasses.replace(module(f"x[{e}]"), form=Form("expert", "x", "x.weight", part=e, parts=3))
        for e in range(3)
    }
    pairs = [pair(name, rank=1 + e, seed=e) for e, name in enumerate(modules)]
    (unit,) = whole_units(reversed(pairs), modules)
    (_, A), (_, B) = stored_tensors(unit, modules)
    assert A.shape == (9, N)
    assert B.shape == (M, 9)
    A3, B3 = A.reshape(3, 3, N), B.reshape(M, 3, 3)  # (expert, row), (column, expert)
    for e, (name, own_B, own_A) in enumerate(pairs):
        assert torch.allclose(B3[:, :, e] @ A3[e], own_B @ own_A)
        spec = dataclasses.replace(modules[name], rank=3)
        assert torch.equal(spec.matrix("A", A), A3[e])
        assert torch.equal(spec.matrix("B", B), B3[:, :, e])


def test_pairs_of_one_target_go_out_together_at_one_rank():
    modules = {
        "a": module("a"),
        "in": module("in", target="attn"),
        "out": module("out", n=7, target="attn"),
        "z": module("z"),
    }
    units = Units(modules)
    assert [len(unit) for unit in units.add(pair("a", 3))] == [1]
    assert list(units.add(pair("in", 1))) == []
    (unit,) = units.add(pair("out", 4, 7))
    assert [(name, tuple(B.shape), tuple(A.shape)) for name, B, A in unit] == [
        ("in", (M, 4), (4, N)),
        ("out", (M, 4), (4, 7)),
    ]
    assert torch.equal(unit[0][1][:, :1], pair("in", 1)[1])
    assert not unit[0][1][:, 1:].any()
    assert units.ranks == {"a": 3, "in": 4, "out": 4}
    assert target_ranks({"a": 3, "in": 1, "out": 4}, modules) == {"a": 3, "attn": 4}


def test_a_pair_that_never_comes_is_zero_and_a_target_that_never_comes_is_left_out():
    modules = {"in": module("in", target="attn"), "out": module("out", n=7, target="attn"), "z": module("z")}
    units = list(whole_units([pair("in", 2)], modules))
    assert [[name for name, _, _ in unit] for unit in units] == [["in", "out"]]
    _, B, A = units[0][1]
    assert (B.shape, A.shape) == ((M, 2), (2, 7))
    assert not B.any()
    held = Units(modules)
    assert list(held.add(pair("out", 2, 7))) == []
    ((one, two), alone) = list(held.add(pair("z")))
    assert (one[0], two[0], alone[0][0]) == ("in", "out", "z")
