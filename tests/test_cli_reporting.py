"""Rendering: names made harmless, tables complete in a pipe and short for large models, JSON strict and atomic."""

import io
import json
import os
import re
import sys
import time

import pytest
import torch
from make_adapters import make_adapter
from rich.console import Console, Group

from fedlora_kernels.cli import main
from fedlora_kernels.errors import InputError
from fedlora_kernels.reporting.json import check_target, plain, write_json
from fedlora_kernels.reporting.tables import MODULE_ROWS, aggregate_tables, comparison_tables, number, size, table
from fedlora_kernels.reporting.terminal import ProgressBar, one_line, show

EVIL = "c\x1b[31m\x07\u202e\u2028\x9b2J[bold]:smile:\ud800"


def report(modules=3, **client):
    rows = [
        {"name": f"model.layers.{i}.q_proj", "kind": "linear", "m": 37, "n": 23, "ranks": [4, 2], "stacked_rank": 6,
         "rank": 2 + i % 3, "numerical_rank": 6, "energy": 4.0, "error": 0.01 * i, "error_bound": 0.011 * i, "rho": 1.0,
         "sigma_err": 0.0, "passes": 1, "notes": ["CAPPED"] if i == 1 else [], "singular_values": [1.0]}
        for i in range(modules)
    ]  # fmt: skip
    used = {"name": "a", "source": "/a", "weight": 0.5, "status": "used", "reason": None, "rank_min": 4, "rank_max": 4,
            "bytes": 4096, "norm": 2.0, "factor": 1.0}  # fmt: skip
    return {
        "schema": 1, "tool": {"name": "fedlora_kernels", "version": "0"},
        "method": {"name": "florist", "options": {}, "rule": "Energy(0.9)"},
        "backend": {"requested": "auto", "used": ["cpu"], "device": "cpu",
                    "fallbacks": [{"op": "product_svd", "backend": "cuda", "reason": "no GPU"}]},
        "clients": [used, used | client], "modules": rows, "extras": [],
        "totals": {"modules": modules, "clients": 2, "rank_in": 18, "rank": 9, "parameters": 540, "bytes": 2160,
                   "error": 0.01, "error_bound": 0.011, "cancellation": None},
        "warnings": [], "notes": [], "passes": 1, "seconds": {"read": 0.1, "compute": 0.2, "write": 0.1, "total": 0.4},
    }  # fmt: skip


def test_one_line_of_several():
    assert one_line("first\n  second\r\n\nthird\x1b[2J") == "first; second; third?[2J"
    assert len(one_line("x" * 900)) == 900


def test_names_are_shown_without_escapes_or_markup(capsys):
    show(aggregate_tables(report(name=EVIL, status="dropped", reason="lora_B\x1b[0m has NaN"), "out\x1b]0;x\x07"))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "c?[31m????2J[bold]:smile:?" in out
    assert "lora_B?[0m has NaN" in out


def test_each_module_and_client_has_a_row_in_a_pipe(capsys):
    show(aggregate_tables(report(3), "out"))
    out = capsys.readouterr().out
    assert "…" not in out
    for text in (
        "model.layers.2.q_proj",
        "37 x 23",
        "0.02",
        "0.022",
        "CAPPED",
        "Energy(0.9)",
        "2 of 2",
        "4.0 KiB",
        "product_svd: not cuda, no GPU",
    ):
        assert text in out


def test_many_modules_are_shown_by_layer_type(capsys):
    count = MODULE_ROWS + 1
    show(aggregate_tables(report(count), "out"))
    out = capsys.readouterr().out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("model.layers.*.q_proj"))
    assert row == [
        "model.layers.*.q_proj",
        "41",
        "37",
        "x",
        "23",
        "2",
        "3",
        "4",
        "0.4",
        "0.44",
        "model.layers.40.q_proj",
    ]


