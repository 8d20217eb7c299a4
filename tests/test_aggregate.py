"""`aggregate`: exact sums over awkward inputs, clients, weights, order, arguments."""

import json
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from adapter_problems import (
    FIRST,
    SHAPES,
    changed,
    client,
    clients,
    config,
    distance,
    products,
    updates,
    weighted,
    without,
)

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.adapters.reader import StateDict, open_adapter
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.engine.result import State
from fedlora_kernels.errors import BackendError, FormatError, InputError, LimitError, RunError, WeightError
from fedlora_kernels.linalg.rules import Budget, Energy, Rank
from fedlora_kernels.methods.contract import make_method

ALL = Energy(1.0)


def scaled(t):
    """Change of gauge that leaves every update as it is."""

    def change(pair):
        state, settings = pair
        return {k: v * (t if "lora_B" in k else 1 / t) for k, v in state.items()}, settings

    return change


def zero_b(pair):
    state, settings = pair
    return {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in state.items()}, settings


AWKWARD = {
    "plain": clients,
    "one_client": lambda **o: clients((4,), **o),
    "duplicates": lambda **o: [*clients(**o), *clients(**o)],
    "a_zero_client": lambda **o: [zero_b(client(7, **o)), *clients(**o)],
    "gauge_imbalanced": lambda **o: [scaled(t)(c) for t, c in zip((2.0**13, 1.0, 2.0**-13), clients(**o), strict=True)],
    "wider_than_the_matrix": lambda **o: clients((11, 13, 12), **o),
    "twice_as_wide": lambda **o: clients((19, 19, 17), **o),
    "rank_one": lambda **o: clients((1, 1), **o),
    "rslora": lambda **o: [client(1, rank=4, alpha=3, use_rslora=True, **o), client(2, rank=6, alpha=5, **o)],
}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", AWKWARD)
def test_full_energy_equals_the_dense_sum(case, dtype, limit):
    pairs = AWKWARD[case](dtype=dtype)
    weights = [k + 1.0 for k in range(len(pairs))]
    result = aggregate(pairs, rule=ALL, weights=weights)
    assert distance(products(result.adapter), weighted(pairs, weights)) < limit
    assert {spec.B.dtype for spec in result.adapter.modules.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_wider_arithmetic(dtype):
    pairs = clients(dtype=dtype)
    result = aggregate(pairs, rule=ALL)
    assert result.report["dtype"] == "float32"
    assert distance(products(result.adapter), weighted(pairs)) < 1e-6


def test_one_row_and_one_column():
    shapes = {"a.q_proj": (1, 17), "b.q_proj": (17, 1), "c.down_proj": (1, 1)}
    pairs = clients((1, 3), shapes=shapes, dtype=torch.float64)
    assert distance(products(aggregate(pairs, rule=ALL).adapter), weighted(pairs)) < 1e-12


def test_clients_of_mixed_dtypes_answer_in_the_widest():
    pairs = [client(1, dtype=torch.bfloat16), client(2, rank=3, dtype=torch.float64)]
    result = aggregate(pairs, rule=ALL)
    assert result.adapter[FIRST].B.dtype == torch.float64
    assert distance(products(result.adapter), weighted(pairs)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, "float32", torch.bfloat16, "float16"])
def test_the_dtype_of_the_answer_can_be_chosen(dtype):
    pairs = clients()
    result = aggregate(pairs, rule=ALL, dtype=dtype)
    made = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert result.adapter[FIRST].A.dtype == made
    assert distance(products(result.adapter), weighted(pairs)) < 8 * torch.finfo(made).eps + 1e-7


def test_exact_cancellation_is_a_zero_module():
    pair = client(3)
    state, settings = pair
    negative = {k: -v if "lora_B" in k else v for k, v in state.items()}, settings
    result = aggregate([pair, negative])
    for row in result.report["modules"]:
        assert row["rank"] == 1
        assert "ZERO" in row["notes"]
        assert row["singular_values"] == []
    assert not any(p.any() for p in products(result.adapter).values())


