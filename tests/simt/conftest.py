"""Kernels of these tests, compiled for the simulated device."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX", "g++")
FLAGS = (
    "-std=c++17",
    "-x",
    "c++",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    f"-I{ROOT}/csrc/simt",
)


def built(source, *flags, link=("-shared",)):
    """A library of one source for the simulated device, from an earlier run where nothing it is made of has changed."""
    read = [source, *sorted(ROOT.glob("csrc/simt/*.h"))]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in read) + repr((CXX, FLAGS, flags, link)).encode())
    target = ROOT / "build" / "simt" / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        command = [CXX, *FLAGS, *flags, *link, str(source), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        fresh.replace(target)
    return target


@pytest.fixture(scope="session")
def build():
    """Compiles a source for the simulated device."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler {CXX}")
    return built


@pytest.fixture(scope="session")
def kernels(build):
    """The kernels of kernels.cpp."""
    return library(build(Path(__file__).with_name("kernels.cpp"), "-O1"))


def library(path):
    """Loads a library; texts come back as bytes."""
    loaded = ctypes.CDLL(str(path))
    loaded.message.restype = loaded.note.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=["forward", "reverse", "1", "2"])
def schedule(request, monkeypatch):
    """Who runs next: every result must be the same under each."""
    monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", request.param)
    return request.param
