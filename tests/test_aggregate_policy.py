"""Bad clients: strict stops and names the place, drop leaves them out, clip scales them down."""

import json
import warnings

import pytest
import torch
from adapter_problems import FIRST, changed, client, clients, distance, poison, products, updates, weighted, without

from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.policy import Limits, Policy
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.errors import InputError, LimitError, MismatchError, NonFiniteError
from fedlora_kernels.linalg import Ragged
from fedlora_kernels.linalg.rules import Energy

ALL = Energy(1.0)


def norm(pair):
    return float(torch.cat([d.flatten() for d in updates(pair).values()]).norm())


@pytest.mark.parametrize("method", ["florist", "flora", "zero_pad", "hetlora"])
@pytest.mark.parametrize(("part", "value"), [("A", float("nan")), ("B", float("inf")), ("B", float("-inf"))])
def test_strict_names_client_module_tensor_and_place(method, part, value, tmp_path):
    bad = changed(client(5, rank=3), part, poison(value), module="model.layers.1.mlp.down_proj")
    with pytest.raises(
        NonFiniteError,
        match=rf"client 'bad', module 'model\.layers\.1\.mlp\.down_proj', lora_{part}: {value}.*\(1, 2\)",
    ):
        aggregate({"good": client(), "bad": bad}, method, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_strict_reports_all_structural_failures_together():
    pairs = {f"c{k}": client(k) for k in range(5)}
    pairs["wide"] = client(6, shapes={**dict.fromkeys([FIRST], (37, 24))})
    pairs["lacking"] = without(client(7), FIRST)
    with pytest.raises(MismatchError) as caught:
        aggregate(pairs)
    text = str(caught.value)
    assert "client 'wide'" in text
    assert "client 'lacking'" in text
    assert "client 'c0'" not in text.replace("in client 'c0'", "")
    assert len(text.splitlines()) <= 20


def test_at_most_twenty_lines():
    pairs = [client(k) for k in range(40)] + [without(client(k), FIRST) for k in range(30)]
    with pytest.raises(MismatchError) as caught:
        aggregate(pairs)
    assert len(str(caught.value).splitlines()) == 20


def bad_ones():
    return {
        "nan": changed(client(11, rank=3), "A", poison()),
        "wide": client(12, shapes={**updates_shapes(), FIRST: (37, 24)}),
        "gone": "/no/such/folder",
    }


def updates_shapes():
    return {name: tuple(d.shape) for name, d in updates(client()).items()}


@pytest.mark.parametrize("which", ["nan", "wide", "gone"])
@pytest.mark.parametrize("memory", [None, 4096])
def test_drop_leaves_the_client_out_and_renormalises(which, memory):
    good = clients()
    sources = {"a": good[0], which: bad_ones()[which], "b": good[1], "c": good[2]}
    with pytest.warns(UserWarning, match=f"client '{which}' was dropped"):
        result = aggregate(sources, rule=ALL, weights=[1, 2, 3, 4], policy="drop", memory=memory)
    assert distance(products(result.adapter), weighted(good, [1, 3, 4])) < 1e-6
    rows = {row["name"]: row for row in result.report["clients"]}
    assert rows[which]["status"] == "dropped"
    assert which in rows[which]["reason"]
    assert rows[which]["weight"] == 0.0
    assert [rows[name]["weight"] for name in "abc"] == [1 / 8, 3 / 8, 4 / 8]
    assert json.loads(result.adapter.metadata["fedlora.clients"]) == ["a", "b", "c"]
    assert result.report["passes"] == 2


@pytest.mark.parametrize("which", ["nan", "wide", "gone"])
def test_the_warning_of_a_drop_names_the_client_once(which):
    with pytest.warns(UserWarning, match="was dropped") as caught:
        aggregate({**{f"g{k}": pair for k, pair in enumerate(clients())}, which: bad_ones()[which]}, policy="drop")
    (text,) = (str(warning.message) for warning in caught)
    assert text.startswith(f"client '{which}' was dropped: ")
    assert text.count(f"client '{which}'") == 1


@pytest.mark.parametrize("memory", [None, 4096, 32768])
@pytest.mark.parametrize("method", ["florist", "hetlora"])
def test_modules_stand_in_the_order_of_the_first_client_that_takes_part(tmp_path, memory, method):
    good = clients()
    state, settings = changed(client(9), "A", poison())
    bad = dict(reversed(state.items())), settings
    with pytest.warns(UserWarning, match="dropped"):
        result = aggregate([bad, *good], method, policy="drop", memory=memory, out=tmp_path / "out")
    alone = aggregate(good, method, policy="drop", memory=memory, out=tmp_path / "alone")
    assert [row["name"] for row in result.report["modules"]] == list(updates_shapes())
    assert list(result.adapter) == list(alone.adapter)
    for name in alone.adapter:
        assert torch.equal(result.adapter[name].B, alone.adapter[name].B)
        assert torch.equal(result.adapter[name].A, alone.adapter[name].A)


def test_drop_of_several_reasons_at_once():
    good = clients()
    sources = {**{f"g{k}": pair for k, pair in enumerate(good)}, **bad_ones()}
    with pytest.warns(UserWarning, match="was dropped"):
        result = aggregate(sources, rule=ALL, policy="drop")
    assert [row["status"] for row in result.report["clients"]] == ["used"] * 3 + ["dropped"] * 3
    assert distance(products(result.adapter), weighted(good)) < 1e-6


def test_drop_without_bad_clients_changes_nothing():
    pairs = clients()
    strict, dropping = aggregate(pairs), aggregate(pairs, policy="drop")
    for name in strict.adapter:
        assert torch.equal(strict.adapter[name].B, dropping.adapter[name].B)


@pytest.mark.parametrize("policy", [Policy("drop", min_clients=4), Policy("drop", min_weight=0.9)])
def test_drop_stops_where_too_little_remains(policy):
    with pytest.raises(InputError, match=r"3 of 4 clients with 0\.75 of the weight remain.*\n.*client 'nan'"):
        aggregate({**{f"g{k}": pair for k, pair in enumerate(clients())}, "nan": bad_ones()["nan"]}, policy=policy)


def test_nobody_left_is_an_error():
    with pytest.raises(InputError, match="0 of 1 clients"):
        aggregate({"gone": "/no/such/folder"}, policy=Policy("drop", min_weight=0.0))


def test_a_client_that_lacks_a_module_fails_only_where_missing_is_an_error():
    sources = {"a": client(0), "b": client(1), "c": without(client(2), FIRST)}
    with pytest.warns(UserWarning, match="client 'c' was dropped"):
        dropped = aggregate(sources, rule=ALL, policy="drop")
    assert dropped.report["clients"][2]["status"] == "dropped"
    kept = aggregate(sources, rule=ALL, policy="drop", read=ReadOptions(missing="zero"))
    assert kept.report["clients"][2]["status"] == "used"


def test_the_last_owner_of_a_module_can_be_dropped():
    sources = {"a": without(client(0), FIRST), "b": without(client(1), FIRST), "nan": changed(client(2), "A", poison())}
    for memory in (None, 4096):
        with pytest.warns(UserWarning, match="dropped") as told:
            result = aggregate(sources, rule=ALL, policy="drop", read=ReadOptions(missing="renormalize"), memory=memory)
        texts = [str(warning.message) for warning in told]
        assert any("client 'nan' was dropped" in text for text in texts)
        assert any("only dropped or rejected clients have (1" in text for text in texts)
        assert FIRST not in result.adapter
        assert distance(products(result.adapter), weighted([sources["a"], sources["b"]])) < 1e-6


def test_a_dropped_wide_client_does_not_widen_the_answer():
    good = clients()
    bad = changed(client(8, dtype=torch.float64), "A", poison())
    with pytest.warns(UserWarning, match="dropped"):
        result = aggregate([*good, bad], policy="drop")
    assert result.report["dtype"] == "float32"
    assert result.adapter[FIRST].B.dtype == torch.float32


@pytest.mark.parametrize("memory", [None, 4096])
def test_clip_scales_updates_down_to_the_bound(memory):
    pairs = clients(dtype=torch.float64)
    norms = [norm(pair) for pair in pairs]
    bound = sorted(norms)[1] * 0.9
    result = aggregate(pairs, rule=ALL, policy=Policy("clip", max_update_norm=bound), memory=memory)
    factors = [min(1.0, bound / size) for size in norms]
    dense = [updates(pair) for pair in pairs]
    wanted = {n: sum(f / 3 * d[n] for f, d in zip(factors, dense, strict=True)) for n in dense[0]}
    assert distance(products(result.adapter), wanted) < 1e-12
    for row, size, factor in zip(result.report["clients"], norms, factors, strict=True):
        assert row["norm"] == pytest.approx(size, rel=1e-12)
        assert row["factor"] == pytest.approx(factor, rel=1e-12)
        assert row["status"] == ("clipped" if factor < 1 else "used")


@pytest.mark.parametrize("bound", [None, "median"])
def test_the_default_bound_is_the_median_norm(bound):
    pairs = clients((4, 4, 4, 4), dtype=torch.float64)
    result = aggregate(pairs, rule=ALL, policy=Policy("clip", max_update_norm=bound))
    norms = sorted(norm(pair) for pair in pairs)
    middle = (norms[1] + norms[2]) / 2
    for row in result.report["clients"]:
        assert row["norm"] * row["factor"] <= middle * (1 + 1e-12)


def test_clip_per_module():
    pairs = clients(dtype=torch.float64)
    dense = [updates(pair) for pair in pairs]
    bound = 60.0
    result = aggregate(pairs, rule=ALL, policy=Policy("clip", max_update_norm=bound, per="module"))
    wanted = {n: sum(d[n] * min(1.0, bound / float(d[n].norm())) / 3 for d in dense) for n in dense[0]}
    assert distance(products(result.adapter), wanted) < 1e-12
    for row, d in zip(result.report["clients"], dense, strict=True):
        strongest = min(1.0, *(bound / float(x.norm()) for x in d.values()))
        assert row["factor"] == pytest.approx(strongest, rel=1e-12)
        assert row["status"] == ("clipped" if strongest < 1.0 else "used")
    assert min(row["factor"] for row in result.report["clients"]) < 1.0


def test_an_infinite_bound_is_refused_and_a_large_one_clips_nothing():
    with pytest.raises(InputError, match="max_update_norm"):
        Policy("clip", max_update_norm=float("inf"))
    pairs = clients()
    plain, clipped = aggregate(pairs), aggregate(pairs, policy=Policy("clip", max_update_norm=1e9))
    for name in plain.adapter:
        assert torch.equal(plain.adapter[name].B, clipped.adapter[name].B)


def test_clip_drops_bad_clients_before_the_median():
    good = clients()
    with pytest.warns(UserWarning, match="dropped"):
        result = aggregate([*good, changed(client(8), "B", poison())], policy="clip", rule=ALL)
    alone = aggregate(good, policy="clip", rule=ALL)
    assert distance(products(result.adapter), products(alone.adapter)) < 1e-7


def test_zero_clients_have_factor_one():
    state, settings = client(5)
    zero = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in state.items()}, settings
    result = aggregate([*clients(), zero], policy=Policy("clip", max_update_norm=1.0))
    row = result.report["clients"][3]
    assert (row["norm"], row["factor"], row["status"]) == (0.0, 1.0, "used")


