"""What is written: the same as in memory, complete or not at all, loadable by PEFT."""

import json
import os
import re
import threading

import pytest
import torch
from adapter_problems import FIRST, SHAPES, client, clients, distance, products, weighted

from fedlora_kernels.adapters.options import WriteOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.adapters.writer import PeftFileWriter
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.errors import InputError, OutputOverflowError, RunError
from fedlora_kernels.linalg.rules import Energy, Rank
from fedlora_kernels.methods.florist import Florist

ALL = Energy(1.0)
FILES = ["adapter_config.json", "adapter_model.safetensors", "report.json"]


def contents(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    "write",
    [
        WriteOptions(),
        WriteOptions(uniform_rank=True),
        WriteOptions(uniform_rank=True, fill="random"),
        WriteOptions(output="balanced"),
    ],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_folder_holds_what_memory_holds(tmp_path, write, dtype):
    pairs = clients((8, 8, 8))
    memory = aggregate(pairs, write=write, dtype=dtype)
    disc = aggregate(pairs, write=write, dtype=dtype, out=tmp_path / "out")
    assert contents(tmp_path / "out") == FILES
    for adapter in (disc.adapter, open_adapter(tmp_path / "out")):
        assert set(adapter) == set(memory.adapter)
        for name in memory.adapter:
            assert torch.equal(adapter[name].B, memory.adapter[name].B)
            assert torch.equal(adapter[name].A, memory.adapter[name].A)
            assert adapter[name].scale == 1.0
        assert dict(adapter.metadata) == dict(memory.adapter.metadata)
        assert dict(adapter.config) == dict(memory.adapter.config)


def test_a_result_in_memory_holds_no_padding():
    result = aggregate(clients((8, 8, 8)), rule=Rank(2))
    padded = aggregate(clients((8, 8, 8)), rule=Energy(0.5))
    for adapter in (result.adapter, padded.adapter):
        for name in adapter:
            for factor in (adapter[name].B, adapter[name].A):
                assert factor.is_contiguous()
                assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()


def test_the_report_in_the_folder_is_that_of_the_result(tmp_path):
    result = aggregate(clients(), out=tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text()) == result.report


def test_the_report_is_plain_json_with_the_promised_keys():
    report = aggregate(clients((4, 4)), "hetlora").report
    json.dumps(report, allow_nan=False)
    assert set(report) == {
        *("schema", "tool", "method", "backend", "policy", "robust", "normalize", "round", "seed", "dtype"),
        *("decision", "comparison"),
        *("clients", "modules", "extras", "totals", "warnings", "notes", "passes", "seconds"),
    }
    assert set(report["clients"][0]) == {
        *("name", "source", "weight", "status", "reason", "rank_min", "rank_max", "bytes", "norm", "factor", "folder"),
    }
    assert set(report["modules"][0]) == {
        *(
            "name",
            "kind",
            "m",
            "n",
            "ranks",
            "stacked_rank",
            "rank",
            "residual_rank",
            "personal_error",
            "numerical_rank",
            "energy",
            "error",
            "error_bound",
        ),
        *("rho", "sigma_err", "passes", "notes", "singular_values"),
        *("energy_kept", "cancellation", "contributions"),
    }
    assert set(report["totals"]) == {
        *("modules", "energy_kept", "cancellation"),
        "clients",
        "rank_in",
        "broadcast_rank",
        "efficiency",
        "rank",
        "parameters",
        "bytes",
        "error",
        "error_bound",
    }
    assert set(report["seconds"]) == {"read", "compute", "write", "total"}


def test_nothing_that_is_not_finite_stands_in_the_report():
    pair = client(3)
    negative = {k: -v if "lora_B" in k else v for k, v in pair[0].items()}, pair[1]
    for method in ("florist", "zero_pad"):
        json.dumps(aggregate([pair, negative], method).report, allow_nan=False)


def test_sizes_in_the_report_are_those_of_the_file(tmp_path):
    for write in (WriteOptions(), WriteOptions(uniform_rank=True)):
        result = aggregate(clients((8, 8)), write=write, out=tmp_path / str(write.pads))
        numbers = sum(result.adapter[n].B.numel() + result.adapter[n].A.numel() for n in SHAPES)
        assert result.report["totals"]["parameters"] == numbers
        assert result.report["totals"]["bytes"] == 4 * numbers


def test_uniform_rank_pads_without_changing_the_product():
    pairs = clients((8, 8, 8))
    plain = aggregate(pairs)
    ranks = {spec.rank for spec in plain.adapter.modules.values()}
    assert len(ranks) > 1
    for fill in ("zero", "random"):
        padded = aggregate(pairs, write=WriteOptions(uniform_rank=True, fill=fill))
        assert {spec.rank for spec in padded.adapter.modules.values()} == {max(ranks)}
        assert "rank_pattern" not in padded.adapter.config
        assert distance(products(padded.adapter), products(plain.adapter)) == 0.0
        short = min(plain.adapter, key=lambda n: plain.adapter.modules[n].rank)
        tail = padded.adapter[short].A[plain.adapter.modules[short].rank :]
        assert bool(tail.any()) == (fill == "random")


def test_ranks_stand_in_patterns():
    result = aggregate(clients((8, 8, 8)))
    config = result.adapter.config
    for name, spec in result.adapter.modules.items():
        assert config["rank_pattern"].get(name, config["r"]) == spec.rank
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) == spec.rank


