"""Rounds: what one leaves for the next is the same in memory and on disc, bit by bit; a previous that cannot be used is named."""

import json
import shutil

import pytest
import torch
from adapter_problems import FIRST, SHAPES, changed, client, clients, distance, poison, products, without
from round_problems import (
    EQUAL,
    MIXED,
    MIXED_DTYPES,
    NAMES,
    REMEMBERING,
    federation,
    in_rounds,
    report_of,
    reported,
    same,
    same_adapter,
    same_result,
)

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.engine.state import STATE_NAME, State
from fedlora_kernels.errors import FormatError, InputError, MismatchError, NonFiniteError
from fedlora_kernels.methods.contract import method_class, method_names

pytestmark = pytest.mark.usefixtures("unsynced")
LAST = "model.layers.1.mlp.down_proj"
METHODS = sorted(REMEMBERING)
PAIRS = sorted(name for name in REMEMBERING if method_class(name).reads_previous == "pair")


def test_every_method_that_reads_the_round_before_is_tested_here():
    ours = [name for name in method_names() if method_class(name).__module__.startswith("fedlora_kernels.")]
    assert METHODS == sorted(name for name in ours if method_class(name).reads_previous)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtypes": MIXED_DTYPES},
        {"dtypes": (torch.float64, *MIXED_DTYPES[1:])},
        {"dtypes": MIXED_DTYPES, "dtype": torch.bfloat16},
        {"memory": 4096},
        {"seed": 3, "write": WriteOptions(uniform_rank=True, fill="random")},
    ],
    ids=["plain", "mixed_dtypes", "mixed_with_float64", "bfloat16_answer", "many_slabs", "uniform_rank"],
)
def test_two_rounds_with_the_state_on_disc_equal_those_in_memory(tmp_path, method, options):
    memory = in_rounds(method, REMEMBERING[method], 2, **options)
    disc = in_rounds(method, REMEMBERING[method], 2, tmp_path, **options)
    for number, (one, other) in enumerate(zip(memory, disc, strict=True)):
        assert same_result(one, other), f"round {number} differs"


