"""fedlora inspect: figures against dense updates, and every suspicion raised by one adapter made to deserve it."""

import io
import json
import math

import numpy as np
import pytest
import torch
from make_adapters import SHAPES, dense, factors, first, make_adapter, make_clients, poison
from rich.console import Console

import fedlora_kernels as fk
from fedlora_kernels.cli import main
from fedlora_kernels.errors import FormatError
from fedlora_kernels.inspection import inspect_adapters
from fedlora_kernels.reporting.html import html_page
from fedlora_kernels.reporting.spectra import inspect_tables


def test_norms_cosines_and_spectra_are_those_of_the_dense_updates(tmp_path):
    paths = make_clients(tmp_path)
    report = inspect_adapters(paths)
    updates = [dense(path) for path in paths]
    flat = [torch.cat([update[name].flatten() for name in SHAPES]) for update in updates]
    for adapter, update, vector in zip(report["adapters"], updates, flat, strict=True):
        assert adapter["norm"] == pytest.approx(float(vector.norm()), rel=1e-6)
        for row in adapter["modules"]:
            expected = torch.linalg.svdvals(update[row["name"]])[: row["rank"]]
            assert row["singular_values"] == pytest.approx(expected.tolist(), rel=1e-6)
            assert row["norm"] == pytest.approx(float(expected.norm()), rel=1e-6)
            shares = expected.square() / expected.square().sum()
            assert row["stable_rank"] == pytest.approx(float(1 / shares[0]), rel=1e-6)
            assert row["effective_rank"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-6)
            kept = shares.cumsum(0)
            assert row["rank_90"] == int((kept < 0.90).sum()) + 1
            assert row["rank_99"] == int((kept < 0.99).sum()) + 1
    expected = np.array([[float(a @ b / (a.norm() * b.norm())) for b in flat] for a in flat])
    assert np.allclose(report["comparison"]["cosines"], expected, atol=1e-7)
    assert report["findings"] == []
    for adapter, update in zip(report["adapters"], updates, strict=True):
        every = torch.cat([torch.linalg.svdvals(update[name]) for name in SHAPES])
        shares = every.square() / every.square().sum()
        entropy = -(shares * shares.clamp_min(1e-40).log()).sum()
        assert adapter["effective_rank"] == pytest.approx(float(entropy.exp()), rel=1e-6)
        assert adapter["stable_rank"] == pytest.approx(float(1 / shares.max()), rel=1e-6)
        assert adapter["weight"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("missing", [False, True])
def test_the_comparison_is_that_of_the_engine(tmp_path, missing):
    paths = make_clients(tmp_path)
    if missing:
        paths.append(str(make_adapter(tmp_path / "x", seed=9, shapes=dict(list(SHAPES.items())[1:]))))
    weights = [1.0, 2.0, 5.0, 0.5][: len(paths)]
    found = inspect_adapters(paths, weights=weights)["comparison"]
    wanted = fk.aggregate(paths, weights=weights, compare=True, read=fk.ReadOptions(missing="zero")).report[
        "comparison"
    ]
    require_equal(found, wanted)


def require_equal(found, wanted):
    """The same values, nested in the same way, but for rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            require_equal(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            require_equal(one, other)
    else:
        assert found == (pytest.approx(wanted, rel=1e-9, abs=1e-12) if isinstance(wanted, float) else wanted)


def halve(tensors):
    """The same update from other factors: a gauge."""
    for key in tensors:
        tensors[key] *= 4.0 if ".lora_A." in key else 0.25


def fresh(tensors):
    for key in tensors:
        if ".lora_B." in key:
            tensors[key] = torch.zeros_like(tensors[key])


def tilt(tensors):
    for key in tensors:
        tensors[key] *= 1e-3 if ".lora_A." in key else 1e3


def one_zero(tensors):
    tensors[first(tensors, "lora_B")].zero_()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"change": poison("lora_A", math.inf)}, ["'x', module 'model.layers.0.self_attn.q_proj', lora_A[1, 2]: NaN or Inf"]),
        ({"alpha": 0}, ["'x'", "lora_alpha is 0"]),
        ({"change": fresh}, ["'x': every update is zero"]),
        ({"change": one_zero}, ["'x': the update is zero in module 'model.layers.0.self_attn.q_proj'"]),
        ({"base_model_name_or_path": "other/model"}, ["base models differ: base/model, other/model"]),
        ({"alpha": 8000}, ["'x': the norm of its update is", "times the median"]),
        ({"seed": 0, "change": halve}, ["'c0' and 'x' are near duplicates"]),
        ({"shapes": {**SHAPES, "model.layers.0.self_attn.q_proj": (37, 29)}}, ["'model.layers.0.self_attn.q_proj'", "shapes differ"]),
        ({"shapes": dict(list(SHAPES.items())[1:])}, ["'x' lacks module 'model.layers.0.self_attn.q_proj'"]),
        ({"seed": 2, "rank": 5}, ["'c2' and 'x' hold the same tensors, bit for bit"]),
        ({"change": tilt}, ["'x': factors far from balanced, |B| is", "e+06 times |A|, in module", "and 3 more"]),
    ],
)  # fmt: skip
def test_what_looks_wrong_is_said(tmp_path, options, said):
    paths = make_clients(tmp_path)
    findings = inspect_adapters([*paths, str(make_adapter(tmp_path / "x", **{"seed": 7, **options}))])["findings"]
    assert any(all(text in finding for text in said) for finding in findings), findings


def all_nan(tensors):
    for tensor in tensors.values():
        tensor[0, 0] = math.nan


def huge(tensors):
    for tensor in tensors.values():
        tensor.mul_(1e100)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (all_nan, ", lora_A[0, 0]: NaN or Inf (and 3 more modules); left out of norms and cosines"),
        (huge, ": the squared norm of the update leaves float64 (and 3 more modules); left out of norms and cosines"),
    ],
)
def test_an_adapter_broken_everywhere_is_one_finding_and_ends_nothing(tmp_path, change, said):
    paths = make_clients(tmp_path)
    broken = make_adapter(tmp_path / "x", seed=7, dtype=torch.float64, change=change)
    report = inspect_adapters([*paths, str(broken)])
    assert report["findings"] == [f"'x', module '{min(SHAPES)}'{said}"]
    assert report["adapters"][3]["norm"] is None
    assert report["comparison"]["cosines"][3][:3] == [0.0, 0.0, 0.0]


def test_a_gauge_of_every_client_changes_nothing(tmp_path):
    plain = inspect_adapters(make_clients(tmp_path / "plain"))
    turned = inspect_adapters(make_clients(tmp_path / "turned", change=halve))
    assert np.allclose(plain["comparison"]["cosines"], turned["comparison"]["cosines"], atol=1e-12)
    assert [a["norm"] for a in plain["adapters"]] == pytest.approx([a["norm"] for a in turned["adapters"]], rel=1e-12)


def test_folders_of_one_name_are_told_apart(tmp_path):
    paths = [str(make_adapter(tmp_path / site / "adapter", seed=k)) for k, site in enumerate("ab")]
    names = [adapter["name"] for adapter in inspect_adapters([*paths, paths[0]])["adapters"]]
    assert names == ["adapter", "adapter_2", "adapter_3"]


def test_files_are_closed_when_one_cannot_be_read(tmp_path):
    paths = make_clients(tmp_path)
    (tmp_path / "c2" / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="c2"):
        inspect_adapters(paths)


def test_command_shows_tables_and_writes_the_report(tmp_path, capsys):
    paths = make_clients(tmp_path)
    report = tmp_path / "r.json"
    assert main(["inspect", *paths[:2], f"third={paths[2]}", "--report", str(report)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for text in ("third", "37 x 23", "Cosines", "Nothing looks wrong", "base/model"):
        assert text in captured.out
    content = json.loads(report.read_text())
    assert [adapter["name"] for adapter in content["adapters"]] == ["c0", "c1", "third"]
    assert content["schema"] == 1


def test_nan_never_reaches_the_report(tmp_path, capsys):
    path = str(make_adapter(tmp_path / "x", change=poison()))
    report = tmp_path / "r.json"
    assert main(["inspect", path, "--quiet", "--report", str(report)]) == 0
    assert capsys.readouterr().out == ""
    assert "NaN" not in report.read_text().replace("NaN or Inf", "")
    assert json.loads(report.read_text())["adapters"][0]["norm"] is None


def test_many_modules_are_summed_up_by_layer_type(tmp_path, capsys):
    shapes = {f"model.layers.{i}.q_proj": (7, 5) for i in range(41)}
    assert main(["inspect", str(make_adapter(tmp_path / "x", shapes=shapes, rank=2))]) == 0
    assert "model.layers.*.q_proj (41, medians)" in capsys.readouterr().out


def test_an_update_beyond_float64_is_said_and_stops_nothing(tmp_path):
    def blow_up(tensors):
        for factor in ("lora_A", "lora_B"):
            tensors[first(tensors, factor)].mul_(1e160)

    paths = [*make_clients(tmp_path), str(make_adapter(tmp_path / "x", dtype=torch.float64, change=blow_up))]
    report = inspect_adapters(paths)
    assert any("'x', module 'model.layers.0.self_attn.q_proj'" in finding for finding in report["findings"])
    assert [adapter["norm"] is None for adapter in report["adapters"]] == [False, False, False, True]
    assert all(math.isfinite(value) for row in report["comparison"]["cosines"] for value in row)


def test_texts_of_a_stranger_reach_the_terminal_harmless(tmp_path, capsys):
    evil = "base\x1b[2J\x07[red]\u202e"
    shapes = {f"layer\x1b[31m\n{i}": (7, 5) for i in range(2)}
    path = make_adapter(tmp_path / "x", shapes=shapes, rank=2, base_model_name_or_path=evil)
    assert main(["inspect", f"n\x1b]0;t\x07={path}"]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    for text in ("base?[2J?[red]", "layer?[31m?0", "n?]0;t?"):
        assert text in out


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fedlora: error: ")
    assert "absent" in captured.err


def agreeing(seed, noise=0.3, sign=1.0):
    """A change to one common adapter and a little noise, as of clients that train on data of one kind."""
    common = factors(SHAPES, 4, 1000)

    def change(tensors):
        own = factors(SHAPES, 4, seed)
        for key in tensors:
            tensors[key].copy_(common[key] * (sign if ".lora_B." in key else 1.0) + noise * own[key])

    return change


def test_who_points_elsewhere_while_the_others_agree_is_named(tmp_path):
    paths = [str(make_adapter(tmp_path / f"c{k}", change=agreeing(k))) for k in range(4)]
    assert inspect_adapters(paths)["findings"] == []
    paths.append(str(make_adapter(tmp_path / "x", seed=99)))
    (finding,) = inspect_adapters(paths)["findings"]
    assert finding.startswith("'x': its cosine with the sum of the others is ")
    # strangers to each other are no outliers: nobody agrees with the rest
    strangers = [str(make_adapter(tmp_path / f"s{k}", seed=k)) for k in range(5)]
    assert inspect_adapters(strangers)["findings"] == []


def test_updates_that_cancel_are_said_to(tmp_path):
    paths = [str(make_adapter(tmp_path / f"c{k}", change=agreeing(k, sign=(-1.0) ** k))) for k in range(2)]
    report = inspect_adapters(paths)
    assert [finding.split(":")[0] for finding in report["findings"]] == ["the updates cancel"]
    # weights of opposite signs make them add up
    assert inspect_adapters(paths, weights=[1.0, -1.0], normalize=False)["findings"] == []


def test_one_loud_adapter_among_equal_ones_is_named(tmp_path):
    """Where the others do not differ at all there is no score, and still a finding."""
    paths = [str(make_adapter(tmp_path / f"c{k}", seed=1, alpha=8)) for k in range(3)]
    paths.append(str(make_adapter(tmp_path / "x", seed=1, alpha=800)))
    assert any(
        finding.startswith("'x': the norm of its update is 100 times")
        for finding in inspect_adapters(paths)["findings"]
    )


def test_weights_of_the_command_reach_the_sum(tmp_path):
    paths = make_clients(tmp_path)
    report = tmp_path / "r.json"
    command = ["inspect", *paths, "--weights", "-1,1,2.5", "--no-normalize", "--quiet", "--report", str(report)]
    assert main(command) == 0
    content = json.loads(report.read_text())
    assert [adapter["weight"] for adapter in content["adapters"]] == [-1.0, 1.0, 2.5]
    assert content["normalize"] is False
    updates = [dense(path) for path in paths]
    total = sum(float((-updates[0][name] + updates[1][name] + 2.5 * updates[2][name]).norm()) ** 2 for name in SHAPES)
    assert content["comparison"]["norm"] == pytest.approx(math.sqrt(total), rel=1e-6)
    assert main(["inspect", *paths, "--weights", "1,2"]) == 2


def test_adapters_whose_start_changed_the_base_are_looked_at_and_said_to_be(tmp_path):
    paths = make_clients(tmp_path, ranks=(4, 4, 4), init_lora_weights="pissa")
    report = inspect_adapters(paths)
    assert [finding.split(",")[0] for finding in report["findings"]] == [
        f"client 'c{k}': init_lora_weights is 'pissa'" for k in range(3)
    ]
    assert [adapter["init"] for adapter in report["adapters"]] == ["pissa"] * 3
    mixed = [*paths, str(make_adapter(tmp_path / "x", seed=9))]
    assert inspect_adapters(mixed)["findings"][-1] == (
        "initialisations differ, so these adapters fit no common base: pissa, true"
    )
    start = fk.ReadOptions(init_factors=paths[0])
    subtracted = inspect_adapters(paths[:2], read=start)
    assert subtracted["adapters"][0]["norm"] == pytest.approx(0.0, abs=1e-5)
    assert subtracted["adapters"][1]["init"] == "true"
    for adapter in subtracted["adapters"]:
        assert (adapter["rank_min"], adapter["rank_max"]) == (4, 4)
        assert adapter["parameters"] == sum(4 * (m + n) for m, n in SHAPES.values())
        assert {(row["rank"], row["start"]) for row in adapter["modules"]} == {(4, 4)}
    assert {row["start"] for adapter in report["adapters"] for row in adapter["modules"]} == {0}
    for found, told in ((report, 0), (subtracted, 2 * (1 + len(SHAPES)))):
        terminal = Console(file=io.StringIO(), width=200)
        terminal.print(inspect_tables(found))
        assert terminal.file.getvalue().count("  4, start ") == told
        assert html_page(found).count(">4, start<") == (told and 2 * len(SHAPES))
    updates = [dense(path) for path in paths[:2]]
    wanted = math.sqrt(sum(float((updates[1][name] - updates[0][name]).norm()) ** 2 for name in SHAPES))
    assert subtracted["adapters"][1]["norm"] == pytest.approx(wanted, rel=1e-6)