def test_the_default_keeps_nine_tenths_of_the_energy():
    pairs = clients((8, 8, 8))
    result = aggregate(pairs)
    assert result.report["method"] == {"name": "florist", "options": {"output": "left"}, "rule": "Energy(0.9)"}
    ideal = weighted(pairs)
    for name, found in products(result.adapter).items():
        lost = float((found - ideal[name]).norm() / ideal[name].norm())
        row = next(row for row in result.report["modules"] if row["name"] == name)
        assert lost**2 <= 0.1 + 1e-9
        assert row["error"] == pytest.approx(lost, rel=1e-5)
        assert row["error"] <= row["error_bound"]
    assert 0.0 < result.report["totals"]["error"] <= 0.1**0.5


def test_total_error_is_that_of_the_whole_model():
    pairs = clients((8, 8, 8))
    result = aggregate(pairs, rule=Rank(3))
    ideal, found = weighted(pairs), products(result.adapter)
    flat = torch.cat([(found[n] - ideal[n]).flatten() for n in ideal])
    whole = torch.cat([ideal[n].flatten() for n in ideal])
    assert result.report["totals"]["error"] == pytest.approx(float(flat.norm() / whole.norm()), rel=1e-5)


def test_sources_of_every_kind_are_one_and_the_same(tmp_path):
    from make_adapters import write

    pairs = clients()
    folders = [write(tmp_path / f"c{k}", *pair) for k, pair in enumerate(pairs)]
    wanted = aggregate(pairs, rule=ALL)
    for sources in (
        folders,
        [str(f) for f in folders],
        [open_adapter(f) for f in folders],
        {"x": folders[0], "y": folders[1], "z": pairs[2]},
    ):
        result = aggregate(sources, rule=ALL)
        for name in SHAPES:
            assert torch.equal(result.adapter[name].B, wanted.adapter[name].B)


def test_names_default_to_folder_names_made_unique(tmp_path):
    from make_adapters import write

    pairs = clients()
    sources = [write(tmp_path / part / "site", *pair) for part, pair in zip("ab", pairs, strict=False)]
    report = aggregate([*sources, pairs[2]]).report
    assert [row["name"] for row in report["clients"]] == ["site", "site_2", "client_2"]


def test_names_of_a_mapping_are_kept_in_order():
    pairs = clients()
    result = aggregate({"zoe": pairs[0], "adam": pairs[1], "mia": pairs[2]}, weights=[3, 2, 1])
    assert [(row["name"], row["weight"]) for row in result.report["clients"]] == [
        ("zoe", 0.5),
        ("adam", 1 / 3),
        ("mia", 1 / 6),
    ]
    assert json.loads(result.adapter.metadata["fedlora.clients"]) == ["zoe", "adam", "mia"]


def test_the_same_folder_twice_warns(tmp_path):
    from make_adapters import write

    folder = write(tmp_path / "c", *client())
    with pytest.warns(UserWarning, match="same adapter"):
        result = aggregate([folder, folder], rule=ALL)
    assert any("same adapter" in text for text in result.report["warnings"])
    assert distance(products(result.adapter), updates(client())) < 1e-6


@pytest.mark.parametrize("nothing", [[], {}, ()])
def test_no_clients_are_refused(nothing):
    with pytest.raises(ValueError, match="no clients"):
        aggregate(nothing)


@pytest.mark.parametrize("wrong", ["folder", 3, None, {1, 2}])
def test_clients_must_be_a_collection(wrong):
    with pytest.raises(InputError, match="clients is of type"):
        aggregate(wrong)


def test_all_bad_clients_are_named_together(tmp_path):
    pairs = clients()
    with pytest.raises(FormatError) as caught:
        aggregate({"ok": pairs[0], "gone": tmp_path / "gone", "bare": (pairs[2][0], {"peft_type": "LORA", "r": 3})})
    assert "'gone'" in str(caught.value)
    assert "'bare'" in str(caught.value)
    assert "'ok'" not in str(caught.value)


def test_adapters_of_the_caller_stay_open_and_untouched(tmp_path):
    from make_adapters import write

    adapter = open_adapter(write(tmp_path / "c", *client()))
    before = adapter[FIRST].B.clone()
    aggregate([adapter, client(1)])
    assert torch.equal(adapter[FIRST].B, before)


