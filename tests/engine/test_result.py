"""`Result`: what a client receives, and other thresholds from one decomposition."""

import json
import re

import numpy as np
import pytest
import torch
from adapter_problems import (
    FIRST,
    PREFIX,
    SHAPES,
    changed,
    client,
    clients,
    config,
    distance,
    products,
    weighted,
    without,
)

from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.errors import InputError, OutputOverflowError
from fedlora_kernels.linalg.rules import (
    Absolute,
    Budget,
    Energy,
    Frobenius,
    Rank,
    SingularValueRatio,
    SingularValueSum,
)

ALL = Energy(1.0)


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_the_clients_own_scale_gives_back_the_product(tmp_path, place):
    pairs = clients((8, 8, 4), dtype=torch.float64)
    pairs.append(client(7, rank=6, alpha=5, use_rslora=True, dtype=torch.float64))
    result = aggregate(pairs, out=None if place == "memory" else tmp_path / "out")
    for k, (_, settings) in enumerate(pairs):
        sent = result.for_client(f"client_{k}")
        r = settings["r"]
        own = settings["lora_alpha"] / (r**0.5 if settings.get("use_rslora") else r)
        assert all(spec.scale == pytest.approx(own, rel=1e-15) for spec in sent.modules.values())
        assert distance(products(sent), products(result.adapter)) < 1e-14
        # bare tensors, loaded into a model with the client's own alpha and rank
        pair = result.adapter[FIRST]
        torch.testing.assert_close(sent[FIRST].B * own, pair.B, rtol=1e-15, atol=0)
        assert not sent.config.get("use_rslora")


def test_a_client_is_named_or_counted():
    result = aggregate({"a": client(0), "b": client(1, alpha=3)})
    assert result.for_client(1).label == result.for_client("b").label == result.for_client(np.int64(1)).label == "b"
    for wrong in ("c", 2, -1, None, True, 1.0, np.True_):
        with pytest.raises(InputError, match=r"no client.*clients: a, b"):
            result.for_client(wrong)


def test_scale_one_is_the_baked_form():
    result = aggregate(clients())
    sent = result.for_client(0, scale=1.0)
    for name in SHAPES:
        assert torch.equal(sent[name].B, result.adapter[name].B)
        assert sent[name].scale == 1.0
    with pytest.raises(InputError, match="scale"):
        result.for_client(0, scale=2.0)


def test_rank_cuts_to_the_best_approximation():
    pairs = clients((8, 8, 8), dtype=torch.float64)
    result = aggregate(pairs, rule=ALL)
    sent = products(result.for_client(1, rank=3))
    for name, D in weighted(pairs).items():
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        assert float((sent[name] - U[:, :3] * S[:3] @ Vh[:3]).norm() / D.norm()) < 1e-12


def test_rank_pads_so_that_the_padding_can_be_trained():
    result = aggregate(clients((8, 8, 8)), rule=Rank(3))
    sent = result.for_client(0, rank=8)
    assert {spec.rank for spec in sent.modules.values()} == {8}
    assert {spec.scale for spec in sent.modules.values()} == {1.0}
    assert distance(products(sent), products(result.adapter)) < 1e-6
    pair = sent[FIRST]
    assert not pair.B[:, 3:].any()
    gradient = torch.randn(37, 23, generator=torch.Generator().manual_seed(1))
    assert ((gradient @ pair.A.T)[:, 3:].norm(dim=0) > 0).all()
    assert float(pair.A[3:].abs().max()) <= 23**-0.5
    again = result.for_client(0, rank=8)
    assert torch.equal(again[FIRST].A, pair.A)
    assert not torch.equal(sent["model.layers.1.self_attn.q_proj"].A[3:], pair.A[3:])


def test_padding_depends_on_seed_and_round():
    rows = [
        aggregate(clients(), rule=Rank(1), **key).for_client(0, rank=2)[FIRST].A[1]
        for key in ({}, {"seed": 1}, {"round": 1})
    ]
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_rank_of_any_integer_type():
    assert {spec.rank for spec in aggregate(clients()).for_client(0, rank=np.int32(3)).modules.values()} == {3}


