"""Robust rules in front of a method: whom they reject is as if never given, and what they decide stands in the report."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from adapter_problems import (
    FIRST,
    SHAPES,
    changed,
    client,
    clients,
    distance,
    poison,
    products,
    updates,
    weighted,
    without,
)
from round_problems import EQUAL, federation, report_of, same_adapter, same_result

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.errors import InputError, NonFiniteError, WeightError
from fedlora_kernels.linalg.rules import Energy

ALL = Energy(1.0)
METHODS = (
    *("fedit", "florist", "hetlora", "clair", "fedtree", "prelort"),
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in ("fedsa", "fedex", "fedmomentum", "flexlora", "lora_fair")
    ),
)
RULES = {
    "krum": fk.Krum(f=2),
    "multi_krum": fk.MultiKrum(f=2),
    "trimmed_mean": fk.TrimmedMean(beta=0.2),
    "geometric_median": fk.GeometricMedian(),
}
WEIGHTS = [1.0, 2.0, 3.0, 1.5, 2.5, 1.0, 4.0]
quiet = pytest.mark.filterwarnings("ignore:method 'fedtree' uses no weights", "ignore:client .* was dropped")


def seven():
    """Five that resemble each other, one large, one turned round."""
    base = client(0)
    made = {}
    for k, name in enumerate("abcdefg"):
        state, settings = client(k)
        near = {key: base[0][key] + 0.1 * value for key, value in state.items()}
        made[name] = near, settings
    made["b"] = {k: 5.0 * v for k, v in made["b"][0].items()}, made["b"][1]
    made["f"] = {k: -v if "lora_B" in k else v for k, v in made["f"][0].items()}, made["f"][1]
    return made


def left(result):
    """Who was not rejected, and the weights used."""
    rows = [row for row in result.report["clients"] if row["status"] != "rejected"]
    return [row["name"] for row in rows], [row["weight"] for row in rows]


@pytest.mark.filterwarnings("ignore:method 'hetlora' uses no weights")
@quiet
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_who_is_rejected_is_as_if_never_given(method, rule):
    """Bit by bit the run of the others alone with the same weights; hetlora's norms round with the number of clients."""
    pairs = seven()
    result = aggregate(pairs, method, weights=WEIGHTS, robust=RULES[rule])
    names, weights = left(result)
    alone = aggregate({name: pairs[name] for name in names}, method, weights=weights, normalize=False)
    if method == "hetlora":
        assert distance(products(result.adapter), products(alone.adapter)) < 1e-6
    else:
        assert same_result(result, alone)
    assert {"b", "f"}.isdisjoint(names) or rule in ("geometric_median", "trimmed_mean")
    assert len(names) == {"krum": 1, "multi_krum": 5, "trimmed_mean": 5, "geometric_median": 7}[rule]
    assert math.fsum(weights) == pytest.approx(1.0, rel=1e-15)


@quiet
@pytest.mark.parametrize("method", ["florist", "fedit", "clair"])
@pytest.mark.parametrize("memory", [1, None])
def test_a_rejected_client_is_not_read_again(method, memory):
    pairs = seven()
    adapters = {name: open_adapter(pair, name=name) for name, pair in pairs.items()}
    reads = []
    for name, adapter in adapters.items():
        inner = adapter.source

        class Watched:
            tensors = inner.tensors

            def read(self, key, out=None, name=name, inner=inner):
                reads.append(name)
                return inner.read(key, out)

            def check_unchanged(self):
                pass

            def close(self):
                pass

        object.__setattr__(adapter, "source", Watched())
    result = aggregate(adapters, method, robust=fk.Krum(f=2), memory=memory)
    (winner,), _ = left(result)
    factors = 2 * len(SHAPES)
    # and one factor of each to see that no two are the same
    assert all(reads.count(name) == factors + 1 for name in adapters if name != winner)


