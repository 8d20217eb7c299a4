"""resize and inspect of kohya files: the same Adapter, the same numbers, a kohya file again."""

import json

import numpy as np
import pytest
from kohya_files import SHAPES, distance, kohya_file, updates

import fedlora_kernels as fk
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.cli import main
from fedlora_kernels.errors import InputError


def best(update, rank):
    U, S, Vh = np.linalg.svd(update.numpy(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def test_a_file_is_cut_to_the_best_pair_of_its_rank(tmp_path):
    path, out = kohya_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert main(["resize", str(path), "-o", str(out), "--rank", "2", "--quiet"]) == 0
    found = updates(out)
    for name, update in updates(path).items():
        assert np.linalg.norm(found[name].numpy() - best(update, 2)) < 1e-5 * np.linalg.norm(update.numpy())
    assert {module.rank for module in open_adapter(out).modules.values()} == {2}
    assert json.loads((tmp_path / "b.safetensors.report.json").read_text())["totals"]["rank"] == 8


def test_several_files_go_into_a_folder(tmp_path):
    paths = [kohya_file(tmp_path / f"c{k}.safetensors", seed=k) for k in range(2)]
    with pytest.raises(InputError, match="is a file, which holds one adapter; name a folder"):
        fk.resize_all(paths, out=tmp_path / "out.safetensors")
    fk.resize_all(paths, out=tmp_path / "out", rule=fk.Energy(1.0))
    for path in paths:
        assert distance(updates(tmp_path / "out" / path.stem / "adapter_model.safetensors"), updates(path)) < 1e-6


def test_inspect_shows_kohya_files(tmp_path, capsys):
    paths = [str(kohya_file(tmp_path / f"c{k}.safetensors", seed=k)) for k in range(2)]
    report = tmp_path / "r.json"
    assert main(["inspect", *paths, "--report", str(report)]) == 0
    assert "lora_unet_down_blocks_0_resnets_0_conv1" in capsys.readouterr().out
    rows = json.loads(report.read_text())["adapters"][0]["modules"]
    norms = {name: float(update.norm()) for name, update in updates(paths[0]).items()}
    assert {row["name"] for row in rows} == set(SHAPES)
    assert all(abs(row["norm"] - norms[row["name"]]) < 1e-6 * norms[row["name"]] for row in rows)