def test_results_show_themselves_in_one_line():
    result = aggregate(clients(), rule=Rank(3))
    assert re.fullmatch(r"Result\(florist, Rank\(3\), 4 modules, total rank 12, error 0\.\d+\)", repr(result))
    assert repr(aggregate(clients(), "zero_pad")).startswith("Result(zero_pad, 4 modules, total rank 20, error ")


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_a_wrong_rank_is_refused(rank):
    with pytest.raises(InputError, match="rank"):
        aggregate(clients()).for_client(0, rank=rank)


def test_every_client_of_a_mixed_round_gets_its_own_rank():
    """Catches one object handed to all clients."""
    result = aggregate(clients((4, 2, 5)), "hetlora")
    assert [result.for_client(k).modules[FIRST].rank for k in range(3)] == [4, 2, 5]


def test_per_module_ranks_and_scales_of_a_client():
    pattern = {FIRST: 2}
    state, _ = client(0, rank=4, dtype=torch.float64)
    for key in state:
        if FIRST in key:
            state[key] = (state[key][:2] if "lora_A" in key else state[key][:, :2]).contiguous()
    odd = (state, config(4, 8, rank_pattern=pattern, alpha_pattern={FIRST: 3}))
    result = aggregate([odd, client(1, dtype=torch.float64)])
    sent = result.for_client(0)
    assert sent.modules[FIRST].scale == pytest.approx(1.5)
    assert sent.modules["model.layers.0.mlp.down_proj"].scale == pytest.approx(2.0)
    assert distance(products(sent), products(result.adapter)) < 1e-14


def test_a_client_receives_the_modules_it_has():
    pairs = [client(0), without(client(1), FIRST)]
    result = aggregate(pairs, read=ReadOptions(missing="zero"))
    assert FIRST not in result.for_client(1)
    assert FIRST in result.for_client(1, scale=1.0)
    assert FIRST in result.for_client(0)


def test_a_client_of_scale_zero_needs_the_baked_form():
    with pytest.warns(UserWarning, match="lora_alpha is 0"):
        result = aggregate([client(0), client(1, alpha=0)])
    with pytest.raises(InputError, match=r"client 'client_1'.*scale is 0"):
        result.for_client(1)
    result.for_client(1, scale=1.0)


def test_a_dtype_too_narrow_for_the_division_is_an_error():
    pairs = [client(0, alpha=1e6), client(1, alpha=1e-6)]
    result = aggregate(pairs, dtype="float16", rule=Rank(1), weights=[1e-6, 1], normalize=False)
    with pytest.raises(OutputOverflowError, match="client 'client_1'"):
        result.for_client(1)


def test_extras_go_along_in_the_clients_scale():
    key = f"{FIRST}.lora_B.bias"
    pairs = []
    for k in range(2):
        state, settings = client(k, alpha=8 * (k + 1), lora_bias=True, modules_to_save=["score"])
        state = {
            **state,
            PREFIX + key: torch.full((37,), 1.0 + k),
            f"{PREFIX}score.weight": torch.full((2, 3), 5.0 + k),
        }
        pairs.append((state, settings))
    result = aggregate(pairs)
    sent = result.for_client(1)
    torch.testing.assert_close(sent.extra(key) * 4.0, result.adapter.extra(key))
    assert torch.equal(sent.extra("score.weight"), torch.full((2, 3), 5.5))


def test_a_clients_adapter_can_be_saved_and_aggregated(tmp_path):
    result = aggregate(clients((4, 4, 4)))
    result.for_client(0, rank=4).save(tmp_path / "next")
    again = aggregate([tmp_path / "next"], rule=ALL)
    assert distance(products(again.adapter), products(result.for_client(0, rank=4))) < 1e-6