@pytest.mark.parametrize("policy", ["strict", "drop"])
def test_many_clients_do_not_run_out_of_files(tmp_path, policy):
    import resource

    from make_adapters import write

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    pairs = [client(k, rank=1, shapes={FIRST: (5, 3)}) for k in range(30)]
    folders = [write(tmp_path / str(k), *pair) for k, pair in enumerate(pairs)]
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, hard))
        result = aggregate(folders, rule=ALL, policy=policy)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {row["status"] for row in result.report["clients"]} == {"used"}
    assert distance(products(result.adapter), weighted(pairs)) < 1e-6


def test_more_clients_than_the_system_has_files_for(tmp_path, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (64, 64))
    with pytest.raises(LimitError, match=r"30 clients need \d+ open files; the system allows 64"):
        aggregate([tmp_path / str(k) for k in range(30)], policy="drop")


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1, 2], "2 weights for 3 clients"),
        ([1, "2", 3], "client 'client_1'.*'2'"),
        ([1, float("nan"), 3], "client 'client_1'.*nan"),
        ([1, 2, float("inf")], "client 'client_2'.*inf"),
        ([1, -2, 3], "client 'client_1'.*-2 is negative"),
        ([0, 0.0, 0], "all 0"),
        ("123", "str"),
        (3.0, "float"),
        ([1, None, 2], "None"),
        ([1, 1j, 2], "1j"),
    ],
)
def test_wrong_weights_are_named(weights, text):
    with pytest.raises(WeightError, match=text):
        aggregate(clients(), weights=weights)


def test_huge_weights_do_not_overflow():
    pairs = clients()
    result = aggregate(pairs, rule=ALL, weights=[1e308, 1e308, 1e308])
    assert distance(products(result.adapter), weighted(pairs)) < 1e-6


def test_weights_of_any_sign_without_normalisation():
    pairs = clients()
    weights = [1.5, -0.7, 0.4]
    result = aggregate(pairs, rule=ALL, weights=torch.tensor(weights, dtype=torch.float64), normalize=False)
    assert distance(products(result.adapter), weighted(pairs, weights, normalize=False)) < 1e-6
    assert not result.report["normalize"]


class Unreadable(StateDict):
    def read(self, key, out=None):
        raise AssertionError("the data of a client of weight 0 was read")


@pytest.mark.filterwarnings("ignore:method 'hetlora' uses no weights")
@pytest.mark.parametrize(
    ("method", "policy"), [("florist", "strict"), ("florist", "clip"), ("hetlora", "strict"), ("fedit", "strict")]
)
def test_a_client_of_weight_zero_is_never_read(method, policy):
    pairs = clients((4, 4, 4))
    adapter = open_adapter(client(9))
    object.__setattr__(adapter, "source", Unreadable(client(9)[0]))
    result = aggregate([pairs[0], adapter, *pairs[1:]], method, weights=[1, 0, 2, 3], policy=policy)
    alone = aggregate(pairs, method, weights=[1, 2, 3], policy=policy)
    for name in SHAPES:
        assert torch.equal(result.adapter[name].B, alone.adapter[name].B)
    row = result.report["clients"][1]
    assert (row["status"], row["weight"]) == ("absent", 0.0)


def test_the_headers_of_a_client_of_weight_zero_are_checked():
    with pytest.raises(InputError, match="client_1"):
        aggregate([client(0), client(1, shapes={FIRST: (36, 23)})], weights=[1, 0])


def test_scale_zero_contributes_nothing_and_is_not_read():
    pairs = clients()
    adapter = open_adapter(client(9, alpha=0))
    object.__setattr__(adapter, "source", Unreadable(client(9)[0]))
    with pytest.warns(UserWarning, match="lora_alpha is 0"):
        result = aggregate([*pairs, adapter], rule=ALL)
    assert distance(products(result.adapter), weighted([*pairs, zero_b(client(9))])) < 1e-6