@pytest.mark.parametrize("scope", ["model", "matrix"])
@pytest.mark.parametrize("rule", ["krum", "multi_krum", "geometric_median", "trimmed_mean", "norm_clip"])
def test_a_rule_as_method_is_the_rule_before_florist_at_full_energy(rule, scope):
    options = {"scope": scope} | ({"f": 2} if "krum" in rule else {})
    made = fk.methods.contract.make_method(rule, options)
    one = aggregate(seven(), rule, weights=WEIGHTS, **options)
    other = aggregate(seven(), "florist", rule=ALL, robust=made, weights=WEIGHTS)
    assert same_adapter(one.adapter, other.adapter)
    assert one.report["robust"] == other.report["robust"]
    assert one.report["clients"] == other.report["clients"]


@pytest.mark.parametrize("form", ["trimmed_mean", fk.TrimmedMean()])
def test_a_rule_may_be_named(form):
    assert aggregate(seven(), robust=form).report["robust"]["name"] == "trimmed_mean"


def per_module(pairs, weights, rule):
    """The answer of scope "matrix", densely: each module judged by its own Gram, among its owners."""
    names = list(pairs)
    dense = {name: updates(pair) for name, pair in pairs.items()}
    total = math.fsum(weights)
    answer = {}
    for module in SHAPES:
        own = [k for k, name in enumerate(names) if module in dense[name]]
        D = torch.stack([dense[names[k]][module].flatten() for k in own])
        w = np.array([weights[k] for k in own])
        verdict = rule.coefficients((D @ D.T).numpy(), w / w.sum() if len(own) < len(names) else w / total)
        answer[module] = sum(
            float(c * f) * dense[names[k]][module] for k, c, f in zip(own, verdict.weight, verdict.factor, strict=True)
        )
    return answer


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        fk.Krum(f=1, scope="matrix"),
        fk.MultiKrum(f=1, scope="matrix"),
        fk.TrimmedMean(beta=0.2, scope="matrix"),
        fk.GeometricMedian(scope="matrix"),
        fk.NormClip(scope="matrix"),
    ],
    ids=lambda rule: rule.name,
)
def test_each_module_is_judged_by_its_own_updates(rule, missing):
    pairs = seven()
    # another outlier in each module
    for name, module in zip("abcd", SHAPES, strict=True):
        pairs[name] = changed(pairs[name], "A", lambda t: 7.0 * t, module)
    if missing:
        pairs["g"] = without(pairs["g"], FIRST)
    read = ReadOptions(missing="renormalize" if missing else "error")
    result = aggregate(pairs, weights=WEIGHTS, rule=ALL, robust=rule, read=read)
    assert distance(products(result.adapter), per_module(pairs, WEIGHTS, rule)) < 1e-6
    told = result.report["robust"]
    assert told["scope"] == "matrix"
    assert list(told["modules"]) == list(SHAPES)
    assert list(told["modules"][FIRST]) == [name for name in pairs if not (missing and name == "g")]
    assert {row["status"] for row in result.report["clients"]} == {"used"}
    json.dumps(result.report, allow_nan=False)


@pytest.mark.parametrize("method", ["fedit", "zero_pad", "fedex", "prelort", "fedsa", "clair", "fedrot"])
def test_scope_matrix_before_methods_of_factors(method):
    """Module by module it is the run of that module alone under scope "model"."""
    pairs = seven()
    for name, module in zip("abcd", SHAPES, strict=True):
        pairs[name] = changed(pairs[name], "A", lambda t: 7.0 * t, module)
    options = {"scope": "matrix"} if method == "clair" else {}
    whole = aggregate(pairs, method, robust=fk.MultiKrum(f=2, scope="matrix"), **options)
    for module in SHAPES:
        single = {name: ({k: v for k, v in s.items() if f".{module}." in k}, c) for name, (s, c) in pairs.items()}
        alone = aggregate(single, method, robust=fk.MultiKrum(f=2), **options)
        if whole.adapter is not None:
            assert torch.equal(whole.adapter[module].B, alone.adapter[module].B)
            assert torch.equal(whole.adapter[module].A, alone.adapter[module].A)
        rejected = [name for name, row in whole.report["robust"]["modules"][module].items() if row["rejected"]]
        assert len(rejected) == 2
        for name, adapter in alone.personal.items():
            torch.testing.assert_close(whole.personal[name][module].B, adapter[module].B, rtol=1e-6, atol=1e-6)


