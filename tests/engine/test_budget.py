"""`Budget`: one size over all modules, against a greedy by the definition; what is held until then; files of the size promised."""

import math
import random
from fractions import Fraction

import pytest
import torch
from adapter_problems import FIRST, PREFIX, SHAPES, client, clients, config, distance, products, weighted
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_aggregate_streaming import LAYERS, counted

from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.engine.budget import Share
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import Budget, Energy

ALL = Energy(1.0)
UNIFORM, DROPPING = WriteOptions(uniform_rank=True), WriteOptions(drop_zero=True)


def by_definition(spectra, costs, size, keep_all=True, cap=None):
    """Ranks of the greedy, in exact arithmetic, one component at a time."""
    ranks = {name: int(keep_all) for name in costs}
    room = size - sum(ranks[name] * costs[name] for name in costs)
    assert room >= 0
    closed = set()
    while True:
        best = None
        for name in costs:
            if name not in closed and ranks[name] < min(len(spectra[name]), cap or len(spectra[name])):
                worth = Fraction(spectra[name][ranks[name]]) ** 2 / costs[name]
                if best is None or worth > best[0]:
                    best = (worth, name)
        if best is None:
            return ranks
        name = best[1]
        if costs[name] <= room:
            ranks[name] += 1
            room -= costs[name]
        else:
            closed.add(name)


def jointly(spectra, costs, targets, size, keep_all=True, cap=None):
    """The same where modules of one target are taken together: their components count as one, of all their squares and costs."""
    members = {}
    for name in costs:
        members.setdefault(targets[name], []).append(name)
    summed = {}
    for target, names in members.items():
        longest = max(len(spectra[name]) for name in names)
        padded = [[*spectra[name], *[0.0] * (longest - len(spectra[name]))] for name in names]
        summed[target] = [math.sqrt(math.fsum(s * s for s in column)) for column in zip(*padded, strict=True)]
    prices = {target: sum(costs[name] for name in names) for target, names in members.items()}
    ranks = by_definition(summed, prices, size, keep_all, cap)
    return {name: max(int(keep_all), min(ranks[targets[name]], len(spectra[name]))) for name in costs}


def spectra_of(numbers):
    return {f"m{i}": sorted(values, reverse=True) for i, values in enumerate(numbers)}


