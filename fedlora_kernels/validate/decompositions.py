"""Calls of `core_svd` and `stacked_qr` over the gallery."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import linalg
from fedlora_kernels.testing import GALLERY, SAMPLE, STACKS, STORAGES, StackProblem, check_qr, check_svd, gallery
from fedlora_kernels.validate.calls import DTYPES, LAPACK, Call, Form, Verdict, row_of, size_class, to_device

__all__ = ["core_svd_calls", "stacked_qr_calls"]

BOUNDS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_SHAPES = ((1, 1), (2, 2), (3, 4), (8, 7), (13, 16), (32, 29), (33, 47), (67, 61), (100, 128))
FULL_SHAPES = (
    *QUICK_SHAPES, (1, 7), (7, 1), (2, 3), (4, 4), (5, 5), (8, 8), (9, 31), (16, 16), (17, 32), (32, 32), (31, 97), (64, 64),
    (65, 64), (127, 128), (131, 97), (256, 251), (300, 37), (512, 509), (521, 40),
)  # fmt: skip
FEW = ("lapack: random", "lapack: latms 3", "classic: half rank", "magma: condD", "classic: kahan", "classic: hadamard")
"""Members of the gallery for sizes where each costs a noticeable part of a second."""


def members(form: Form, size: int) -> Sequence[str]:
    """Names of the gallery for matrices of that largest side."""
    if size > 160:
        return FEW
    if form.full:
        return tuple(GALLERY)
    return SAMPLE if size <= 48 else FEW


def core_svd_calls(form: Form) -> Iterator[Call]:
    """Every shape and dtype with the gallery; storage of the first shapes in turn, a batch beyond 16 bits in the full form."""
    for number, (p, q) in enumerate(FULL_SHAPES if form.full else QUICK_SHAPES):
        for dtype in DTYPES:
            wanted = members(form, max(p, q))
            names, C = gallery(p, q, form.seed, dtype, wanted)
            store = list(STORAGES)[number % len(STORAGES)]
            yield _svd_call(names, STORAGES[store](C), store, tuple(sorted(set(wanted) - set(names))))
    if form.full:
        _, C = gallery(4, 3, form.seed, torch.float32, ("magma: randn",))
        generator = torch.Generator().manual_seed(form.seed)
        many = torch.randn(65543, 4, 3, generator=generator) + C
        yield _svd_call([f"matrix {i}" for i in range(len(many))], many, "batch of 65543", ())


def _svd_call(names: Sequence[str], C: Tensor, store: str, left_out: tuple[str, ...]) -> Call:
    N, p, q = C.shape
    cases = tuple(f"{name} {p} x {q}, {store}" for name in names)

    def run(backend: str, device: torch.device) -> Any:
        # a storage is one of this device; the move to another one may not keep it
        X = C if device.type == "cpu" else to_device(C, device)
        return to_device(linalg.core_svd(X, backend=backend, check=False), torch.device("cpu"))

    def judge(backend: str, result: Any) -> Iterable[Verdict]:
        found = check_svd(C, result, lapack=backend in LAPACK)
        return [Verdict(case, checks) for case, checks in zip(cases, found, strict=True)]

    regime = size_class("size", max(p, q), BOUNDS)
    return Call("core_svd", regime, C.dtype, {"p": p, "q": q, "N": N}, cases, run, judge, left_out)


QUICK_STACKS = ((1, (1,)), (29, (5, 3)), (13, (9, 8)), (83, (5, 7, 1)), (211, (16, 16)))
FULL_STACKS = (
    *QUICK_STACKS, (1, (3, 2)), (2, (2,)), (19, (7, 12)), (16, (8, 8)), (5, (16, 16)), (257, (32, 31)), (600, (64, 64)),
    (2003, (13, 16)), (4099, (8, 8)),
)  # fmt: skip
STACK_SAMPLE = (
    "independent", "duplicates", "zero first", "zero weight", "graded", "kappa 1e0", "kappa 1e6", "kappa 1e14",
    "classic: laeuchli", "classic: kahan", "classic: vandermonde", "classic: hilbert", "classic: half rank",
    "lapack: zero", "lapack: latms 1", "magma: condD", "magma: kronecker", "classic: columns 1e+-30", "classic: subnormal",
)  # fmt: skip
STACK_FEW = ("independent", "duplicates", "graded", "kappa 1e6", "kappa 1e14")


def stacked_qr_calls(form: Form) -> Iterator[Call]:
    """Every stack of clients over shapes tall, square and wide, R alone and with Q."""
    for m, ranks in FULL_STACKS if form.full else QUICK_STACKS:
        many = m * sum(ranks) > 20000
        wanted = STACK_FEW if many else tuple(STACKS) if form.full else STACK_SAMPLE
        for dtype in DTYPES:
            made = {name: STACKS[name](m, ranks, form.seed, dtype) for name in wanted}
            kept = {name: problem for name, problem in made.items() if _finite(problem)}
            for mode in ("reduced", "r"):
                yield _qr_call(kept, m, ranks, dtype, mode, tuple(sorted(set(made) - set(kept))))


def _finite(problem: StackProblem) -> bool:
    # R is float32 for narrower blocks: weights and column norms must fit as well
    norms = problem.stacked().norm(dim=0)
    largest = torch.finfo(torch.float64 if problem.blocks[0].dtype == torch.float64 else torch.float32).max
    return bool(torch.isfinite(norms).all()) and bool((norms <= largest).all())


def _qr_call(
    problems: dict[str, StackProblem],
    m: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    mode: str,
    left_out: tuple[str, ...],
) -> Call:
    blocks = [torch.stack([problem.blocks[k] for problem in problems.values()]) for k in range(len(ranks))]
    weights = torch.stack([problem.weights for problem in problems.values()])
    cases = tuple(f"{name} {m} x {sum(ranks)}" for name in problems)

    def run(backend: str, device: torch.device) -> Any:
        given = to_device(blocks, device)
        result = linalg.stacked_qr(given, weights=weights, mode=mode, backend=backend, check=False)
        return to_device(result, torch.device("cpu"))

    def judge(_: str, result: Any) -> Iterable[Verdict]:
        for i, (case, problem) in enumerate(zip(cases, problems.values(), strict=True)):
            yield Verdict(case, check_qr(problem.stacked(), row_of(result, i), rank=problem.rank), variant=variant)

    variant = "Q and R" if mode == "reduced" else "R alone"
    shape = "wide" if m < sum(ranks) else "tall" if m > sum(ranks) else "square"
    regime = f"{shape}, {size_class('R', sum(ranks), (32,))}"
    sizes = {"m": m, "R": sum(ranks), "K": len(ranks), "N": len(problems)}
    return Call("stacked_qr", regime, dtype, sizes, cases, run, judge, left_out)
