"""Experts: which tensors are theirs, how many there are, at which rank and scale; what is refused, and how it says so."""

import pytest
import torch
from expert_problems import EXPERTS, PREFIX, TARGETS, client, config, dense, distance, nested, paths, state
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fedlora_kernels.adapters.forms import stored_tensors, whole_units
from fedlora_kernels.adapters.lora_config import LoRAConfig
from fedlora_kernels.adapters.model import TensorSpec
from fedlora_kernels.adapters.moe import TargetParameters, expert_modules, nesting
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import FedLoRAError, FormatError, InputError, LimitError

ORDER = ReadOptions(parameter_order=("gate_up_proj", "down_proj"))
MIXED = {"rank_pattern": {r".*\.experts\.gate_up_proj": 6}, "alpha_pattern": {r".*\.experts\.gate_up_proj": 10}}


def products(adapter):
    return {name: pair.scale * (pair.B.double() @ pair.A.double()) for name, pair in adapter.pairs()}


def mixed(experts=EXPERTS):
    """A client whose ``gate_up_proj`` has twice the rank and alpha of ``down_proj``, as PEFT fuses two layers into one."""
    tensors, settings_ = state(0, 3, experts), config(3, 5, **MIXED)
    inner = state(1, 6, experts, plain={})
    for target in TARGETS:
        for letter in "AB":
            key = f"{PREFIX}{nested(target, 1)}.lora_{letter}.weight"
            tensors[key] = inner[key]
    return tensors, settings_


def mixed_updates(pair):
    tensors, _ = pair
    inner = {key: value for key, value in tensors.items() if ".base_layer" in key}
    outer = {key: value for key, value in tensors.items() if ".base_layer" not in key}
    return dense((inner, config(6, 10))) | dense((outer, config(3, 5)))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.integers(1, 7), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans()
)
def test_the_update_is_the_index_formula(experts, rank, dtype, rslora):
    pair = client(experts, rank, experts=experts, dtype=dtype, use_rslora=rslora)
    adapter = open_adapter(pair)
    # every product of two floats is exact in float64, only their sum is not
    assert distance(products(adapter), dense(pair, experts)) < 1e-14


def test_an_expert_is_a_module_of_its_own_under_the_stored_path():
    adapter = open_adapter(client())
    assert list(adapter)[:2] == ["model.layers.0.mlp.experts.base_layer[0]", "model.layers.0.mlp.experts.base_layer[1]"]
    assert "model.layers.1.mlp.experts[4]" in adapter
    spec = adapter.modules["model.layers.0.mlp.experts[3]"]
    assert (spec.kind, spec.m, spec.n, spec.rank) == ("expert", 11, 6, 3)
    assert spec.form.target == "model.layers.0.mlp.experts"
    assert spec.form.names == ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj")
    assert adapter.modules["model.layers.0.self_attn.q_proj"].kind == "linear"


def test_one_expert_is_an_ordinary_pair():
    pair = client(experts=1)
    adapter = open_adapter(pair)
    assert {module.kind for module in adapter.modules.values()} == {"linear"}
    assert {nested(target, depth) for target in TARGETS for depth in (0, 1)} <= set(adapter)
    assert distance(products(adapter), dense(pair, 1)) < 1e-14


def test_writing_is_the_inverse_of_reading():
    tensors, settings_ = client(dtype=torch.float64)
    adapter = open_adapter((tensors, settings_))
    found = {}
    for unit in whole_units([(name, pair.B, pair.A) for name, pair in adapter.pairs()], adapter.modules):
        found.update(stored_tensors(unit, adapter.modules))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("entries", "parameters", "modules"),
    [
        (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], 2, ["q_proj"]),
        (["gate_up_proj", "down_proj"], 2, ["q_proj"]),
        (["gate_up_proj", "down_proj"], 2, []),
        (["gate_up_proj", "down_proj"], 2, None),
        (["gate_up_proj", "down_proj"], 2, r".*\.q_proj"),
        ([f"{target}.{name}" for target in TARGETS for name in ("gate_up_proj", "down_proj")], 2, ["q_proj"]),
        (["experts.w2"], 1, ["q_proj"]),
        (["w2"], 1, "all-linear"),
        (["w2"], 1, ["q_proj"]),
    ],
)
def test_entries_name_parameters_by_the_end_of_their_name(entries, parameters, modules):
    shapes = dict(list({"gate_up_proj": (14, 9), "down_proj": (11, 6)}.items())[-parameters:])
    plain = {} if modules in ([], None) else {"model.layers.0.self_attn.q_proj": (13, 8)}
    pair = state(parameters=shapes, plain=plain), config(targets=entries, target_modules=modules)
    adapter = open_adapter(pair)
    assert sum(module.kind == "expert" for module in adapter.modules.values()) == EXPERTS * parameters * len(TARGETS)
    assert distance(products(adapter), dense(pair)) < 1e-14