def test_two_runs_are_bitwise_equal(tmp_path):
    pairs = clients()
    for k in range(2):
        aggregate(pairs, out=tmp_path / str(k), write=WriteOptions(uniform_rank=True, fill="random"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_another_order_and_a_split_client_change_nothing():
    pairs = clients(dtype=torch.float64)
    one = aggregate(pairs, weights=[1, 2, 3])
    for other, weights in ((pairs[::-1], [3, 2, 1]), ([*pairs, pairs[2]], [1, 2, 1.5, 1.5])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = aggregate(other, weights=weights)
        assert [r["rank"] for r in result.report["modules"]] == [r["rank"] for r in one.report["modules"]]
        assert distance(products(result.adapter), products(one.adapter)) < 1e-12


def test_aggregate_of_aggregates_is_one_step():
    pairs = clients((4, 2, 5, 3), dtype=torch.float64)
    left = aggregate(pairs[:2], weights=[1, 2], rule=ALL)
    right = aggregate(pairs[2:], weights=[3, 4], rule=ALL)
    both = aggregate([left.adapter, right.adapter], weights=[3, 7], rule=ALL)
    assert distance(products(both.adapter), weighted(pairs, [1, 2, 3, 4])) < 1e-12


def test_modules_keep_the_order_of_the_first_client():
    state, settings = client()
    order = [list(SHAPES)[k] for k in (2, 0, 3, 1)]
    shuffled = {key: state[key] for name in order for key in state if f".{name}." in key}
    result = aggregate([(shuffled, settings), client(1)])
    assert list(result.adapter) == order
    assert [row["name"] for row in result.report["modules"]] == order


def test_round_follows_previous(tmp_path):
    pairs = clients()
    first = aggregate(pairs, out=tmp_path / "r0")
    assert first.state == State("florist", 0)
    assert aggregate(pairs, previous=first).state.round == 1
    assert aggregate(pairs, previous=State("florist", 4)).state.round == 5
    assert aggregate(pairs, previous=tmp_path / "r0").report["round"] == 1
    assert aggregate(pairs, previous=first.adapter).report["round"] == 1
    assert aggregate(pairs, previous=first, round=7).state.round == 7


@pytest.mark.parametrize("previous", ["nowhere", 3])
def test_a_previous_that_says_nothing_is_refused(previous):
    with pytest.raises(InputError, match="previous"):
        aggregate(clients(), previous=previous)
    with pytest.raises(
        InputError, match=r"previous nowhere: report\.json cannot be read: No such file or directory; .*round="
    ):
        aggregate(clients(), previous="nowhere")
    with pytest.raises(InputError, match="previous is an empty path"):
        aggregate(clients(), previous="")
    with pytest.raises(InputError, match="round="):
        aggregate(clients(), previous=open_adapter(client()))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "florst"}, "known methods"),
        ({"tau": 0.9}, "known options: rule, output"),
        ({"method": "fedit", "rule": ALL}, "rule"),
        ({"method": 3}, "method"),
        ({"rule": 0.9}, "rank rule"),
        ({"rule": Budget("1kB")}, "1000 bytes for 4 modules; at least 1056 needed"),
        ({"robust": "krum"}, "krum: f is None"),
        ({"robust": "florist"}, "robust is .*a robust rule"),
        ({"robust": 3}, "robust is 3; a robust rule"),
        ({"method": "geometric_median", "robust": "trimmed_mean"}, "is a robust rule already"),
        ({"client_state": {}}, "takes no client_state"),
        ({"per_client": True}, "per_client=True writes folders; give out="),
        ({"policy": "lenient"}, "policy|Policy"),
        ({"read": "strict"}, r"read is of type str; ReadOptions\(\.\.\.\) needed"),
        ({"write": {}}, "write is of type dict"),
        ({"dtype": torch.int8}, "dtype"),
        ({"dtype": "float8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"memory": "much"}, "memory"),
        ({"memory": 0}, "memory"),
        ({"seed": -1}, "seed"),
        ({"round": -1}, "round"),
        ({"round": 1.5}, "round"),
        ({"backend": "abacus"}, "backend"),
        ({"method": "fedit", "write": WriteOptions(output="balanced")}, "no singular values"),
    ],
)
def test_wrong_arguments_are_refused(arguments, text):
    with pytest.raises(InputError, match=text):
        aggregate(clients((4, 4)), **arguments)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_backend_can_be_named(backend):
    pairs = clients(dtype=torch.float64)
    result = aggregate(pairs, rule=ALL, backend=backend)
    assert result.report["backend"] == {"requested": backend, "used": [backend], "device": "cpu", "fallbacks": []}
    assert distance(products(result.adapter), weighted(pairs)) < 1e-12


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(BackendError, match="no GPU"):
        aggregate(clients(), device="cuda")


def test_a_method_object_is_taken_as_it_is():
    method = make_method("florist", {}, Rank(2))
    assert {row["rank"] for row in aggregate(clients(), method).report["modules"]} == {2}
    with pytest.raises(InputError, match="already"):
        aggregate(clients(), method, rule=ALL)


def registered(monkeypatch, **needs):
    """A method of someone else's, of FedIT's arithmetic."""
    from fedlora_kernels.methods import contract
    from fedlora_kernels.methods.fedit import FedIT

    monkeypatch.setattr(contract, "_REGISTRY", dict(contract._REGISTRY))
    return contract.register(type("Other", (FedIT,), {"name": "other", **needs}))


def test_a_pair_that_is_worse_than_nothing_is_noted():
    one, other = client(0), client(1)
    one = ({key: 10 * tensor if "lora_A" in key else tensor for key, tensor in one[0].items()}, one[1])
    opposite = ({key: -tensor if "lora_B" in key else tensor for key, tensor in one[0].items()}, one[1])
    slightly = ({key: tensor * 1e-3 if "lora_B" in key else tensor for key, tensor in other[0].items()}, other[1])
    report = aggregate([one, opposite, slightly], "zero_pad").report
    assert any(note.startswith("farther from the weighted sum than nothing at all: ") for note in report["notes"])
    assert not any("farther" in note for note in aggregate([one, one], "zero_pad").report["notes"])


def test_a_method_without_weights_warns_of_unequal_ones(monkeypatch):
    registered(monkeypatch, uses_weights=False)
    pairs = clients((4, 4))
    aggregate(pairs, "other", weights=[2, 2])
    with pytest.warns(UserWarning, match="'other' uses no weights"):
        aggregate(pairs, "other", weights=[1, 2])


@pytest.mark.parametrize("gives", [("personal",), ("common", "personal"), ()])
def test_a_method_that_gives_other_than_it_declares_is_refused(monkeypatch, gives):
    registered(monkeypatch, gives=gives)
    with pytest.raises(RunError, match="'other' declares to give"):
        aggregate(clients((4, 4)), "other")


def test_balanced_output_splits_the_singular_values():
    result = aggregate(clients(dtype=torch.float64), rule=Rank(3), write=WriteOptions(output="balanced"))
    pair = result.adapter[FIRST]
    torch.testing.assert_close(pair.B.T @ pair.B, pair.A @ pair.A.T, rtol=0, atol=1e-10)
    assert result.report["method"]["options"] == {"output": "balanced"}


@pytest.mark.parametrize("memory", [4096, None])
def test_progress_goes_from_nothing_to_everything(memory):
    seen = []
    aggregate(clients(), "hetlora", progress=lambda *step: seen.append(step), memory=memory)
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["survey", "combine"]
    for stage in stages:
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1] > 0
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_mixed_ranks_fail_fedit_by_name():
    with pytest.raises(
        InputError, match=r"client 'client_1', module .*: rank 2, but 4 in client 'client_0'.*fedit.*zero_pad"
    ):
        aggregate(clients(), "fedit")


