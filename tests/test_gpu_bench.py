"""The GPU benchmarks without a GPU: the script runs on tiny problems, and the evidence keeps what every stage came to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUITES = {"small_svd", "core_svd", "stacked_qr", "product_svd", "align_factors"}

pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the source tree")


def run(*command, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_every_suite_runs_has_green_gates_and_peers_with_figures(tmp_path):
    code, output = run(sys.executable, "bench/gpu_kernels.py", "--dry-run", "--json", tmp_path / "rows.json")
    assert code == 0, output
    kept = json.loads((tmp_path / "rows.json").read_text())
    rates, *rows = kept["rows"]
    assert kept["machine"]["torch"]
    assert min(rates["float64"], rates["float32"], rates["copy"]) > 0
    assert {row["what"] for row in rows} == SUITES
    for row in rows:
        assert row["red"] == []
        assert row["failed_peers"] == {}
        ours, peer = row["routes"]["ours"], row["routes"][row["best_peer"]]
        assert row["ratio"] == pytest.approx(peer["us_per_matrix"] / ours["us_per_matrix"])
        assert row["times floor, here"] > 0
        for figures in row["routes"].values():
            assert figures["accuracy"]
            assert set(figures["accuracy"]) == set(ours["accuracy"])
            assert 0 < figures["q20"] <= figures["us_per_matrix"] <= figures["q80"]
            assert max(figures["accuracy"].values()) < 1e-3


@pytest.mark.full
def test_one_suite_alone(tmp_path):
    code, output = run(
        sys.executable, "bench/gpu_kernels.py", "--dry-run", "--only", "stacked_qr", "--json", tmp_path / "rows.json"
    )
    assert code == 0, output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["rates", "stacked_qr", "stacked_qr"]


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is an NVIDIA driver")
def test_without_a_gpu_there_is_no_evidence(tmp_path):
    code, output = run("bash", "bench/gpu_evidence.sh", tmp_path, PYTHON=sys.executable)
    assert code == 1
    assert "torch finds no GPU here" in output
    assert list(tmp_path.iterdir()) == []
    code, output = run(sys.executable, "bench/gpu_kernels.py")
    assert code == 2
    assert "torch finds no GPU here; --dry-run shows that the script runs" in output


# Plays a machine with a GPU: stages end as $ENDS says (name=status), the benchmark leaves one row.
PYTHON = r"""#!/bin/sh
case "$*" in
*get_device_name*) echo "Fake GPU"; exit 0 ;;
*get_device_capability*) echo 90; exit 0 ;;
*setup.py*) stage=build ;;
*-m\ pytest*) stage=tests ;;
*gpu_kernels.py*) stage=kernels; echo '{"rows": [{"what": "row"}]}' > "$5" ;;
*peers.py*) stage=peers ;;
*self_test*) stage=sanitizer ;;
*) exec "$REAL_PYTHON" "$@" ;;
esac
echo "this is $stage for $FEDLORA_CUDA_ARCHS"
for end in $ENDS; do [ "${end%=*}" = $stage ] && exit "${end#*=}"; done
exit 0
"""

SANITIZER = """#!/bin/sh
echo "sanitizer $*"
[ "$2" != racecheck ]
"""


def evidence(tmp_path, ends, sanitizer=True):
    """(exit status, evidence, log) of a run on that machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        if sanitizer or name == "python":
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
    code, output = run(
        "bash",
        "bench/gpu_evidence.sh",
        tmp_path / "out",
        PYTHON=str(folder / "python"),
        REAL_PYTHON=sys.executable,
        ENDS=ends,
        CUDA_HOME="/nowhere",
        PATH=f"{folder}:{os.environ['PATH']}",
    )
    assert (tmp_path / "out/evidence-Fake-GPU.json").is_file(), output
    return (
        code,
        json.loads((tmp_path / "out/evidence-Fake-GPU.json").read_text()),
        (tmp_path / "out/evidence-Fake-GPU.log").read_text(),
    )


def test_a_stage_that_fails_does_not_stop_the_next_and_all_is_kept(tmp_path):
    code, found, log = evidence(tmp_path, "tests=1 peers=124")
    assert code != 0
    assert {stage["stage"]: stage["end"] for stage in found["stages"]} == {
        "build": "passed",
        "tests": "failed, status 1",
        "kernels": "passed",
        "peers": "out of time",
        "memcheck": "passed",
        "racecheck": "failed, status 1",
        "initcheck": "passed",
    }
    assert found["kernels"] == [{"what": "row"}]
    assert "peers" not in found
    assert found["machine"]["torch"]
    assert "this is build for 90" in log
    assert "sanitizer --tool initcheck --kernel-regex kns=fedlora --error-exitcode 9" in log


@pytest.mark.full
def test_a_machine_without_the_sanitizer_leaves_it_out(tmp_path):
    code, found, _ = evidence(tmp_path, "", sanitizer=False)
    assert code == 0
    assert [stage["end"] for stage in found["stages"][-3:]] == ["left out"] * 3