def test_too_few_owners_of_a_module_are_named():
    pairs = seven()
    for name in "abcd":
        pairs[name] = without(pairs[name], FIRST)
    with pytest.raises(
        InputError, match=rf"module '{FIRST}': krum: f is 1, which needs at least 5 clients; 3 take part"
    ):
        aggregate(pairs, robust=fk.Krum(f=1, scope="matrix"), read=ReadOptions(missing="renormalize"))


def test_modules_that_only_rejected_clients_have_are_left_out():
    pairs = {name: without(pair, FIRST) if name not in ("b", "f") else pair for name, pair in seven().items()}
    read = ReadOptions(missing="renormalize")
    with pytest.warns(UserWarning, match=rf"only dropped or rejected clients have \(1, '{FIRST}' first\) are left out"):
        result = aggregate(pairs, rule=ALL, robust=fk.MultiKrum(f=2), read=read)
    assert left(result)[0] == list("acdeg")
    assert FIRST not in result.adapter
    alone = {name: pairs[name] for name in "acdeg"}
    assert distance(products(result.adapter), weighted(list(alone.values()))) < 1e-6


@pytest.mark.parametrize("policy", ["strict", "drop", "clip"])
@pytest.mark.parametrize("rule", [fk.Krum(f=2), fk.MultiKrum(f=2, q=2)])
def test_what_a_rule_rejects_is_no_failure_to_a_policy(policy, rule):
    """min_clients and min_weight count bad clients, not those that a rule leaves out on purpose."""
    result = aggregate(seven(), robust=rule, policy=Policy(policy, min_clients=7, min_weight=1.0))
    assert len(left(result)[0]) == (1 if rule.name == "krum" else 2)


@quiet
@pytest.mark.parametrize("method", METHODS)
def test_drop_and_a_rule_together(method):
    """The bad client leaves first, the rule judges the rest."""
    pairs = seven()
    bad = {**pairs, "nan": changed(client(9), "B", poison())}
    result = aggregate(bad, method, policy="drop", robust=fk.MultiKrum(f=2))
    alone = aggregate(pairs, method, robust=fk.MultiKrum(f=2))
    assert same_result(result, alone)
    assert [row["status"] for row in result.report["clients"]][-1] == "dropped"
    with pytest.raises(NonFiniteError, match="client 'nan'"):
        aggregate(bad, method, robust=fk.MultiKrum(f=2))


@quiet
@pytest.mark.parametrize("method", METHODS)
def test_clip_and_a_rule_together(method):
    """The rule sees clipped updates, and the factors stay with those that it keeps."""
    pairs, policy = seven(), Policy("clip", max_update_norm="median")
    result = aggregate(pairs, method, policy=policy, robust=fk.MultiKrum(f=1))
    names, weights = left(result)
    assert "f" not in names
    bound = float(np.median([row["norm"] for row in result.report["clients"]]))
    alone = aggregate(
        {name: pairs[name] for name in names}, method, weights=weights, normalize=False,
        policy=Policy("clip", max_update_norm=bound),
    )  # fmt: skip
    for name, adapter in {"": result.adapter, **result.personal}.items():
        other = alone.personal[name] if name else alone.adapter
        # the bound comes from norms that round with the number of clients
        assert adapter is other or distance(products(adapter), products(other)) < 1e-6
    clipped = {row["name"] for row in result.report["clients"] if row["status"] == "clipped"}
    assert clipped <= set(names)
    assert clipped


@pytest.mark.parametrize("method", ["fedit", "florist", "fedsa", "prelort"])
def test_norm_clip_is_the_policy_clip(method):
    rule = aggregate(seven(), method, weights=WEIGHTS, robust=fk.NormClip(max_update_norm=40.0))
    policy = aggregate(seven(), method, weights=WEIGHTS, policy=Policy("clip", max_update_norm=40.0))
    assert distance(products(rule.for_client(0)), products(policy.for_client(0))) < 1e-6
    factors = [[row["factor"] for row in result.report["clients"]] for result in (rule, policy)]
    assert factors[0] == pytest.approx(factors[1], rel=1e-14)
    assert [row["status"] for row in rule.report["clients"]] == [row["status"] for row in policy.report["clients"]]