def test_clipping_reaches_hetlora():
    """Weights by norm of clipped updates: with a tiny bound all clients count alike."""
    pairs = clients((4, 4, 4), dtype=torch.float64)
    clipped = aggregate(pairs, "hetlora", policy=Policy("clip", max_update_norm=1e-3))
    by_hand = [
        ({k: v * (1e-3 / norm(pair)) if "lora_B" in k else v for k, v in pair[0].items()}, pair[1]) for pair in pairs
    ]
    assert distance(products(clipped.adapter), products(aggregate(by_hand, "hetlora").adapter)) < 1e-11


def test_policies_warn_only_of_what_happened():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aggregate(clients(), policy="drop")


@pytest.mark.parametrize("memory", [None, 64])
def test_modules_are_dropped_one_by_one_from_what_was_read(memory):
    """A block of equal shapes may hold modules of which only some have an owner left: a scale of 0 is not read either."""
    first, second = next(iter(updates_shapes().items())), ("model.layers.2.self_attn.q_proj", (37, 23))
    still = client(0, alpha=0, shapes=dict([first]))
    for names in ([first, second], [second, first]):
        bad = changed(client(1, shapes=dict(names)), "A", poison())
        with pytest.warns(UserWarning, match="dropped"), pytest.warns(UserWarning, match="lora_alpha is 0"):
            result = aggregate(
                {"still": still, "bad": bad},
                policy=Policy("drop", min_weight=0),
                read=ReadOptions(missing="renormalize"),
                memory=memory,
            )
        assert list(result.adapter) == [FIRST]
        assert result.report["modules"][0]["notes"] == ["ZERO"]


