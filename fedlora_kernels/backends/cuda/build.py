"""The CUDA library built where it is missing, once, from the sources in the package, into the user's cache.

The key of a build holds all that it depends on: this package, the sources, the compiler and the GPUs. One process builds while
others wait; a build that fails says why and leaves nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from fedlora_kernels._version import __version__
from fedlora_kernels.backends.cuda import nvcc as compiler
from fedlora_kernels.backends.native.library import HEADERS
from fedlora_kernels.errors import BackendError

__all__ = ["NAME", "cache", "first_use"]

NAME = "libfedlora_cuda.so"
JOBS = 8
"""Sources compiled at once: each takes a third of a gigabyte of memory."""
LEAST = 80
"""The oldest compute capability that the kernels are written for."""

_log = logging.getLogger("fedlora_kernels")


def cache() -> Path:
    """FEDLORA_CACHE, else the folder of this package in the user's cache."""
    if named := os.environ.get("FEDLORA_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedlora_kernels"


def first_use() -> Path:
    """The library for the GPUs of this machine, built now if no process has done so before; BackendError says why there is none."""
    csrc = next((header.parents[1] for header in HEADERS if header.is_file()), None)
    if csrc is None or not compiler.sources(csrc):
        raise BackendError(
            "the sources of the CUDA library are missing beside the package; install a wheel that holds it"
        )
    try:
        targets = compiler.architectures() if "FEDLORA_CUDA_ARCHS" in os.environ else _present()
        nvcc = compiler.find()
        if nvcc is None:
            raise BackendError(
                "no nvcc to build it with; `pip install 'fedlora-kernels[nvcc]'`, or set CUDA_HOME to a toolkit"
            )
        version = compiler.version(nvcc)
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"it cannot be built: {error}") from error
    folder = cache() / "cuda"
    library = folder / _key(csrc, version, targets) / NAME
    if library.is_file():
        return library
    if os.environ.get("FEDLORA_BUILD_CUDA", "").strip() == "0":
        raise BackendError("FEDLORA_BUILD_CUDA=0 forbids to build it")
    _check_driver(version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{library.parent.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system if this process dies
            if not library.is_file():
                _build(nvcc, version, csrc, targets, library)
    except OSError as error:
        raise BackendError(
            f"it cannot be built in {folder}: {error}; set FEDLORA_CACHE to a folder to write to"
        ) from error
    return library


def _present() -> tuple[str, ...]:
    """The compute capabilities of the GPUs here."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    named = tuple(f"{major}{minor}" for major, minor in sorted(found) if 10 * major + minor >= LEAST)
    if not named:
        raise ValueError(f"no GPU of compute capability {LEAST / 10} or more")
    return named


def _key(csrc: Path, version: str, targets: Sequence[str]) -> str:
    """All that a build depends on, as the name of a folder."""
    digest = hashlib.sha256(repr((compiler.FLAGS, targets)).encode())
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(csrc)}\0".encode() + path.read_bytes())
    return f"{__version__}-{digest.hexdigest()[:16]}-nvcc{version}-sm{'.'.join(targets)}"


def _check_driver(version: str) -> None:
    """BackendError where the driver is of an older generation than the compiler: its programs would not start."""
    offered = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(offered))
    except (OSError, AttributeError):
        return  # the library itself says that there is no driver
    if status == 0 and offered.value // 1000 < int(version.split(".", maxsplit=1)[0]):
        raise BackendError(
            f"the driver knows CUDA {offered.value // 1000}.{offered.value % 1000 // 10}, too old for what nvcc {version} makes; "
            f"update the driver, or set CUDA_HOME to a toolkit {offered.value // 1000}"
        )


def _build(nvcc: Sequence[str], version: str, csrc: Path, targets: Sequence[str], library: Path) -> None:
    """Compiles beside the place of the library and moves it there whole."""
    _log.warning(
        "building the CUDA library for sm_%s with nvcc %s, once; this takes minutes", ", sm_".join(targets), version
    )
    partial = library.parent.with_name(f"{library.parent.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        sources = compiler.sources(csrc)
        objects = [partial / f"{source.stem}.o" for source in sources]

        def compiled(source: Path, out: Path) -> None:
            _run([*compiler.compile_command(nvcc, csrc, source, targets), "-o", str(out)])

        with ThreadPoolExecutor(min(JOBS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(compiled, sources, objects):
                pass
        _run(compiler.link_command(nvcc, objects, partial / NAME, targets))
        library.parent.mkdir(exist_ok=True)
        (partial / NAME).replace(library)
    finally:
        with suppress(OSError):  # what cannot be removed is removed by the next build
            shutil.rmtree(partial)


def _run(command: list[str]) -> None:
    """BackendError with what the compiler said first of all that is wrong."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr + done.stdout).strip().splitlines()
        first = next((line for line in said if "error" in line.lower()), said[0] if said else "nothing was said")
        raise BackendError(
            f"it cannot be built: {shlex.quote(command[0])} failed with status {done.returncode}: {first.strip()}"
        )
