"""Runs that are killed and go on: the same output to the last bit, whenever they died, and nothing of another run's."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_adapters import PREFIX, make_adapter, make_clients

import fedlora_kernels as fk
from fedlora_kernels.cli import main

SCRIPT = Path(__file__).parent / "resumed_runs.py"
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in (("q", (41, 23)), ("d", (19, 53)))}
WEIGHTS = "adapter_model.safetensors"

METHODS = {
    "florist": [],
    "padded": ["--uniform-rank", "--fill", "random", "--rank", "3"],
    "residual": ["--method", "fedex", "--per-client"],
    "personal": ["--method", "clair", "--per-client"],
    "decided": ["--method", "hetlora", "--policy", "drop"],
    "robust": ["--robust", "norm_clip", "--dtype", "float64"],
    "state": ["--method", "fedtree", "--per-client"],
    "compared": ["--compare", "--method", "flora"],
}


def with_extras(tensors):
    """A bias and a module that is saved whole: they come after all factors."""
    tensors[f"{PREFIX}model.norm.weight"] = torch.randn(23, generator=torch.Generator().manual_seed(4))


def clients_of(tmp_path, name):
    if name in ("personal", "residual", "state"):
        return make_clients(tmp_path / "clients", 3, ranks=(4,), shapes=SHAPES)
    saved = {"modules_to_save": ["norm"], "change": with_extras}
    return make_clients(tmp_path / "clients", 3, ranks=(4, 2, 5), shapes=SHAPES, **saved)


def killed(tmp_path, mode, count, name):
    clients = clients_of(tmp_path, name)
    root = tmp_path / "root"
    root.mkdir()
    command = [sys.executable, str(SCRIPT), mode, str(count), str(root), json.dumps(METHODS[name]), *clients]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_points(rows):
    modules = len(SHAPES)
    for row in rows:
        assert row["same"], row
        assert row["leftovers"] == [], row
        assert row["stderr"] == "", row
        assert row["status"] == -9, row
    # what is repeated shrinks as the run goes on: late deaths find all modules there
    resumed = [row["resumed"] for row in rows if not row["died"]["out"]]
    assert resumed == sorted(resumed)
    assert resumed[-1] == modules
    assert any(0 < count < modules for count in resumed)


def test_a_run_that_died_in_any_write_goes_on(tmp_path):
    rows = killed(tmp_path, "points", 10, "florist")
    check_points(rows)


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_died_in_any_write_goes_on_whatever_it_writes(tmp_path, name):
    rows = killed(tmp_path, "points", 24, name)
    assert len(rows) == 24
    check_points(rows)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    rows = killed(tmp_path, "moments", 4, "decided")
    assert sum(row["deaths"] for row in rows) >= 4
    assert all(row["same"] for row in rows), rows


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_twenty_deaths_at_random_moments(tmp_path, name):
    rows = killed(tmp_path, "moments", 20, name)
    assert sum(row["deaths"] for row in rows) >= 20
    assert all(row["same"] for row in rows), rows
    assert any(row["resumed"] for row in rows)


class Stop(Exception):
    pass


def stopped(clients, out, after=4, **options):
    """Aggregate until ``after`` slabs are done, and end there."""
    calls = []

    def progress(stage, done, total):
        calls.append(done)
        if len(calls) > after:
            raise Stop

    with pytest.raises(Stop):
        fk.aggregate(clients, out=out, resume=True, memory=1, progress=progress, **options)
    return kept(out)


def kept(out):
    return sorted(out.parent.glob(f"{out.name}.partial-*"))


@pytest.fixture
def halfway(tmp_path):
    """A run that was ended halfway: its clients, its output, and what it kept."""
    clients = make_clients(tmp_path / "clients", 3, shapes=SHAPES)
    wanted = fk.aggregate(clients, out=tmp_path / "wanted", memory=1).adapter
    (partial,) = stopped(clients, tmp_path / "out")
    return clients, tmp_path / "out", partial, Path(wanted.label) / WEIGHTS


def gone_on(clients, out, **options):
    """Modules that were there already, after a run that goes on; the texts that it warns of."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fk.aggregate(clients, out=out, resume=True, memory=1, **options)
    notes = [note for note in result.report["notes"] if note.startswith("resumed: ")]
    return int(notes[0].split()[1]) if notes else 0, [str(warning.message) for warning in caught]