def test_a_module_of_that_name_outside_the_entries_is_a_plain_pair():
    tensors = state(plain={"vision.experts": (13, 8)})
    adapter = open_adapter((tensors, config(targets=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])))
    assert adapter.modules["vision.experts"].kind == "linear"


def test_keys_with_adapter_name_and_foreign_prefix_are_read():
    tensors, settings_ = client()
    named = {f"model.{key}".replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    assert distance(products(open_adapter((named, settings_))), dense((tensors, settings_))) < 1e-14


def test_patterns_are_matched_with_the_name_of_the_parameter():
    both = {f"layers.1.mlp.experts.{name}": 9 for name in ("gate_up_proj", "down_proj")}
    adapter = open_adapter((state(), config(alpha_pattern=both)))
    scales = {name: module.scale for name, module in adapter.modules.items()}
    assert scales["model.layers.1.mlp.experts[0]"] == 3.0
    assert scales["model.layers.0.mlp.experts[0]"] == pytest.approx(5 / 3)
    assert not adapter.notes
    missed = open_adapter((state(), config(alpha_pattern={"layers.1.mlp.experts": 9})))
    assert {module.scale for module in missed.modules.values()} == {5 / 3}
    assert "matches no module" in missed.notes[0]


def test_other_ranks_for_the_parameters_of_a_module_are_refused_without_their_order():
    with pytest.raises(FormatError) as caught:
        open_adapter(mixed(), name="c1")
    assert str(caught.value) == (
        "client 'c1', module 'model.layers.0.mlp.experts': the configuration gives model.layers.0.mlp.experts.down_proj rank 3 and "
        "alpha 5, model.layers.0.mlp.experts.gate_up_proj rank 6 and alpha 10, and no key says which pair is whose; one rank and "
        "alpha for all parameters of a module needed. Name its parameters in the order in which the model registers them, such as "
        "parameter_order=down_proj,gate_up_proj"
    )


def test_other_alphas_alone_are_refused_too():
    with pytest.raises(FormatError, match="no key says which pair is whose"):
        open_adapter((state(), config(alpha_pattern={"experts.down_proj": 6})))


def test_the_order_of_parameters_says_which_pair_is_whose():
    pair = mixed()
    adapter = open_adapter(pair, ORDER)
    assert distance(products(adapter), mixed_updates(pair)) < 1e-14
    assert adapter.modules["model.layers.0.mlp.experts.base_layer[0]"].rank == 6


@pytest.mark.parametrize(
    ("experts", "text"),
    [(4, "in the order of parameter_order its parameters have 8, 2 experts; equal"), (5, "15 rows, which rank 6")],
)
def test_a_wrong_order_shows_in_the_number_of_experts(experts, text):
    with pytest.raises(FormatError, match=text):
        open_adapter(mixed(experts), ReadOptions(parameter_order=("down_proj", "gate_up_proj")))


def test_an_order_that_lacks_a_parameter_does_not_help():
    with pytest.raises(FormatError, match="no key says which pair is whose"):
        open_adapter(mixed(), ReadOptions(parameter_order=("gate_up_proj",)))


def test_an_order_cannot_place_a_pair_among_more_parameters_than_pairs():
    pair = state(parameters={"down_proj": (11, 6)}), config(alpha_pattern={"experts.down_proj": 6})
    with pytest.raises(FormatError, match="Only 1 of them carry a pair: leave the others out of target_parameters"):
        open_adapter(pair, ORDER)


@pytest.mark.parametrize("order", ["gate_up_proj", [1], [""], {"a": 1}])
def test_the_order_is_a_list_of_names(order):
    with pytest.raises(InputError, match="parameter_order"):
        ReadOptions(parameter_order=order)


@pytest.mark.parametrize("rank_from", ["config", "tensor"])
def test_rows_that_the_rank_does_not_divide_are_refused(rank_from):
    with pytest.raises(FormatError) as caught:
        open_adapter((state(rank=3, plain={}), config(rank=4)), ReadOptions(rank_from=rank_from), name="c1")
    assert str(caught.value) == (
        "client 'c1', module 'model.layers.0.mlp.experts.base_layer': lora_A has 15 rows, which rank 4 of the configuration does not "
        "divide; experts * r rows needed. Mend r or rank_pattern"
    )


def without_pairs(depth):
    return {
        key: value
        for key, value in state().items()
        if nesting(key.rsplit(".lora_", 1)[0])[1] != depth or "q_proj" in key
    }


def test_an_inner_pair_without_the_outer_one_is_refused():
    with pytest.raises(
        FormatError, match=r"pairs on 'model.layers.0.mlp.experts.base_layer', and target_parameters names 2"
    ):
        open_adapter((without_pairs(0), config()))


def test_a_single_pair_of_two_possible_parameters_of_one_rank_is_read():
    tensors = without_pairs(1)
    assert distance(products(open_adapter((tensors, config()))), dense((tensors, config()))) < 1e-14


def test_more_pairs_than_parameters_are_refused():
    with pytest.raises(FormatError, match="and target_parameters names 1 parameters of it"):
        open_adapter((state(), config(targets=["experts.gate_up_proj"])))


def test_nested_pairs_without_target_parameters_are_refused():
    with pytest.raises(FormatError, match="and target_parameters names 0 parameters of it"):
        open_adapter((state(), config(targets=[])))


def test_a_flat_pair_without_target_parameters_is_one_of_the_wrong_rank():
    pair = state(parameters={"down_proj": (11, 6)}), config(targets=[])
    with pytest.raises(FormatError, match="the configuration says rank 3, the tensors have 15"):
        open_adapter(pair)


def test_columns_of_B_must_be_the_rows_of_A():
    tensors = state()
    key = f"{PREFIX}{TARGETS[0]}.lora_B.weight"
    tensors[key] = tensors[key][:, :-1]
    with pytest.raises(FormatError, match=r"lora_A \(15, 6\) has 15 rows, lora_B \(11, 14\) has 14 columns"):
        open_adapter((tensors, config()))


def test_convolutions_have_no_experts():
    tensors = state()
    for letter, shape in (("A", (15, 2, 3)), ("B", (11, 15, 1))):
        tensors[f"{PREFIX}{TARGETS[0]}.lora_{letter}.weight"] = torch.ones(shape)
    with pytest.raises(FormatError, match=r"\(experts \* r, n\) and \(m, r \* experts\) needed"):
        open_adapter((tensors, config()))


def test_a_plain_module_named_like_an_expert_is_ambiguous():
    with pytest.raises(FormatError, match=r"'model.layers.0.mlp.experts\[0\]' is ambiguous"):
        open_adapter((state(plain={f"{TARGETS[0]}[0]": (4, 5)}), config()))


def test_the_cap_on_modules_counts_experts_before_they_are_made():
    count = 2 * 2 * EXPERTS + 1
    assert len(open_adapter(client(), ReadOptions(limits=Limits(modules_per_client=count)))) == count
    with pytest.raises(LimitError, match="modules per client"):
        open_adapter(client(), ReadOptions(limits=Limits(modules_per_client=count - 1)))


def test_a_header_that_claims_a_terabyte_of_experts_makes_none():
    A, B = TensorSpec("A", (3 << 40, 1), torch.float32), TensorSpec("B", (1, 3 << 40), torch.float32)
    claimed = LoRAConfig(config(), "c")
    with pytest.raises(LimitError, match="modules per client is 1099511627776; at most 65536"):
        expert_modules(TARGETS[0], {0: (A, B)}, claimed.parameters, claimed, Limits())


def test_an_alpha_of_zero_is_warned_of_once_for_a_module():
    adapter = open_adapter((state(plain={}), config(alpha=0)))
    assert len(adapter.warnings) == 1
    assert "'model.layers.0.mlp.experts' and 1 more: lora_alpha is 0" in adapter.warnings[0]


@pytest.mark.parametrize(("version", "count"), [("0.18.1", 1), ("0.19.0", 0), (None, 0)])
def test_the_layout_of_older_versions_is_noted(version, count):
    notes = open_adapter(client(peft_version=version), name="c").notes
    assert len(notes) == count
    assert all(note.startswith("client 'c': saved by PEFT 0.18.1; from 0.19 on") for note in notes)


@pytest.mark.parametrize("value", ["experts.w1", 3, [1], [""]])
def test_target_parameters_are_a_list_of_names(value):
    with pytest.raises(FormatError, match="target_parameters"):
        open_adapter((state(), {**config(), "target_parameters": value}))


def test_names_of_parameters():
    parameters = TargetParameters(["mlp.experts.down", "up", "experts.down", "up"], ["up", "down"])
    assert parameters.of("a.mlp.experts") == ("a.mlp.experts.down", "a.mlp.experts.up")
    assert parameters.of("mlp.experts") == ("mlp.experts.down", "mlp.experts.up")
    assert parameters.of("a.xmlp.experts") == ("a.xmlp.experts.down", "a.xmlp.experts.up")
    assert parameters.of("q_proj") == ("q_proj.up",)
    assert parameters.names("experts")
    assert not parameters.names("q_proj")
    assert parameters.ordered(["x.down", "x.up"]) == ["x.up", "x.down"]
    assert parameters.ordered(["x.down", "x.other"]) is None
    assert TargetParameters([]).of("experts") == ()


def test_thousands_of_names_are_looked_up_in_no_time():
    names = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(20000)]
    parameters = TargetParameters(names)
    assert all(len(parameters.of(name.rpartition(".")[0])) == 1 for name in names)


