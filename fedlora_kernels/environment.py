"""This machine as the package sees it: versions, processor, backends with their reasons, and a self-test of each."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import backends, linalg
from fedlora_kernels._version import __version__
from fedlora_kernels.backends.native.threads import thread_count
from fedlora_kernels.errors import BackendError, FedLoRAError, InputError

__all__ = ["machine", "survey"]

SCHEMA = 1
"""Version of this report."""
PACKAGES = ("torch", "numpy", "rich", "safetensors", "peft", "transformers", "triton", "scipy")
COMPILERS = ("g++", "nvcc")
SELF_TEST_SECONDS = 1.0

# psABI levels of x86-64, each by features that only it requires (names of /proc/cpuinfo)
_X86_LEVELS = (
    ("x86-64-v4", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
    ("x86-64-v3", ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")),
    ("x86-64-v2", ("cx16", "popcnt", "sse4_1", "sse4_2", "ssse3")),
)


def survey() -> dict[str, Any]:
    """Return versions, processor, GPUs, backends and FEDLORA_ variables as plain values.

    ``problems`` are variables that would end a run; ``healthy`` is False if there is one, or if a backend that is on fails its
    self-test. Nothing here raises for what is missing.
    """
    problems = _wrong_variables()
    rows = [_backend(name, on, reason) for name, (on, reason) in backends.status().items()]
    return {
        "schema": SCHEMA,
        **machine(),
        "compilers": {name: shutil.which(name) for name in COMPILERS},
        "backends": rows,
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("FEDLORA_")},
        "problems": problems,
        "healthy": not problems and all(row["passed"] for row in rows if row["on"]),
    }


def machine() -> dict[str, Any]:
    """Return what figures must carry with them: versions, processor, GPUs, and the load when it is asked."""
    return {
        "tool": {"name": "fedlora_kernels", "version": __version__},
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": processor(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _wrong_variables() -> list[str]:
    problems = []
    name = os.environ.get("FEDLORA_BACKEND") or "auto"
    if name != "auto":
        try:
            backends.get(name)
        except FedLoRAError as error:
            problems.append(f"FEDLORA_BACKEND: {error}")
    try:
        thread_count()
    except InputError as error:
        problems.append(str(error))
    return problems


def processor() -> dict[str, Any]:
    """Return the processor's name, its SIMD level, the cores this process may use and torch's threads."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    architecture = platform.machine()
    simd = "NEON" if {"asimd", "neon"} & flags or architecture in ("aarch64", "arm64") else architecture
    if architecture in ("x86_64", "AMD64"):
        simd = next((level for level, needed in _X86_LEVELS if flags.issuperset(needed)), "x86-64")
    return {
        "name": fields.get("model name") or platform.processor() or architecture,
        "simd": simd,
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(name: str, on: bool, reason: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "on": on, "reason": reason, "passed": on, "error": None, "limit": None}
    if on:
        row |= self_test(name)
    return row


def self_test(name: str) -> dict[str, Any]:
    """Run small problems through a backend for at most about a second and compare with the reference.

    Returns ``passed``, the largest relative error and its ``limit``, the operations that ran, those that the backend does
    not serve, and a text for a failure.
    """
    start = time.perf_counter()
    worst = 0.0
    tested: list[str] = []
    left_out: list[str] = []
    failures: list[str] = []
    device = torch.device("cuda" if name == "cuda" else "cpu")
    expected = _problems(torch.device("cpu"))
    for op, answer in _problems(device).items():
        if time.perf_counter() - start > SELF_TEST_SECONDS:
            left_out.append(f"{op}: no time left")
            continue
        try:
            error = _difference(answer(name).cpu(), expected[op]("reference"))
        except BackendError as reason:
            left_out.append(f"{op}: {reason}")
            continue
        except Exception as reason:
            # any fault of a backend is what this command is asked to show
            failures.append(f"{op}: {type(reason).__name__}: {reason}")
            continue
        worst = max(worst, error)
        tested.append(op)
        if not error <= LIMIT:
            failures.append(f"{op}: error {error:.1e}")
    if not tested and not failures:
        failures = left_out
    return {
        "passed": not failures,
        "error": worst,
        "limit": LIMIT,
        "tested": tested,
        "left_out": left_out,
        "failure": "; ".join(failures),
    }


def _difference(got: Tensor, expected: Tensor) -> float:
    error = float(torch.linalg.norm(got - expected) / torch.linalg.norm(expected))
    return error if math.isfinite(error) else math.inf


LIMIT = 1e-10
"""Relative error allowed in the self-test: float64 problems of condition below 1e3, sizes below 300."""


def _problems(device: torch.device) -> dict[str, Callable[[str], Any]]:
    """Return by operation a function that answers, on a backend, something unique: no singular vectors, no signs.

    The numbers do not depend on the device that holds them.
    """
    generator = torch.Generator().manual_seed(20)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    m, n, ranks = 131, 97, (5, 8, 3)
    B, A = [draw(m, rank) for rank in ranks], [draw(rank, n) for rank in ranks]
    weights = [0.5, 0.3, 0.2]
    square, turn, reference = draw(23, 17), draw(6, 6), draw(6, n)

    def stacked_qr(backend: str) -> Any:
        R = linalg.stacked_qr(B, weights=weights, backend=backend).R
        return R.mT @ R

    def core_svd(backend: str) -> Any:
        found = linalg.core_svd(square, backend=backend)
        return found.U * found.S @ found.Vh

    def product_svd(backend: str) -> Any:
        found = linalg.product_svd(B, A, weights=weights, output="left", backend=backend)
        return found.left @ found.right

    def update_gram(backend: str) -> Any:
        return linalg.update_gram(B, A, weights=weights, backend=backend)

    def procrustes_rotation(backend: str) -> Any:
        return linalg.procrustes_rotation(reference.mT @ turn, reference.mT, backend=backend).Q

    return {
        "stacked_qr": stacked_qr,
        "core_svd": core_svd,
        "product_svd": product_svd,
        "update_gram": update_gram,
        "procrustes_rotation": procrustes_rotation,
    }