def test_the_next_run_goes_on_after_the_last_whole_slab(halfway):
    clients, out, partial, wanted = halfway
    assert (partial / "journal").is_file()
    done, warned = gone_on(clients, out)
    assert 3 <= done < len(SHAPES)
    assert warned == []
    assert (out / WEIGHTS).read_bytes() == wanted.read_bytes()
    assert kept(out) == []


def test_what_is_there_is_not_read_again(halfway):
    clients, out, _, _ = halfway
    stages = []
    fk.aggregate(clients, out=out, resume=True, memory=1, progress=lambda *told: stages.append(told))
    assert stages[0][1] > 0
    assert stages[-1][1] == stages[-1][2]


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"weights": [1, 2, 3]}, {"rule": fk.Energy(0.8)}, {"method": "flora"}, {"policy": "drop"}]
)
def test_other_options_are_another_run(halfway, options):
    clients, out, partial, _ = halfway
    done, warned = gone_on(clients, out, **options)
    assert done == 0
    assert any(partial.name in text and "not used" in text for text in warned), warned
    assert kept(out) == [partial]


def touch(clients):
    path = Path(clients[1]) / WEIGHTS
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def reconfigure(clients):
    path = Path(clients[2]) / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))


def rename(clients):
    os.rename(clients[0], clients[0] + "x")
    clients[0] += "x"


@pytest.mark.parametrize("change", [touch, reconfigure, rename, list.reverse], ids=lambda change: change.__name__)
def test_other_clients_are_another_run(halfway, change):
    clients, out, partial, _ = halfway
    change(clients)
    done, warned = gone_on(clients, out)
    assert done == 0
    assert any(partial.name in text for text in warned), warned


def test_another_version_is_another_run(halfway, monkeypatch):
    clients, out, partial, _ = halfway
    monkeypatch.setattr("fedlora_kernels.engine.fingerprint.__version__", "0.0.1")
    done, warned = gone_on(clients, out)
    assert (done, partial.name in warned[0]) == (0, True)


def test_another_number_of_threads_of_torch_is_another_run(halfway, monkeypatch):
    """Its products round otherwise then, whatever number the kernels take."""
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "1")
    clients, out, _, _ = halfway
    shutil.rmtree(halfway[2])
    (partial,) = stopped(clients, out)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    done, warned = gone_on(clients, out)
    assert (done, partial.name in warned[0]) == (0, True)


def test_a_run_that_cannot_go_on_now_holds_no_file_and_loses_nothing(tmp_path, monkeypatch):
    """The second of its files cannot be cut to what is told of it."""
    clients = make_clients(tmp_path / "clients", 3, ranks=(4,), shapes=SHAPES)
    out, options = tmp_path / "out", {"method": "fedtree", "per_client": True, "policy": "strict"}
    (partial,) = stopped(clients, out, after=14, **options)
    cut, calls, open_files = os.ftruncate, [], len(os.listdir("/proc/self/fd"))

    def failing(fd, size):
        calls.append(fd)
        if len(calls) == 4:
            raise OSError(5, "broken")
        cut(fd, size)

    monkeypatch.setattr(os, "ftruncate", failing)
    with pytest.raises(fk.RunError, match="broken"):
        fk.aggregate(clients, out=out, resume=True, memory=1, **options)
    assert len(calls) == 4
    assert len(os.listdir("/proc/self/fd")) == open_files
    monkeypatch.undo()
    assert kept(out) == [partial]
    assert gone_on(clients, out, **options)[0] > 0


def flip(place, path, at):
    content = bytearray((place / path).read_bytes())
    content[at] ^= 1
    (place / path).write_bytes(content)


def begin(place):
    """Where the tensors begin that the journal tells of."""
    line = (place / "journal").read_bytes().splitlines()[1]
    return json.loads(line[33:])["files"][WEIGHTS]["begin"]


