"""The micro-benchmarks: which problems, which peers, which floor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import linalg
from fedlora_kernels.bench import accuracy, peers
from fedlora_kernels.bench.comparison import Comparison, Peer, Setting
from fedlora_kernels.bench.floors import Stage, core_stages, sweeps
from fedlora_kernels.testing import (
    Check,
    check_qr,
    check_rotated,
    check_rotation,
    check_svd,
    check_weighted_sum,
    tolerance,
)

__all__ = ["SUITES"]

LOOPED = 64
"""Matrices of a batch that loops are timed on."""
GATED = 4
"""Matrices of our answer that are judged."""
LAPACK = frozenset({"torch", "reference"})

Suite = Callable[[Setting], Iterator[Comparison]]
Figures = Callable[[Any], Mapping[str, float]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _row(result: Any, i: int) -> Any:
    """Matrix i of a result whose fields are tensors or None."""
    return type(result)(*(None if field is None else field[i] for field in vars(result).values()))


def small_svd(setting: Setting) -> Iterator[Comparison]:
    """SVD of many small matrices, and of one."""
    sizes = (
        ((4, 50), (8, 50)) if setting.quick else ((4, 10_000), (8, 10_000), (16, 10_000), (32, 1_000), (16, 1), (32, 1))
    )
    for dtype in (torch.float32, torch.float64):
        for r, batch in sizes:
            yield _svd("small_svd", setting, r, batch, dtype)


def core_svd(setting: Setting) -> Iterator[Comparison]:
    """SVD of cores of stacked factors."""
    sizes = ((48, 2),) if setting.quick else ((64, 32), (128, 16), (256, 4), (512, 2), (64, 1), (256, 1))
    for dtype in (torch.float64, torch.float32):
        for r, batch in sizes:
            yield _svd("core_svd", setting, r, batch, dtype)


def _svd(suite: str, setting: Setting, r: int, batch: int, dtype: torch.dtype) -> Comparison:
    C = _normal(batch, r, r, dtype=dtype, seed=r)
    few = C[:LOOPED]
    figures: Figures = lambda found: accuracy.of_svd(C, *found)  # noqa: E731

    def stacked(found: Sequence[Any]) -> Mapping[str, float]:
        return figures([torch.stack([torch.as_tensor(one[i]) for one in found]) for i in range(3)])

    svd = partial(torch.linalg.svd, full_matrices=False)
    others = {
        "torch svd, batched": Peer(partial(svd, C), batch, figures),
        "torch svd, looped": Peer(peers.looped(svd, few), len(few), stacked),
    }
    if numpy := peers.optional("numpy.linalg"):
        found = partial(numpy.svd, C.numpy(), full_matrices=False)
        others["numpy svd, batched"] = Peer(found, batch, lambda usv: figures([torch.as_tensor(x) for x in usv]), True)
    if scipy := peers.optional("scipy.linalg"):
        for driver in ("gesdd", "gesvd"):
            one = partial(scipy.svd, full_matrices=False, lapack_driver=driver)
            others[f"scipy {driver}, looped"] = Peer(peers.looped(one, few.numpy()), len(few), stacked, True)

    def gate(result: Any, backend: str) -> Sequence[Check]:
        judged = linalg.SVDResult(*(field[:GATED] for field in vars(result).values()))
        return [check for checks in check_svd(C[:GATED], judged, lapack=backend in LAPACK) for check in checks]

    return Comparison(
        suite=suite,
        case={"dtype": _name(dtype), "r": r, "L": batch},
        op="core_svd",
        count=batch,
        ours=partial(linalg.core_svd, C, backend=setting.backend),
        accuracy=lambda result: figures((result.U, result.S, result.Vh)),
        gate=gate,
        floor=core_stages(batch, r, dtype),
        peers=others,
    )


def gram(setting: Setting) -> Iterator[Comparison]:
    """Inner products of the updates of eight clients."""
    m, widths = (96, (16,)) if setting.quick else (4096, (16, 32, 64, 128, 256, 512))
    for dtype in (torch.float32, torch.bfloat16):
        for R in widths:
            yield _gram(setting, m, R, dtype, modules=2 if R >= 256 else 8)


def _gram(setting: Setting, m: int, R: int, dtype: torch.dtype, modules: int) -> Comparison:
    K = 8
    r = R // K
    B = [_normal(modules, m, r, dtype=dtype, seed=k) for k in range(K)]
    A = [_normal(modules, r, m, dtype=dtype, seed=K + k) for k in range(K)]

    def library(b: Sequence[Tensor], a: Sequence[Tensor], kind: torch.dtype) -> Tensor:
        X, Y = torch.cat([x.to(kind) for x in b], -1), torch.cat([y.to(kind) for y in a], -2)
        products = (X.mT @ X) * (Y @ Y.mT)
        inner: Tensor = products.reshape(*products.shape[:-2], K, r, K, r).sum((-1, -3))
        return inner

    exact = library([x[0] for x in B], [y[0] for y in A], torch.float64)
    sizes = torch.stack(
        [(x[0].double().norm(dim=0) * y[0].double().norm(dim=1)).sum() for x, y in zip(B, A, strict=True)]
    )
    scale = sizes[:, None] * sizes
    figures: Figures = lambda G: accuracy.of_gram(exact, scale, G[0])  # noqa: E731

    def looped(kind: torch.dtype) -> list[Tensor]:
        return [library([x[i] for x in B], [y[i] for y in A], kind) for i in range(modules)]

    others = {
        "torch float64, batched": Peer(partial(library, B, A, torch.float64), modules, figures),
        "torch float64, looped": Peer(partial(looped, torch.float64), modules, figures),
        "torch float32, batched": Peer(partial(library, B, A, torch.float32), modules, figures),
    }
    moved, work = modules * 2 * m * R * _bytes(dtype), modules * 2.0 * m * R * R
    return Comparison(
        suite="gram",
        case={"dtype": _name(dtype), "m": m, "n": m, "R": R, "K": K, "L": modules},
        op="update_gram",
        count=modules,
        ours=partial(linalg.update_gram, B, A, backend=setting.backend),
        accuracy=figures,
        gate=lambda G, _: [Check("error", figures(G)["error"], tolerance("gram"))],
        floor=[Stage("gram", moved, work)],
        peers=others,
    )


def product_svd(setting: Setting) -> Iterator[Comparison]:
    """Truncated SVD of the sum of stacked factors, Energy(0.95), LoRA-like spectrum."""
    full = (
        (1024, 32, 16, torch.float32), (1024, 64, 16, torch.float32), (4096, 64, 4, torch.float32), (4096, 128, 4, torch.float32),
        (4096, 256, 2, torch.float32), (4096, 128, 4, torch.bfloat16), (4096, 128, 1, torch.float32),
    )  # fmt: skip
    for size, R, modules, dtype in ((96, 16, 2, torch.float32),) if setting.quick else full:
        yield _product(setting, size, R, modules, dtype)


def _product(setting: Setting, size: int, R: int, modules: int, dtype: torch.dtype) -> Comparison:
    B = (_normal(modules, size, R) * torch.logspace(0, -2, R)).to(dtype)
    A = _normal(modules, R, size, seed=1).to(dtype)
    b, a = B[0].double(), A[0].double()
    exact = torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.mT)[1].mT)
    ours = partial(linalg.product_svd, B, A, rule=linalg.Energy(0.95), backend=setting.backend)
    p = _kept(exact)
    figures: Figures = lambda found: accuracy.of_product(exact, p, found[0], found[1])  # noqa: E731
    first: Figures = lambda found: figures([part[0] for part in found])  # noqa: E731
    # peers compute in float32: libraries have no decompositions of halves
    X, Y = B.float(), A.float()
    routes: dict[str, Callable[..., peers.Triple]] = {
        "QR + QR + core": peers.qr_qr_core,
        "thin SVDs + core": peers.thin_svds,
        "Gram + eigh": peers.gram_eigh,
        "Cholesky-QR + core": peers.cholesky_qr_core,
    }
    others: dict[str, Peer] = {}
    for name, route in routes.items():
        others[f"{name}, looped"] = Peer(peers.looped(route, X, Y), modules, lambda found: figures(found[0]))
        others[f"{name}, batched"] = Peer(partial(route, X, Y), modules, first)
    if size <= 1024:
        others["dense SVD"] = Peer(partial(peers.dense, X[0], Y[0]), 1, figures)
    others["randomised, not exact"] = Peer(partial(peers.randomised, X[0], Y[0], p), 1, figures)

    def gate(result: Any, _: str) -> Sequence[Check]:
        rho, passes = float(result.certificate.rho[0]), int(result.certificate.passes[0])
        found = figures((result.left[0], result.S[0]))
        # the values that judge are Householder's, which has an error of its own
        limit = tolerance("P1", rho=rho, passes=passes) + tolerance("P1", rho=rho, passes=2)
        skew = tolerance("P2", dtype=dtype, rho=rho, passes=passes)
        return [
            Check("rank", abs(int(result.rank[0]) - p), 0),
            Check("value", found["value"], limit),
            Check("orthogonality", found["orthogonality"], skew),
        ]

    return Comparison(
        suite="product_svd",
        case={"dtype": _name(dtype), "m": size, "n": size, "R": R, "p": p, "L": modules},
        op="product_svd",
        count=modules,
        ours=ours,
        accuracy=lambda result: figures((result.left[0], result.S[0])),
        gate=gate,
        floor=_product_floor(modules, size, R, p, dtype),
        peers=others,
    )


def _kept(s: Tensor) -> int:
    """Rank that Energy(0.95) keeps of these values."""
    share = s.square().cumsum(0) / s.square().sum()
    return int((share < 0.95).sum()) + 1


def _product_floor(L: int, size: int, R: int, p: int, dtype: torch.dtype) -> list[Stage]:
    S, width = 2 * size, _bytes(dtype)
    return [
        Stage("gram", L * S * R * width, L * R * R * S),
        Stage("small factorisations", 0, L * (2 * 2 / 3 + 2 + 8 / 3) * R**3),
        Stage("core", 0, L * 2 * 2.5 * sweeps(R) * R**3),
        Stage("back-transform", L * (S * R + S * p) * width, L * 2.0 * R * p * S),
    ]


def stacked_qr(setting: Setting) -> Iterator[Comparison]:
    """QR of two stacked blocks, R alone and with Q."""
    sizes = ((120, 16),) if setting.quick else ((1024, 64), (4096, 64), (4096, 128), (4096, 256))
    for m, R in sizes:
        for mode in ("r", "reduced"):
            yield _qr(setting, m, R, 2 if setting.quick else 4, mode)


def _qr(setting: Setting, m: int, R: int, modules: int, mode: str) -> Comparison:
    X = _normal(modules, m, R)
    blocks = [X[..., : R // 2], X[..., R // 2 :]]

    def figures(Q: Tensor | None, R_: Tensor) -> Mapping[str, float]:
        return accuracy.of_qr(X[0], Q[0] if mode == "reduced" and Q is not None else None, R_[0])

    def stacked(found: Sequence[Any]) -> Mapping[str, float]:
        return accuracy.of_qr(X[0], found[0][0] if mode == "reduced" else None, found[0][1])

    qr = partial(torch.linalg.qr, mode=mode)

    def twice() -> Any:
        return peers.cholesky_qr(X.double(), twice=True)

    others = {
        "torch qr, batched": Peer(partial(qr, X), modules, lambda found: figures(*found)),
        "torch qr, looped": Peer(peers.looped(qr, X), modules, stacked),
        "Cholesky-QR float32": Peer(partial(peers.cholesky_qr, X), modules, lambda found: figures(*found)),
        "Cholesky-QR twice, float64": Peer(twice, modules, lambda found: figures(*found)),
    }
    if scipy := peers.optional("scipy.linalg"):
        one = partial(scipy.qr, mode="economic" if mode == "reduced" else "r")

        def last(found: Sequence[Any]) -> Mapping[str, float]:
            Q = torch.as_tensor(found[0][0]) if mode == "reduced" else None
            return accuracy.of_qr(X[0], Q, torch.as_tensor(found[0][-1][:R]))

        others["scipy qr, looped"] = Peer(peers.looped(one, X.numpy()), modules, last, True)
    size, work = _bytes(X.dtype), modules * float(m * R * R)
    floor = [Stage("gram", modules * m * R * size, work), Stage("small", 0, modules * 2 / 3 * R**3)]
    if mode == "reduced":
        floor.append(Stage("Q", 2 * modules * m * R * size, work))
    return Comparison(
        suite="stacked_qr",
        case={"dtype": _name(X.dtype), "m": m, "R": R, "L": modules, "mode": mode},
        op="stacked_qr",
        count=modules,
        ours=partial(linalg.stacked_qr, blocks, mode=mode, backend=setting.backend),
        accuracy=lambda result: figures(result.Q, result.R),
        gate=lambda result, _: check_qr(X[0].double(), _row(result, 0), rank=R),
        floor=floor,
        peers=others,
    )


def polar(setting: Setting) -> Iterator[Comparison]:
    """Rotation of square float64 frames: the r x r part of Procrustes alone."""
    for r in (4,) if setting.quick else (4, 8, 16, 32, 64):
        yield _polar(setting, r, 20 if setting.quick else 2400 if r <= 16 else 240)


def _polar(setting: Setting, r: int, pairs: int) -> Comparison:
    X, Y = (_normal(pairs, r, r, dtype=torch.float64, seed=seed) for seed in (r, r + 1))
    few = slice(0, LOOPED)
    figures: Figures = lambda Q: accuracy.of_rotation(X, Y, Q)  # noqa: E731
    stacked: Figures = lambda found: figures(torch.stack([torch.as_tensor(Q) for Q in found]))  # noqa: E731
    others = {
        "torch svd, batched": Peer(partial(peers.procrustes, X, Y), pairs, figures),
        "torch svd, looped": Peer(peers.looped(peers.procrustes, X[few], Y[few]), len(X[few]), stacked),
    }
    if scipy := peers.optional("scipy.linalg"):
        call = peers.looped(scipy.orthogonal_procrustes, X[few].numpy(), Y[few].numpy())
        first: Figures = lambda found: stacked([Q for Q, _ in found])  # noqa: E731
        others["scipy orthogonal_procrustes, looped"] = Peer(call, len(X[few]), first, True)

    def gate(result: Any, _: str) -> Sequence[Check]:
        judged = range(min(GATED, pairs))
        return [check for i in judged for check in check_rotation(X[i], Y[i], _row(result, i), special=False)]

    work = 2.0 * r**3 * 2 + 2 * 2.5 * sweeps(r) * r**3  # two products and the rotations
    return Comparison(
        suite="polar",
        case={"dtype": "float64", "r": r, "L": pairs},
        op="procrustes_rotation",
        count=pairs,
        ours=partial(linalg.procrustes_rotation, X, Y, backend=setting.backend),
        accuracy=lambda result: figures(result.Q),
        gate=gate,
        floor=[Stage("polar", pairs * 3 * r * r * 8, pairs * work)],
        peers=others,
    )


def align_factors(setting: Setting) -> Iterator[Comparison]:
    """Pairs rotated towards a reference, beside a bare copy of their bytes."""
    shapes = ((96, 80),) if setting.quick else ((768, 1024), (4096, 4096))
    for m, n in shapes:
        for r in (4,) if setting.quick else (4, 8, 16):
            # beyond any cache, as the adapters of a fleet are
            yield _align(setting, m, n, r, 10 if setting.quick else min(2400, (128 << 20) // (4 * r * (m + n))))


def _align(setting: Setting, m: int, n: int, r: int, pairs: int) -> Comparison:
    B, A, A_ref = _normal(pairs, m, r), _normal(pairs, r, n, seed=1), _normal(pairs, r, n, seed=2)
    few = slice(0, LOOPED)
    figures: Figures = lambda found: accuracy.of_aligned(B, A, found[0], found[1])  # noqa: E731
    stacked: Figures = lambda found: figures([torch.stack([one[i] for one in found]) for i in range(2)])  # noqa: E731
    others = {
        "torch, batched": Peer(partial(peers.align, B, A, A_ref), pairs, figures),
        "torch, looped": Peer(peers.looped(peers.align, B[few], A[few], A_ref[few]), len(B[few]), stacked),
    }
    room = torch.empty_like(B), torch.empty_like(A)
    copy = Peer(lambda: (room[0].copy_(B), room[1].copy_(A)), pairs, lambda _: {})

    def gate(result: Any, _: str) -> Sequence[Check]:
        left, right, rotation = result
        found: list[Check] = []
        for i in range(min(GATED, pairs)):
            here = _row(rotation, i)
            found += check_rotation(A[i].mT, A_ref[i].mT, here, special=False)
            found += check_rotated(B[i], A[i], here.Q, left[i], right[i])
        return found

    moved = pairs * 4 * (2 * r * (m + n) + r * n)
    work = pairs * 2.0 * r * r * n  # X^T Y in float64; the rotation itself may be float32
    return Comparison(
        suite="align_factors",
        case={"dtype": "float32", "m": m, "n": n, "r": r, "L": pairs},
        op="align_factors",
        count=pairs,
        ours=partial(linalg.align_factors, B, A, A_ref, special=False, backend=setting.backend),
        accuracy=figures,
        gate=gate,
        floor=[Stage("rotate", moved, work, pairs * 2.0 * r * r * (m + n))],
        peers=others,
        bounds={"copy of B and A": copy},
    )


def sums(setting: Setting) -> Iterator[Comparison]:
    """Weighted sum of the factors of eight clients."""
    for rows, r, modules in ((96, 4, 2),) if setting.quick else ((4096, 16, 32), (4096, 64, 8)):
        yield _sum(setting, rows, r, modules)


def _sum(setting: Setting, rows: int, r: int, modules: int) -> Comparison:
    K = 8
    blocks = [_normal(modules, rows, r, seed=k) for k in range(K)]
    weights = torch.linspace(0.5, 1.5, K, dtype=torch.float64)
    exact = functools.reduce(torch.add, [w * X.double() for w, X in zip(weights, blocks, strict=True)])
    scale = float(exact.norm())
    figures: Figures = lambda found: {"error": float((found.double() - exact).norm()) / scale}  # noqa: E731

    def added() -> Tensor:
        total = torch.zeros_like(blocks[0])
        for w, X in zip(weights.tolist(), blocks, strict=True):
            total.add_(X, alpha=w)
        return total

    stack = torch.stack(blocks)
    others = {
        "torch add": Peer(added, modules, figures),
        "torch tensordot": Peer(lambda: torch.tensordot(weights.float(), stack, 1), modules, figures),
    }

    def gate(result: Any, _: str) -> Sequence[Check]:
        return check_weighted_sum([X[0] for X in blocks], weights, _row(result, 0))

    return Comparison(
        suite="sums",
        case={"dtype": "float32", "m": rows, "r": r, "K": K, "L": modules},
        op="weighted_sum",
        count=modules,
        ours=partial(linalg.weighted_sum, blocks, weights=weights, backend=setting.backend),
        accuracy=lambda result: figures(result.sum),
        gate=gate,
        floor=[Stage("sum", modules * 4 * rows * r * (K + 1), modules * 2.0 * rows * r * K)],
        peers=others,
    )


SUITES: Mapping[str, Suite] = {
    suite.__name__: suite for suite in (small_svd, core_svd, gram, product_svd, stacked_qr, polar, align_factors, sums)
}
"""By name, in the order of the report."""
