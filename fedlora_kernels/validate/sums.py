"""Calls of `weighted_sum`, `mixed_sum` and `select_rank`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import linalg
from fedlora_kernels.linalg import RankRule
from fedlora_kernels.testing import (
    SPECTRA,
    STORAGES,
    check_mixed_sum,
    check_rank,
    check_weighted_sum,
    roundoff,
    spectrum,
)
from fedlora_kernels.validate.calls import DTYPES, Call, Form, Verdict, row_of, to_device

__all__ = ["mixed_sum_calls", "select_rank_calls", "weighted_sum_calls"]

BLOCKS = {
    "equal": ((37, 5),) * 4,
    "columns": ((37, 3), (37, 16), (37, 1), (37, 7)),
    "rows": ((3, 41), (11, 41), (1, 41)),
    "corners": ((2, 7), (5, 3)),
    "one number": ((1, 1),),
    "long": ((3, 2049), (3, 2049)),
}
FULL_BLOCKS = {**BLOCKS, "many clients": ((13, 17),) * 40, "large": ((501, 333), (501, 333), (499, 128))}


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers over six orders of magnitude, of any sign."""
    size = 10.0 ** (6 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 4)
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


def weighted_sum_calls(form: Form) -> Iterator[Call]:
    """Blocks of one and of several shapes, answers in every dtype, weights 0 among them."""
    for number, (name, shapes) in enumerate((FULL_BLOCKS if form.full else BLOCKS).items()):
        generator = torch.Generator().manual_seed(form.seed + number)
        wide = [_normal(generator, 3, *shape) for shape in shapes]
        weights = torch.randn(3, len(shapes), generator=generator, dtype=torch.float64)
        if len(shapes) > 1:
            weights[1, 0] = 0
        for dtype in DTYPES:
            for out in DTYPES if form.full else (dtype, torch.float32):
                blocks = [block.to(dtype) for block in wide]
                yield _weighted_call(name, blocks, weights, out)


def _weighted_call(name: str, blocks: Sequence[Tensor], weights: Tensor, out: torch.dtype) -> Call:
    variant = f"to {str(out).removeprefix('torch.')}"
    cases = tuple(f"{name} blocks, matrix {i}, {variant}" for i in range(len(weights)))

    def run(backend: str, device: torch.device) -> Any:
        given = to_device(list(blocks), device)
        result = linalg.weighted_sum(given, weights=weights, dtype=out, backend=backend, check=False)
        return to_device(result, torch.device("cpu"))

    def judge(_: str, result: Any) -> Iterable[Verdict]:
        for i, case in enumerate(cases):
            checks = check_weighted_sum([block[i] for block in blocks], weights[i], row_of(result, i))
            yield Verdict(case, checks, variant=variant)

    p, q = (max(block.shape[axis] for block in blocks) for axis in (1, 2))
    regime = "blocks of one shape" if len({block.shape for block in blocks}) == 1 else "blocks of several shapes"
    sizes = {"p": p, "q": q, "K": len(blocks), "N": len(weights)}
    return Call("weighted_sum", regime, blocks[0].dtype, sizes, cases, run, judge)


MIXED = {
    "equal": (37, (5, 5, 5, 5), 5),
    "ranks": (37, (3, 16, 1, 7), 11),
    "one": (1, (1,), 1),
    "a strip": (64, (16, 16), 16),
    "wide": (66, (40, 17), 33),
    "a chunk and a row": (2049, (2, 3), 4),
}
FULL_MIXED = {**MIXED, "many clients": (97, (7,) * 30, 13), "large": (1501, (64, 64, 32), 128)}


def mixed_sum_calls(form: Form) -> Iterator[Call]:
    """Blocks times small matrices from either side, by rows and by columns in memory."""
    for number, (name, (p, ranks, q)) in enumerate((FULL_MIXED if form.full else MIXED).items()):
        generator = torch.Generator().manual_seed(form.seed + number)
        wide = [_normal(generator, 2, p, r) for r in ranks]
        mixers = [_normal(generator, 2, r, q) / sum(ranks) for r in ranks]  # within the range of float16
        store = list(STORAGES)[number % len(STORAGES)]
        for dtype in DTYPES:
            blocks = [STORAGES[store](block.to(dtype)) for block in wide]
            for side in ("right", "left"):
                for out in (dtype, torch.float64) if dtype != torch.float64 else (dtype,):
                    yield _mixed_call(f"{name}, {store}", blocks, mixers, side, out)


