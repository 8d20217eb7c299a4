"""The CUDA kernels against what libraries offer, in one run: ratios, accuracy of both, and the floors of the machine.

Calls are timed by CUDA events, interleaved, medians with 20/80 quantiles; ours with check=False, data resident, the caller's
dtype in and out. Each peer is timed in every form it has (batched, looped, drivers), the fastest counts. Floors take the copy
bandwidth and the matrix-product rates of the same run, and beside them those of the data sheet of an H200.

    python bench/gpu_kernels.py [--only NAME ...] [--seconds 1] [--json FILE] [--dry-run]

--dry-run takes tiny sizes on the CPU, whatever backend serves them: it shows that the script runs, its figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timing import arguments, machine, measure, save, show
from torch import Tensor

import fedlora_kernels as fk
from fedlora_kernels import backends, linalg
from fedlora_kernels.bench import accuracy, peers
from fedlora_kernels.bench.floors import Rates, Stage, sweeps, total
from fedlora_kernels.errors import BackendError
from fedlora_kernels.testing import Check, check_qr, check_rotated, check_svd

H200 = Rates(float64=67e12, float32=67e12, copy=4.3e12)
"""Tensor cores in float64, vector units in float32, and a copy that was measured once."""
PROCESSORS, STEP = 132, 1.5e-6
"""Of the same: multiprocessors, and seconds of one step of rotations, which waits for the one before."""
RULE = fk.Energy(0.95)
FEW = 8
"""Matrices that slow loops are timed on, and that are judged."""


class Setting(NamedTuple):
    """Where to run, with what backend, and whether sizes are tiny."""

    device: str
    backend: str
    seconds: float
    tiny: bool


class Peer(NamedTuple):
    """A library's way: the call, how many problems it solves, and the accuracy of its answer."""

    call: Callable[[], Any]
    count: int
    accuracy: Callable[[Any], Mapping[str, float]]


class Case(NamedTuple):
    """One problem, what solves it, and what no implementation can undercut: stages, and seconds of waiting on the device."""

    facts: Mapping[str, Any]
    count: int
    ours: Callable[[], Any]
    accuracy: Callable[[Any], Mapping[str, float]]
    gate: Callable[[Any], Sequence[Check]]
    peers: Mapping[str, Peer]
    floor: Sequence[Stage]
    latency: float = 0.0