def test_notes_stand_below_the_tables_and_the_first_of_many(capsys):
    noted = report() | {"notes": ["one\x1b[2J", "two"]}
    show(aggregate_tables(noted, "out"))
    assert capsys.readouterr().out.endswith("\nNotes\n- one?[2J\n- two\n")
    show(aggregate_tables(noted | {"notes": [f"note {i}" for i in range(33)]}, "out"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["- note 29", "- and 3 more; --report FILE.json holds all"]
    show(aggregate_tables(report(), "out"))
    assert "Notes" not in capsys.readouterr().out


def test_missing_figures_are_dashes(capsys):
    content = report(1)
    content["modules"][0] |= {"energy": None, "error": None, "error_bound": None}
    content["clients"][1] |= {"norm": None, "status": "clipped", "factor": 0.25}
    show(aggregate_tables(content, "out"))
    out = capsys.readouterr().out
    assert "-" in next(line for line in out.splitlines() if line.startswith("model.layers.0"))
    assert "scaled by 0.25" in out


def test_a_client_that_was_never_opened_has_no_rank(capsys):
    show(aggregate_tables(report(1, name="gone", status="dropped", rank_min=None, rank_max=None, bytes=None), "out"))
    out = capsys.readouterr().out
    assert "None" not in out
    (line,) = (line for line in out.splitlines() if line.startswith("gone"))
    assert line.split()[:4] == ["gone", "0.5", "dropped", "-"]


def test_a_method_without_kernels_needs_no_backend(capsys):
    content = report(1)
    content["backend"] |= {"used": [], "fallbacks": []}
    show(aggregate_tables(content, "out"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("backend"))
    assert line.split(maxsplit=1)[1] == "none needed"


def lines_at(renderable, width):
    """What a terminal of so many columns shows; every line fits, or rich has cut it."""
    shown = io.StringIO()
    Console(file=shown, width=width, color_system=None).print(renderable)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in shown.getvalue()
    return lines


@pytest.mark.parametrize("count", [3, 300])
def test_tables_at_80_columns_fold_no_number_and_few_names(count):
    content = report(count)
    content["modules"][1]["name"] = "base.decoder.block.17.layer_norm_free_attention.query_projection.linear"
    content["comparison"] = comparison(["berlin", "oslo", "a_client_of_a_rather_long_name"])
    content["clients"][0] |= {
        "name": "a_client_of_a_rather_long_name",
        "reason": "lora_B[1, 2] is nan; finite numbers needed",
    }
    lines = lines_at(aggregate_tables(content, "out"), 80)
    (row,) = (line for line in lines if line.startswith(("model.layers.2.", "model.layers.*.")))
    assert "37 x 23" in row
    for part in ("0.02 ", "  6 ") if count == 3 else ("299", "2.99"):
        assert part in row
    # 224 modules and more are a few types of layers
    assert len(lines) < 60


def test_columns_that_do_not_fit_go_from_the_last_on_and_come_back():
    shown = table("t", "name", "?>first", "?>second", ">last")
    shown.add_row("x" * 20, "1" * 10, "2" * 10, "3" * 10)
    heads = {width: lines_at(shown, width)[2].split() for width in (60, 45, 35, 28)}
    assert heads == {
        60: ["name", "first", "second", "last"],
        45: ["name", "first", "last"],
        35: ["name", "last"],
        28: ["name", "last"],
    }
    assert lines_at(shown, 60)[2].split() == heads[60]
    assert sum("x" in line for line in lines_at(shown, 28)) == 2


def comparison(names):
    count = len(names)
    each = {key: [0.5] * count for key in ("norms", "with_sum", "with_rest", "without")}
    return {"clients": names, "norm": 1.0, "cancellation": 0.5, "orthogonal": 0.3, "drift": 0.1,
            "cosines": [[0.25] * count for _ in names], **each}  # fmt: skip


@pytest.mark.parametrize(("count", "title"), [(8, "Cosines between updates"), (9, "least and most alike")])
def test_cosines_of_many_clients_are_their_extremes(count, title):
    lines = lines_at(Group(*comparison_tables(comparison([f"client_{k}" for k in range(count)]))), 80)
    assert any(title in line for line in lines)
    assert sum(line.lstrip("0123456789 ").startswith("client_") for line in lines) == 2 * count


def test_a_single_client_is_compared_with_nobody():
    assert comparison_tables(comparison(["alone"])) == []


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB"), (None, "-")]
)
def test_sizes(count, text):
    assert size(count) == text


def test_numbers():
    assert (number(None), number(0.000123456), number(3.0)) == ("-", "0.000123", "3")


def test_plain_values_hold_no_nan():
    value = plain({"a": (float("nan"), [float("-inf")]), 3: torch.tensor([1.5, float("inf")]), "n": None, "b": True})
    assert value == {"a": [None, [None]], "3": [1.5, None], "n": None, "b": True}


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_json(path, {"x": float("nan"), "name": EVIL})
    assert json.loads(path.read_text()) == {"x": None, "name": EVIL}
    before = path.read_bytes()

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"x": 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize("name", ["r.html", "folder.json", "absent/r.json", "file/r.json"])
def test_report_targets_are_checked(tmp_path, name):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--report"):
        check_target(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.json"]


@pytest.mark.parametrize("name", ["adapter_config.json", "list.json", "page.html", "link.json"])
def test_reports_replace_nobodys_files(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "page.html").write_text("<!doctype html><title>Not ours</title>")
    write_json(tmp_path / "ours", report())
    (tmp_path / "link.json").symlink_to("ours")
    with pytest.raises(InputError, match=f"{name}: a file is there that is no report written here"):
        check_target(tmp_path / name, suffixes=(".json", ".html"))


@pytest.mark.parametrize("name", ["r.json", "r.html"])
def test_reports_replace_older_ones_and_empty_files(tmp_path, name):
    target, adapter = tmp_path / name, str(make_adapter(tmp_path / "a"))
    target.touch()
    assert main(["inspect", adapter, "--quiet", "--report", str(target)]) == 0
    before = target.stat()
    assert before.st_size > 0
    assert main(["inspect", adapter, "--quiet", "--report", str(target)]) == 0
    assert target.stat().st_ino != before.st_ino


def test_a_report_never_replaces_a_clients_file(tmp_path, capsys):
    adapter = str(make_adapter(tmp_path / "a"))
    config = tmp_path / "a" / "adapter_config.json"
    before = config.read_bytes()
    assert main(["aggregate", adapter, "-o", str(tmp_path / "out"), "--report", str(config)]) == 2
    assert "is no report written here" in capsys.readouterr().err
    assert config.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_the_page_may_lie_in_the_output_and_is_replaced_with_it(tmp_path, capsys):
    adapter, out = str(make_adapter(tmp_path / "a")), tmp_path / "out"
    argv = ["aggregate", adapter, "-o", str(out), "--quiet", "--report", str(out / "report.html")]
    assert main(argv) == 0
    assert "report.html" in os.listdir(out)
    assert main([*argv, "--overwrite"]) == 0
    assert "report.html" in os.listdir(out)
    for name in ("page.html", "clients/report.html"):
        assert main([*argv[:-1], str(out / name), "--overwrite"]) == 2
        assert "only report.json and report.html have a place; name a file outside" in capsys.readouterr().err


def test_the_report_of_another_output_is_left_alone(tmp_path, capsys):
    """A next round reads there which round and method it goes on from."""
    adapter, first = str(make_adapter(tmp_path / "a")), tmp_path / "round_0"
    assert main(["aggregate", adapter, "-o", str(first), "--quiet"]) == 0
    before = (first / "report.json").read_bytes()
    for argv in (["inspect", adapter], ["aggregate", adapter, "-o", str(tmp_path / "round_1")]):
        assert main([*argv, "--report", str(first / "report.json")]) == 2
        assert "round_0/adapter_model.safetensors; give another name" in capsys.readouterr().err
    assert (first / "report.json").read_bytes() == before


def test_the_longest_name_is_no_trouble(tmp_path):
    name = "n" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 5) + ".json"
    write_json(check_target(tmp_path / name), {"x": 1})
    assert os.listdir(tmp_path) == [name]


def test_no_bar_in_a_pipe(capsys):
    with ProgressBar(quiet=False) as progress:
        progress("read", 1, 2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for quiet in (False, True):
        with ProgressBar(quiet=quiet) as progress:
            progress("read\x1b", 1, 2)
            progress("read\x1b", 2, 2)
        assert bool(capsys.readouterr().err) is not quiet


def test_the_bar_tells_bytes_rate_and_time_left(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    wide = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr("fedlora_kernels.reporting.terminal.console", lambda **_: wide)
    with ProgressBar(quiet=False) as progress:
        for done in range(4):
            progress("combine", done << 20, 8 << 20)
            time.sleep(0.05)
        progress._bar.refresh()
    text = shown.getvalue()
    assert "3.0/8.0 MiB" in text
    assert re.search(r"\d MB/s", text)
    assert re.search(r"0:00:0\d", text)


def test_a_bar_that_begins_in_the_middle_counts_only_what_is_new(monkeypatch):
    """What an earlier run has done would make the rate of this one a thousandfold."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar(quiet=False) as progress:
        progress("combine", 10**12, 2 * 10**12)
        for k in range(1, 4):
            time.sleep(0.02)
            progress("combine", 10**12 + k * 1000, 2 * 10**12)
        (task,) = progress._bar.tasks
        assert task.speed < 10**6


def test_what_was_decided_of_each_client_stands_beside_it(tmp_path, capsys):
    for k in range(5):
        make_adapter(tmp_path / f"c{k}", rank=4, seed=k)
    clients = [str(tmp_path / f"c{k}") for k in range(5)]
    assert main(["aggregate", *clients, "-o", str(tmp_path / "clair"), "--method", "clair"]) == 0
    shown = capsys.readouterr().out
    assert "flags" in shown
    assert "scores" in shown
    arguments = ["--method", "fedit", "--robust", "krum", "--set", "krum.f=1"]
    assert main(["aggregate", *clients, "-o", str(tmp_path / "krum"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "score" in shown
    assert shown.count("rejected") == 4
