"""Truncated SVD of stacked low-rank factors: `product_svd` against the routes that users take today, in one run.

Peers, in float32, at the better of 1 and all threads, looped over modules (their better choice on a CPU): QR + QR + core SVD,
two thin SVDs + core (the published FLoRIST code), and the dense SVD of B A (PEFT's ``svd`` merge, FlexLoRA; timed on one
module). Beside each time, for the first module: the worst relative error of a kept singular value and the worst departure of
U from orthonormal columns. Peers return all R columns, `product_svd` the p that its rule keeps.

Below stand the milliseconds of processor that a module costs on each stage of the library's one pass.

    python bench/product.py [--quick] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import arguments, machine, measure, save, show, threaded
from torch import Tensor

import fedlora_kernels as fk
from fedlora_kernels.backends.contract import Factors
from fedlora_kernels.backends.cpu import BACKEND, product
from fedlora_kernels.bench.peers import dense, qr_qr_core, thin_svds

Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
RULE = fk.Energy(0.95)


def accuracy(U: Tensor, S: Tensor, exact: Tensor, p: int) -> dict[str, float]:
    """Worst relative error of the first p singular values, worst entry of ``U^T U - I``."""
    U, S = U[:, :p].double(), S[:p].double()
    gram = U.mT @ U - torch.eye(p, dtype=torch.float64)
    return {"sigma_error": float(((S - exact[:p]).abs() / exact[:p]).max()), "orthogonality": float(gram.abs().max())}


def stages(B: Tensor, A: Tensor, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of processor a module on each stage, of the fastest of some calls."""
    weights = torch.ones(B.shape[0], 1, dtype=torch.float64)
    group = Factors((B,), (A,), weights, B.shape[1], A.shape[2], min(B.shape[1:] + A.shape[2:]))
    spent = torch.zeros(repeats, len(product.STAGES), dtype=torch.float64)
    for seconds in spent:
        product.product_svd(BACKEND.library, [group], RULE.spec(), "usv", B.dtype, seconds=seconds)
    best = spent[spent.sum(-1).argmin()] * 1e3 / B.shape[0]
    return dict(zip(product.STAGES, best.tolist(), strict=True))


def compare(size: int, R: int, modules: int, seconds: float, dense_too: bool) -> list[dict[str, Any]]:
    """Rows for one problem: m = n = size, LoRA-like spectrum, float32."""
    torch.manual_seed(0)
    B = torch.randn(modules, size, R) * torch.logspace(0, -2, R)
    A = torch.randn(modules, R, size)
    exact = torch.linalg.svdvals(torch.linalg.qr(B[0].double())[1] @ torch.linalg.qr(A[0].double().mT)[1].mT)
    routes: dict[str, Route] = {"QR + QR + core": qr_qr_core, "thin SVDs + core": thin_svds}
    if dense_too:
        routes["dense SVD"] = dense
    most = torch.get_num_threads()
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for count in sorted({1, most}):
        calls["product_svd", count] = threaded(count, lambda: fk.product_svd(B, A, rule=RULE))
        for name, route in routes.items():
            few = 1 if name == "dense SVD" else modules
            calls[name, count] = threaded(
                count, lambda f=route, k=few: [f(b, a) for b, a in zip(B[:k], A[:k], strict=True)]
            )
    took = measure({f"{name}|{count}": call for (name, count), call in calls.items()}, seconds=seconds, warmup=1)
    torch.set_num_threads(most)
    ours = fk.product_svd(B, A, rule=RULE)
    p = int(ours.rank[0])
    found = {"product_svd": (ours.left[0], ours.S[0])} | {name: route(B[0], A[0])[:2] for name, route in routes.items()}
    best = {}
    for name in found:
        counts = [count for known, count in calls if known == name]
        per_module = 1 if name == "dense SVD" else modules
        best[name] = min((took[f"{name}|{count}"]["median"] / per_module, count) for count in counts)
    rows = []
    for name, (time, count) in best.items():
        row = {"route": name, "m": size, "n": size, "R": R, "p": p, "modules": modules, "threads": count}
        row |= {"ms_per_module": 1e3 * time, "times_ours": time / best["product_svd"][0]}
        rows.append(row | accuracy(*found[name], exact, p))
    if BACKEND.available()[0]:
        rows.append({"route": "stages of product_svd", "m": size, "n": size, "R": R, "modules": modules} | stages(B, A))
    return rows


def main() -> None:
    options = arguments(__doc__, "small sizes, short runs").parse_args()
    seconds = 0.2 if options.quick else 2.0
    print(machine())
    rows = []
    for size, R, modules, dense_too in [
        (1024, 32, 16, True),
        (1024, 64, 16, True),
        (4096, 64, 8, False),
        (4096, 128, 8, False),
    ]:
        if options.quick and size > 1024:
            continue
        rows += compare(size, R, modules, seconds, dense_too)
    for row in rows:
        show(row)
    save(options.json, rows)


if __name__ == "__main__":
    main()
