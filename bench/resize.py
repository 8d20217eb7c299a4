"""An adapter cut to smaller ranks: `fk.resize` against the dense route of the scripts in use, per module, in one run.

The dense route forms ``D = s B A`` in float32 and takes ``torch.linalg.svd`` of it (kohya's ``resize_lora`` up to 2048, PEFT's
``convert_to_lora`` and ``svd`` merge); reading and writing are not counted against it. Ours is timed three times: the
decomposition alone (`product_svd`), the whole `resize` in memory, and from folder to folder, durably, with the fsyncs that this
costs spread over the modules of one adapter. All at the better of 1 and all threads, the dense route, which takes minutes, once
each. The judge is the dense SVD in float64.

    python bench/resize.py [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import arguments, machine, measure, save, show, threaded
from torch import Tensor

import fedlora_kernels as fk

RULE = fk.Energy(0.99)
SCALE = 2.0


def factors(m: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """A pair whose spectrum falls by two decades, as trained ones do."""
    made = torch.Generator().manual_seed(0)
    return torch.randn(m, rank, generator=made) * torch.logspace(0, -2, rank), torch.randn(rank, n, generator=made)


def adapter_of(B: Tensor, A: Tensor, modules: int) -> fk.Adapter:
    """The pair as an adapter in memory, in each of so many modules."""
    targets = [f"model.layers.{k}.q_proj" for k in range(modules)]
    state = {f"base_model.model.{name}.lora_A.weight": A.clone() for name in targets}
    state |= {f"base_model.model.{name}.lora_B.weight": B.clone() for name in targets}
    rank = A.shape[0]
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    return fk.open_adapter((state, settings))


def dense(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The route of the scripts: SVD of the dense update, cut by the rule."""
    U, S, Vh = torch.linalg.svd(SCALE * (B @ A), full_matrices=False)
    p = int(fk.select_rank(S, RULE))
    return U[:, :p] * S[:p], S, Vh[:p]


def fastest(name: str, call: Callable[[], object], seconds: float, modules: int = 1) -> dict[str, Any]:
    """Median and quantiles per module, and threads, of the better of 1 and all threads."""
    most = torch.get_num_threads()
    took = measure({str(count): threaded(count, call) for count in sorted({1, most})}, seconds=seconds)
    torch.set_num_threads(most)
    count, best = min(took.items(), key=lambda item: item[1]["median"])
    times = {key: best[key] / modules for key in ("median", "q20", "q80")}
    return {"route": name, "threads": int(count), "modules": modules, "seconds": times.pop("median"), **times} | {
        "runs": best["runs"]
    }


def once(name: str, call: Callable[[], Any], counts: set[int]) -> tuple[dict[str, Any], Any]:
    """The better of one call each at so many threads, and its answer."""
    most = torch.get_num_threads()
    spent = {}
    for count in sorted(counts):
        torch.set_num_threads(count)
        begin = time.perf_counter()
        answer = call()
        spent[count] = time.perf_counter() - begin
    torch.set_num_threads(most)
    count = min(spent, key=lambda count: spent[count])
    return {"route": name, "threads": count, "modules": 1, "seconds": spent[count], "runs": 1}, answer


def compare(m: int, n: int, rank: int, modules: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of one problem: the routes, their ranks, and the worst error of a kept singular value."""
    B, A = factors(m, n, rank)
    one = adapter_of(B, A, 1)
    rows = [
        fastest("product_svd", lambda: fk.product_svd(B, A, weights=[SCALE], rule=RULE, output="left"), seconds),
        fastest("resize in memory", lambda: fk.resize(one, rule=RULE), seconds),
    ]
    with tempfile.TemporaryDirectory() as place:
        source, out = Path(place) / "in", Path(place) / "out"
        adapter_of(B, A, modules).save(source)
        rows.append(
            fastest(
                "resize, folder to folder",
                lambda: fk.resize(source, rule=RULE, out=out, overwrite=True),
                seconds,
                modules,
            )
        )
        kept = torch.tensor(fk.resize(source, rule=RULE).report["modules"][0]["singular_values"], dtype=torch.float64)
    ours = fk.product_svd(B, A, weights=[SCALE], rule=RULE)
    row, (_, S, right) = once("dense SVD, float32", lambda: dense(B, A), {1, torch.get_num_threads()})
    judge, exact = once("dense values, float64", lambda: torch.linalg.svdvals(SCALE * (B.double() @ A.double())), {1})
    rows += [row, judge]
    p = int(fk.select_rank(exact, RULE))
    spectra = {"product_svd": ours.S[: int(ours.rank)], "resize in memory": kept, "resize, folder to folder": kept}
    spectra |= {"dense SVD, float32": S[: right.shape[0]].double(), "dense values, float64": exact[:p]}
    for row in rows:
        S = spectra[row["route"]]
        row |= {"m": m, "n": n, "r": rank, "rule": str(RULE), "p": len(S), "p_exact": p}
        row["times_faster"] = rows[3]["seconds"] / row["seconds"]
        both = min(len(S), p)
        row["sigma_error"] = float(((S[:both] - exact[:both]).abs() / exact[:both]).max())
    return rows


def main() -> None:
    options = arguments(__doc__, "1024 x 768 in place of 4096 x 4096, which takes minutes").parse_args()
    print(machine())
    rows = compare(1024, 768, 64, 16, 0.2) if options.quick else compare(4096, 4096, 64, 16, 3.0)
    for row in rows:
        show(row)
    save(options.json, rows)


if __name__ == "__main__":
    main()
