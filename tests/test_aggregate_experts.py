"""Aggregating experts: every method sees each as a module of its own, and what is written is what it made of them."""

import json

import pytest
import torch
from expert_problems import (
    EXPERTS,
    PARAMETERS,
    PREFIX,
    TARGETS,
    client,
    clients,
    config,
    dense,
    distance,
    folder,
    nested,
    read_back,
    state,
    unfused,
    weighted,
)

import fedlora_kernels as fk
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.cli import main
from fedlora_kernels.errors import FormatError, InputError, MismatchError, NonFiniteError
from fedlora_kernels.linalg.rules import Budget, Energy, Rank
from fedlora_kernels.methods.contract import make_method, method_class, method_names
from fedlora_kernels.resize import resize

ALL = Energy(1.0)
INNER, OUTER = nested(TARGETS[0], 1), TARGETS[0]
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")


def products(adapter):
    return {name: pair.scale * (pair.B.double() @ pair.A.double()) for name, pair in adapter.pairs()}


def renamed(updates):
    """Updates of `unfused` clients under the names of fused ones."""
    return {name.replace("_inner[", ".base_layer["): update for name, update in updates.items()}


def federation(method, number=0):
    """Five clients as a method accepts them: of one rank, or with one frozen factor, where it asks for that."""
    frozen = method.frozen_factor(number)
    ranks = (3,) * 5 if method.equal_ranks or method.frozen else (3, 2, 4, 1, 3)
    pairs = [client(10 * number + k, rank, 5 if frozen else 5 + k) for k, rank in enumerate(ranks)]
    shared = {key: value for key, value in pairs[0][0].items() if f".lora_{frozen}." in key}
    return {f"c{k}": ({**tensors, **shared}, settings) for k, (tensors, settings) in enumerate(pairs)}


def reported(name, clients):
    if not method_class(name).takes_client_state:
        return {}
    return {"client_state": {key: 0.125 * (k + 1) for k, key in enumerate(clients)}}


def run(method, pairs, **options):
    return aggregate(pairs, method, weights=[3, 1, 2, 2, 1], **options, **reported(method.name, pairs))


@QUIET
@pytest.mark.parametrize("name", method_names())
def test_every_method_makes_of_experts_what_it_makes_of_plain_modules(name):
    """Common pair, residual, and what each client receives; in two rounds where a method remembers or alternates."""
    method = make_method(name, {"f": 1} if name.endswith("krum") else {})
    fused = unfused_ = None
    for number in range(2 if method.reads_previous or method.needs_round else 1):
        pairs = federation(method, number)
        plain = {key: unfused(pair) for key, pair in pairs.items()}
        fused = run(method, pairs, previous=fused, round=number)
        unfused_ = run(method, plain, previous=unfused_, round=number)
        assert [row["name"] for row in fused.report["modules"]] == list(
            renamed({row["name"]: 0 for row in unfused_.report["modules"]})
        )
        for one, other in zip(fused.report["modules"], unfused_.report["modules"], strict=True):
            assert one["rank"] == other["rank"]
            assert (one["energy"] or 0.0) == pytest.approx(other["energy"] or 0.0, rel=1e-12)
        for mine, theirs in ((fused.adapter, unfused_.adapter), (fused.residual, unfused_.residual)):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert distance(products(mine), renamed(products(theirs))) < 1e-6
        for key in pairs:
            assert distance(products(fused.for_client(key)), renamed(products(unfused_.for_client(key)))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["florist", "flora"])
def test_exact_methods_give_the_sum_of_the_index_formula(name, dtype, tmp_path):
    pairs = clients(dtype=dtype)
    rule = {"rule": ALL} if name == "florist" else {}
    aggregate(pairs, name, weights=[1, 2, 3], out=tmp_path / "out", **rule)
    found = dense(read_back(tmp_path / "out"), scale=1.0)
    assert distance(found, weighted(pairs, [1, 2, 3])) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_the_mean_of_factors_is_taken_expert_by_expert():
    pairs = clients((3, 3, 3))
    result = aggregate(pairs, "fedit")
    wanted = {}
    for name in open_adapter(pairs[0]):
        each = [open_adapter(pair)[name] for pair in pairs]
        B = sum(pair.scale * pair.B.double() for pair in each) / 3
        wanted[name] = B @ (sum(pair.A.double() for pair in each) / 3)
    assert distance(products(result.adapter), wanted) < 1e-6