def test_config_of_the_result_is_loadable():
    result = aggregate(clients(), rule=Rank(3))
    assert result.adapter.config["r"] == result.adapter.config["lora_alpha"] == 3
    assert not result.adapter.config.get("use_rslora")
    assert set(config()) - {"bias"} <= set(result.adapter.config)
    assert {spec.scale for spec in result.adapter.modules.values()} == {1.0}


def test_a_change_in_one_client_changes_the_answer():
    pairs = clients()
    other = [changed(pairs[0], "B", lambda t: t * 1.01), *pairs[1:]]
    assert distance(products(aggregate(pairs, rule=ALL).adapter), products(aggregate(other, rule=ALL).adapter)) > 1e-4


def test_very_many_clients_of_one_name_are_told_apart_at_once():
    from fedlora_kernels.engine.clients import _unique

    started = time.perf_counter()
    names = [name for name, _ in _unique([("a_3", 0), *[("a", 0)] * 50_000, ("a_2", 0)])]
    assert len(set(names)) == 50_002
    assert names[:4] == ["a_3", "a", "a_4", "a_5"]
    assert names[-1] == "a_2"
    assert time.perf_counter() - started < 20


def test_one_folder_under_several_paths_warns(tmp_path, monkeypatch):
    from make_adapters import write

    write(tmp_path / "c", *client())
    (tmp_path / "link").symlink_to(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    for other in ("c/", str(tmp_path / "c"), "link", "../" + tmp_path.name + "/c"):
        with pytest.warns(UserWarning, match="same adapter"):
            aggregate(["c", other])


def test_the_remedy_of_a_cap_can_be_typed():
    with pytest.raises(LimitError) as caught:
        aggregate(clients((4, 2, 5)), read=fk.ReadOptions(limits=fk.Limits(modules_per_client=2)))
    remedy = re.search(r"Raise it with (ReadOptions\(.*\))", str(caught.value))[1]
    aggregate(clients((4, 2, 5)), read=eval(remedy, vars(fk)))


def test_a_union_of_modules_may_exceed_the_cap_on_one_client(tmp_path, monkeypatch):
    monkeypatch.setattr(fk.Limits.__init__, "__defaults__", tuple(
        3 if value == fk.Limits.modules_per_client else value for value in fk.Limits.__init__.__defaults__
    ))  # fmt: skip
    with pytest.raises(LimitError, match="modules per client is 4; at most 3"):
        aggregate([client(0)])
    pairs = [without(client(0), FIRST), without(client(1), "model.layers.1.mlp.down_proj")]
    for out in (None, tmp_path / "out"):
        write = WriteOptions(uniform_rank=True)
        assert len(aggregate(pairs, read=ReadOptions(missing="zero"), write=write, out=out).adapter) == len(SHAPES)


@pytest.mark.parametrize(
    ("call", "found"), [({"clients": 3}, "clients is of type int;"), ({"policy": 3}, "policy is of type int;"),
                        ({"read": []}, "read is of type list;"), ({"method": 3}, "method is of type int;")],
)  # fmt: skip
def test_wrong_types_are_named(call, found):
    with pytest.raises(InputError, match=found):
        aggregate(**{"clients": clients(), **call})


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_what_a_rule_cuts_to_nothing_is_lost_and_not_zero(backend):
    """The certificate must not call an update zero because nothing of it is above the threshold."""
    pairs = clients()
    whole = aggregate(pairs, rule=fk.Energy(1.0), backend=backend)
    sizes = {row["name"]: row["singular_values"][0] for row in whole.report["modules"]}
    name = max(sizes, key=sizes.get)
    rule = fk.Absolute(0.999 * sizes[name])
    lost = {other for other in sizes if sizes[other] <= rule.cutoff}
    assert lost
    assert name not in lost
    for result in (aggregate(pairs, rule=rule, backend=backend), whole.at(rule)):
        rows = {row["name"]: row for row in result.report["modules"]}
        for other in lost:
            assert not result.adapter[other].B.any()
            assert (rows[other]["rank"], rows[other]["notes"].count("ZERO")) == (1, 0)
            assert rows[other]["error"] == pytest.approx(1.0, rel=1e-12)
            assert rows[other]["energy_kept"] == pytest.approx(0.0, abs=1e-12)
            assert rows[other]["error_bound"] >= rows[other]["error"]
            assert rows[other]["energy"] >= sizes[other] ** 2
        assert result.adapter[name].B.any()
    result = aggregate(pairs, rule=rule, backend=backend)
    assert any(f"keeps nothing of {len(lost)} modules" in note for note in result.report["notes"])
    left = aggregate(pairs, rule=rule, backend=backend, write=fk.WriteOptions(drop_zero=True))
    assert set(left.adapter) == set(sizes) - lost