@pytest.mark.parametrize(
    "rule", [fk.NormClip(max_update_norm=math.inf), fk.TrimmedMean(beta=0.0), fk.MultiKrum(f=1, q=7)]
)
@pytest.mark.parametrize("scope", ["model", "matrix"])
@pytest.mark.parametrize("method", ["fedit", "florist"])
def test_a_rule_that_rejects_nobody_changes_nothing(rule, scope, method, tmp_path):
    rule = dataclasses.replace(rule, scope=scope)
    result = aggregate(seven(), method, weights=WEIGHTS, robust=rule, out=tmp_path / "out")
    assert same_adapter(result.adapter, aggregate(seven(), method, weights=WEIGHTS).adapter)
    report_of(tmp_path / "out")


def test_clipping_does_not_make_frozen_factors_differ():
    """What must be equal is what clients sent, not what was made of it."""
    state, settings = client(0)
    pairs = []
    for k in range(4):
        other = client(k + 1)[0]
        pairs.append(
            ({key: value if "lora_B" in key else (1 + k) * other[key] for key, value in state.items()}, settings)
        )
    for options in ({"policy": "clip"}, {"robust": fk.NormClip()}, {"robust": fk.NormClip(scope="matrix")}):
        result = aggregate(pairs, "rolora", round=1, **options)
        exact = aggregate(pairs, "florist", rule=ALL, **options)
        assert distance(products(result.adapter), products(exact.adapter)) < 1e-6
        assert any(row["factor"] < 1.0 for row in result.report["clients"]) or "robust" in options


def test_a_rule_that_only_weighs_is_told_to_do_nothing_for_a_method_without_weights():
    with pytest.warns(
        UserWarning, match=r"method 'fedtree' uses no weights; those of robust rule 'geometric_median' change nothing"
    ):
        aggregate(federation(0), "fedtree", robust=fk.GeometricMedian())
    with pytest.raises(InputError, match="uses no weights, so a rule cannot choose per matrix"):
        aggregate(federation(0), "fedtree", robust=fk.Krum(f=1, scope="matrix"))