def one_zero_module():
    pairs = clients()
    for state, _ in pairs:
        for key in state:
            if FIRST in key and "lora_B" in key:
                state[key] = torch.zeros_like(state[key])
    return pairs


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_drop_zero_leaves_zero_modules_out(tmp_path, place):
    out = None if place == "memory" else tmp_path / "out"
    result = aggregate(one_zero_module(), write=WriteOptions(drop_zero=True), out=out)
    assert set(result.adapter) == set(SHAPES) - {FIRST}
    row = next(row for row in result.report["modules"] if row["name"] == FIRST)
    assert row["rank"] == 0
    assert "ZERO" in row["notes"]
    kept = aggregate(one_zero_module())
    assert kept.adapter.modules[FIRST].rank == 1


def test_all_zero_cannot_be_dropped_to_nothing(tmp_path):
    pairs = [({k: torch.zeros_like(v) for k, v in state.items()}, settings) for state, settings in clients()]
    with pytest.raises(InputError, match="no modules"):
        aggregate(pairs, write=WriteOptions(drop_zero=True), out=tmp_path / "out")
    assert contents(tmp_path) == []


@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("method", ["florist", "flora", "zero_pad"])
def test_overflow_of_the_output_dtype_names_module_and_size(tmp_path, place, method):
    pairs = clients((4, 4), dtype=torch.float32)
    for state, _ in pairs:
        key = f"base_model.model.{FIRST}.lora_B.weight"
        state[key] = state[key] * 1e6
    out = None if place == "memory" else tmp_path / "out"
    with pytest.raises(
        OutputOverflowError, match=rf"module '{FIRST}': max\|x\| of the result is \d.*e\+0\d; float16 holds 6.55e\+04"
    ):
        aggregate(pairs, method, dtype="float16", out=out)
    assert contents(tmp_path) == []


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out"
    first = aggregate(clients(), out=out)
    with pytest.raises(InputError, match="exists"):
        aggregate(clients(), out=out)
    assert torch.equal(open_adapter(out)[FIRST].B, first.adapter[FIRST].B)
    second = aggregate(clients(), rule=Rank(2), out=out, overwrite=True)
    assert open_adapter(out).modules[FIRST].rank == second.adapter.modules[FIRST].rank == 2
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        aggregate(clients(), out=out, overwrite=True)


class Broken(Florist):
    """Fails at the second group."""

    def combine(self, group, plan, previous):
        if "layers.1.self_attn.q_proj" in str(group.modules):
            raise RunError("the second half failed")
        return super().combine(group, plan, previous)


def test_a_failure_midway_leaves_nothing_no_thread_and_no_file(tmp_path):
    before, files = threading.active_count(), len(contents("/proc/self/fd"))
    with pytest.raises(RunError, match="second half"):
        aggregate(clients(), Broken(), out=tmp_path / "out", memory=4096)
    assert contents(tmp_path) == []
    assert threading.active_count() == before
    assert len(contents("/proc/self/fd")) == files


def test_an_interrupt_midway_leaves_nothing_and_no_thread(tmp_path):
    before = threading.active_count()

    def progress(stage, done, total):
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aggregate(clients(), out=tmp_path / "out", memory=4096, progress=progress)
    assert contents(tmp_path) == []
    assert threading.active_count() == before