@pytest.mark.parametrize("method", METHODS)
def test_ten_rounds_with_the_state_on_disc_equal_those_in_memory(tmp_path, method):
    memory = in_rounds(method, REMEMBERING[method], 10)
    disc = in_rounds(method, REMEMBERING[method], 10, tmp_path)
    assert [result.state.round for result in disc] == list(range(10))
    for number, (one, other) in enumerate(zip(memory, disc, strict=True)):
        assert same_result(one, other), f"round {number} differs"


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory", [None, 1, 100_000])
def test_ten_rounds_of_every_dtype_and_memory(tmp_path, method, dtype, memory):
    options = {"dtypes": MIXED_DTYPES, "dtype": dtype, "memory": memory}
    memories = in_rounds(method, REMEMBERING[method], 10, **options)
    for one, other in zip(memories, in_rounds(method, REMEMBERING[method], 10, tmp_path, **options), strict=True):
        assert same_result(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_the_round_before_changes_the_next(method):
    """Guards the tests above: a method that forgot its previous would pass them."""
    ranks = REMEMBERING[method]
    first = aggregate(federation(0, ranks), method)
    other = aggregate(federation(7, ranks, present=range(5), groups=(1, 1, 0, 0, 0)), method)
    # of raflora and prelort only the ranks that nobody present has remember
    absent = {k for k, rank in enumerate(ranks) if rank == max(MIXED)}
    now = federation(1, ranks, present=[k for k in (0, 1, 2) if k not in absent])
    one, two = (aggregate(now, method, previous=before) for before in (first, other))
    assert not (same_adapter(one.adapter, two.adapter) and one.report["decision"] == two.report["decision"])


@pytest.mark.parametrize("method", METHODS)
def test_every_form_of_previous_is_one_and_the_same(tmp_path, method):
    ranks = REMEMBERING[method]
    first = aggregate(federation(0, ranks), method, out=tmp_path / "r0", per_client=True)
    wanted = aggregate(federation(1, ranks), method, previous=tmp_path / "r0")
    forms = [str(tmp_path / "r0"), first, first.state, State.load(tmp_path / "r0")]
    if method in PAIRS:
        forms += [first.adapter, fk.open_adapter(tmp_path / "r0"), State(method, 0, adapter=first.adapter)]
    for form in forms:
        assert same_result(wanted, aggregate(federation(1, ranks), method, previous=form))


@pytest.mark.parametrize("method", METHODS)
def test_a_round_may_replace_the_output_of_the_round_before(tmp_path, method):
    """What is read of the old output stays readable while it is replaced."""
    ranks, out = REMEMBERING[method], tmp_path / "out"
    wanted = in_rounds(method, ranks, 3, tmp_path / "apart" if (tmp_path / "apart").mkdir() is None else None)
    previous = None
    for number in range(3):
        now = federation(number, ranks)
        again = aggregate(
            now, method, previous=previous, out=out, overwrite=number > 0, per_client="personal" in method_class(method).gives,
            **reported(method, now),
        )  # fmt: skip
        assert same_result(wanted[number], again)
        previous = out if number % 2 else again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart", "out"]


@pytest.mark.parametrize("method", ["prelort", "raflora"])
def test_the_scale_of_a_previous_adapter_counts(method):
    """A pair of scale 3 is the pair with 3 B; it shows where nobody present has the last ranks."""
    state, settings = client(5, rank=4, alpha=12)
    folded = {key: value.double() * (3.0 if "lora_B" in key else 1.0) for key, value in state.items()}
    now = federation(2, MIXED, present=(0, 1, 2))
    one, other, without_scale = (
        products(aggregate(now, method, previous=fk.open_adapter(pair), round=2).adapter)
        for pair in (
            (state, settings),
            (folded, {**settings, "lora_alpha": 4}),
            (state, {**settings, "lora_alpha": 4}),
        )
    )
    assert distance(one, other) < 1e-6
    assert distance(one, without_scale) > 1e-2


@pytest.mark.parametrize("method", ["fedrot", "fedtree"])
def test_a_method_that_cannot_go_on_without_previous_says_so(method):
    with pytest.raises(InputError, match=rf"method '{method}' in round 2 needs previous=.*start with round=0"):
        aggregate(clients((4, 4)), method, round=2)
    assert aggregate(clients((4, 4)), method, round=0).report["round"] == 0


@pytest.mark.parametrize("method", ["prelort", "raflora"])
def test_a_method_that_can_start_anywhere_does(method):
    assert aggregate(clients(), method, round=5).report["round"] == 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["memory", "disc"])
def test_the_result_of_another_method_is_refused_by_name(tmp_path, method, place):
    other = aggregate(clients((4, 4)), "fedit", out=None if place == "memory" else tmp_path / "out")
    previous = other if place == "memory" else tmp_path / "out"
    with pytest.raises(
        InputError, match=rf"previous is a result of method 'fedit'; method '{method}' needs one of its own"
    ):
        aggregate(clients((4, 4)), method, previous=previous)


def test_a_method_that_reads_nothing_takes_the_round_of_any_result(tmp_path):
    first = aggregate(clients((4, 4)), "fedrot", out=tmp_path / "out")
    assert aggregate(clients(), previous=first).report["round"] == 1
    assert aggregate(clients(), previous=tmp_path / "out").report["round"] == 1


def tree(tmp_path, **options):
    """A fedtree output of round 0, its clients those of the next round too."""
    out = tmp_path / "out"
    aggregate(federation(0), "fedtree", out=out, per_client=True, **options)
    return out


def test_a_folder_without_its_state_file_is_refused_by_name(tmp_path):
    out = tree(tmp_path)
    (out / STATE_NAME).unlink()
    with pytest.raises(
        InputError, match=r"previous holds no fedlora_state\.safetensors, which method 'fedtree' needs; .*round 0"
    ):
        aggregate(federation(1), "fedtree", previous=out)