def test_a_client_of_weight_zero_counts_nowhere():
    pairs = seven()
    with_absent = aggregate({**pairs, "zero": client(30)}, robust=fk.Krum(f=2), weights=[*WEIGHTS, 0.0])
    assert same_adapter(with_absent.adapter, aggregate(pairs, robust=fk.Krum(f=2), weights=WEIGHTS).adapter)
    with pytest.raises(InputError, match="krum: f is 2, which needs at least 7 clients; 6 take part"):
        aggregate(pairs, robust=fk.Krum(f=2), weights=[0.0, *WEIGHTS[1:]])


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1, 1, -1], [2, -1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("scope", ["model", "matrix"])
def test_negative_weights_and_rules_do_not_mix(weights, scope):
    with pytest.raises(WeightError, match="a robust rule needs weights >= 0"):
        aggregate(seven(), robust=fk.TrimmedMean(scope=scope), weights=weights, normalize=False)


def test_weights_of_another_sum_keep_it():
    result = aggregate(seven(), rule=ALL, robust=fk.Krum(f=2), weights=[3.0] * 7, normalize=False)
    (winner,), weights = left(result)
    assert weights == pytest.approx([21.0], rel=1e-14)
    assert distance(products(result.adapter), {n: 21.0 * d for n, d in updates(seven()[winner]).items()}) < 1e-6


@pytest.mark.parametrize("scope", ["model", "matrix"])
@pytest.mark.parametrize("rule", ["krum", "multi_krum", "geometric_median", "trimmed_mean", "norm_clip"])
def test_what_is_told_of_a_rule_is_plain_json(tmp_path, rule, scope):
    made = fk.methods.contract.make_method(rule, {"scope": scope} | ({"f": 2} if "krum" in rule else {}))
    pairs = seven()
    pairs["c"] = pairs["a"]
    pairs["e"] = {k: torch.zeros_like(v) for k, v in pairs["e"][0].items()}, pairs["e"][1]
    result = aggregate(pairs, robust=made, out=tmp_path / "out")
    told = report_of(tmp_path / "out")["robust"]
    assert told == json.loads(json.dumps(result.report["robust"], allow_nan=False))
    assert told["name"] == rule
    assert told["options"]["scope"] == told["scope"] == scope
    assert ["a", "c"] in told["near_twins"]
    rows = told["clients"] if scope == "model" else told["modules"][FIRST]
    assert list(rows) == list("abcdefg")
    for row in rows.values():
        assert set(row) == {"weight", "factor", "score", "rejected"}
        assert isinstance(row["weight"], float)
        assert isinstance(row["rejected"], bool)
        assert row["rejected"] == (row["weight"] == 0.0)


def test_without_a_rule_there_is_nothing_to_tell():
    assert aggregate(seven()).report["robust"] is None


@pytest.mark.parametrize("policy", ["strict", "clip"])
def test_the_bias_of_a_module_follows_its_matrix(policy):
    """With scope "matrix" who is rejected in a module has no say in its bias either."""
    pairs, biases = {}, {}
    for k, (name, (state, settings)) in enumerate(seven().items()):
        bias = torch.full((37,), float(k + 1))
        pairs[name] = {**state, f"base_model.model.{FIRST}.lora_B.bias": bias}, {**settings, "lora_bias": True}
        biases[name] = bias
    result = aggregate(pairs, rule=ALL, weights=WEIGHTS, policy=policy, robust=fk.MultiKrum(f=2, scope="matrix"))
    told = result.report["robust"]["modules"][FIRST]
    factors = {row["name"]: row["factor"] for row in result.report["clients"]}
    wanted = sum(row["weight"] * factors[name] * 2.0 * biases[name].double() for name, row in told.items())
    assert any(row["rejected"] for row in told.values())
    torch.testing.assert_close(result.adapter.extra(f"{FIRST}.lora_B.bias").double(), wanted, rtol=1e-6, atol=0)


def test_absolute_tensors_follow_a_decision_for_the_model():
    pairs = {}
    for k, (name, (state, settings)) in enumerate(seven().items()):
        head = {"base_model.model.score.weight": torch.full((2, 3), float(k + 1))}
        pairs[name] = {**state, **head}, {**settings, "modules_to_save": ["score"]}
    result = aggregate(pairs, robust=fk.MultiKrum(f=2))
    names = left(result)[0]
    assert names == list("acdeg")
    wanted = sum("abcdefg".index(name) + 1 for name in names) / 5
    assert result.adapter.extra("score.weight").flatten().tolist() == pytest.approx([wanted] * 6)


def test_a_rule_looks_at_scaled_updates_not_at_factors():
    """A change of gauge, or of where the scale sits, changes no decision."""
    pairs = seven()
    moved = {}
    for k, (name, (state, settings)) in enumerate(pairs.items()):
        t = 2.0 ** (3 * k - 9)
        factors = {key: value * (t if "lora_B" in key else 1 / (4 * t)) for key, value in state.items()}
        moved[name] = factors, {**settings, "lora_alpha": 4 * settings["lora_alpha"]}
    for rule in RULES.values():
        one, other = (aggregate(p, rule=ALL, robust=rule, weights=WEIGHTS) for p in (pairs, moved))
        assert left(one)[0] == left(other)[0]
        assert distance(products(one.adapter), products(other.adapter)) < 1e-6


@pytest.mark.parametrize("ranks", [EQUAL, (4, 2, 5, 3, 4)])
def test_mixed_ranks_and_dtypes(ranks):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32)
    pairs = [
        client(k, rank=rank, alpha=8 + k, dtype=dtype)
        for k, (rank, dtype) in enumerate(zip(ranks, dtypes, strict=True))
    ]
    result = aggregate(pairs, rule=ALL, robust=fk.Krum(f=1))
    (winner,), _ = left(result)
    assert distance(products(result.adapter), updates(pairs[int(winner[-1])])) < 1e-6
    assert result.report["dtype"] == ("float64" if winner == "client_3" else "float32")


def test_one_client_passes_every_rule():
    pair = clients((4,))
    wanted = aggregate(pair, rule=ALL)
    for rule in (*RULES.values(), fk.NormClip()):
        assert same_adapter(aggregate(pair, rule=ALL, robust=rule).adapter, wanted.adapter)
