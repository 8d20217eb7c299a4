"""`resize` of every kind of layer: the best update of the ranks chosen, and a file of the size that a budget gives it."""

import kind_problems as kinds
import pytest
import torch
from safetensors.torch import load_file

import fedlora_kernels as fk


def written(folder):
    """Dense updates of a written folder, every scale of which is 1, and the bytes of its factors."""
    state = load_file(folder / "adapter_model.safetensors")
    return kinds.dense(state, 1.0), sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def best(D, rank):
    """The best approximation of a rank of the matrix that an update is, in the shape of the update."""
    U, S, Vh = torch.linalg.svd(D.flatten(1), full_matrices=False)
    return (U[:, :rank] * S[:rank] @ Vh[:rank]).reshape(D.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_lost_of_any_kind_at_full_energy(tmp_path, dtype):
    pair = kinds.client(rank=3, dtype=dtype)
    fk.resize(pair, rule=fk.Energy(1.0), out=tmp_path / "out")
    found, _ = written(tmp_path / "out")
    assert kinds.distance(found, kinds.updates(pair)) < 1e-6


@pytest.mark.parametrize("rule", [fk.Rank(2), fk.Energy(0.7), fk.Budget(2500), fk.Budget(4000).capped(2)], ids=str)
@pytest.mark.parametrize("uniform", [False, True])
def test_the_best_update_of_every_kind(tmp_path, rule, uniform):
    pair = kinds.client(rank=5, alpha=9)
    write = fk.WriteOptions(uniform_rank=uniform)
    result = fk.resize(pair, rule=rule, write=write, out=tmp_path / "out")
    found, size = written(tmp_path / "out")
    ranks = {row["name"]: row["rank"] for row in result.report["modules"]}
    ranks["lm_head"] = ranks["model.embed_tokens"]  # tied
    assert found.keys() == kinds.updates(pair).keys()
    for name, D in kinds.updates(pair).items():
        assert float((found[name] - best(D, ranks[name])).norm() / D.norm()) < 1e-6
    assert size == result.report["totals"]["bytes"]
    if isinstance(rule, fk.Budget):
        assert size <= rule.nbytes
