"""The CUDA library built at first use, by a compiler that only tells how it was called."""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from fedlora_kernels.backends.cuda import CudaBackend, build
from fedlora_kernels.backends.cuda import nvcc as compiler
from fedlora_kernels.backends.native.library import HEADERS, abi_stamp
from fedlora_kernels.errors import BackendError

# Says that it is version $NVCC_VERSION; compiling writes a line to $NVCC_CALLS, linking copies $NVCC_LIBRARY.
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V${NVCC_VERSION:-13.0.88}"; exit 0; fi
for word; do
    [ "$last" = -o ] && out="$word"
    [ "$word" = -shared ] && link=1
    last="$word"
done
echo "$@" >> "$NVCC_CALLS"
sleep "${NVCC_SECONDS:-0}"
if [ -n "$NVCC_STATUS" ]; then echo "some note"; echo "gram.cu(7): error: no such thing" >&2; exit "$NVCC_STATUS"; fi
if [ -n "$link" ]; then cp "$NVCC_LIBRARY" "$out"; else echo object > "$out"; fi
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """That compiler, a GPU of capability 9.0, and a cache of its own; answers the file of calls."""
    script, library = tmp_path / "nvcc", tmp_path / "made.so"
    script.write_text(NVCC)
    script.chmod(0o755)
    library.write_bytes(b"made")
    for name in ("FEDLORA_BUILD_CUDA", "FEDLORA_CUDA_ARCHS", "NVCC_STATUS", "NVCC_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVCC", str(script))
    monkeypatch.setenv("NVCC_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("NVCC_LIBRARY", str(library))
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(build, "_check_driver", lambda version: None)
    return tmp_path / "calls"


def calls(file):
    return file.read_text().splitlines() if file.is_file() else []


def whole_build():
    csrc = next(header.parents[1] for header in HEADERS if header.is_file())
    return len(compiler.sources(csrc)) + 1


def test_built_once_and_found_again(nvcc, caplog):
    first = build.first_use()
    assert first.read_bytes() == b"made"
    assert first.name == "libfedlora_cuda.so"
    assert "nvcc13.0.88" in first.parent.name
    assert "sm90" in first.parent.name
    assert len(calls(nvcc)) == whole_build()
    assert "building the CUDA library for sm_90 with nvcc 13.0.88, once" in caplog.text
    assert build.first_use() == first
    assert len(calls(nvcc)) == whole_build()
    assert sorted(path.name for path in first.parents[1].iterdir()) == [first.parent.name, f"{first.parent.name}.lock"]


def test_another_compiler_gpu_or_package_is_another_library(nvcc, monkeypatch):
    found = {build.first_use()}
    monkeypatch.setenv("NVCC_VERSION", "13.1.2")
    found.add(build.first_use())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 + index, 0))
    found.add(build.first_use())
    assert "-gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_100,code=sm_100" in calls(nvcc)[-1]
    monkeypatch.setattr(build, "__version__", "99.0")
    found.add(build.first_use())
    monkeypatch.setenv("FEDLORA_CUDA_ARCHS", "80")
    found.add(build.first_use())
    assert len(found) == 5


def test_other_sources_are_another_library(nvcc, monkeypatch, tmp_path):
    csrc = next(header.parents[1] for header in HEADERS if header.is_file())
    copy = tmp_path / "csrc"
    shutil.copytree(csrc, copy)
    monkeypatch.setattr(build, "HEADERS", (copy / "include" / "fedlora.h",))
    first = build.first_use()
    with (copy / "cuda" / "runtime.cuh").open("a") as file:
        file.write("// more\n")
    assert build.first_use() != first


