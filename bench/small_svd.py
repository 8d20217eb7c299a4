"""Batched SVD of small matrices: the cpu library against torch.linalg.svd, interleaved in one run, with the accuracy of both.

    python bench/small_svd.py [--seconds 1] [--json FILE]

Both run at one thread and at all of them, and each counts at its better setting; times are medians, per matrix. Accuracy is
the worst of the batch: |C - U S Vh|_F / |C|_F, and max |U^T U - I|, |V^T V - I|.
"""

import argparse
import os
from functools import partial

import torch
from timing import machine, measure, save, threaded

from fedlora_kernels.backends.cpu import BACKEND

SIZES = ((4, 10_000), (8, 10_000), (16, 10_000), (32, 1_000), (64, 1_000), (128, 64), (256, 64))
HEAD = "dtype      r   batch   ours us  torch us   ratio   ratio at 1 thread   residual ours, torch   orthogonality ours, torch"
LINE = (
    "{dtype}  {r:3d}  {batch:6d}  {ours_us:8.3f}  {torch_us:8.2f}  {ratio:6.1f}  {ratio_1:18.1f}"
    "        {ours_residual:.1e}  {torch_residual:.1e}           {ours_orthogonality:.1e}  {torch_orthogonality:.1e}"
)


def ours(C):
    return BACKEND.core_svd([C])[0][:3]


def peer(C):
    return torch.linalg.svd(C, full_matrices=False)


def accuracy(C, factors):
    """(relative residual, orthogonality) of the worst matrix, in float64."""
    C, U, S, Vh = (t.double() for t in (C, *factors))
    residual = (C - (U * S[:, None]) @ Vh).flatten(1).norm(dim=1) / C.flatten(1).norm(dim=1)
    identity = torch.eye(S.shape[1], dtype=torch.float64)
    skew = max((U.mT @ U - identity).abs().max().item(), (Vh @ Vh.mT - identity).abs().max().item())
    return residual.max().item(), skew


def compare(r, batch, dtype, threads, seconds):
    C = torch.randn(batch, r, r, dtype=dtype, generator=torch.Generator().manual_seed(r))
    counts = sorted({1, threads})
    calls = {
        (name, n): threaded(n, partial(call, C)) for name, call in (("ours", ours), ("torch", peer)) for n in counts
    }
    times = {key: time["median"] / batch * 1e6 for key, time in measure(calls, seconds=seconds, warmup=1).items()}
    mine, theirs = (min(times[name, n] for n in counts) for name in ("ours", "torch"))
    (residual, skew), (peer_residual, peer_skew) = accuracy(C, ours(C)), accuracy(C, peer(C))
    return {
        "r": r,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "load": os.getloadavg()[0],
        "us": {f"{name}, {n} threads": time for (name, n), time in times.items()},
        "ours_us": mine,
        "torch_us": theirs,
        "ratio": theirs / mine,
        "ratio_1": times["torch", 1] / times["ours", 1],
        "ours_residual": residual,
        "torch_residual": peer_residual,
        "ours_orthogonality": skew,
        "torch_orthogonality": peer_skew,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="at least so long for each call and size")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"{BACKEND.available()[1]}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n{HEAD}")
    rows = []
    for dtype in (torch.float32, torch.float64):
        for r, batch in SIZES:
            rows.append(compare(r, batch, dtype, options.threads, options.seconds))
            print(LINE.format(**rows[-1]), flush=True)
    save(options.json, rows)


if __name__ == "__main__":
    main()
