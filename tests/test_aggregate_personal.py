"""What each client receives, in memory and on disc, of every method; residuals; frozen factors; without measuring."""

import copy
import json
import math
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from adapter_problems import (
    FIRST,
    PREFIX,
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
from make_adapters import write
from round_problems import MIXED, federation, report_of, reported, same, same_adapter

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.errors import InputError, MismatchError, NonFiniteError
from fedlora_kernels.linalg.rules import Energy, Rank
from fedlora_kernels.methods.contract import method_class, method_names

pytestmark = pytest.mark.usefixtures("unsynced")
ALL = Energy(1.0)
OURS = [name for name in method_names() if method_class(name).__module__.startswith("fedlora_kernels.")]
PERSONAL = [name for name in OURS if "personal" in method_class(name).gives]
FROZEN = {"ffa": 0, "fedsvd": 0, "rolora": 0}
"""Methods whose clients hold one A, and a round in which they do."""


def problem(method, **options):
    """Five clients that the method takes: of mixed ranks where it can, with one frozen A where it must."""
    ranks = (4,) * 5 if method_class(method).equal_ranks else MIXED
    made = federation(0, ranks, **options)
    if method in FROZEN:
        first = made["emil"][0]
        for name, (state, settings) in made.items():
            A = {key: first[key][: settings["r"]].clone() for key in state if "lora_A" in key}
            made[name] = {**state, **A}, settings
    return made


def run(method, pairs=None, **options):
    pairs = problem(method) if pairs is None else pairs
    if "krum" in method:
        options.setdefault("f", 1)
    return aggregate(pairs, method, weights=options.pop("weights", None), **reported(method, pairs), **options)


@lru_cache(maxsize=64)
def in_memory(method):
    """The plain run of a method, made once."""
    return run(method)


@pytest.mark.parametrize("method", OURS)
def test_folders_of_clients_equal_what_they_receive_in_memory(tmp_path, method):
    """--per-client holds for_client(k, scale=1.0), in the form of PEFT."""
    memory = in_memory(method)
    disc = run(method, out=tmp_path / "out", per_client=True)
    there = [row["name"] for row in memory.report["clients"] if row["status"] != "rejected"]
    assert sorted(disc.personal) == sorted(there)
    for row in report_of(tmp_path / "out")["clients"]:
        if row["name"] not in there:
            assert row["folder"] is None
            continue
        found = fk.open_adapter(tmp_path / "out" / row["folder"])
        wanted = memory.for_client(row["name"], scale=1.0)
        assert list(found) == list(wanted)
        for name in wanted:
            assert found[name].scale == wanted[name].scale == 1.0
            assert same(found[name].B, wanted[name].B)
            assert same(found[name].A, wanted[name].A)
        settings = json.loads((tmp_path / "out" / row["folder"] / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA"
        assert settings["r"] == settings["lora_alpha"] == max(spec.rank for spec in found.modules.values())
        assert same_adapter(disc.for_client(row["name"]), memory.for_client(row["name"]))
        assert same_adapter(disc.for_client(row["name"], rank=3), memory.for_client(row["name"], rank=3))
        assert same_adapter(disc.for_client(row["name"], rank=11), memory.for_client(row["name"], rank=11))


@pytest.mark.parametrize("method", OURS)
def test_the_clients_own_scale_gives_back_the_baked_product(method):
    result = in_memory(method)
    pairs = problem(method)
    for name, (state, settings) in pairs.items():
        if method in PERSONAL and name not in result.personal:
            continue
        sent, baked = result.for_client(name), result.for_client(name, scale=1.0)
        own = settings["lora_alpha"] / settings["r"]
        assert {spec.scale for spec in sent.modules.values()} == {own}
        assert {spec.scale for spec in baked.modules.values()} == {1.0}
        assert distance(products(sent), products(baked)) < 1e-6
        assert all(f"{PREFIX}{module}.lora_A.weight" in state for module in sent)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("rank", [1, 13])
def test_any_rank_can_be_asked_for(method, rank):
    result = in_memory(method)
    name = next(iter(result.personal), "cleo")
    sent, whole = result.for_client(name, rank=rank, scale=1.0), result.for_client(name, rank=40, scale=1.0)
    assert {spec.rank for spec in sent.modules.values()} == {rank}
    for module in sent:
        assert same(sent[module].B, whole[module].B[:, :rank])


@pytest.mark.parametrize("method", PERSONAL)
@pytest.mark.parametrize("place", ["memory", "disc"])
def test_who_took_no_part_has_no_personal_adapter(tmp_path, method, place):
    pairs = {**problem(method), "nan": changed(client(9, rank=4), "A", poison()), "zero": client(8, rank=4)}
    weights = [1.0] * 6 + [0.0]
    options = {} if place == "memory" else {"out": tmp_path / "out", "per_client": True}
    with pytest.warns(UserWarning, match="'nan' was dropped"):
        result = run(method, pairs, weights=weights, policy="drop", robust=fk.MultiKrum(f=1), **options)
    rejected = [row["name"] for row in result.report["clients"] if row["status"] == "rejected"]
    assert len(rejected) == 1
    for name in ("nan", "zero", *rejected):
        with pytest.raises(
            InputError, match=f"client '{name}' has no adapter of its own in this result: it took no part"
        ):
            result.for_client(name)
    assert set(result.personal) == set(pairs) - {"nan", "zero", *rejected}
    with pytest.raises(InputError, match="no client 'nobody'; clients: ada, ben"):
        result.for_client("nobody")


@pytest.mark.parametrize("method", ["fedit", "florist"])
def test_of_a_common_pair_everybody_receives(method):
    pairs = {**problem("fedit"), "zero": client(8, rank=4)}
    result = run(method, pairs, weights=[1.0] * 5 + [0.0], robust=fk.MultiKrum(f=1))
    for name in pairs:
        assert distance(products(result.for_client(name)), products(result.adapter)) < 1e-6


def test_personal_pairs_that_were_not_kept_on_disc_are_named(tmp_path):
    result = run("clair", out=tmp_path / "out")
    with pytest.raises(InputError, match=r"personal adapters were not kept\. per_client=True keeps them on disc"):
        result.for_client("ada")


@pytest.mark.parametrize("method", sorted(set(PERSONAL) - {"clair"}))
def test_a_method_without_a_common_pair_needs_folders_for_clients(tmp_path, method):
    with pytest.raises(InputError, match=rf"method '{method}' has no common pair; per_client=True writes"):
        run(method, out=tmp_path / "out")
    assert run(method).adapter is None
    assert list(tmp_path.iterdir()) == []


def test_a_position_is_that_of_the_caller_whoever_can_be_read(tmp_path):
    pairs = {"gone": tmp_path / "gone", "a": client(0), "b": client(1)}
    with pytest.warns(UserWarning, match="'gone' was dropped"):
        result = aggregate(pairs, policy="drop")
    assert [result.for_client(k).label for k in (1, 2)] == ["a", "b"]
    for key in (0, "gone"):
        with pytest.raises(InputError, match="client 'gone' could not be read"):
            result.for_client(key)


def extras_of(k):
    """A bias change of rank-4 clients with their own scales, a head, and a bias that is absolute."""
    state, settings = client(k, rank=4, alpha=4 * (k + 1))
    state[f"{PREFIX}{FIRST}.lora_B.bias"] = torch.full((37,), float(k + 1))
    state[f"{PREFIX}score.weight"] = torch.full((2, 3), 10.0 * (k + 1))
    return state, {**settings, "lora_bias": True, "modules_to_save": ["score"]}


@pytest.mark.parametrize("method", ["fedit", "florist", "fedex", "prelort", "clair", "fedtree", "fedsa"])
@pytest.mark.parametrize("place", ["memory", "disc"])
def test_tensors_that_are_no_factors_reach_the_clients(tmp_path, method, place):
    """As means for everybody; those of a method that leaves them with their clients, as each has them."""
    pairs = {name: extras_of(k) for k, name in enumerate("abc")}
    options = {} if place == "memory" else {"out": tmp_path / "out", "per_client": True}
    result = run(method, pairs, **options)
    own = method_class(method).own_extras
    for k, name in enumerate("abc"):
        found = result.for_client(name, scale=1.0)
        bias = (k + 1.0) * (k + 1) if own else (1 + 4 + 9) / 3
        head = 10.0 * (k + 1) if own else 20.0
        assert found.extra(f"{FIRST}.lora_B.bias").tolist() == pytest.approx([bias] * 37, rel=1e-6)
        assert found.extra("score.weight").flatten().tolist() == pytest.approx([head] * 6, rel=1e-6)
        mine = result.for_client(name)
        assert mine.extra(f"{FIRST}.lora_B.bias").tolist() == pytest.approx([bias / (k + 1)] * 37, rel=1e-6)
        if place == "disc":
            assert same_adapter(result.personal[name], fk.open_adapter(tmp_path / "out" / "clients" / name))
            assert list(result.personal[name].extras) == list(found.extras)
            assert result.personal[name].config["modules_to_save"] == ["score"]
            assert result.personal[name].config["lora_bias"] is True
    if result.residual is not None:
        assert not result.residual.extras
    assert (result.report["extras"][0]["rule"] == "own") == own


@pytest.mark.parametrize("method", ["florist", "fedsa"])
def test_extras_of_some_owners_stay_with_them(tmp_path, method):
    pairs = {"a": extras_of(0), "b": extras_of(1), "c": (client(2, rank=4)[0], extras_of(2)[1])}
    read = ReadOptions(extras="owners")
    result = run(method, pairs, read=read, out=tmp_path / "out", per_client=True)
    assert [sorted(result.personal[name].extras) for name in "abc"] == [
        sorted(result.personal["a"].extras), sorted(result.personal["a"].extras), [],
    ]  # fmt: skip
    assert len(result.personal["a"].extras) == 2


@pytest.mark.parametrize("method", ["fedit", "fedsa", "clair"])
def test_a_target_without_extras_refuses_them_before_anything_is_written(tmp_path, method):
    pairs = {name: extras_of(k) for k, name in enumerate("ab")}
    with pytest.raises(InputError, match="target 'vllm' holds no extra tensors"):
        run(method, pairs, write=WriteOptions(target="vllm"), out=tmp_path / "out", per_client=True)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_number_in_an_extra_that_stays_with_its_client_is_named():
    pairs = {name: extras_of(k) for k, name in enumerate("ab")}
    pairs["b"][0][f"{PREFIX}score.weight"][1, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"client 'b', tensor 'score\.weight': inf at index \(1, 1\)"):
        run("fedsa", pairs)


@pytest.mark.parametrize("method", ["zero_pad", "prelort", "fedsa", "clair", "fedex"])
@pytest.mark.parametrize("missing", ["zero", "renormalize"])
def test_a_client_that_lacks_a_module_receives_those_that_it_has(tmp_path, method, missing):
    pairs = {"a": client(0), "b": without(client(1), FIRST), "c": client(2)}
    read = ReadOptions(missing=missing)
    memory, disc = run(method, pairs, read=read), run(method, pairs, read=read, out=tmp_path / "out", per_client=True)
    for result in (memory, disc):
        assert [FIRST in result.for_client(name) for name in "abc"] == [True, False, True]
    assert [FIRST in disc.personal[name] for name in "abc"] == [True, False, True]


@pytest.mark.parametrize("method", ["fedex", "fedmomentum"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("place", ["memory", "disc"])
def test_pair_and_residual_are_the_dense_sum(tmp_path, method, dtype, limit, place):
    pairs = clients((4, 4, 4, 4), dtype=dtype)
    weights = [1.0, 2.0, 3.0, 4.0]
    options = {} if place == "memory" else {"out": tmp_path / "out"}
    result = run(method, pairs, weights=weights, **options)
    if method == "fedmomentum":
        limit = max(limit, 0.01 * 1.001)  # energy 0.9999: the distance is its square root
    residual = result.residual if place == "memory" else fk.open_adapter(tmp_path / "out" / "residual")
    pair, rest = products(result.adapter), products(residual)
    assert distance({name: pair[name] + rest[name] for name in pair}, weighted(pairs, weights)) < limit
    assert distance(pair, weighted(pairs, weights)) > 0.1
    assert {spec.scale for spec in residual.modules.values()} == {1.0}
    for row in result.report["modules"]:
        assert row["residual_rank"] == residual.modules[row["name"]].rank


def test_a_residual_of_nothing_is_not_written(tmp_path):
    """Where all A are equal the mean is exact, and there is nothing to add to the base."""
    same_pair = [client(0), client(0)]
    result = run("fedex", same_pair, out=tmp_path / "out")
    assert result.residual is None
    assert not (tmp_path / "out" / "residual").exists()
    assert {row["residual_rank"] for row in result.report["modules"]} == {0}
    one = [changed(client(0), "B", lambda t: 2 * t, FIRST), client(0)]
    mixed = [changed(one[0], "A", lambda t: -t, FIRST), client(0)]
    some = run("fedex", mixed, out=tmp_path / "some")
    assert list(some.residual) == [FIRST]


def test_methods_without_a_residual_have_none():
    for method in OURS:
        if "residual" not in method_class(method).gives:
            assert in_memory(method).residual is None


@pytest.mark.parametrize(("method", "round_", "part"), [
    ("ffa", 0, "A"), ("ffa", 3, "A"), ("fedsvd", 0, "A"), ("rolora", 0, "A"), ("rolora", 1, "B"), ("rolora", 2, "A"),
])  # fmt: skip
@pytest.mark.parametrize("memory", [None, 1])
def test_frozen_factors_that_differ_name_both_clients(tmp_path, method, round_, part, memory):
    base, settings = client(0)
    pairs = {}
    for k, name in enumerate("abcd"):
        trained = client(k + 1)[0]
        pairs[name] = {key: value if f"lora_{part}" in key else trained[key] for key, value in base.items()}, settings
    result = aggregate(pairs, method, round=round_, memory=memory)
    assert distance(products(result.adapter), weighted(list(pairs.values()))) < 1e-6
    last = list(SHAPES)[-1]

    def nudge(tensor):
        tensor[2, 3] = torch.nextafter(tensor[2, 3], torch.tensor(math.inf))
        return tensor

    pairs["c"] = changed(pairs["c"], part, nudge, last)
    place = "row 2 of lora_A" if part == "A" else "column 3 of lora_B times its scale"
    with pytest.raises(MismatchError, match=rf"clients 'a' and 'c', module '{last}': {place} differs"):
        aggregate(pairs, method, round=round_, memory=memory, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    # who takes no part need not agree
    aggregate(pairs, method, round=round_, weights=[1, 1, 0, 1], memory=memory)


def test_nested_frozen_factors_and_dtypes_agree():
    base = client(0, rank=8)[0]
    pairs = []
    for k, (rank, dtype) in enumerate(((8, torch.float32), (3, torch.float64), (5, torch.float32))):
        state, settings = client(k + 1, rank=rank, dtype=dtype)
        pairs.append(
            ({key: base[key][:rank].to(dtype) if "lora_A" in key else value for key, value in state.items()}, settings)
        )
    result = aggregate(pairs, "ffa")
    assert distance(products(result.adapter), weighted(pairs)) < 1e-12
    state, settings = pairs[1]
    pairs[1] = {k: v.bfloat16() if "lora_A" in k else v for k, v in state.items()}, settings
    with pytest.raises(MismatchError, match="clients 'client_0' and 'client_1'"):
        aggregate(pairs, "ffa")


@pytest.mark.parametrize("method", OURS)
def test_without_measuring_only_the_distance_is_unknown(tmp_path, method):
    whole = in_memory(method)
    result = run(method, measure=False, out=tmp_path / "out", per_client=True)
    assert same_adapter(result.adapter, whole.adapter)
    for key in result.personal.keys() & whole.personal.keys():
        assert same_adapter(result.personal[key], whole.personal[key])
    report = report_of(tmp_path / "out")
    known = [row["error"] is not None for row in report["modules"]]
    assert len(set(known)) == 1
    if known[0]:  # the distance comes with the decomposition
        assert report["totals"]["error"] == whole.report["totals"]["error"]
        return
    assert {row["error_bound"] for row in report["modules"]} == {None}
    assert report["totals"]["error"] is None
    assert report["totals"]["error_bound"] is None
    assert "error unknown" in repr(result)
    if result.adapter is not None:
        assert "fedlora.energy_kept" not in result.adapter.metadata
        assert "fedlora.error_bound" not in result.adapter.metadata


@pytest.mark.parametrize(
    "method", ["fedit", "zero_pad", "hetlora", "prelort", "fedrot", "lora_fair", "ffa", "rolora", "flora"]
)
def test_methods_of_factors_do_not_measure_unless_asked(method):
    report = run(method, measure=False).report
    assert report["totals"]["error"] is None
    assert {row["energy"] for row in report["modules"]} == {None}


@pytest.mark.parametrize("method", OURS)
def test_reports_are_plain_json(tmp_path, method):
    result = run(method, out=tmp_path / "out", per_client=True)
    assert report_of(tmp_path / "out") == json.loads(json.dumps(result.report, allow_nan=False))
    assert result.report["method"]["name"] == method


@pytest.mark.parametrize("method", [*PERSONAL, "fedex", "fedmomentum", "flexlora", "prelort", "geometric_median"])
def test_two_runs_on_disc_are_the_same_bytes(tmp_path, method):
    for k in "ab":
        run(method, out=tmp_path / k, per_client=True)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("memory", [1, pytest.param(100_000, marks=pytest.mark.full)])
def test_slabs_of_any_size_give_the_same_answer(method, memory):
    whole, part = in_memory(method), run(method, memory=memory)
    for name in whole.personal:
        assert distance(products(part.personal[name]), products(whole.personal[name])) < 1e-5
    for one, other in ((part.adapter, whole.adapter), (part.residual, whole.residual)):
        assert one is other or distance(products(one), products(other)) < 1e-5


@pytest.mark.parametrize("method", OURS)
def test_half_precision_in_and_out(method):
    result = run(method, problem(method, dtypes=(torch.bfloat16,) * 5), dtype="bfloat16")
    adapters = [adapter for adapter in (result.adapter, result.residual, *result.personal.values()) if adapter]
    assert adapters
    assert {adapter[name].B.dtype for adapter in adapters for name in adapter} == {torch.bfloat16}
    assert all(torch.isfinite(adapter[name].B).all() for adapter in adapters for name in adapter)


def test_fedsa_sends_back_the_clients_own_b():
    pairs = {name: client(k, rank=4, alpha=4 * (k + 1)) for k, name in enumerate("abc")}
    result = run("fedsa", pairs)
    for name, (state, _) in pairs.items():
        sent = result.for_client(name)
        torch.testing.assert_close(sent[FIRST].B, state[f"{PREFIX}{FIRST}.lora_B.weight"], rtol=1e-6, atol=0)
    assert torch.equal(result.for_client("a")[FIRST].A, result.for_client("c")[FIRST].A)


def test_a_client_of_scale_zero_is_told_to_take_the_baked_form():
    pairs = {"a": client(0), "b": client(1, alpha=0)}
    with pytest.warns(UserWarning, match="lora_alpha is 0"):
        result = run("fedsa", pairs)
    with pytest.raises(InputError, match=r"client 'b', module .*: the client's scale is 0.*use scale=1\.0"):
        result.for_client("b")
    assert FIRST in result.for_client("b", scale=1.0)


def test_clients_and_residual_beside_a_cut_sum():
    """The default florist cuts; what clients receive is the cut pair, prefixes of it where asked."""
    pairs = clients((8, 8, 8))
    result = aggregate(pairs, rule=Rank(5))
    assert distance(products(result.for_client(0)), products(result.adapter)) < 1e-6
    U, S, Vh = torch.linalg.svd(weighted(pairs)[FIRST], full_matrices=False)
    found = products(result.for_client(1, rank=2))[FIRST]
    assert float((found - U[:, :2] * S[:2] @ Vh[:2]).norm() / updates(pairs[0])[FIRST].norm()) < 1e-5


class Net(torch.nn.Module):
    """Two layers of other shapes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(7, 11, bias=False), torch.nn.Linear(11, 5, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("method", ["clair", "fedex", "fedtree", "prelort"])
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_the_folders_of_clients_and_the_residual(tmp_path, method):
    peft = pytest.importorskip("peft")
    shapes = {"up": (11, 7), "down": (5, 11)}
    ranks = (4, 4, 4) if method_class(method).equal_ranks else (4, 2, 3)
    pairs = {
        name: client(k, rank=rank, alpha=2 * rank, shapes=shapes, target_modules=["up", "down"], task_type=None)
        for k, (name, rank) in enumerate(zip("abc", ranks, strict=True))
    }
    result = run(method, pairs, out=tmp_path / "out", per_client=True)
    torch.manual_seed(1)
    base = Net()
    folders = {f"clients/{name}": adapter for name, adapter in result.personal.items()}
    if result.residual is not None:
        folders["residual"] = result.residual
    assert len(folders) == 3 + (method == "fedex")
    for folder, adapter in folders.items():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out" / folder)
        merged = loaded.merge_and_unload()
        found = {name: (getattr(merged, name).weight - getattr(base, name).weight).double() for name in shapes}
        assert distance({name: delta.detach() for name, delta in found.items()}, products(adapter)) < 1e-5


PEAK = """
import json, sys, threading, time
import psutil, torch
torch.set_num_threads(1)
import fedlora_kernels.methods
from fedlora_kernels.aggregate import aggregate
me = psutil.Process()
method, warm, out, memory, *folders = sys.argv[1:]
aggregate([warm, warm], method, out=out + "-warm", per_client=True)  # libraries load on first use
base = me.memory_info().rss
peak = base
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, me.memory_info().rss)
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
result = aggregate(folders, method, out=out, memory=int(memory), per_client=True)
done = True
watcher.join()
print(json.dumps({"above": peak - base, "written": sum(adapter.nbytes for adapter in result.personal.values())}))
"""


def peak(tmp_path, method, clients_, modules, memory):
    shapes = {f"layers.{k}.q_proj": (4097, 2049) for k in range(modules)}
    one = write(tmp_path / "c0", *client(0, rank=8, shapes=shapes))
    folders = [one]
    for k in range(1, clients_):
        copy = tmp_path / f"c{k}"
        copy.mkdir()
        (copy / "adapter_config.json").write_bytes((one / "adapter_config.json").read_bytes())
        (copy / "adapter_model.safetensors").hardlink_to(one / "adapter_model.safetensors")
        folders.append(copy)
    warm = write(tmp_path / "warm", *client(1, shapes={"layers.0.q_proj": (37, 23)}))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PEAK,
        method,
        str(warm),
        str(tmp_path / "out"),
        str(memory),
        *map(str, folders),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_that_writes_all_clients_streams(tmp_path):
    """Personal adapters of 157 MB in all under a limit of 16 MiB."""
    found = peak(tmp_path, "fedit", 16, 50, 16 << 20)
    print(found["above"] >> 20, "MiB above import,", found["written"] >> 20, "MiB written")
    assert found["written"] > 150e6
    assert found["above"] < found["written"] // 2, f"{found['above'] >> 20} MiB above import"


@pytest.mark.full
@pytest.mark.parametrize("method", ["fedsa", "fedtree", "clair", "florist", "flora", "fedex"])
def test_every_kind_of_method_streams(tmp_path, method):
    """Two slabs and 256 MiB, and no more, whatever is written."""
    memory = 64 << 20
    found = peak(tmp_path, method, 12, 60, memory)
    print(method, found["above"] >> 20, "MiB above import,", found["written"] >> 20, "MiB written")
    assert found["above"] < memory // 2 + (256 << 20), f"{found['above'] >> 20} MiB above import"
