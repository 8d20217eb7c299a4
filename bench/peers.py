"""What the libraries reach on this machine: the bar for our kernels, and the rates that set the floors.

Copy bandwidth and float64/float32 GEMM rate; torch.linalg svd, qr and eigh, looped and batched; the library compositions
that aggregate stacked factors today (QR + QR + core, and float64 Gram + eigh), with their accuracy against float64.

    python bench/peers.py [--device cuda] [--quick] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import arguments, machine, measure, save, show
from torch import Tensor

from fedlora_kernels.bench.peers import gram_eigh, looped, qr_qr_core


def rates(device: str, seconds: float) -> list[dict[str, Any]]:
    """Copy bandwidth in bytes/s (read + write) and GEMM rates in flop/s."""
    count = 1 << (28 if device == "cuda" else 25)
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    size = 8192 if device == "cuda" else 1024
    rows = []
    took = measure({"copy": lambda: target.copy_(source)}, device=device, seconds=seconds)["copy"]
    rows.append({"what": "copy", "bytes_per_s": 8 * count / took["median"], **took})
    for dtype in (torch.float64, torch.float32):
        a = torch.randn(size, size, device=device, dtype=dtype)
        took = measure({"gemm": lambda a=a: a @ a}, device=device, seconds=seconds)["gemm"]
        rows.append({"what": f"gemm {dtype}", "flop_per_s": 2 * size**3 / took["median"], **took})
    return rows


def lapack_calls(X: Tensor, few: Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """NumPy's and SciPy's LAPACK on the same matrices, each with the number it decomposes (needs the extra ``bench``)."""
    import scipy.linalg

    gesvd = partial(scipy.linalg.svd, lapack_driver="gesvd")
    return {
        "numpy svd batched": (partial(np.linalg.svd, X.numpy()), X.shape[0]),
        "scipy gesdd looped": (looped(scipy.linalg.svd, few.numpy()), few.shape[0]),
        "scipy gesvd looped": (looped(gesvd, few.numpy()), few.shape[0]),
    }


def decompositions(device: str, sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """Seconds per matrix of torch.linalg svd, qr, eigh, looped and batched; on a CPU also NumPy's and SciPy's LAPACK."""
    rows = []
    for dtype in (torch.float32, torch.float64):
        for size in sizes:
            batch = max(2, min(20000 if size <= 32 else 224, (1 << 22) // size**2))
            X = torch.randn(batch, size, size, device=device, dtype=dtype)
            few = X[: min(batch, 64)]
            M = X @ X.mT
            calls: dict[str, tuple[Callable[[], object], int]] = {
                "svd batched": (lambda X=X: torch.linalg.svd(X), batch),
                "svd looped": (looped(torch.linalg.svd, few), len(few)),
                "qr batched": (lambda X=X: torch.linalg.qr(X), batch),
                "eigh batched": (lambda M=M: torch.linalg.eigh(M), batch),
            }
            if device == "cpu":
                calls |= lapack_calls(X, few)
            took = measure({name: call for name, (call, _) in calls.items()}, device=device, seconds=seconds, warmup=1)
            for name, (_, count) in calls.items():
                per_matrix = took[name]["median"] / count
                row = {
                    "what": name,
                    "size": size,
                    "dtype": str(dtype),
                    "batch": count,
                    "us_per_matrix": 1e6 * per_matrix,
                }
                rows.append(row | {"runs": took[name]["runs"]})
    return rows


def compositions(device: str, modules: int, seconds: float) -> list[dict[str, Any]]:
    """Library compositions for the aggregation of stacked factors, LoRA-like spectrum, m = n = 4096."""
    rows = []
    for R in (64, 128):
        B = torch.randn(modules, 4096, R, device=device) * torch.logspace(0, -2, R, device=device)
        A = torch.randn(modules, R, 4096, device=device)
        exact = torch.linalg.svdvals(torch.linalg.qr(B[0].double())[1] @ torch.linalg.qr(A[0].double().mT)[1].mT)
        routes = {"QR + QR + core": qr_qr_core, "Gram + eigh": gram_eigh}
        calls: dict[str, Callable[[], object]] = {
            f"{n} batched": lambda f=f, B=B, A=A: f(B, A) for n, f in routes.items()
        }
        calls |= {
            f"{n} looped": lambda f=f, B=B, A=A: [f(b, a) for b, a in zip(B, A, strict=True)] for n, f in routes.items()
        }
        took = measure(calls, device=device, seconds=seconds, warmup=1)
        for name in calls:
            S = routes[name.rsplit(" ", 1)[0]](B[:1], A[:1])[1][0].double()
            worst = float(((S - exact).abs() / exact).max())
            row = {"what": name, "R": R, "modules": modules, "ms_per_module": 1e3 * took[name]["median"] / modules}
            rows.append(row | {"worst_sigma_error": worst, "runs": took[name]["runs"]})
    return rows


def main() -> None:
    parser = arguments(__doc__, "fewer sizes and shorter runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    seconds = 0.1 if options.quick else 1.0
    sizes = [8, 32] if options.quick else [8, 16, 32, 64, 128, 256, 512, 1024]
    modules = 2 if options.quick or options.device == "cpu" else 32
    print(machine())
    rows = rates(options.device, seconds)
    rows += decompositions(options.device, sizes, seconds)
    rows += compositions(options.device, modules, seconds)
    for row in rows:
        show(row)
    save(options.json, rows)


if __name__ == "__main__":
    main()