def _mixed_call(name: str, blocks: list[Tensor], mixers: list[Tensor], side: Any, out: torch.dtype) -> Call:
    variant = f"{side}, to {str(out).removeprefix('torch.')}"
    cases = tuple(f"{name}, matrix {i}, {variant}" for i in range(len(blocks[0])))

    def run(backend: str, device: torch.device) -> Any:
        X, M = ([Z.mT for Z in part] if side == "left" else part for part in (blocks, mixers))
        if device.type != "cpu":
            X = to_device(X, device)
        result = linalg.mixed_sum(X, to_device(M, device), side=side, dtype=out, backend=backend, check=False)
        return to_device(result, torch.device("cpu"))

    def judge(_: str, result: Any) -> Iterable[Verdict]:
        for i, case in enumerate(cases):
            row = row_of(result, i)
            if side == "left":
                row = type(row)(row.sum.mT, row.norm, row.rounding, row.info, row.notes)
            checks = check_mixed_sum([block[i] for block in blocks], [mixer[i] for mixer in mixers], row)
            yield Verdict(case, checks, variant=variant)

    p, q, R = blocks[0].shape[1], mixers[0].shape[2], sum(block.shape[2] for block in blocks)
    sizes = {"p": p, "q": q, "K": len(blocks), "N": len(blocks[0])}
    return Call("mixed_sum", f"R {'<= 32' if R <= 32 else '> 32'}", blocks[0].dtype, sizes, cases, run, judge)


def _rules(k: int) -> list[RankRule]:
    shares = (1e-12, 0.9, 0.999, 0.999999, 1 - 1e-12, 1.0)
    made: list[RankRule] = [linalg.Energy(tau) for tau in shares]
    made += [linalg.SingularValueSum(tau) for tau in shares]
    made += [linalg.Frobenius(0.95), linalg.Rank(1), linalg.Rank(max(k, 1)), linalg.Rank(k + 7)]
    made += [linalg.SingularValueRatio(x) for x in (1.0, 2.0, 1e6)]
    made += [linalg.Absolute(x) for x in (0.0, 0.5, 1.0)]
    made += [linalg.Energy(0.999).capped(2), linalg.Absolute(0.0).capped(3)]
    return made


def select_rank_calls(form: Form) -> Iterator[Call]:
    """All spectra and rules, ties at the threshold among them, counted in rational arithmetic."""
    for k in (1, 2, 10, 64, 300) if form.full else (1, 10, 33):
        spectra = {f"{name} {cond:g}": spectrum(name, k, cond, form.seed) for name in SPECTRA for cond in (10.0, 1e8)}
        spectra |= {"equal": torch.ones(k).double(), "zero": torch.zeros(k).double()}
        for dtype in (torch.float64, torch.float32):
            S = torch.stack(list(spectra.values())).to(dtype)
            for rule in _rules(k):
                yield _rank_call(tuple(f"{name}, k {k}, {rule}" for name in spectra), S, rule)


def _rank_call(cases: tuple[str, ...], S: Tensor, rule: RankRule) -> Call:
    floors = 4 * S.shape[1] * roundoff(S.dtype) * S[:, 0].double()

    def run(backend: str, device: torch.device) -> Any:
        found = linalg.select_rank(
            to_device(S, device), rule, floor=to_device(floors, device), backend=backend, check=False
        )
        return to_device(found, torch.device("cpu"))

    def judge(_: str, result: Any) -> Iterable[Verdict]:
        for i, case in enumerate(cases):
            checks = check_rank(S[i].double().tolist(), rule.spec(), float(floors[i]), int(result[i]))
            yield Verdict(case, checks, variant=type(rule).__name__)

    return Call("select_rank", "every rule", S.dtype, {"p": S.shape[1], "N": len(S)}, cases, run, judge)