def test_one_builds_and_the_others_wait(nvcc, monkeypatch):
    monkeypatch.setenv("NVCC_SECONDS", "0.05")
    found = []
    threads = [threading.Thread(target=lambda: found.append(build.first_use())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(calls(nvcc)) == whole_build()


def test_a_build_that_was_killed_is_done_again(nvcc, monkeypatch):
    monkeypatch.setenv("NVCC_SECONDS", "30")
    process = multiprocessing.get_context("fork").Process(target=build.first_use)
    process.start()
    while not calls(nvcc):
        time.sleep(0.01)
    process.kill()
    process.join()
    (left,) = (Path(os.environ["FEDLORA_CACHE"]) / "cuda").glob("*.partial")
    assert left.is_dir()
    monkeypatch.setenv("NVCC_SECONDS", "0")
    assert build.first_use().read_bytes() == b"made"
    assert not left.exists()


def test_a_failed_build_says_why_and_leaves_nothing(nvcc, monkeypatch):
    monkeypatch.setenv("NVCC_STATUS", "2")
    with pytest.raises(BackendError, match=r"nvcc failed with status 2: gram\.cu\(7\): error: no such thing$"):
        build.first_use()
    left = list((Path(os.environ["FEDLORA_CACHE"]) / "cuda").iterdir())
    assert [path.suffix for path in left] == [".lock"]
    monkeypatch.delenv("NVCC_STATUS")
    assert build.first_use().is_file()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NVCC", "no-such-nvcc", r"no nvcc to build it with; `pip install 'fedlora-kernels\[nvcc\]'`"),
        ("NVCC", "true", "true names no version"),
        ("FEDLORA_BUILD_CUDA", "0", "FEDLORA_BUILD_CUDA=0 forbids to build it"),
        ("FEDLORA_CUDA_ARCHS", "75", "FEDLORA_CUDA_ARCHS: '75' is no compute capability from 80 on"),
        (
            "FEDLORA_CACHE",
            "/dev/null",
            "cannot be built in /dev/null/cuda: .*; set FEDLORA_CACHE to a folder to write to",
        ),
    ],
)
def test_reasons(nvcc, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match=message):
        build.first_use()
    backend = CudaBackend()
    monkeypatch.setattr(backend.library, "path", Path("/no/such/library"))
    ok, reason = backend.available()
    assert not ok
    assert reason.startswith("libfedlora_cuda.so did not come with the package, and ")


def test_gpus_that_are_too_old(nvcc, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(BackendError, match=r"no GPU of compute capability 8\.0 or more"):
        build.first_use()


@pytest.mark.parametrize(("offered", "ok"), [(12080, False), (13000, True), (13020, True)])
def test_drivers_older_than_the_compiler_are_refused(monkeypatch, offered, ok):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(number):
            number._obj.value = offered
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver)
    if ok:
        build._check_driver("13.1.80")
    else:
        with pytest.raises(BackendError, match=r"the driver knows CUDA 12\.8, too old for what nvcc 13\.1\.80 makes"):
            build._check_driver("13.1.80")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler g++")
def test_the_backend_loads_what_was_built(nvcc, monkeypatch, tmp_path):
    header = next(header for header in HEADERS if header.is_file())
    source = tmp_path / "library.cpp"
    source.write_text(
        f'extern "C" unsigned long fedlora_abi() {{ return {abi_stamp(header)}ul; }}\n'
        'extern "C" const char *fedlora_isa() { return "sm_90"; }\n'
        'extern "C" int fedlora_devices(long *count) { *count = 2; return 0; }\n'
    )
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", os.environ["NVCC_LIBRARY"]], check=True)
    backend = CudaBackend()
    monkeypatch.setattr(backend.library, "path", Path("/no/such/library"))
    assert backend.available() == (True, "libfedlora_cuda.so, sm_90")
    assert backend.library.path.is_relative_to(os.environ["FEDLORA_CACHE"])


def test_no_gpu_means_no_build(nvcc, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = CudaBackend()
    monkeypatch.setattr(backend.library, "path", Path("/no/such/library"))
    assert not backend.available()[0]
    assert calls(nvcc) == []