def test_negative_weights_subtract():
    pairs = clients()
    result = aggregate(pairs, weights=[1.0, -0.5, 2.0], normalize=False, rule=ALL)
    updates = [dense(pair) for pair in pairs]
    wanted = {name: updates[0][name] - 0.5 * updates[1][name] + 2.0 * updates[2][name] for name in updates[0]}
    assert distance(products(result.adapter), wanted) < 1e-6


@pytest.mark.parametrize("source", ["files", "memory"])
@pytest.mark.parametrize("name", ["florist", "flora", "zero_pad"])
def test_any_memory_gives_the_same_bits(name, source, tmp_path):
    """Slabs that hold a few experts, one each, or everything; files and state dicts."""
    pairs = clients()
    if source == "files":
        pairs = [folder(tmp_path / f"c{k}", pair) for k, pair in enumerate(pairs)]
    results = [aggregate(pairs, name, memory=memory) for memory in (1, 4096, 30_000, None)]
    first = results[0].adapter
    for result in results[1:]:
        assert list(result.adapter) == list(first)
        for (_, one), (_, other) in zip(first.pairs(), result.adapter.pairs(), strict=True):
            assert torch.equal(one.B, other.B)
            assert torch.equal(one.A, other.A)


@pytest.mark.parametrize("place", ["file", "memory"])
def test_experts_are_written_at_one_rank_for_a_module(place, tmp_path):
    out = {"out": tmp_path / "out"} if place == "file" else {}
    result = aggregate(clients(), rule=Energy(0.7), **out)
    chosen = {row["name"]: row["rank"] for row in result.report["modules"]}
    for target in TARGETS:
        own = {name: module for name, module in result.adapter.modules.items() if module.form.target == target}
        assert len(own) == 2 * EXPERTS
        assert {module.rank for module in own.values()} == {max(chosen[name] for name in own)}
        assert len({chosen[name] for name in own}) > 1
        for name in own:
            pair, p = result.adapter[name], chosen[name]
            assert not pair.B[:, p:].any()
            assert not pair.A[p:].any()
    assert result.report["totals"]["rank"] == sum(chosen.values())
    numbers = sum(module.rank * (module.m + module.n) for module in result.adapter.modules.values())
    assert result.report["totals"]["parameters"] == numbers


def test_padding_that_can_be_trained_is_random_rows_beside_zero_columns(tmp_path):
    write = fk.WriteOptions(fill="random")
    plain, filled = (aggregate(clients(), rule=Energy(0.7), write=w) for w in (fk.WriteOptions(), write))
    aggregate(clients(), rule=Energy(0.7), write=write, out=tmp_path / "out")
    file = open_adapter(str(tmp_path / "out"))
    assert distance(products(filled.adapter), products(plain.adapter)) == 0.0
    padded = 0
    for row in plain.report["modules"]:
        pair, p = filled.adapter[row["name"]], row["rank"]
        padded += pair.A.shape[0] - p
        assert bool(pair.A[p:].any(1).all())
        assert not pair.B[:, p:].any()
        assert torch.equal(file[row["name"]].A, pair.A)
    assert padded > 0
    file.close()


