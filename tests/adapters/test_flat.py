"""Pairs out of flat tensors: any run of experts, from any source, in pieces of any size, number for number."""

import json

import pytest
import torch
from expert_problems import client, folder
from safetensors.torch import save_file

from fedlora_kernels.adapters import flat
from fedlora_kernels.adapters.flat import read_flat
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import FormatError

PATH = "model.layers.0.mlp.experts"
EXPERTS, M, N, RANK = 5, 11, 6, 3


def shards(path, pair):
    """The same adapter in two files with an index, A apart from B."""
    path.mkdir()
    weight_map = {key: f"part-{int('lora_B' in key)}.safetensors" for key in pair[0]}
    for name in set(weight_map.values()):
        save_file({key: pair[0][key] for key in pair[0] if weight_map[key] == name}, path / name)
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "adapter_config.json").write_text(json.dumps(pair[1]))
    return str(path)


def transposed(pair):
    """The same tensors, none of them contiguous."""
    return {key: value.t().contiguous().t() for key, value in pair[0].items()}, pair[1]


SOURCES = {
    "file": folder,
    "shards": shards,
    "memory": lambda path, pair: pair,
    "transposed memory": lambda path, pair: transposed(pair),
}


@pytest.fixture(params=SOURCES)
def adapter(request, tmp_path):
    adapter = open_adapter(SOURCES[request.param](tmp_path / "c", client(dtype=torch.bfloat16)))
    yield adapter
    adapter.close()


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 1), (2, 4), (4, 5)])
@pytest.mark.parametrize("piece", [1, 61, 200, 1 << 20])
def test_a_run_of_experts_is_read_number_for_number(adapter, monkeypatch, start, stop, piece):
    monkeypatch.setattr(flat, "READ", piece)
    names = [f"{PATH}[{e}]" for e in range(start, stop)]
    B = torch.full((len(names), M, RANK), torch.nan, dtype=torch.bfloat16)
    A = torch.full((len(names), RANK, N), torch.nan, dtype=torch.bfloat16)
    read_flat(adapter.source, [adapter.modules[name] for name in names], B, A)
    for e, name in enumerate(names):
        assert torch.equal(B[e], adapter[name].B)
        assert torch.equal(A[e], adapter[name].A)


def test_pairs_read_a_flat_tensor_once_however_many_experts_it_has(adapter):
    reads = []
    inner = adapter.source.read

    def read(key, out=None):
        reads.append(key)
        return inner(key, out)

    adapter.source.read = read
    assert len(list(adapter.pairs())) == len(adapter)
    assert len(reads) == len(set(reads)) == 10
    reads.clear()
    assert torch.equal(adapter[f"{PATH}[0]"].A, adapter[f"{PATH}[0]"].A)
    assert len(reads) == 2


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path, letter):
    pair = client()
    adapter = open_adapter(folder(tmp_path / "c", pair))
    spec = getattr(adapter.modules[f"{PATH}[0]"], letter)
    _, place = adapter.source.place(spec.key)
    with open(tmp_path / "c" / "adapter_model.safetensors", "r+b") as file:
        file.truncate(place + spec.nbytes // 2)
    specs = [adapter.modules[f"{PATH}[{e}]"] for e in range(EXPERTS)]
    with pytest.raises(FormatError, match="the file is truncated"):
        read_flat(adapter.source, specs, torch.empty(EXPERTS, M, RANK), torch.empty(EXPERTS, RANK, N))


def test_rows_must_fit_the_tensor(tmp_path):
    adapter = open_adapter(folder(tmp_path / "c", client()))
    key = adapter.modules[f"{PATH}[0]"].A.key
    good = torch.empty(2, N)
    adapter.source.read_rows(key, 13, good)
    for start, out in (
        (14, good),
        (-1, good),
        (0, torch.empty(2, N + 1)),
        (0, good.double()),
        (0, torch.empty(N, 2).t()),
    ):
        with pytest.raises(ValueError, match="contiguous rows"):
            adapter.source.read_rows(key, start, out)


@pytest.mark.parametrize("written", [1, 50, 1 << 20])
@pytest.mark.parametrize("count", [1, 4])
def test_what_is_interleaved_has_the_number_of_the_pair_fastest(monkeypatch, written, count):
    monkeypatch.setattr(flat, "WRITTEN", written)
    Bs = [torch.randn(M, RANK + 1)[:, :RANK] for _ in range(count)]
    whole = torch.cat([piece.reshape(-1) for piece in flat.interleaved(Bs)]).reshape(M, RANK * count)
    for e, B in enumerate(Bs):
        assert torch.equal(whole[:, e::count], B)
