"""The table and the picture, from fabricated reports."""

import io
import json
import xml.etree.ElementTree as ET

import pytest
from demo_problems import report_of
from rich.console import Console

from fedlora_kernels.demo.report import Row, draw_spectra, energy_rank, results_table, write_results

DOMAINS = ("tweets", "movies")
ROWS = [
    Row("commoner label", {"tweets": 0.5, "movies": 0.6}),
    Row("client tweets", {"tweets": 0.901, "movies": 0.5}, own="tweets", rank=12, nbytes=7000),
    Row(
        "florist",
        {"tweets": 0.85, "movies": 0.8},
        rank=20,
        nbytes=12345,
        error=1e-8,
        dense_error=2.34e-8,
        seconds=0.1234,
    ),
]
REPORT = report_of(
    {f"layers.{i}.self.{kind}": [2.0**-j * (i + 1) for j in range(5)] for i in range(2) for kind in ("query", "value")}
)


def test_table_shows_every_figure_and_marks_a_clients_own_domain():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table(ROWS))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == ["adapter", *DOMAINS, "mean", "rank", "kB", "error", "check", "ms"]
    assert lines[2] == ["commoner", "label", "50.0", "60.0", "55.0"]
    assert lines[3] == ["client", "tweets", "90.1*", "50.0", "70.0", "12", "7"]
    assert lines[4] == ["florist", "85.0", "80.0", "82.5", "20", "12", "1.0e-08", "2.3e-08", "123"]


@pytest.mark.parametrize(
    ("values", "tau", "rank"),
    [
        ([1.0] * 10, 0.9, 9),
        ([1.0] * 25, 7 / 25, 7),
        ([2.0, 1.0, 1.0], 0.5, 1),
        ([2.0, 1.0, 1.0], 0.7, 2),
        ([3.0], 1.0, 1),
        ([1.0, 1e-9], 1.0, 1),
    ],
)
def test_energy_rank_is_the_smallest_that_reaches_tau(values, tau, rank):
    assert energy_rank(values, tau) == rank


def test_results_are_written_with_their_attribution(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'fedlora-kernels[demo]'")
    write_results(tmp_path, ROWS, REPORT, ["A note."])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.txt", "spectra.svg"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"][2]["dense_error"] == 2.34e-8
    for text in (capsys.readouterr().out, (tmp_path / "results.txt").read_text()):
        assert "90.1*" in text
        assert "A note." in text
        assert "MIT licence" in " ".join(text.split())


def test_picture_is_the_same_twice_and_holds_a_curve_per_module(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'fedlora-kernels[demo]'")
    for name in ("a.svg", "b.svg"):
        draw_spectra(REPORT, ROWS, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    root = ET.parse(tmp_path / "a.svg").getroot()
    panels = [e for e in root.iter("{http://www.w3.org/2000/svg}g") if e.get("id", "").startswith("axes_")]
    assert len(panels) == 3