def test_the_paths_of_the_problem_are_what_the_model_registers():
    assert [path for path, *_ in paths()][:2] == [nested(TARGETS[0], 1), TARGETS[0]]
    assert nesting("a.base_layer.base_layer") == ("a", 2)
    assert nesting("a.base_layer.out_proj") == ("a.base_layer.out_proj", 0)


USUAL = ["experts", "experts.base_layer", "m.experts", "m.experts.base_layer", "q_proj"]
STRANGE = ["", "base_layer", "experts[0]", "experts.base_layer.base_layer", "a..b", "a" * 300]
PATHS = st.sampled_from(5 * USUAL + STRANGE)
NAMED = ["experts.gate", "experts.down", "m.experts.gate", "gate", "down"]
ENTRIES = st.sampled_from(6 * NAMED + ["experts", ".", "", "q_proj.weight"])


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.data())
def test_anything_that_calls_itself_experts_is_read_or_refused_by_name(data):
    """Paths, shapes, entries and patterns of a stranger."""
    tensors = {}
    for path in data.draw(st.lists(PATHS, min_size=1, max_size=3, unique=True)):
        rows = data.draw(st.sampled_from([2] if path == "q_proj" else [2, 4, 6, 8, 4, 6, 8, 3]))
        for letter, shape in (("A", (rows, 5)), ("B", (7, rows))):
            odd = data.draw(st.sampled_from([None] * 60 + [(rows, 5, 1), (rows,), (0, 5), (7, rows + 1)]))
            tensors[f"{path}.lora_{letter}.weight"] = torch.ones(odd or shape)
    fields = data.draw(
        st.fixed_dictionaries(
            {"r": st.sampled_from([2] * 8 + [1, 3]), "target_parameters": st.lists(ENTRIES, min_size=1, max_size=4)},
            optional={
                "target_modules": st.one_of(st.none(), st.just("all-linear"), st.lists(PATHS, max_size=2)),
                "rank_pattern": st.dictionaries(ENTRIES, st.integers(1, 4), max_size=1),
                "alpha_pattern": st.dictionaries(ENTRIES, st.floats(-2, 2), max_size=1),
                "peft_version": st.one_of(st.none(), st.just("0.18"), st.integers()),
            },
        )
    )
    options = ReadOptions(parameter_order=data.draw(st.sampled_from([None, ("gate", "down"), ("gate",)])))
    try:
        adapter = open_adapter((tensors, {"peft_type": "LORA", "lora_alpha": 4, **fields}), options, name="c")
    except FedLoRAError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith("client 'c'")
        return
    event(f"{sum(spec.kind == 'expert' for spec in adapter.modules.values())} experts")
    for name, pair in adapter.pairs():
        spec = adapter.modules[name]
        assert pair.B.shape == (spec.m, spec.rank)
        assert pair.A.shape == (spec.rank, spec.n)
    assert sum(spec.rank * (spec.m + spec.n) for spec in adapter.modules.values()) == sum(
        x.numel() for x in tensors.values()
    )
