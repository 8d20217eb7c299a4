"""Weighted merges against PEFT's own ``add_weighted_adapter(combination_type="svd")``, by effective update, in a small model."""

import warnings

import peft
import pytest
import torch

import fedlora_kernels as fk

SHAPES = {"q_proj": (23, 17), "o_proj": (11, 23)}
RANKS = {"first": (4, 8), "second": (6, 3), "third": (2, 10)}
"""Rank and alpha of each adapter."""


@pytest.fixture(params=[False, True], ids=["plain", "rslora"])
def model(request):
    """A model with three trained adapters of different ranks and scales, beside those adapters as pairs for us."""
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({name: torch.nn.Linear(n, m, bias=False) for name, (m, n) in SHAPES.items()})
    made, pairs = None, {}
    for name, (rank, alpha) in RANKS.items():
        settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(SHAPES), use_rslora=request.param)
        if made is None:
            made = peft.get_peft_model(base, settings, adapter_name=name)
        else:
            made.add_adapter(name, settings)
        for key, parameter in made.named_parameters():
            if f".{name}." in key:
                parameter.data = torch.randn(parameter.shape)
        pairs[name] = peft.get_peft_model_state_dict(made, adapter_name=name), settings.to_dict()
    return made, pairs, request.param


def updates(model, adapter):
    """What an adapter adds to each weight, by module, float64."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach().double()
        for name, layer in layers.items()
        if adapter in layer.lora_A
    }


def distance(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def best(D, rank):
    """The best approximation of a rank, dense."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, -1.0, 0.5), (0.2, 0.3, 0.5)], ids=str)
def test_our_merge_is_pefts_where_peft_is_right(tmp_path, model, weights, rank):
    made, pairs, rslora = model
    made.add_weighted_adapter(list(RANKS), list(weights), "merged", combination_type="svd", svd_rank=rank)
    fk.aggregate(pairs, weights=weights, normalize=False, rule=fk.Rank(rank), out=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that it misses
        made.load_adapter(str(tmp_path / "out"), "ours")
    ours, theirs = updates(made, "ours"), updates(made, "merged")
    parts = {name: updates(made, name) for name in RANKS}
    wanted = {
        module: best(sum(w * parts[name][module] for w, name in zip(weights, RANKS, strict=True)), rank)
        for module in SHAPES
    }
    assert distance(ours, wanted) < 1e-5
    if not rslora:
        assert distance(ours, theirs) < 1e-5
    else:
        # the merged configuration inherits use_rslora, so PEFT's own result comes out larger by the root of its rank
        assert distance({name: D / rank**0.5 for name, D in theirs.items()}, ours) < 1e-5
    made.set_adapter("ours")
    x = torch.randn(5, 17)
    layer = made.base_model.model["q_proj"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ wanted["q_proj"].float().T, rtol=1e-4, atol=1e-4)


def test_resized_adapters_load_into_peft(tmp_path, model):
    made, pairs, _ = model
    for name, pair in pairs.items():
        fk.resize(pair, rule=fk.Energy(0.7), out=tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.load_adapter(str(tmp_path / name), f"small_{name}")
        report = fk.resize(pair, rule=fk.Energy(0.7)).report["modules"]
        ranks = {row["name"]: row["rank"] for row in report}
        wanted = {module: best(D, ranks[module]) for module, D in updates(made, name).items()}
        assert distance(updates(made, f"small_{name}"), wanted) < 1e-5