def test_the_reason_for_a_drop_is_cut():
    shapes = {f"layers.{i}.q_proj": (5, 3) for i in range(90)}
    pairs = {
        "a": client(0, shapes=shapes),
        "b": client(1, shapes=shapes),
        "c": client(2, shapes={FIRST: (5, 3), "layers.0.q_proj": (5, 3)}),
    }
    with pytest.warns(UserWarning, match="'c' was dropped"):
        result = aggregate(pairs, policy="drop")
    assert result.report["clients"][2]["reason"].count("; ... and 71 more") == 1
    assert result.report["clients"][2]["reason"].count("client 'c'") == 19


@pytest.mark.parametrize(
    ("method", "robust", "most"),
    [("florist", None, 1), ("hetlora", None, 1), ("florist", "geometric_median", 3)],
)
def test_only_who_compares_clients_pays_for_pairs_of_them(monkeypatch, method, robust, most):
    """K^2 numbers for every module are gigabytes where the norms of the clients are kilobytes."""
    from fedlora_kernels.methods import factors

    plain, asked = factors.update_gram, []

    def counted(B, A, **options):
        asked.extend(len(problem) for problem in (B if isinstance(B, Ragged) else [B]))
        return plain(B, A, **options)

    monkeypatch.setattr(factors, "update_gram", counted)
    pairs = clients()
    result = aggregate(pairs, method, policy="drop", robust=robust)
    assert max(asked[:3]) == most
    assert [row["norm"] for row in result.report["clients"]] == pytest.approx([norm(pair) for pair in pairs], rel=1e-12)