DAMAGE = {
    "first line": lambda place: flip(place, "journal", 40),
    "second line": lambda place: flip(place, "journal", 200),
    "its checksum": lambda place: flip(place, "journal", 70),
    "last line": lambda place: flip(place, "journal", -30),
    "line lost": lambda place: (place / "journal").write_bytes(
        b"".join(line for i, line in enumerate((place / "journal").read_bytes().splitlines(True)) if i != 2)
    ),
    "tensors": lambda place: flip(place, f"out/{WEIGHTS}", begin(place) + 1000),
    "tensors cut": lambda place: os.truncate(place / "out" / WEIGHTS, begin(place) + 1000),
    "file lost": lambda place: (place / "out" / WEIGHTS).unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_found_and_begun_anew(halfway, name):
    clients, out, partial, wanted = halfway
    DAMAGE[name](partial)
    done, warned = gone_on(clients, out)
    assert done == 0
    assert len(warned) == 1
    assert f"{partial} is damaged (" in warned[0]
    assert (out / WEIGHTS).read_bytes() == wanted.read_bytes()
    assert kept(out) == []


@pytest.mark.parametrize("cut", [1, 50, 10**6])
def test_a_line_that_was_being_written_is_left_out(halfway, cut):
    clients, out, partial, wanted = halfway
    path = partial / "journal"
    os.truncate(path, max(0, path.stat().st_size - cut))
    done, warned = gone_on(clients, out)
    assert done < 4
    assert warned == []
    assert (out / WEIGHTS).read_bytes() == wanted.read_bytes()


def test_two_runs_on_the_same_folder_are_refused(halfway, capsys):
    clients, out, partial, wanted = halfway
    fd = os.open(partial, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    argv = ["aggregate", *clients, "-o", str(out), "--memory", "1B", "--resume", "--quiet"]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"fedlora: error: output {out}: another run is at work on {partial}")
    assert told.count("\n") == 1
    assert partial.exists()
    os.close(fd)
    assert main(argv) == 0
    assert (out / WEIGHTS).read_bytes() == wanted.read_bytes()


def test_a_link_in_the_place_of_the_folder_is_not_followed(halfway, tmp_path):
    clients, out, partial, _ = halfway
    shutil.move(partial, tmp_path / "elsewhere")
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(fk.RunError, match="cannot be written"):
        fk.aggregate(clients, out=out, resume=True, memory=1)
    assert (tmp_path / "elsewhere" / "journal").is_file()


def test_without_resume_nothing_is_kept_and_what_is_there_is_left_alone(halfway):
    clients, out, partial, wanted = halfway
    fk.aggregate(clients, out=out, memory=1)
    assert (out / WEIGHTS).read_bytes() == wanted.read_bytes()
    assert kept(out) == [partial]
    before = sorted(out.parent.iterdir())

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        fk.aggregate(clients, out=out, memory=1, overwrite=True, progress=stop)
    assert sorted(out.parent.iterdir()) == before


def test_a_run_that_has_done_nothing_keeps_nothing(tmp_path):
    clients = make_clients(tmp_path / "clients", 3, shapes=SHAPES)
    assert stopped(clients, tmp_path / "out", after=0) == []


def test_a_run_on_wrong_input_keeps_nothing(tmp_path):
    clients = make_clients(tmp_path / "clients", 2, shapes=SHAPES)

    def poison(tensors):
        tensors[f"{PREFIX}model.layers.3.d.lora_B.weight"][1, 2] = float("nan")

    clients.append(str(make_adapter(tmp_path / "bad", shapes=SHAPES, change=poison)))
    with pytest.raises(fk.NonFiniteError):
        fk.aggregate(clients, out=tmp_path / "out", resume=True, memory=1)
    assert kept(tmp_path / "out") == []


def test_an_output_that_appears_meanwhile_costs_nothing(halfway, monkeypatch):
    """Put in place by somebody else: the run is refused at its end, and goes on from there with overwrite."""
    clients, out, partial, wanted = halfway
    journal = fk.engine.journal.Journal
    finish = journal.finish

    def overtaken(self):
        shutil.copytree(wanted.parent, out)
        finish(self)

    monkeypatch.setattr(journal, "finish", overtaken)
    with pytest.raises(fk.InputError, match="exists; replace it with overwrite"):
        fk.aggregate(clients, out=out, resume=True, memory=1)
    assert kept(out) == [partial]
    monkeypatch.undo()
    assert gone_on(clients, out, overwrite=True) == (len(SHAPES), [])
    assert (out / WEIGHTS).read_bytes() == wanted.read_bytes()
    assert kept(out) == []


def test_an_old_output_stays_until_the_new_one_is_whole(halfway):
    clients, out, _, wanted = halfway
    fk.aggregate(clients, out=out, rule=fk.Rank(1))
    old = (out / WEIGHTS).read_bytes()
    stopped(clients, out, after=2, overwrite=True)
    assert (out / WEIGHTS).read_bytes() == old
    done, _ = gone_on(clients, out, overwrite=True)
    assert done >= 4
    assert (out / WEIGHTS).read_bytes() == wanted.read_bytes()


def test_clients_in_memory_count_by_their_content(tmp_path):
    from adapter_problems import changed, clients

    out, pairs = tmp_path / "out", clients(shapes=SHAPES)
    (partial,) = stopped(pairs, out)
    other = [changed(pairs[0], "A", lambda tensor: tensor * 2, "model.layers.3.q"), *pairs[1:]]
    (again, _) = sorted(stopped(other, out), key=lambda path: path != partial)
    assert again == partial
    assert gone_on(pairs, out)[0] >= 3


def test_resume_needs_an_output():
    with pytest.raises(fk.InputError, match="give out="):
        fk.aggregate([], resume=True)


def test_a_full_disc_keeps_what_is_done(tmp_path):
    """The same path through the code as a disc without space: no file may grow beyond 64 KiB."""
    clients = make_clients(
        tmp_path / "clients", shapes={f"{name}{i}": (m * 3, n * 3) for i in range(5) for name, (m, n) in SHAPES.items()}
    )
    root = tmp_path / "root"
    root.mkdir()
    argv = ["aggregate", *clients, "-o", str(root / "out"), "--resume", "--memory", "1B", "--quiet"]
    command = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", sys.executable, "-m", "fedlora_kernels", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in root.iterdir()] == [path.name for path in kept(root / "out")]
    assert main(argv) == 0
    report = json.loads((root / "out" / "report.json").read_text())
    assert any(note.startswith("resumed: ") for note in report["notes"])
    wanted = fk.aggregate(clients, out=tmp_path / "wanted", memory=1)
    assert (root / "out" / WEIGHTS).read_bytes() == (tmp_path / "wanted" / WEIGHTS).read_bytes()
    assert wanted.report["modules"] == report["modules"]


@pytest.mark.parametrize(("after", "there"), [(3, 0), (10, 0), (11, 10), (12, 11), (20, 11)])
def test_experts_that_share_a_rank_go_on_after_the_last_whole_module(tmp_path, after, there):
    """Two modules of ten experts, and a plain one between them, a slab each; the pairs of ten experts are written at one rank."""
    from expert_problems import clients, folder

    folders = [folder(tmp_path / f"c{k}", pair) for k, pair in enumerate(clients())]
    fk.aggregate(folders, out=tmp_path / "wanted", memory=1)
    stopped(folders, tmp_path / "out", after=after)
    done, warned = gone_on(folders, tmp_path / "out")
    assert done == there
    assert warned == []
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "wanted" / WEIGHTS).read_bytes()
    assert kept(tmp_path / "out") == []