def normal(setting: Setting, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every run of one device."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=setting.device, dtype=torch.float32).to(dtype)


def on_host(result: Any, count: int = FEW) -> Any:
    """The first matrices of a result whose fields are tensors or None, on the CPU."""
    return type(result)(*(None if field is None else field[:count].cpu() for field in vars(result).values()))


LAPACK = ("torch", "reference")
"""Backends that are held to LAPACK's limits."""


def flat(checks: Sequence[Sequence[Check]]) -> list[Check]:
    """All checks of all matrices."""
    return [check for each in checks for check in each]


def small_svd(setting: Setting) -> Iterator[Case]:
    """SVD of very many tiny matrices."""
    batch = 60 if setting.tiny else 20_000
    for dtype in (torch.float32, torch.float64):
        for r in (4, 8) if setting.tiny else (8, 16, 32):
            yield svd(setting, batch, r, dtype)


def core_svd(setting: Setting) -> Iterator[Case]:
    """SVD of the cores of all modules of a model."""
    for dtype in (torch.float32, torch.float64):
        for r in (40,) if setting.tiny else (64, 128, 256):
            yield svd(setting, 3 if setting.tiny else 224, r, dtype)


def svd(setting: Setting, batch: int, r: int, dtype: torch.dtype) -> Case:
    C = normal(setting, batch, r, r, dtype=dtype, seed=r)
    few = C[: max(1, min(batch, FEW))]

    def figures(answer: Any) -> Mapping[str, float]:
        return accuracy.of_svd(few.cpu(), *(field[: len(few)].cpu() for field in answer))

    def library(driver: str | None, X: Tensor) -> Any:
        return torch.linalg.svd(X, full_matrices=False, driver=driver)

    def eigh(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squares, V = torch.linalg.eigh(X.mT.double() @ X.double())
        S, V = squares.clamp_min(0).sqrt().flip(-1), V.flip(-1)
        return ((X.double() @ V) / S[..., None, :]).to(dtype), S.to(dtype), V.mT.to(dtype)

    drivers = (None, "gesvdj", "gesvda") if setting.device == "cuda" else (None,)
    # above 32 a batch is a loop inside the library
    X = C if r <= 32 else few
    others = {f"svd {driver or 'default'}": Peer(partial(library, driver, X), len(X), figures) for driver in drivers}
    others["float64 Gram + eigh, batched"] = Peer(partial(eigh, C), batch, figures)
    size = torch.finfo(dtype).bits // 8
    work = 2 * 2.5 * sweeps(r) * r**3 + (8 / 3 * r**3 if r > 32 else 0)
    # vector units do float64 at half the rate of the tensor cores, which is what Rates holds
    flops = {"float64": 2 * batch * work} if dtype == torch.float64 else {"float32": batch * work}
    waves = -(-batch // PROCESSORS)
    return Case(
        {"r": r, "L": batch, "dtype": str(dtype)},
        batch,
        partial(linalg.core_svd, C, check=False, backend=setting.backend),
        lambda result: figures((result.U, result.S, result.Vh)),
        lambda result: flat(check_svd(few.cpu(), on_host(result, len(few)), lapack=setting.backend in LAPACK)),
        others,
        [Stage("svd", batch * (3 * r * r + r) * size, **flops)],
        waves * sweeps(r) * (r - 1) * STEP if r > 32 else 0.0,
    )


def stacked_qr(setting: Setting) -> Iterator[Case]:
    """QR of tall stacks, with and without Q."""
    batch, m, R = (3, 96, 12) if setting.tiny else (224, 4096, 128)
    X = normal(setting, batch, m, R, seed=1)
    few = X[: min(batch, FEW)]
    for mode in ("r", "reduced"):

        def figures(answer: Any) -> Mapping[str, float]:
            Q, R = answer
            return accuracy.of_qr(few[0].cpu(), Q[0].cpu() if Q is not None and Q.numel() else None, R[0].cpu())

        moved = batch * 4 * (m * R * (2 if mode == "reduced" else 1) + R * R)
        flops = batch * 2 * m * R * R * (2 if mode == "reduced" else 1)
        yield Case(
            {"mode": mode, "L": batch, "m": m, "R": R, "dtype": "torch.float32"},
            batch,
            partial(linalg.stacked_qr, [X], mode=mode, check=False, backend=setting.backend),
            lambda result: figures((result.Q, result.R)),
            lambda result: [check for i in range(len(few)) for check in check_qr(few[i].cpu(), one(result, i))],
            {"qr": Peer(partial(torch.linalg.qr, few, mode=mode), len(few), figures)},
            [Stage("reflections", moved, float64=flops)],
        )


def one(result: Any, i: int) -> Any:
    """Matrix i of a result, on the CPU."""
    return type(result)(*(None if field is None else field[i].cpu() for field in vars(result).values()))


SHAPES = ((4096, 4096, 64), (1024, 4096, 64), (14336, 4096, 64), (4096, 14336, 32))
"""m, n and number of the modules of a model of the size of Llama 3 8B: q and o, k and v, gate and up, down."""
TINY = ((48, 40, 2), (24, 40, 1))


def adapters(setting: Setting, clients: int, r: int, dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Factors of every client, a batch for each shape; B decays as trained adapters do."""
    shapes = TINY if setting.tiny else SHAPES
    decay = torch.logspace(0, -2, r, device=setting.device)
    return [
        (
            [(normal(setting, L, m, r, seed=k) * decay).to(dtype) for k in range(clients)],
            [normal(setting, L, r, n, dtype=dtype, seed=clients + k) for k in range(clients)],
        )
        for m, n, L in shapes
    ]


def product_svd(setting: Setting) -> Iterator[Case]:
    """FLoRIST of a whole model: eight clients of rank 16, in bfloat16."""
    clients, r, dtype = (3, 4, torch.float32) if setting.tiny else (8, 16, torch.bfloat16)
    groups = adapters(setting, clients, r, dtype)
    stacked = [(torch.cat(B, -1), torch.cat(A, -2)) for B, A in groups]
    b, a = (X[0].double() for X in stacked[0])
    exact = torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.mT)[1].mT).cpu()
    R, L = clients * r, sum(len(B) for B, _ in stacked)
    ours = partial(
        fk.product_svd,
        linalg.Ragged([B for B, _ in groups]),
        linalg.Ragged([A for _, A in groups]),
        rule=RULE,
        check=False,
        backend=setting.backend,
    )
    try:
        p = int(ours()[0].rank[0])
    except BackendError:
        p = R  # `compare` tells the reason

    def figures(found: tuple[Tensor, Tensor]) -> Mapping[str, float]:
        return accuracy.of_product(exact, p, found[0].cpu(), found[1].cpu())

    def batched(route: Callable[[Tensor, Tensor], Any], wide: torch.dtype) -> list[Any]:
        return [[X.to(dtype) for X in route(B.to(wide), A.to(wide))] for B, A in stacked]

    layer = [(B[: max(1, len(B) // 32)], A[: max(1, len(B) // 32)]) for B, A in stacked]

    def looped(route: Callable[[Tensor, Tensor], Any]) -> list[Any]:
        """The modules of one layer, in float32."""
        return [
            [X[None].to(dtype) for X in route(b.float(), a.float())]
            for B, A in layer
            for b, a in zip(B, A, strict=True)
        ]

    def first(answer: list[Any]) -> Mapping[str, float]:
        return figures((answer[0][0][0], answer[0][1][0]))

    routes = {"QR + QR + core": peers.qr_qr_core, "float64 Gram + eigh": peers.gram_eigh, "thin SVDs": peers.thin_svds}
    others = {
        f"{name}, looped": Peer(partial(looped, route), sum(len(B) for B, _ in layer), first)
        for name, route in routes.items()
    }
    others["float64 Gram + eigh, batched"] = Peer(partial(batched, peers.gram_eigh, torch.float32), L, first)
    others["Cholesky-QR twice + core, batched"] = Peer(
        partial(batched, peers.cholesky_qr_core, torch.float32), L, first
    )
    size = torch.finfo(dtype).bits // 8
    S = sum(L * (B.shape[-2] + A.shape[-1]) for B, A in stacked for L in (len(B),))
    both = 2 * S * R * p
    W = sweeps(R)
    yield Case(
        {"clients": clients, "r": r, "L": L, "R": R, "p": p, "dtype": str(dtype)},
        L,
        ours,
        lambda result: figures((result[0].left[0], result[0].S[0])),
        lambda result: value_gate(result, exact, p),
        others,
        [
            Stage("Gram", size * R * S, float64=R * R * S),
            Stage("small factorisations", float64=L * (2 / 3 + 2) * R**3),
            # float32 Jacobi, 4.5 instructions an element and rotation for both sides
            Stage("core", float32=L * 2 * 4.5 * W * R**3),
            Stage("back-transform", size * (R + p) * S, float64=both),
        ],
        -(-L // PROCESSORS) * W * (R - 1) * STEP,
    )


def value_gate(result: Any, exact: Tensor, p: int) -> list[Check]:
    """Singular values of the first module to the limit of one pass at rho = 1, and no module in trouble."""
    S = result[0].S[0, :p].cpu().double()
    worst = float(((S - exact[:p]).abs() / exact[:p]).max())
    trouble = sum(int((group.info != 0).sum()) for group in result)
    return [Check("P1", worst, 2.0**-53 * 260), Check("info", float(trouble), 0.0)]


def align_factors(setting: Setting) -> Iterator[Case]:
    """FedRot of a whole model: fifty clients of rank 16, each rotated onto a reference."""
    clients, r, dtype = (3, 4, torch.float32) if setting.tiny else (50, 16, torch.bfloat16)
    shapes = TINY if setting.tiny else SHAPES
    B = [normal(setting, clients, L, m, r, dtype=dtype, seed=1) for m, _, L in shapes]
    A = [normal(setting, clients, L, r, n, dtype=dtype, seed=2) for _, n, L in shapes]
    references = [normal(setting, L, r, n, dtype=dtype, seed=3) for _, n, L in shapes]

    def library() -> list[Any]:
        return [peers.align(b.float(), a.float(), a_ref.float()) for b, a, a_ref in zip(B, A, references, strict=True)]

    def figures(left: Tensor, right: Tensor) -> Mapping[str, float]:
        return accuracy.of_aligned(*(X[:FEW].cpu() for X in (B[0][0], A[0][0], left, right)))

    # every client is a problem of its own: they share a reference, which is read where it lies
    pairs = [linalg.Ragged([x for X in stack for x in X]) for stack in (B, A)]
    shared = linalg.Ragged([reference for reference in references for _ in range(clients)])
    size = torch.finfo(dtype).bits // 8
    S = sum(L * (m + n) for m, n, L in shapes)
    moved = size * r * (2 * clients * S + sum(L * n for _, n, L in shapes))
    count = clients * sum(L for *_, L in shapes)
    yield Case(
        {"clients": clients, "r": r, "L": count // clients, "dtype": str(dtype)},
        count,
        partial(fk.align_factors, *pairs, shared, special=False, check=False, backend=setting.backend),
        lambda result: figures(result[0][0], result[0][1]),
        lambda result: rotation_gate(B[0][0], A[0][0], result[0]),
        {"torch, batched": Peer(library, count, lambda found: figures(found[0][0][0], found[0][1][0]))},
        [Stage("read and write once", moved)],
    )


def rotation_gate(B: Tensor, A: Tensor, result: tuple[Tensor, Tensor, Any]) -> list[Check]:
    """Whether the pairs of the first client are what their rotations make of them."""
    left, right, rotation = result
    return [
        check
        for i in range(min(FEW, len(B)))
        for check in check_rotated(*(X[i].cpu() for X in (B, A, rotation.Q, left, right)))
    ]


SUITES = {f.__name__: f for f in (small_svd, core_svd, stacked_qr, product_svd, align_factors)}


def rates(setting: Setting) -> Rates:
    """Copy bandwidth, read and written, and the rates of matrix products of this machine."""
    count, size = (1 << 12, 64) if setting.tiny else (1 << 28, 8192)
    source = torch.zeros(count, device=setting.device)
    target = torch.empty_like(source)
    factors = {str(d): torch.ones(size, size, device=setting.device, dtype=d) for d in (torch.float64, torch.float32)}
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    calls |= {name: lambda X=X: X @ X for name, X in factors.items()}
    took = measure(calls, device=setting.device, seconds=setting.seconds, warmup=3)
    double, single = (2 * size**3 / took[name]["q20"] for name in factors)
    return Rates(double, single, 8 * count / took["copy"]["q20"])


def compare(name: str, case: Case, setting: Setting, here: Rates) -> dict[str, Any]:
    """One row: ours and every peer that runs, timed together; no ratio where our own answer is not what it must be."""
    try:
        answer = case.ours()
    except BackendError as error:
        return {"what": name, **case.facts, "reason": str(error)}
    red = [
        f"{check.name} {check.value:.1e}, limit {check.limit:.1e}" for check in case.gate(answer) if not check.passed
    ]
    row: dict[str, Any] = {"what": name, **case.facts, "red": red, "failed_peers": {}}
    found = {"ours": dict(case.accuracy(answer))}
    del answer
    calls, counts = {"ours": case.ours}, {"ours": case.count}
    for title, peer in case.peers.items():
        try:
            found[title] = dict(peer.accuracy(peer.call()))
        except (RuntimeError, torch.linalg.LinAlgError) as error:
            # a library that gives up on a problem is a finding, not a fault of this run
            row["failed_peers"][title] = str(error).partition("\n")[0]
            continue
        calls[title], counts[title] = peer.call, peer.count
    took = measure(calls, device=setting.device, seconds=setting.seconds, warmup=3)
    us = {title: took[title]["median"] / counts[title] * 1e6 for title in calls}
    row["routes"] = {
        title: {
            "us_per_matrix": us[title],
            **{q: took[title][q] / counts[title] * 1e6 for q in ("q20", "q80")},
            "runs": took[title]["runs"],
            "accuracy": found[title],
        }
        for title in calls
    }
    best = min((title for title in calls if title != "ours"), key=lambda title: us[title], default=None)
    row |= {"best_peer": best, "ratio": us[best] / us["ours"] if best and not red else None}
    for title, known in (("here", here), ("data sheet of an H200", H200)):
        floor = total(case.floor, known) + case.latency
        row[f"times floor, {title}"] = us["ours"] * case.count * 1e-6 / floor
    row["stages"] = [{"stage": s.name, "us": s.seconds(here) * 1e6, "bound": s.bound(here)} for s in case.floor]
    row["steps_us"] = case.latency * 1e6
    return row


def brief(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the figures of each route but ours and the fastest peer."""
    shown = {key: value for key, value in row.items() if key not in ("routes", "stages")}
    for title in ("ours", row.get("best_peer")):
        if title in row.get("routes", {}):
            shown[f"{title}, us"] = row["routes"][title]["us_per_matrix"]
            shown |= {f"{title}, {name}": value for name, value in row["routes"][title]["accuracy"].items()}
    return shown


def main() -> None:
    parser = arguments(__doc__, "short runs")
    parser.add_argument("--only", nargs="+", choices=SUITES, metavar="NAME", help="of " + ", ".join(SUITES))
    parser.add_argument("--seconds", type=float, default=1.0, help="at least so long for each call")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; the figures mean nothing")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --dry-run shows that the script runs")
    seconds = 0.0 if options.dry_run else 0.2 if options.quick else options.seconds
    stand_in = "cpu" if backends.status()["cpu"][0] else "reference"
    device, backend = ("cpu", stand_in) if options.dry_run else ("cuda", "cuda")
    setting = Setting(device, backend, seconds, options.dry_run)
    print(machine())
    here = rates(setting)
    rows: list[dict[str, Any]] = [{"what": "rates", **here._asdict()}]
    for name in options.only or SUITES:
        for case in SUITES[name](setting):
            rows.append(compare(name, case, setting, here))
            show(brief(rows[-1]))
            save(options.json, rows)  # what is known stays, should a later one fail
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