def test_a_state_file_of_another_method_or_round_is_refused_by_name(tmp_path):
    out = tree(tmp_path)
    report = report_of(out)
    for change, text in (
        ({"method": {**report["method"], "name": "prelort"}}, r"of method 'fedtree', but report\.json says 'prelort'"),
        ({"round": 4}, r"of round 0, but report\.json says 4"),
    ):
        (out / "report.json").write_text(json.dumps({**report, **change}))
        with pytest.raises(FormatError, match=rf"fedlora_state\.safetensors: {text}"):
            aggregate(federation(1), "fedtree", previous=out)


@pytest.mark.parametrize("left", [0, 7, 100, 0.5, -1])
def test_a_truncated_state_file_is_refused_by_name(tmp_path, left):
    out = tree(tmp_path)
    data = (out / STATE_NAME).read_bytes()
    cut = int(len(data) * left) if isinstance(left, float) else left
    (out / STATE_NAME).write_bytes(data[:cut])
    with pytest.raises(FormatError, match=r"fedlora_state\.safetensors: "):
        aggregate(federation(1), "fedtree", previous=out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"round": 0}', '{"round": "0", "method": {"name": "fedrot"}}', "\0"])
def test_a_broken_report_is_refused_by_name(tmp_path, text):
    aggregate(federation(0), "fedrot", out=tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"previous .*out: report\.json .*; an output folder needed"):
        aggregate(federation(1), "fedrot", previous=tmp_path / "out")


def test_a_state_without_its_memory_is_refused_by_name(tmp_path):
    out = tree(tmp_path)
    state = State.load(out)
    bare = State("fedtree", 0, dict(state.tensors), fk.engine.state.Memory({}, {}))
    with pytest.raises(InputError, match="fedtree: previous holds no tree"):
        aggregate(federation(1), "fedtree", previous=bare)
    with pytest.raises(InputError, match=r"previous holds no fedlora_state"):
        aggregate(federation(1), "fedtree", previous=State("fedtree", 0))


def test_a_folder_without_its_adapter_is_refused_by_name(tmp_path):
    out = tmp_path / "out"
    aggregate(federation(0), "fedrot", out=out)
    (out / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"no adapter_config.json; a PEFT adapter folder needed"):
        aggregate(federation(1), "fedrot", previous=out)
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"previous holds no common adapter, which method 'fedrot' needs; give the whole output"
    ):
        aggregate(federation(1), "fedrot", previous=out)


@pytest.mark.parametrize("method", METHODS)
def test_a_module_that_is_missing_in_previous(method):
    """Refused by name where the method needs every module, else it starts anew."""
    ranks = REMEMBERING[method]
    fewer = {name: without(pair, FIRST) for name, pair in federation(0, ranks).items()}
    first = aggregate(fewer, method)
    if method_class(method).needs_previous:
        with pytest.raises(InputError, match=rf"module '{FIRST}'"):
            aggregate(federation(1, ranks), method, previous=first)
        return
    result = aggregate(federation(1, ranks), method, previous=first)
    whole = aggregate(federation(1, ranks), method, previous=aggregate(federation(0, ranks), method))
    fresh = aggregate(federation(1, ranks), method, round=1)
    for name in SHAPES:
        wanted = fresh if name == FIRST else whole
        assert same(result.adapter[name].A, wanted.adapter[name].A)
        assert same(result.adapter[name].B, wanted.adapter[name].B)


@pytest.mark.parametrize("method", PAIRS)
def test_another_shape_in_previous_is_refused_by_name(method):
    first = aggregate(federation(0, REMEMBERING[method], shapes={**SHAPES, FIRST: (38, 23)}), method)
    with pytest.raises(MismatchError, match=rf"module '{FIRST}': 37 x 23 in the clients, 38 x 23 in previous"):
        aggregate(federation(1, REMEMBERING[method]), method, previous=first)


