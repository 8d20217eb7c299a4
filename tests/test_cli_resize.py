"""fedlora resize: one adapter or several, flags, table, report, exit status."""

import json
import os

import pytest
from make_adapters import SHAPES, dense, make_adapter, make_clients

from fedlora_kernels.cli import main


def report_of(out):
    return json.loads((out / "report.json").read_text())


def distance(found, expected):
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def test_one_adapter(tmp_path, capsys):
    source, out = make_adapter(tmp_path / "a", rank=6), tmp_path / "out"
    assert main(["resize", str(source), "-o", str(out), "--energy", "1", "--report", str(tmp_path / "copy.json")]) == 0
    assert distance(dense(out), dense(source)) < 1e-6
    assert sorted(os.listdir(out)) == ["adapter_config.json", "adapter_model.safetensors", "report.json"]
    assert json.loads((tmp_path / "copy.json").read_text()) == report_of(out)
    shown = capsys.readouterr()
    assert "24 -> 24 (sums over 4 modules)" in shown.out
    assert "6 -> 6" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("flags", "rank"),
    [
        (["--rank", "2"], 2),
        (["--energy", "1", "--max-rank", "3"], 3),
        (["--sv-ratio", "1"], 1),
        (["--sv-cumulative", "1"], 6),
        (["--sv-fro", "1"], 6),
        (["--absolute", "0"], 6),
    ],
)
def test_rule_flags(tmp_path, flags, rank):
    source, out = make_adapter(tmp_path / "a", rank=6), tmp_path / "out"
    assert main(["resize", str(source), "-o", str(out), "--quiet", *flags]) == 0
    assert [row["rank"] for row in report_of(out)["modules"]] == [rank] * len(SHAPES)


def test_energy_09_is_the_default_and_a_budget_is_kept(tmp_path):
    source = str(make_adapter(tmp_path / "a", rank=6))
    for name, flags in {"a9": [], "b9": ["--energy", "0.9"], "c9": ["--budget", "4.3kB"]}.items():
        assert main(["resize", source, "-o", str(tmp_path / name), "--quiet", *flags]) == 0
    tensors = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a9", "b9")]
    assert tensors[0] == tensors[1]
    assert 4300 - 4 * 72 < report_of(tmp_path / "c9")["totals"]["bytes"] <= 4300


def test_several_adapters(tmp_path, capsys):
    paths, out = make_clients(tmp_path), tmp_path / "out"
    argv = ["resize", paths[0], paths[1], f"third={paths[2]}", "-o", str(out), "--rank", "2", "--dtype", "bfloat16"]
    assert main([*argv, "--uniform-rank", "--report", str(tmp_path / "copy.json")]) == 0
    names = [os.path.basename(path) for path in paths[:2]] + ["third"]
    assert sorted(os.listdir(out)) == sorted([*names, "report.json"])
    assert json.loads((tmp_path / "copy.json").read_text()) == report_of(out)
    assert [row["name"] for row in report_of(out)["adapters"]] == names
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert "Rank(2), bfloat16" in shown
    # in place of the old output, and only with the flag
    assert main([*argv, "--quiet"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*argv, "--quiet", "--overwrite"]) == 0


def test_what_float16_has_no_numbers_for_is_said(tmp_path, capsys):
    paths = [str(make_adapter(tmp_path / f"c{k}", alpha=alpha)) for k, alpha in enumerate((8, 1e-7))]
    assert main(["resize", paths[1], "-o", str(tmp_path / "one"), "--dtype", "float16"]) == 0
    alone = capsys.readouterr().out.split("\nNotes\n")[1]
    assert alone.startswith(f"- float16 has no numbers small enough for {len(SHAPES)} modules")
    assert main(["resize", *paths, "-o", str(tmp_path / "both"), "--dtype", "float16"]) == 0
    assert capsys.readouterr().out.split("\nNotes\n")[1].startswith(f"- c1: {alone[2:20]}")


def test_modules_by_layer_type_where_there_are_many(tmp_path, capsys):
    shapes = {f"layers.{k}.q_proj": (11, 7) for k in range(60)}
    source = make_adapter(tmp_path / "a", rank=3, shapes=shapes)
    assert main(["resize", str(source), "-o", str(tmp_path / "out"), "--rank", "1"]) == 0
    shown = capsys.readouterr().out
    assert "layers.*.q_proj" in shown
    assert "180 -> 60" in shown


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["missing", "-o", "{out}"], "missing"),
        (["{a}", "-o", "{out}", "--rank", "0"], "--rank"),
        (["{a}", "-o", "{out}", "--budget", "12parsec"], "--budget"),
        (
            ["{a}", "-o", "{out}", "--budget", "9"],
            "at least 1056 needed, one component in each of them. Give a larger size or a narrower dtype, or --drop-zero",
        ),
        (["{a}", "-o", "{out}", "--rank", "1", "--energy", "1"], "--energy"),
        (["{a}", "-o", "{out}/x/y"], "does not exist"),
        (["{a}", "-o", "{a}", "--overwrite"], "would replace it; name another one"),
        (["{a}", "-o", "{out}", "--weights", "1"], "unrecognized arguments: --weights"),
        (["{a}", "{a}", "-o", "{a}", "--overwrite"], "would replace it; name another one"),
        (["x={a}", "x={a}", "-o", "{out}"], "given twice"),
        (["{a}", "-o", "{out}", "--report", "{out}.txt"], "--report"),
    ],
)
def test_wrong_arguments_are_named_and_leave_nothing(tmp_path, capsys, argv, text):
    places = {"a": str(make_adapter(tmp_path / "a")), "out": str(tmp_path / "out")}
    before = sorted(tmp_path.rglob("*"))
    assert main(["resize", *(part.format(**places) for part in argv)]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_target_vllm_has_one_rank(tmp_path):
    source, out = make_adapter(tmp_path / "a", rank=6), tmp_path / "out"
    assert main(["resize", str(source), "-o", str(out), "--budget", "4.3kB", "--target", "vllm", "--quiet"]) == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 4
    assert "rank_pattern" not in settings
    assert report_of(out)["totals"]["bytes"] == 4 * 4 * sum(map(sum, SHAPES.values()))