def test_the_configuration_says_what_was_targeted_and_by_which_version(tmp_path):
    pairs = [client(k, lora_dropout=0.1, peft_version=version) for k, version in enumerate(("0.20.0", "0.21.2"))]
    aggregate(pairs, rule=Energy(0.7), out=tmp_path / "out")
    _, written = read_back(tmp_path / "out")
    assert written["target_modules"] == ["q_proj"]
    assert written["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert written["lora_dropout"] == 0.0
    assert written["peft_version"] == "0.20.0"
    assert all(key.rpartition(".")[2] in (*PARAMETERS, "q_proj") for key in written.get("rank_pattern", {}))


def test_a_plain_output_says_nothing_of_experts(tmp_path):
    plain = [
        ({key: value for key, value in pair[0].items() if "q_proj" in key}, config(r)) for pair, r in ((client(), 3),)
    ]
    aggregate(plain, rule=ALL, out=tmp_path / "out")
    _, written = read_back(tmp_path / "out")
    assert not {"target_parameters", "peft_version"} & written.keys()


def test_pairs_without_target_modules_come_back_without(tmp_path):
    pair = state(plain={}), config(target_modules=None)
    aggregate([pair], rule=ALL, out=tmp_path / "out")
    tensors, written = read_back(tmp_path / "out")
    assert written["target_modules"] == []
    assert distance(dense((tensors, written), scale=1.0), dense(pair)) < 1e-6


def test_the_aggregate_of_aggregates_is_the_aggregate(tmp_path):
    pairs = clients()
    for name, part in (("one", pairs[:2]), ("two", pairs[2:])):
        aggregate(part, "flora", out=tmp_path / name)
    both = aggregate([tmp_path / "one", tmp_path / "two"], weights=[2, 1], rule=ALL)
    assert distance(products(both.adapter), weighted(pairs)) < 1e-6


def test_what_clients_receive_is_written_for_each(tmp_path):
    pairs = {f"c{k}": pair for k, pair in enumerate(clients())}
    result = aggregate(pairs, "hetlora", out=tmp_path / "out", per_client=True)
    for k, key in enumerate(pairs):
        tensors, written = read_back(tmp_path / "out" / "clients" / key)
        assert written["r"] == (3, 2, 4)[k]
        assert distance(dense((tensors, written), scale=1.0), products(result.for_client(key, scale=1.0))) < 1e-7


@pytest.mark.parametrize("rank", [1, 3, 7, None])
def test_for_client_cuts_or_pads_all_experts_alike(rank):
    pairs = clients()
    result = aggregate(pairs, rule=ALL)
    for k, (_, settings) in enumerate(pairs):
        sent = result.for_client(k, rank=rank)
        scale = settings["lora_alpha"] / settings["r"]
        assert {module.scale for module in sent.modules.values()} == {scale}
        assert rank is None or {module.rank for module in sent.modules.values()} == {rank}
        if rank in (None,):
            assert distance(products(sent), products(result.adapter)) < 1e-6
        again = aggregate([(sent.source._state, sent.config)], rule=ALL)
        assert distance(products(again.adapter), products(sent)) < 1e-6


def test_another_threshold_from_the_same_decomposition():
    whole = aggregate(clients(), rule=ALL)
    cut, direct = whole.at(Energy(0.7)), aggregate(clients(), rule=Energy(0.7))
    assert [row["rank"] for row in cut.report["modules"]] == [row["rank"] for row in direct.report["modules"]]
    assert distance(products(cut.adapter), products(direct.adapter)) < 1e-6
    assert {name: module.rank for name, module in cut.adapter.modules.items()} == {
        name: module.rank for name, module in direct.adapter.modules.items()
    }


def test_resize_keeps_what_the_rule_says_of_each_expert(tmp_path):
    pair = client(rank=4)
    result = resize(folder(tmp_path / "c", pair), rule=Rank(2), out=tmp_path / "out")
    found = dense(read_back(tmp_path / "out"), scale=1.0)
    for name, update in dense(pair).items():
        U, S, Vh = torch.linalg.svd(update)
        wanted = (U[:, :2] * S[:2]) @ Vh[:2]
        assert (found[name] - wanted).norm() <= 1e-5 * update.norm()
    assert {module.rank for module in result.adapter.modules.values()} == {2}


def test_a_budget_is_kept_with_the_padding_of_experts(tmp_path):
    whole = aggregate(clients(), "flora", out=tmp_path / "whole").report["totals"]["bytes"]
    size = whole // 3
    aggregate(clients(), rule=Budget(size), out=tmp_path / "out")
    tensors, _ = read_back(tmp_path / "out")
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert 0.6 * size < written <= size


def zeroed(pair, paths):
    """B = 0 of whole stored pairs."""
    keys = {f"{PREFIX}{path}.lora_B.weight" for path in paths}
    return {key: torch.zeros_like(value) if key in keys else value for key, value in pair[0].items()}, pair[1]


@pytest.mark.parametrize("drop_zero", [False, True])
def test_experts_that_are_zero_stay_as_zeros_beside_others(drop_zero, tmp_path):
    pairs = [zeroed(pair, [INNER]) for pair in clients()]
    aggregate(pairs, rule=ALL, write=fk.WriteOptions(drop_zero=drop_zero), out=tmp_path / "out")
    assert distance(dense(read_back(tmp_path / "out"), scale=1.0), weighted(pairs)) < 1e-6


def test_a_module_whose_experts_are_all_zero_can_be_left_out(tmp_path):
    pairs = [zeroed(pair, [INNER, OUTER]) for pair in clients()]
    aggregate(pairs, rule=ALL, write=fk.WriteOptions(drop_zero=True), out=tmp_path / "out")
    tensors, written = read_back(tmp_path / "out")
    assert not any(f"{OUTER}." in key for key in tensors)
    assert written["target_parameters"] == [f"{TARGETS[1]}.down_proj", f"{TARGETS[1]}.gate_up_proj"]
    wanted = {name: update for name, update in weighted(pairs).items() if not name.startswith(OUTER)}
    assert distance(dense((tensors, written), scale=1.0), wanted) < 1e-6


@pytest.mark.parametrize(("missing", "share"), [("zero", 2 / 3), ("renormalize", 1.0)])
def test_a_module_that_a_client_lacks(missing, share):
    pairs = clients()
    tensors, settings = pairs[1]
    pairs[1] = {key: value for key, value in tensors.items() if f"{OUTER}." not in key}, settings
    with pytest.raises(MismatchError, match="missing here, present in most clients"):
        aggregate(pairs)
    result = aggregate(pairs, rule=ALL, read=fk.ReadOptions(missing=missing))
    owners = weighted([pairs[0], pairs[2]])
    found = products(result.adapter)
    for name in found:
        if name.startswith(OUTER):
            assert (found[name] - share * owners[name]).norm() <= 1e-6 * owners[name].norm()


def test_a_bad_number_is_found_in_its_expert():
    pairs = clients()
    key = f"{PREFIX}{INNER}.lora_B.weight"
    tensors, settings = pairs[1]
    bad = tensors[key].clone()
    bad[7, 1 * EXPERTS + 3] = float("nan")  # column 1 of expert 3
    pairs[1] = {**tensors, key: bad}, settings
    with pytest.raises(NonFiniteError) as caught:
        aggregate(pairs)
    where = rf"client 'client_1', module '{INNER}[3]', lora_B: nan at index (7, 1)"
    assert str(caught.value).startswith(where)


def test_clipping_by_module_bounds_each_expert():
    pairs = clients()
    policy = fk.Policy("clip", max_update_norm=4.0, per="module")
    result = aggregate(pairs, policy=policy, rule=ALL)
    updates = [dense(pair) for pair in pairs]
    wanted = {name: sum(d[name] * min(1.0, 4.0 / float(d[name].norm())) for d in updates) / 3 for name in updates[0]}
    assert any(float(d[name].norm()) > 4.0 for d in updates for name in d)
    assert distance(products(result.adapter), wanted) < 1e-6


def test_the_report_has_a_row_for_each_expert_and_the_table_one_for_each_parameter(tmp_path, capsys):
    names = {"gate_up_proj": (14, 9), "down_proj": (11, 6)}
    many = [client(k, experts=24, parameters=names) for k in range(2)]
    folders = [folder(tmp_path / f"c{k}", pair) for k, pair in enumerate(many)]
    assert main(["aggregate", *folders, "-o", str(tmp_path / "out"), "--energy", "0.9"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["modules"]) == 2 * 2 * 24 + 1
    assert {row["kind"] for row in report["modules"]} == {"expert", "linear"}
    shown = capsys.readouterr().out
    assert "model.layers.*.mlp.experts.base_layer[*]" in shown
    assert "model.layers.*.mlp.experts[*]" in shown
    assert shown.count("experts") < 10
    assert main(["inspect", *folders]) == 0
    assert "model.layers.*.mlp.experts[*] (48, medians)" in capsys.readouterr().out


def test_the_command_line_takes_the_order_of_parameters(tmp_path, capsys):
    tensors, inner = state(0, 3), state(1, 6, plain={})
    for target in TARGETS:
        for letter in "AB":
            key = f"{PREFIX}{nested(target, 1)}.lora_{letter}.weight"
            tensors[key] = inner[key]
    both = {".*gate_up_proj": 6}
    source = folder(tmp_path / "c", (tensors, config(3, 5, rank_pattern=both, alpha_pattern=both)))
    assert main(["aggregate", source, "-o", str(tmp_path / "out")]) == 2
    assert "--parameter-order down_proj,gate_up_proj" in capsys.readouterr().err
    order = ["--parameter-order", "gate_up_proj,down_proj"]
    assert main(["aggregate", source, "-o", str(tmp_path / "out"), "--energy", "1", *order]) == 0
    found = dense(read_back(tmp_path / "out"), scale=1.0)
    first, second = dense((inner, config(6, 6))), dense((tensors, config(3, 5)))
    wanted = {name: (first if ".base_layer" in name else second)[name] for name in found}
    assert distance(found, wanted) < 1e-6
    assert main(["inspect", source, *order]) == 0


def test_scales_that_no_key_tells_apart_cannot_be_handed_to_a_client():
    settings = config(alpha_pattern={"experts.down_proj": 6})
    read = fk.ReadOptions(parameter_order=("gate_up_proj", "down_proj"))
    result = aggregate([(state(), settings)], rule=ALL, read=read)
    with pytest.raises(InputError, match=r"its pairs have different scales, and no key says which is whose"):
        result.for_client(0)
    assert len(result.for_client(0, scale=1.0)) == len(result.adapter)


def test_rows_without_a_whole_number_of_experts_end_the_command_in_one_line(tmp_path, capsys):
    source = folder(tmp_path / "c", (state(rank=3, plain={}), config(rank=4)))
    assert main(["aggregate", source, "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "client 'c', module 'model.layers.0.mlp.experts.base_layer': lora_A has 15 rows" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError):
        aggregate([source])


@pytest.mark.parametrize(("steps", "there"), [(2, 0), (9, 0), (15, 11), (19, 11)])
def test_a_run_that_is_ended_among_the_experts_of_a_module_goes_on_after_the_module_before(tmp_path, steps, there):
    sources = [folder(tmp_path / f"c{k}", pair) for k, pair in enumerate(clients())]
    aggregate(sources, rule=Energy(0.7), out=tmp_path / "whole", memory=1)
    left = iter(range(steps))

    def progress(stage, done, total):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aggregate(sources, rule=Energy(0.7), out=tmp_path / "out", memory=1, resume=True, progress=progress)
    result = aggregate(sources, rule=Energy(0.7), out=tmp_path / "out", memory=1, resume=True)
    notes = [note for note in result.report["notes"] if note.startswith("resumed: ")]
    assert (int(notes[0].split()[1]) if notes else 0) == there
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


@QUIET
@pytest.mark.parametrize("rule", [fk.Krum(f=1, scope="matrix"), fk.TrimmedMean(scope="matrix")])
def test_clients_chosen_expert_by_expert_are_read_where_they_are_chosen(rule):
    """What is read of a flat tensor then has gaps."""
    pairs = federation(make_method("florist", {}))
    fused = aggregate(pairs, rule=ALL, robust=rule)
    plain = aggregate({key: unfused(pair) for key, pair in pairs.items()}, rule=ALL, robust=rule)
    assert distance(products(fused.adapter), renamed(products(plain.adapter))) < 1e-6


def test_experts_of_the_round_before_must_have_the_layout_of_the_clients():
    square = {"gate_up_proj": (9, 9), "down_proj": (11, 6)}
    before = aggregate(clients((3, 3), parameters=square, peft_version="0.18.1"), "fedrot")
    again = aggregate(clients((3, 3), parameters=square, peft_version="0.18.0"), "fedrot", previous=before)
    assert again.report["round"] == 1
    with pytest.raises(
        MismatchError,
        match=r"client 'client_0', configuration: peft_version is '0.21.2' but '0.18.1' in client 'previous'",
    ):
        aggregate(clients((3, 3), parameters=square), "fedrot", previous=before)


@pytest.mark.parametrize("experts", [1, EXPERTS])
def test_experts_have_no_form_in_a_kohya_file(tmp_path, capsys, experts):
    source = folder(tmp_path / "c", client(experts=experts))
    assert main(["convert", source, "-o", str(tmp_path / "x.safetensors"), "--to", "kohya"]) == 2
    assert "a parameter of target_parameters has no form in a kohya file" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