@pytest.mark.parametrize("kind", ["strict", "drop", "clip"])
def test_too_few_clients_are_too_few_even_if_none_fails(kind):
    with pytest.raises(InputError, match=r"3 of 3 clients with 1 of the weight remain; at least 4 and 0\.5 needed"):
        aggregate(clients(), policy=Policy(kind, min_clients=4))


def test_huge_weights_do_not_overflow_the_share_that_remains():
    bad = changed(client(9), "A", poison())
    with pytest.warns(UserWarning, match="dropped"):
        result = aggregate([client(0), client(1), client(2), bad], weights=[1e308] * 4, policy="drop")
    assert [row["weight"] for row in result.report["clients"]] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


@pytest.mark.parametrize("memory", [None, 4096])
def test_a_norm_beyond_the_bound_fails_a_client_that_is_not_clipped(memory, tmp_path):
    pairs = {**{f"c{k}": pair for k, pair in enumerate(clients())}, "loud": changed(client(8), "B", lambda B: B * 1e3)}
    bound = 2 * max(map(norm, clients()))
    with pytest.raises(LimitError, match=r"client 'loud': the norm of its update is [\d.e+]+; at most .*policy='clip'"):
        aggregate(pairs, policy=Policy("strict", bound), memory=memory, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="client 'loud' was dropped: the norm of its update"):
        result = aggregate(pairs, rule=ALL, policy=Policy("drop", bound), memory=memory)
    assert distance(products(result.adapter), weighted(clients())) < 1e-6
    assert aggregate(pairs, policy=Policy("strict", 1e9), memory=memory).report["passes"] == 2


def test_a_bound_per_module_names_the_module():
    pairs = {"a": client(1), "b": changed(client(2), "B", lambda B: B * 1e3)}
    with pytest.raises(LimitError, match=rf"client 'b', module '{FIRST}': the norm of its update") as caught:
        aggregate(pairs, policy=Policy("strict", 1e3, per="module"))
    assert len(str(caught.value).splitlines()) == 1


def test_the_median_is_a_bound_for_clipping_alone():
    for kind in ("strict", "drop"):
        with pytest.raises(InputError, match=f"kind 'clip' needed, not '{kind}'"):
            Policy(kind, "median")


def test_norms_far_from_the_others_are_noted_where_norms_are_known():
    pairs = {f"c{k}": client(k) for k in range(6)}
    pairs["loud"] = changed(client(8), "B", lambda B: B * 1e3)
    result = aggregate(pairs, policy="drop")
    (note,) = [text for text in result.report["notes"] if "the norm of its update" in text]
    assert note.startswith("client 'loud': the norm of its update is ")
    del pairs["loud"]
    assert not [text for text in aggregate(pairs, policy="drop").report["notes"] if "the norm of its update" in text]


def test_equal_content_under_other_names_is_warned_of_and_a_last_number_tells_apart():
    pair = client(1)
    copied = {key: value.clone() for key, value in pair[0].items()}
    with pytest.warns(UserWarning, match="clients 'a' and 'c' have the same content; it counts twice"):
        aggregate({"a": pair, "b": client(2), "c": (copied, pair[1])})
    last = list(copied)[-1]
    copied[last][-1, -1] += 1.0
    assert aggregate({"a": pair, "c": (copied, pair[1])}).report["warnings"] == []


def test_clients_that_count_nothing_are_not_looked_at_for_equal_content():
    pair = client(1)
    copied = {key: value.clone() for key, value in pair[0].items()}, pair[1]
    assert aggregate({"a": pair, "b": copied}, weights=[1, 0]).report["warnings"] == []


def test_too_many_clients_are_refused_before_one_is_opened():
    with pytest.raises(
        LimitError, match=r"clients is 3; at most 2. Raise it with ReadOptions\(limits=Limits\(clients=3\)\)"
    ):
        aggregate(["/no/a", "/no/b", "/no/c"], read=ReadOptions(limits=Limits(clients=2)))