def test_a_failure_midway_leaves_the_old_folder(tmp_path):
    out = tmp_path / "out"
    old = aggregate(clients(), out=out)
    with pytest.raises(RunError):
        aggregate(clients(), Broken(), out=out, overwrite=True, memory=4096)
    assert contents(tmp_path) == ["out"]
    assert torch.equal(open_adapter(out)[FIRST].B, old.adapter[FIRST].B)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_disc_ends_the_run(tmp_path, monkeypatch, error):
    written = []

    def add(self, key, shape, pieces):
        if len(written) == 3:
            raise error
        written.append(key)

    monkeypatch.setattr(PeftFileWriter, "add_pieces", add)
    with pytest.raises(type(error)):
        aggregate(clients(), out=tmp_path / "out", memory=4096)
    assert contents(tmp_path) == []


def test_a_file_that_shrinks_while_read_is_an_input_error(tmp_path):
    from make_adapters import write

    folders = [write(tmp_path / f"c{k}", *pair) for k, pair in enumerate(clients())]
    adapters = [open_adapter(folder) for folder in folders]
    with open(folders[1] / "adapter_model.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(InputError, match="truncated"):
        aggregate(adapters, out=tmp_path / "out", memory=4096)
    assert "out" not in contents(tmp_path)


def test_peft_loads_the_result_and_computes_the_same_update(tmp_path):
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(23, 37, bias=False)
            self.down_proj = torch.nn.Linear(53, 19, bias=False)

    shapes = {"q_proj": (37, 23), "down_proj": (19, 53)}
    pairs = [client(k, rank=6, alpha=9, shapes=shapes, task_type=None) for k in range(3)]
    result = aggregate(pairs, rule=Energy(0.8), out=tmp_path / "out")
    result.for_client("client_1").save(tmp_path / "personal")
    for folder in ("out", "personal"):
        base = Net()
        for layer in (base.q_proj, base.down_proj):
            layer.weight.data.zero_()
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / folder).merge_and_unload()
        for name, product in products(result.adapter).items():
            torch.testing.assert_close(
                getattr(loaded, name).weight.double(), product, rtol=0, atol=1e-5 * float(product.norm())
            )


def test_metadata_says_what_was_done(tmp_path):
    result = aggregate(
        {"a": client(0), "b": client(1)}, weights=[1, 3], rule=Energy(0.8), round=3, out=tmp_path / "out"
    )
    found = result.adapter.metadata
    assert found["fedlora.method"] == "florist"
    assert found["fedlora.rule"] == "Energy(0.8)"
    assert found["fedlora.round"] == "3"
    assert json.loads(found["fedlora.weights"]) == [0.25, 0.75]
    assert json.loads(found["fedlora.clients"]) == ["a", "b"]
    assert 0.8 <= float(found["fedlora.energy_kept"]) < 1.0
    assert float(found["fedlora.error_bound"]) >= result.report["totals"]["error"]


def test_many_client_names_fit_into_the_metadata(tmp_path):
    shapes = {FIRST: (5, 3)}
    pairs = {"c" * 200 + str(k): client(k, rank=1, shapes=shapes) for k in range(100)}
    result = aggregate(pairs, rule=ALL, out=tmp_path / "out")
    assert json.loads(result.adapter.metadata["fedlora.clients"]) == list(pairs)
    assert distance(products(result.adapter), weighted(list(pairs.values()))) < 1e-6


@pytest.mark.parametrize("out", ["c0", "c0/", "link/c0", "round"])
def test_the_output_never_replaces_a_client(tmp_path, monkeypatch, out):
    """A client's folder looks like one of ours: replacing it would destroy what the client trained."""
    from make_adapters import write

    sources = [write(tmp_path / "c0", *client(0)), write(tmp_path / "round" / "clients" / "c1", *client(1))]
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"client 'c.': the output .* would replace it; name another one"):
        aggregate(sources, out=out, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("factor", ["B", "A"])
def test_what_was_written_is_compared_with_what_was_computed(tmp_path, monkeypatch, uniform, factor):
    plain = PeftFileWriter.add_pair

    def wrong(self, name, B, A):
        if name == FIRST:
            B, A = (B * 1.001, A) if factor == "B" else (B, A * 1.001)
        plain(self, name, B, A)

    monkeypatch.setattr(PeftFileWriter, "add_pair", wrong)
    with pytest.raises(RunError, match=f"module '{re.escape(FIRST)}' reads back with other numbers"):
        aggregate(clients(), out=tmp_path / "out", write=WriteOptions(uniform_rank=uniform))
    assert list(tmp_path.iterdir()) == []