few = st.sampled_from([1.0, 2.0, 3.0, 4.0, 6.0])
wide = st.floats(min_value=1e-300, max_value=1e300)
problem = st.lists(
    st.tuples(st.integers(1, 30), st.one_of(st.lists(few, max_size=6), st.lists(wide, max_size=6))),
    min_size=1,
    max_size=6,
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(problem, st.integers(0, 400), st.booleans(), st.sampled_from([None, 1, 2, 4]))
@example([(4, [2.0, 1.0]), (16, [4.0, 2.0])], 40, True, None)  # ties between shapes: 1/4 = 4/16
@example([(5, [1e-200, 1e-201]), (5, [1e-190])], 10, False, None)  # squares that underflow
def test_ranks_are_those_of_the_definition(modules, room, keep_all, cap):
    spectra = spectra_of([values for _, values in modules])
    costs = {f"m{i}": cost for i, (cost, _) in enumerate(modules)}
    size = room + (sum(costs.values()) if keep_all else max(costs.values()))
    share = Share("Budget", size, costs, keep_all=keep_all, cap=cap)
    found = share.ranks(spectra)
    assert found == by_definition(spectra, costs, size, keep_all, cap)
    assert sum(found[name] * costs[name] for name in costs) <= size


@settings(derandomize=True, deadline=None, max_examples=200)
@given(problem, st.integers(0, 400), st.booleans(), st.integers(1, 4), st.integers(0, 2**32))
def test_modules_of_one_target_are_taken_together(modules, room, keep_all, count, seed):
    made = random.Random(seed)
    # irrational weights: sums of squares do not tie
    spectra = spectra_of([[s * (1.0 + made.random()) for s in values if 1e-3 <= s <= 1e3] for _, values in modules])
    costs = {f"m{i}": cost for i, (cost, _) in enumerate(modules)}
    targets = {name: f"t{i // count}" for i, name in enumerate(costs)}
    size = room + sum(costs.values())
    share = Share("Budget", size, costs, keep_all=keep_all, targets=targets)
    assert share.ranks(spectra) == jointly(spectra, costs, targets, size, keep_all)
    seen = {}
    for name in costs:
        seen[name] = spectra[name]
        assert all(min(share.ranks(spectra)[known], len(spectra[known])) <= share.most(seen)[known] for known in seen)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(problem, st.integers(0, 400), st.booleans(), st.booleans())
@example([(7, [1.0]), (3, [1.0]), (10, [9.0, 9.0])], 3, False, False)  # room left by a dear one goes to a cheap one
def test_no_module_exceeds_what_is_held_of_it_early(modules, room, keep_all, uniform):
    spectra = spectra_of([values for _, values in modules])
    costs = {f"m{i}": cost for i, (cost, _) in enumerate(modules)}
    size = room + sum(costs.values())
    share = Share("Budget", size, costs, keep_all=keep_all, uniform=uniform)
    ranks = share.ranks(spectra)
    seen = {}
    for name in costs:
        seen[name] = spectra[name]
        most = share.most(seen)
        assert all(min(ranks[known], len(spectra[known])) <= most[known] for known in seen)


def test_what_is_held_shrinks_while_modules_pass_by():
    names = [f"m{i}" for i in range(50)]
    spectra = {name: [1.0 / (i + 1) for i in range(64)] for name in names}
    share = Share("Budget", 50 * 8 * 10, dict.fromkeys(names, 10))
    held, seen = 0, {}
    for name in names:
        seen[name] = spectra[name]
        held += min(64, share.most(seen)[name])
    assert sum(share.ranks(spectra).values()) == 50 * 8
    assert held < 1600 < 50 * 64


def test_ties_go_to_the_module_that_comes_first():
    spectra = {"a": [4.0, 1.0], "b": [4.0, 1.0], "c": [8.0, 2.0]}
    costs = {"a": 10, "b": 10, "c": 40}  # 1/10 = 1/10 = 4/40
    assert Share("B", 60 + 10, costs).ranks(spectra) == {"a": 2, "b": 1, "c": 1}
    assert Share("B", 60 + 20, costs).ranks(spectra) == {"a": 2, "b": 2, "c": 1}
    assert Share("B", 60 + 59, costs).ranks(spectra) == {"a": 2, "b": 2, "c": 1}
    assert Share("B", 60 + 60, costs).ranks(spectra) == {"a": 2, "b": 2, "c": 2}


def test_an_exact_hit_counts_and_a_byte_less_does_not():
    spectra, costs = {"a": [3.0, 2.0, 1.0]}, {"a": 7}
    assert [Share("B", size, costs).ranks(spectra)["a"] for size in (7, 13, 14, 20, 21, 99)] == [1, 1, 2, 2, 3, 3]


def test_one_rank_for_all_is_paid_by_all():
    spectra, costs = {"a": [9.0, 8.0, 7.0], "b": [1.0], "c": []}, {"a": 5, "b": 2, "c": 3}
    for size, cap, ranks in [(10, None, (1, 1, 1)), (29, None, (2, 1, 1)), (30, None, (3, 1, 1)), (99, 2, (2, 1, 1))]:
        assert tuple(Share("B", size, costs, uniform=True, cap=cap).ranks(spectra).values()) == ranks
    assert Share("B", 14, costs, keep_all=False, uniform=True).ranks(spectra) == {"a": 2, "b": 1, "c": 0}


def size_of(folder):
    """Bytes of the factors in a written file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if ".lora_" in key)


def attention_and_tied_head():
    """A MultiheadAttention, whose two pairs are written at one rank, and an embedding whose head is written as well."""
    made = torch.Generator().manual_seed(0)
    shapes = {
        "attn.lora_A.weight": (6, 23),
        "attn.lora_B.weight": (69, 6),
        "attn.base_layer.out_proj.lora_A.weight": (6, 23),
        "attn.base_layer.out_proj.lora_B.weight": (23, 6),
        "model.embed_tokens.lora_embedding_A": (6, 50),
        "model.embed_tokens.lora_embedding_B": (11, 6),
    }
    state = {f"{PREFIX}{key}": torch.randn(*shape, generator=made) for key, shape in shapes.items()}
    for head, embedding in (("A", "B"), ("B", "A")):
        tensor = state[f"{PREFIX}model.embed_tokens.lora_embedding_{embedding}"].T.contiguous()
        state[f"{PREFIX}lm_head.lora_{head}.weight"] = tensor
    return state, config(6, 8, ensure_weight_tying=True, target_modules=["attn", "embed_tokens"])


@pytest.mark.parametrize("size", [1600, 3000, 4444])
def test_what_is_written_beside_a_pair_is_paid_for(tmp_path, size):
    result = aggregate([attention_and_tied_head()], rule=Budget(size), out=tmp_path / "out")
    assert result.adapter.modules["model.embed_tokens"].form.tied == "lm_head"
    assert size_of(tmp_path / "out") == result.report["totals"]["bytes"] <= size
    ranks = {row["name"]: row["rank"] for row in result.report["modules"]}
    assert ranks["attn"] == ranks["attn.base_layer.out_proj"]
    assert size - size_of(tmp_path / "out") < 4 * (92 + 46)
    cut = aggregate([attention_and_tied_head()], rule=ALL).at(Budget(size))
    assert cut.report["totals"]["bytes"] == result.report["totals"]["bytes"]
    assert {row["name"]: row["rank"] for row in cut.report["modules"]} == ranks


def test_an_initialisation_that_is_kept_keeps_its_ranks():
    pair = client(init_lora_weights="pissa")
    read = ReadOptions(init="keep")
    with pytest.raises(InputError, match=r"Budget\('1MB'\): init='keep' keeps the ranks"):
        aggregate([pair], rule=Budget("1MB"), read=read)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("write", [WriteOptions(), UNIFORM, DROPPING, WriteOptions(output="balanced")], ids=str)
@pytest.mark.parametrize("size", [3000, 5120, "9kB", "20KiB"])
def test_the_file_has_the_size(tmp_path, dtype, write, size):
    pairs, budget = clients((8, 8, 4)), Budget(size)
    result = aggregate(pairs, rule=budget, dtype=dtype, write=write, out=tmp_path / "out")
    totals, itemsize = result.report["totals"], getattr(torch, dtype).itemsize
    found = size_of(tmp_path / "out")
    assert found == totals["bytes"] == totals["parameters"] * itemsize <= budget.nbytes
    # nothing that is left out would have fitted
    if not write.uniform_rank:
        rest = [sum(SHAPES[row["name"]]) for row in result.report["modules"] if row["rank"] < row["numerical_rank"]]
        assert found + itemsize * min(rest, default=budget.nbytes) > budget.nbytes
    else:
        assert len({spec.rank for spec in result.adapter.modules.values()}) == 1


@pytest.mark.parametrize("size", [2200, 8000, 20000])
@pytest.mark.parametrize("cap", [None, 5])
def test_the_answer_is_the_best_approximation_of_its_ranks(size, cap):
    pairs = clients((8, 8, 4), dtype=torch.float64)
    budget = Budget(size) if cap is None else Budget(size).capped(cap)
    result = aggregate(pairs, rule=budget)
    dense = {name: torch.linalg.svd(D, full_matrices=False) for name, D in weighted(pairs).items()}
    spectra = {name: S[:20].tolist() for name, (_, S, _) in dense.items()}
    ranks = by_definition(spectra, {name: 8 * sum(shape) for name, shape in SHAPES.items()}, size, cap=cap)
    rows = {row["name"]: row for row in result.report["modules"]}
    for name, (U, S, Vh) in dense.items():
        p = ranks[name]
        assert rows[name]["rank"] == p
        best = U[:, :p] * S[:p] @ Vh[:p]
        assert float((products(result.adapter)[name] - best).norm() / S.norm()) < 1e-12
        assert rows[name]["error"] == pytest.approx(float(S[p:].norm() / S.norm()), rel=1e-9)
        assert rows[name]["error_bound"] >= rows[name]["error"]
        assert rows[name]["singular_values"] == pytest.approx(S[:p].tolist(), rel=1e-12)
    assert result.report["method"]["rule"] == str(budget) == result.adapter.metadata["fedlora.rule"]


@pytest.mark.parametrize("memory", ["1GiB", "20kB", 1])
def test_every_tensor_is_read_once(memory):
    pairs = clients(shapes=LAYERS)
    adapters = counted(pairs)
    result = aggregate(adapters, rule=Budget("30kB"), memory=memory)
    assert result.report["passes"] == 1
    for adapter in adapters:
        assert set(adapter.source.reads.values()) == {1}
    whole = aggregate(pairs, rule=Budget("30kB"))
    assert [row["rank"] for row in result.report["modules"]] == [row["rank"] for row in whole.report["modules"]]
    assert distance(products(result.adapter), products(whole.adapter)) < 1e-6


def zeroed(pair, module):
    state, own = pair
    return {key: torch.zeros_like(value) if module in key else value for key, value in state.items()}, own


def test_a_zero_module_costs_one_component_or_is_left_out():
    pair = zeroed(client(dtype=torch.float64), FIRST)
    costs = {name: 8 * sum(shape) for name, shape in SHAPES.items()}
    least = sum(costs.values())
    result = aggregate([pair], rule=Budget(least))
    assert [row["rank"] for row in result.report["modules"]] == [1, 1, 1, 1]
    assert not result.adapter[FIRST].B.any()
    with pytest.raises(InputError, match=rf"{least - 1} bytes for 4 modules; at least {least} needed.*drop_zero=True"):
        aggregate([pair], rule=Budget(least - 1))
    dropped = aggregate([pair], rule=Budget(4 * (least - costs[FIRST])), write=DROPPING)
    assert [row["rank"] for row in dropped.report["modules"]] == [0, 4, 4, 4]
    write = WriteOptions(uniform_rank=True, drop_zero=True)
    uniform = aggregate([pair], rule=Budget(3 * (least - costs[FIRST])), write=write)
    assert [row["rank"] for row in uniform.report["modules"]] == [0, 3, 3, 3]


def test_modules_that_gain_least_are_left_out_with_drop_zero():
    state, own = client(lora_bias=True)
    state = {key: x * 1e-3 if FIRST in key else x for key, x in state.items()}
    state = {
        **state,
        **{f"base_model.model.{name}.lora_B.bias": torch.ones(shape[0]) for name, shape in SHAPES.items()},
    }
    result = aggregate([(state, own)], rule=Budget(4 * (60 + 72 + 72)), write=DROPPING)
    assert FIRST not in result.adapter
    assert f"{FIRST}.lora_B.bias" not in result.adapter.extras
    row = next(row for row in result.report["modules"] if row["name"] == FIRST)
    assert (row["rank"], row["error"], row["error_bound"], row["singular_values"]) == (0, 1.0, 1.0, [])
    assert row["notes"] == []
    assert any("leaves no room for" in note and FIRST in note for note in result.report["notes"])


@pytest.mark.parametrize("write", [WriteOptions(), UNIFORM, DROPPING], ids=["plain", "uniform", "dropping"])
def test_too_small_a_size_says_the_smallest(tmp_path, write):
    least = 4 * (60 if write.drop_zero else sum(map(sum, SHAPES.values())))
    adapters = counted([client()])
    with pytest.raises(InputError, match=rf"Budget\({least - 1}\): {least - 1} bytes .* at least {least} needed"):
        aggregate(adapters, rule=Budget(least - 1), write=write, out=tmp_path / "out")
    assert not adapters[0].source.reads, "the header says it already"
    assert list(tmp_path.iterdir()) == []
    aggregate([client()], rule=Budget(least), write=write)


def test_a_size_that_no_module_with_an_update_fits_is_refused():
    small, big = {"a.q_proj": (2, 3)}, {"b.q_proj": (37, 23)}
    pair = zeroed(client(shapes={**small, **big}), "a.q_proj")
    with pytest.raises(InputError, match="at least 240 needed, one component of the smallest"):
        aggregate([pair], rule=Budget(100), write=DROPPING)


def test_a_policy_that_drops_decides_before_the_size_is_shared():
    """The modules of the dropped client alone would cost more than there is."""
    bad = client(1, shapes={**SHAPES, "model.layers.9.self_attn.q_proj": (5000, 23)})
    bad[0]["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    read = ReadOptions(missing="zero")
    with pytest.warns(UserWarning, match="dropped"):
        result = aggregate([client(), bad], rule=Budget("5kB"), policy="drop", read=read)
    assert set(result.adapter) == set(SHAPES)
    assert result.report["totals"]["bytes"] <= 5000


def test_at_shares_a_size_over_the_modules_of_the_adapter():
    pair = zeroed(client(dtype=torch.float64), FIRST)
    full = aggregate([pair], rule=ALL)
    for size in (2112, 3000, 5000):
        cut, direct = full.at(Budget(size)), aggregate([pair], rule=Budget(size))
        assert distance(products(cut.adapter), products(direct.adapter)) < 1e-12
        assert cut.report["totals"]["bytes"] == direct.report["totals"]["bytes"] <= size
    dropped = aggregate([pair], rule=ALL, write=DROPPING).at(Budget(1800))
    assert FIRST not in dropped.adapter
    with pytest.raises(InputError, match="at least 2112 needed"):
        full.at(Budget(2000))


@pytest.mark.parametrize("size", [1e-90, 1e77])
def test_energies_that_leave_float64_are_compared_all_the_same(size):
    state, own = client(dtype=torch.float64)
    huge = {key: x * size for key, x in state.items()}, own
    for result in (aggregate([huge], rule=Budget(4000)), aggregate([huge], rule=ALL).at(Budget(4000))):
        plain = aggregate([(state, own)], rule=Budget(4000))
        assert [r["rank"] for r in result.report["modules"]] == [r["rank"] for r in plain.report["modules"]]
        assert result.report["modules"][0]["error"] == pytest.approx(plain.report["modules"][0]["error"], rel=1e-9)


def test_a_method_without_a_rule_takes_no_budget():
    with pytest.raises(InputError, match="does not choose its rank by a rule"):
        aggregate(clients(), "fedit", rule=Budget("1MB"))