RULES = [
    Energy(0.5),
    Energy(0.9),
    Energy(0.999),
    ALL,
    Frobenius(0.9),
    Rank(1),
    Rank(4),
    Rank(400),
    SingularValueSum(0.7),
    SingularValueRatio(3.0),
    Absolute(30.0),
    Energy(0.99).capped(3),
    Budget(5000),
    Budget("15kB").capped(6),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_another_rule_from_the_same_decomposition(tmp_path, rule, place):
    pairs = clients((8, 8, 4), dtype=torch.float64)
    full = aggregate(pairs, rule=ALL, out=None if place == "memory" else tmp_path / "out")
    cut, direct = full.at(rule), aggregate(pairs, rule=rule)
    assert distance(products(cut.adapter), products(direct.adapter)) < 1e-12
    assert cut.report["method"]["rule"] == direct.report["method"]["rule"] == str(rule)
    assert dict(cut.adapter.config) == dict(direct.adapter.config)
    for found, wanted in zip(cut.report["modules"], direct.report["modules"], strict=True):
        assert found["rank"] == wanted["rank"]
        assert found["error"] == pytest.approx(wanted["error"], rel=1e-9, abs=1e-12)
        assert found["error_bound"] == pytest.approx(wanted["error_bound"], rel=1e-3, abs=1e-7)
        assert found["rho"] == pytest.approx(wanted["rho"], rel=1e-9)
        assert found["singular_values"] == pytest.approx(wanted["singular_values"], rel=1e-12)
    for key in ("rank", "parameters", "bytes"):
        assert cut.report["totals"][key] == direct.report["totals"][key]
    json.dumps(cut.report, allow_nan=False)


def test_at_is_monotone_and_leaves_the_first_result_alone():
    full = aggregate(clients((8, 8, 4)), rule=ALL)
    ranks = [full.at(Energy(t)).report["totals"]["rank"] for t in (0.1, 0.5, 0.9, 0.99, 1.0)]
    assert ranks == sorted(ranks)
    assert ranks[-1] == full.report["totals"]["rank"]
    assert full.report["method"]["rule"] == "Energy(1.0)"


def test_at_of_a_zero_module_keeps_the_unit_row():
    state, settings = client()
    zero = {k: torch.zeros_like(v) if FIRST in k else v for k, v in state.items()}, settings
    for write in (WriteOptions(), WriteOptions(drop_zero=True)):
        cut = aggregate([zero], rule=ALL, write=write).at(Energy(0.5))
        assert (FIRST in cut.adapter) != write.drop_zero
        assert cut.report["modules"][list(SHAPES).index(FIRST)]["rank"] == int(not write.drop_zero)


def test_at_cuts_the_padding_of_a_uniform_rank():
    pairs = clients((8, 8, 4))
    padded = aggregate(pairs, rule=ALL, write=WriteOptions(uniform_rank=True))
    plain = aggregate(pairs, rule=ALL)
    assert distance(products(padded.at(Energy(0.9)).adapter), products(plain.at(Energy(0.9)).adapter)) == 0.0


@pytest.mark.parametrize(
    ("method", "options"), [("florist", {"rule": Energy(0.9)}), ("florist", {"rule": ALL.capped(3)}), ("zero_pad", {})]
)
def test_at_needs_the_whole_spectrum(method, options):
    with pytest.raises(InputError, match=r"Energy\(1\.0\)"):
        aggregate(clients(), method, **options).at(Energy(0.5))


@pytest.mark.parametrize("rule", [0.5, None])
def test_at_takes_a_rank_rule(rule):
    with pytest.raises(InputError, match="rank rule"):
        aggregate(clients(), rule=ALL).at(rule)


def test_what_a_client_receives_follows_the_cut():
    cut = aggregate(clients((8, 8, 4)), rule=ALL).at(Rank(2))
    assert cut.for_client(0).modules[FIRST].rank == 2


@pytest.mark.parametrize("size", [1e-90, 1e77])
def test_at_says_where_an_energy_leaves_float64(size):
    pairs = [changed(changed(client(k, dtype=torch.float64), part="B", change=lambda x: x * size), "A", lambda x: x * size)
             for k in range(2)]  # fmt: skip
    full = aggregate(pairs, rule=ALL)
    with pytest.raises(InputError, match=f"module '{re.escape(FIRST)}'.* float64"):
        full.at(Rank(2))


def test_updates_too_small_to_square_still_have_an_error_bound():
    tiny = {"q": (7, 5)}
    pairs = [client(k, dtype=torch.float64, shapes=tiny) for k in range(2)]
    pairs = [
        ({key: x * 1e-90 for key, x in state.items()}, {**settings, "target_modules": ["q"]})
        for state, settings in pairs
    ]
    report = aggregate(pairs, rule=Rank(1)).report
    assert report["totals"]["error"] == report["modules"][0]["error"] > 0.1
    assert report["totals"]["error_bound"] == report["modules"][0]["error_bound"]
