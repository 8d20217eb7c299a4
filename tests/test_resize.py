"""`resize`: the best pair of the ranks asked for, each file read once and written once, several adapters all or none."""

import json
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from adapter_problems import FIRST, SHAPES, changed, client, distance, poison, products, updates
from jsonschema import Draft202012Validator
from make_adapters import make_adapter
from make_adapters import poison as poison_tensors

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import WriteOptions
from fedlora_kernels.errors import InputError, NonFiniteError
from fedlora_kernels.reporting import schema
from fedlora_kernels.resize import summary

LARGE = {
    f"layers.{k}.{part}_proj": shape for k in range(12) for part, shape in (("q", (371, 233)), ("down", (190, 530)))
}
RULES = [
    fk.Rank(3),
    fk.Energy(0.9),
    fk.Energy(1.0),
    fk.Frobenius(0.8),
    fk.SingularValueSum(0.7),
    fk.SingularValueRatio(3.0),
    fk.Absolute(20.0),
    fk.Rank(5).capped(2),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_best_pair_of_its_rank(rule):
    pair = client(rank=6, alpha=9, dtype=torch.float64)
    result = fk.resize(pair, rule=rule)
    found = products(result.adapter)
    for row in result.report["modules"]:
        D = updates(pair)[row["name"]]
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        p = row["rank"]
        assert p == int(fk.select_rank(S[:6], rule))
        assert float((found[row["name"]] - U[:, :p] * S[:p] @ Vh[:p]).norm() / D.norm()) < 1e-13
        error = float(S[p:].norm() / D.norm())
        assert row["ranks"] == [6]
        assert row["error"] == pytest.approx(error, rel=1e-9, abs=1e-12)
        assert row["energy_kept"] == pytest.approx(1 - error**2, rel=1e-12)
        assert row["error"] <= row["error_bound"] < error + 1e-6
    totals = result.report["totals"]
    assert totals["energy_kept"] == pytest.approx(1 - totals["error"] ** 2)


def test_everything_of_the_adapter_stays(tmp_path):
    state, settings = client(rank=6, lora_bias=True, modules_to_save=["score"], use_rslora=True)
    state["base_model.model.score.weight"] = torch.randn(2, 3)
    for name, (m, _) in SHAPES.items():
        state[f"base_model.model.{name}.lora_B.bias"] = torch.randn(m)
    result = fk.resize((state, settings), rule=fk.Rank(2), out=tmp_path / "out")
    scale = settings["lora_alpha"] / 6**0.5
    assert torch.equal(result.adapter.extra("score.weight"), state["base_model.model.score.weight"])
    bias = state[f"base_model.model.{FIRST}.lora_B.bias"]
    torch.testing.assert_close(result.adapter.extra(f"{FIRST}.lora_B.bias"), bias * scale)
    assert {spec.rank for spec in result.adapter.modules.values()} == {2}
    assert {spec.scale for spec in result.adapter.modules.values()} == {1.0}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_and_placement(dtype):
    pair = client(rank=6)
    result = fk.resize(pair, rule=fk.Energy(1.0), dtype=dtype, write=WriteOptions(output="balanced", uniform_rank=True))
    assert {spec.B.dtype for spec in result.adapter.modules.values()} == {getattr(torch, dtype)}
    assert distance(products(result.adapter), updates(pair)) < 4 * torch.finfo(getattr(torch, dtype)).eps + 1e-14
    pair = result.adapter[FIRST]
    torch.testing.assert_close(pair.B.double().norm(dim=0), pair.A.double().norm(dim=1), rtol=1e-2, atol=0)


class Traffic:
    """Bytes read from and written to each file, by name, whichever thread does it."""

    def __init__(self, monkeypatch):
        self.read, self.written, self._lock = Counter(), Counter(), threading.Lock()
        preadv, write = os.preadv, os.write

        def counted_preadv(fd, buffers, offset, *flags):
            got = preadv(fd, buffers, offset, *flags)
            self._add(self.read, fd, got)
            return got

        def counted_write(fd, data):
            got = write(fd, data)
            self._add(self.written, fd, got)
            return got

        monkeypatch.setattr(os, "preadv", counted_preadv)
        monkeypatch.setattr(os, "write", counted_write)

    def _add(self, counter, fd, got):
        with self._lock:
            counter[os.readlink(f"/proc/self/fd/{fd}")] += got

    def of(self, counter, name):
        return sum(count for path, count in counter.items() if Path(path).name == name)


@pytest.mark.parametrize("memory", ["1GiB", "1MB", 1], ids=str)
@pytest.mark.parametrize("rule", [fk.Energy(0.9), fk.Budget("400kB")], ids=str)
def test_the_file_is_read_once_and_written_once(tmp_path, monkeypatch, memory, rule):
    folder = make_adapter(tmp_path / "in", rank=8, shapes=LARGE)
    size = (folder / "adapter_model.safetensors").stat().st_size
    traffic = Traffic(monkeypatch)
    result = fk.resize(folder, rule=rule, out=tmp_path / "out", memory=memory)
    written = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    source = str(folder / "adapter_model.safetensors")
    assert traffic.read[source] == size, "every byte once, header and tensors"
    assert result.report["passes"] == 1
    assert sum(count for path, count in traffic.written.items() if "adapter_model" in path) < written + 100_000
    assert result.report["totals"]["bytes"] <= written
    # what was written is looked at again: its header, and two of its modules
    back = sum(count for path, count in traffic.read.items() if path != source and "adapter_model" in path)
    assert back < written / 2


def test_one_adapter_is_out_itself(tmp_path):
    make_adapter(tmp_path / "a", rank=6)
    result = fk.resize(tmp_path / "a", rule=fk.Rank(2), out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors", "report.json"]
    assert result.report["clients"][0]["name"] == "a"
    assert fk.resize(tmp_path / "a", rule=fk.Rank(2), name="b").report["clients"][0]["name"] == "b"


def several(tmp_path):
    other = {"decoder.k_proj": (29, 31), "decoder.o_proj": (13, 17)}
    return {
        "a": str(make_adapter(tmp_path / "a", rank=6)),
        "b": str(make_adapter(tmp_path / "b", rank=3, seed=1, shapes=other, target_modules=["k_proj", "o_proj"])),
        "c/d": str(make_adapter(tmp_path / "c", rank=5, seed=2, dtype=torch.bfloat16)),
    }


def test_several_adapters_need_nothing_in_common(tmp_path):
    adapters, out = several(tmp_path), tmp_path / "out"
    seen = []
    results = fk.resize_all(adapters, rule=fk.Rank(2), out=out, progress=lambda *step: seen.append(step))
    assert list(results) == list(adapters)
    assert sorted(os.listdir(out)) == ["a", "b", "c_d", "report.json"]
    for (name, result), place in zip(results.items(), ("a", "b", "c_d"), strict=True):
        alone = fk.resize(adapters[name], rule=fk.Rank(2))
        assert distance(products(result.adapter), products(alone.adapter)) < 1e-6
        assert result.adapter.label == str(out / place)
        assert result.state.adapter is result.adapter
        assert json.loads((out / place / "report.json").read_text())["clients"][0]["name"] == name
    report = json.loads((out / "report.json").read_text())
    assert not list(Draft202012Validator(schema("resize")).iter_errors(report))
    assert report == json.loads(json.dumps(summary(results)))
    assert [row["folder"] for row in report["adapters"]] == ["a", "b", "c_d"]
    assert [row["rank_in"] for row in report["adapters"]] == [24, 6, 20]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == sum(row["bytes_in"] for row in report["adapters"])


def test_several_adapters_in_memory(tmp_path):
    pairs = [client(0, rank=6), client(1, rank=5)]
    results = fk.resize_all(pairs, rule=fk.Budget("5kB"))
    assert list(results) == ["client_0", "client_1"]
    assert all(result.report["totals"]["bytes"] <= 5000 for result in results.values())
    assert results["client_1"].for_client("client_1").modules[FIRST].scale == pytest.approx(8 / 5)


def test_names_never_collide_with_each_other_or_with_files_of_ours(tmp_path):
    names = ["x", "X", "x.safetensors", "report.json", "clients", "residual", "../x"]
    adapters = {name: client(k, rank=2) for k, name in enumerate(names)}
    fk.resize_all(adapters, rule=fk.Rank(1), out=tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["adapters"]
    places = [row["folder"].lower() for row in rows]
    assert len(set(places)) == len(names)
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*(row["folder"] for row in rows), "report.json"])
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_of_several_is_replaced_and_a_collection_never(tmp_path):
    adapters, out = several(tmp_path), tmp_path / "out"
    fk.resize_all(adapters, rule=fk.Rank(2), out=out)
    with pytest.raises(InputError, match="exists"):
        fk.resize_all(adapters, rule=fk.Rank(1), out=out)
    fk.resize_all({"a": adapters["a"]}, rule=fk.Rank(1), out=out, overwrite=True)
    assert sorted(os.listdir(out)) == ["a", "report.json"]
    make_adapter(out / "mine")
    with pytest.raises(InputError, match="holds 'mine', which was not written here"):
        fk.resize_all(adapters, rule=fk.Rank(1), out=out, overwrite=True)
    (out / "a" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not written here"):
        fk.resize_all(adapters, rule=fk.Rank(1), out=out, overwrite=True)


@pytest.mark.parametrize(
    "report",
    ["", "[]", "{}", '{"tool": {"name": "other"}, "adapters": [{"folder": "a"}]}', '{"tool": {"name": "fedlora_kernels"}}',
     '{"tool": {"name": "fedlora_kernels"}, "adapters": [3]}', '{"tool": 3, "adapters": []}', "[" * 100_000],
)  # fmt: skip
def test_a_folder_of_adapters_is_ours_only_by_its_report(tmp_path, report):
    make_adapter(tmp_path / "out" / "a")
    (tmp_path / "out" / "report.json").write_text(report)
    with pytest.raises(InputError, match="holds 'a', which was not written here"):
        fk.resize_all([client()], rule=fk.Rank(1), out=tmp_path / "out", overwrite=True)


def test_one_bad_adapter_leaves_nothing(tmp_path):
    adapters, out = several(tmp_path), tmp_path / "out"
    adapters["z"] = str(make_adapter(tmp_path / "z", change=poison_tensors()))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(NonFiniteError, match="client 'z', module"):
        fk.resize_all(adapters, rule=fk.Rank(1), out=out)
    assert sorted(os.listdir(tmp_path)) == before


def test_all_that_cannot_be_read_are_named_before_anything_is_resized(tmp_path):
    adapters = several(tmp_path)
    seen = []
    with pytest.raises(InputError, match=r"client 'x'.*\n.*client 'y'"):
        fk.resize_all(
            {**adapters, "x": str(tmp_path / "none"), "y": str(tmp_path)},
            out=tmp_path / "out",
            progress=lambda *step: seen.append(step),
        )
    assert not seen


def test_the_inputs_are_never_replaced(tmp_path):
    inside = tmp_path / "all"
    make_adapter(inside / "a", rank=4)
    fk.resize_all({"b": client()}, rule=fk.Rank(1), out=tmp_path / "out")
    for out in (inside, inside / "a"):
        with pytest.raises(InputError, match=r"not written here|would replace"):
            fk.resize_all([inside / "a"], rule=fk.Rank(1), out=out, overwrite=True)
    with pytest.raises(InputError, match="would replace"):
        fk.resize_all([tmp_path / "out" / "b"], rule=fk.Rank(1), out=tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="would replace"):
        fk.resize(tmp_path / "out" / "b", rule=fk.Rank(1), out=tmp_path / "out", overwrite=True)


def test_bad_numbers_are_named():
    with pytest.raises(NonFiniteError, match=f"client 'client_0', module '{FIRST}', lora_B"):
        fk.resize(changed(client(), "B", poison()))


def test_no_adapters():
    with pytest.raises(InputError, match="no clients"):
        fk.resize_all([])


def test_kohya_files_stay_kohya_files(tmp_path):
    from safetensors.torch import load_file, save_file

    made = torch.Generator().manual_seed(0)
    shapes = {"lora_unet_q": ((6, 23), (37, 6)), "lora_unet_conv": ((6, 5, 3, 3), (7, 6, 1, 1))}
    paths = []
    for name in ("a", "b"):
        state = {}
        for module, (down, up) in shapes.items():
            state[f"{module}.lora_down.weight"] = torch.randn(*down, generator=made)
            state[f"{module}.lora_up.weight"] = torch.randn(*up, generator=made)
            state[f"{module}.alpha"] = torch.tensor(3.0)
        paths.append(tmp_path / f"{name}.safetensors")
        save_file(state, paths[-1])
    results = fk.resize_all(paths, rule=fk.Budget(1000), out=tmp_path / "out")
    assert list(results) == ["a.safetensors", "b.safetensors"]
    for name, source in zip(("a", "b"), paths, strict=True):
        given, found = load_file(source), load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        assert found.keys() == given.keys()
        size = 0
        for module in shapes:
            down, up = (found[f"{module}.lora_{part}.weight"] for part in ("down", "up"))
            rank = down.shape[0]
            assert float(found[f"{module}.alpha"]) == rank
            size += 4 * (down.numel() + up.numel())
            D = (
                0.5
                * given[f"{module}.lora_up.weight"].flatten(1).double()
                @ given[f"{module}.lora_down.weight"].flatten(1).double()
            )
            U, S, Vh = torch.linalg.svd(D, full_matrices=False)
            best = U[:, :rank] * S[:rank] @ Vh[:rank]
            assert float((up.flatten(1).double() @ down.flatten(1).double() - best).norm() / D.norm()) < 1e-6
        assert size == results[f"{name}.safetensors"].report["totals"]["bytes"] <= 1000
    fk.resize_all(paths, rule=fk.Rank(1), out=tmp_path / "out", overwrite=True)