@pytest.mark.parametrize("change", [{"shapes": {**SHAPES, LAST: (20, 53)}}, {"ranks": (3,) * 5}], ids=["shape", "rank"])
def test_another_shape_or_rank_in_the_state_is_refused_by_name(change):
    """Where a cluster of which nobody is there keeps its last mean; in one of its own the state is not looked at."""
    first = aggregate(federation(0), "fedtree")
    assert [["ada", "dora"], ["ben", "cleo", "emil"]] == first.report["decision"]["clusters"]["1"]
    with pytest.raises(MismatchError, match=r"module 'model\.layers\.1.*kept is \d+ x \d+, this round's are \d+ x \d+"):
        aggregate(federation(1, present=(1, 2), **change), "fedtree", previous=first)


def test_another_rank_in_previous_is_refused_by_name():
    first = aggregate(federation(0, EQUAL), "fedrot")
    with pytest.raises(MismatchError, match="previous pair has rank 4, the clients have rank 3"):
        aggregate(federation(1, (3,) * 5), "fedrot", previous=first)


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("part", ["A", "B"])
def test_a_number_in_previous_that_is_not_finite_is_named_as_such(method, part):
    """Not blamed on clients, whose numbers are all finite."""
    first = aggregate(federation(0, REMEMBERING[method]), method)
    state = {}
    for name in first.adapter:
        for factor in "AB":
            state[f"base_model.model.{name}.lora_{factor}.weight"] = getattr(first.adapter[name], factor).clone()
    state[f"base_model.model.{FIRST}.lora_{part}.weight"][-1, -1] = float("nan")
    broken = fk.open_adapter((state, dict(first.adapter.config)))
    now = federation(1 if part == "A" else 2, REMEMBERING[method], present=(0, 1, 2))
    with pytest.raises(NonFiniteError, match=rf"previous, module '{FIRST}', lora_{part}: nan at index"):
        aggregate(now, method, previous=broken, round=1 if part == "A" else 2)


def test_modules_left_out_as_zero_are_asked_for_by_the_remedy():
    zero = {
        name: ({k: torch.zeros_like(v) if FIRST in k and "lora_B" in k else v for k, v in state.items()}, settings)
        for name, (state, settings) in federation(0).items()
    }
    first = aggregate(zero, "fedrot", write=WriteOptions(drop_zero=True))
    assert FIRST not in first.adapter
    with pytest.raises(MismatchError, match=rf"module '{FIRST}': not in previous; .*drop_zero=False"):
        aggregate(federation(1), "fedrot", previous=first)
    whole = aggregate(zero, "fedrot")
    assert FIRST in aggregate(federation(1), "fedrot", previous=whole).adapter


def test_a_client_that_the_tree_does_not_know_is_named():
    first = aggregate(federation(0, present=(0, 1, 2, 3)), "fedtree")
    with pytest.raises(InputError, match="client 'emil': not in the tree"):
        aggregate(federation(1, present=(0, 4)), "fedtree", previous=first)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"nobody": 0.5}, "client_state: no client 'nobody' in this round"),
        ([0.5], "client_state holds 1 entries for 5 clients"),
        (0.5, "client_state is of type float; a mapping by client name, or a list in their order"),
        ("0.5", "client_state is of type str"),
        ({"ada": 1.5}, "client_state of client 'ada'"),
        ({"ada": float("nan")}, "client_state of client 'ada'"),
    ],
)
def test_a_wrong_client_state_is_refused(value, text):
    with pytest.raises(InputError, match=text):
        aggregate(federation(0), "fedtree", client_state=value)


def test_client_state_by_name_and_by_order_are_one():
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    by_order = aggregate(federation(0), "fedtree", client_state=values)
    by_name = aggregate(federation(0), "fedtree", client_state=dict(zip(NAMES, values, strict=True)))
    assert same_result(by_order, by_name)
    assert by_order.report["decision"]["lam"]["ben"]