def test_a_kohya_file_goes_on_as_well(tmp_path):
    from kohya_files import SHAPES as MODULES
    from kohya_files import kohya_file

    metadata = {"ss_network_dim": "4", "sshs_model_hash": "0" * 64}
    made = [kohya_file(tmp_path / f"c{k}.safetensors", seed=k, metadata=metadata) for k in range(3)]
    out, wanted = tmp_path / "out.safetensors", tmp_path / "wanted.safetensors"
    fk.aggregate(made, out=wanted, memory=1)
    stopped(made, out, after=3)
    done, warned = gone_on(made, out)
    assert 1 <= done < len(MODULES)
    assert warned == []
    assert out.read_bytes() == wanted.read_bytes()
    assert kept(out) == []


def test_a_comparison_of_clients_goes_on_as_well(tmp_path):
    clients, out = make_clients(tmp_path / "clients", 3, shapes=SHAPES), tmp_path / "out"
    wanted = fk.aggregate(clients, memory=1, compare=True).report
    stopped(clients, out, compare=True)
    found = fk.aggregate(clients, out=out, resume=True, memory=1, compare=True).report
    assert any(note.startswith("resumed: ") for note in found["notes"])
    assert found["comparison"] == wanted["comparison"]


def test_a_budget_begins_anew_and_says_nothing_of_going_on(tmp_path):
    clients = make_clients(tmp_path / "clients", 3, shapes=SHAPES)
    out, rule = tmp_path / "out", fk.Budget("8kB")
    assert stopped(clients, out, rule=rule) == []
    wanted = fk.aggregate(clients, out=tmp_path / "wanted", memory=1, rule=rule)
    assert gone_on(clients, out, rule=rule) == (0, [])
    assert (out / WEIGHTS).read_bytes() == (Path(wanted.adapter.label) / WEIGHTS).read_bytes()