def test_the_client_state_of_a_dropped_client_harms_nobody():
    bad = {**federation(0), "gone": "/no/such/folder"}
    state = dict.fromkeys(bad, 0.25)
    with pytest.warns(UserWarning, match="'gone' was dropped"):
        result = aggregate(bad, "fedtree", policy="drop", client_state=state)
    wanted = aggregate(federation(0), "fedtree", client_state=dict.fromkeys(NAMES, 0.25))
    assert same_result(result, wanted)


def test_the_state_is_that_of_the_clients_that_were_there(tmp_path):
    """A client that skips a round is still in the tree, and comes back to its cluster."""
    first = aggregate(federation(0), "fedtree", out=tmp_path / "r0", per_client=True)
    second = aggregate(federation(1, present=(0, 2)), "fedtree", previous=first, out=tmp_path / "r1", per_client=True)
    third = aggregate(federation(2, present=(0, 1, 2, 3, 4)), "fedtree", previous=tmp_path / "r1")
    for key in ("cuts", "clusters"):
        assert first.report["decision"][key] == second.report["decision"][key] == third.report["decision"][key]
    assert sorted(second.personal) == ["ada", "cleo"]
    assert sorted(third.personal) == sorted(NAMES)


@pytest.mark.parametrize("round_", [0, 3])
def test_a_given_round_stands_above_that_of_previous(round_):
    first = aggregate(federation(0), "fedrot")
    assert aggregate(federation(1), "fedrot", previous=first, round=round_).state.round == round_


def test_modules_that_come_and_go(tmp_path):
    """A module that nobody present has is not in the output; when it comes back it has no past."""
    read = ReadOptions(missing="renormalize")
    ranks = REMEMBERING["prelort"]
    for root in (None, tmp_path):
        previous = None
        for number in range(3):
            now = federation(number, ranks, present=(0, 1, 2))
            if number == 1:
                now = {name: without(pair, FIRST) for name, pair in now.items()}
            place = {} if root is None else {"out": root / str(number)}
            result = aggregate(now, "prelort", previous=previous, read=read, **place)
            previous = result if root is None else root / str(number)
            assert (FIRST in result.adapter) == (number != 1)


def test_a_copy_of_an_output_is_as_good_as_the_output(tmp_path):
    out = tree(tmp_path)
    shutil.copytree(out, tmp_path / "copy")
    shutil.rmtree(out)
    assert aggregate(federation(1), "fedtree", previous=tmp_path / "copy").report["round"] == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.filterwarnings("ignore:client 'ben' was dropped", "ignore:method 'fedtree' uses no weights")
def test_who_is_dropped_or_rejected_in_a_later_round_is_as_if_never_given(method, memory):
    """What has been read of the clients, and of the round before, is that of those who are left."""
    ranks = REMEMBERING[method]
    first = aggregate(federation(0, ranks), method)
    now = federation(1, ranks, present=range(5))
    bad = {**now, "ben": changed(now["ben"], "A", poison())}
    dropped = aggregate(bad, method, previous=first, policy="drop", memory=memory)
    rejected = aggregate(now, method, previous=first, robust=fk.MultiKrum(f=1), memory=memory)
    names = [row["name"] for row in rejected.report["clients"] if row["status"] != "rejected"]
    assert len(names) == 4
    for result, left in ((dropped, [name for name in now if name != "ben"]), (rejected, names)):
        alone = aggregate({name: now[name] for name in left}, method, previous=first, memory=memory)
        assert same_result(result, alone)


@pytest.mark.parametrize("method", ["fedrot", "fedtree"])
def test_round_zero_starts_anew_whatever_was_before(method):
    """The remedy that fedtree names for clients that its tree does not know."""
    first = aggregate(federation(0, present=(0, 1, 2)), method)
    anew = aggregate(federation(1, present=range(5)), method, previous=first, round=0)
    assert same_result(anew, aggregate(federation(1, present=range(5)), method))
