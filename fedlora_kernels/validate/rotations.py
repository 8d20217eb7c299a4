"""Calls of `procrustes_rotation`, `rotate_factors` and `align_factors` over all pairs of frames."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import linalg
from fedlora_kernels.testing import FRAMES, check_rotated, check_rotation, exact_polar, gauge
from fedlora_kernels.validate.calls import DTYPES, Call, Form, Verdict, row_of, size_class, to_device

__all__ = ["align_factors_calls", "procrustes_calls", "rotate_factors_calls"]

BOUNDS = (1, 4, 8, 16, 32, 64)
QUICK = ((37, 1), (37, 2), (31, 4), (53, 8), (61, 13), (67, 33))
FULL = (*QUICK, (3, 7), (41, 5), (41, 3), (64, 16), (127, 16), (97, 32), (131, 64), (211, 100), (4099, 8), (1, 1))
SAMPLE = (
    *(name for name in FRAMES if not name.startswith("correlation")),
    "correlation lapack: zero", "correlation lapack: identity", "correlation lapack: bidiagonal", "correlation magma: condD",
    "correlation magma: ones", "correlation magma: svd cluster0", "correlation magma: svd rand dominant",
    "correlation classic: hadamard", "correlation classic: twins", "correlation classic: half rank", "correlation classic: kahan",
    "correlation classic: negative zero", "correlation classic: duplicate columns",
)  # fmt: skip
FEW = ("turned", "turned, noisy", "reflected", "half target", "kappa 1e6", "zero target")


def _frames(
    form: Form, rows: int, r: int, dtype: torch.dtype
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """Pairs by name, all of one shape, and the names of those that leave the range of the dtype."""
    wanted = FEW if r > 64 or rows > 1000 else tuple(FRAMES) if form.full else SAMPLE
    made = {name: FRAMES[name](rows, r, form.seed, dtype) for name in wanted}
    shape = (rows, r) if rows >= r else None
    kept = {
        name: pair
        for name, pair in made.items()
        if all(torch.isfinite(Z).all() for Z in pair) and (shape is None or tuple(pair[0].shape) == shape)
    }
    if shape is None:  # a correlation of r columns needs r rows
        kept = {name: pair for name, pair in kept.items() if len(pair[0]) == rows}
    return kept, tuple(sorted(set(made) - set(kept)))


def procrustes_calls(form: Form) -> Iterator[Call]:
    """Both groups, O(r) and SO(r), with and without blend."""
    for rows, r in FULL if form.full else QUICK:
        for dtype in DTYPES:
            pairs, left_out = _frames(form, rows, r, dtype)
            X, Y = (torch.stack(tensors) for tensors in zip(*pairs.values(), strict=True))
            polar = remembered(X, Y)
            for special, blend in ((False, 1.0), (True, 1.0), (True, 0.5)):
                yield _rotation_call(tuple(pairs), X, Y, polar, special, blend, left_out)


Polar = Callable[[int, bool], tuple[Tensor, bool]]


def remembered(X: Tensor, Y: Tensor) -> Polar:
    """The polar factor of each pair of matrices (N, rows, r) in extended precision, computed when first asked for."""
    return functools.cache(lambda i, special: exact_polar(X[i], Y[i], special=special))


def _rotation_call(
    names: tuple[str, ...],
    X: Tensor,
    Y: Tensor,
    polar: Polar,
    special: bool,
    blend: float,
    left_out: tuple[str, ...],
) -> Call:
    N, rows, r = X.shape
    cases = tuple(f"{name} {rows} x {r}" for name in names)
    variant = ("SO" if special else "O") + (f", blend {blend:g}" if blend < 1 else "")

    def run(backend: str, device: torch.device) -> Any:
        result = linalg.procrustes_rotation(
            to_device(X, device), to_device(Y, device), special=special, blend=blend, backend=backend, check=False
        )
        return to_device(result, torch.device("cpu"))

    def judge(_: str, result: Any) -> Iterable[Verdict]:
        for i, case in enumerate(cases):
            exact = functools.partial(polar, i, special)
            checks = check_rotation(X[i], Y[i], row_of(result, i), special=special, blend=blend, polar=exact)
            yield Verdict(f"{case}, {variant}", checks, variant=variant)

    regime, sizes = size_class("r", r, BOUNDS), {"m": rows, "r": r, "N": N}
    return Call("procrustes_rotation", regime, X.dtype, sizes, cases, run, judge, left_out)


PAIRS = ((37, 1, 23), (41, 4, 29), (53, 8, 31), (64, 16, 48), (67, 33, 71))
FULL_PAIRS = (*PAIRS, (3, 7, 2), (131, 64, 97), (2003, 5, 3), (5, 13, 1999), (768, 16, 1024))


def _pair(m: int, r: int, n: int, dtype: torch.dtype, seed: int, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, count, dtype=torch.float64)[:, None, None]
    B = scales * torch.randn(count, m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(count, r, n, generator=generator, dtype=torch.float64)
    return B.to(dtype), A.to(dtype)


def rotate_factors_calls(form: Form) -> Iterator[Call]:
    """Pairs turned by Haar rotations, by the identity and by a reflection."""
    for m, r, n in FULL_PAIRS if form.full else PAIRS:
        turns = [gauge(r, form.seed + i, reflected=i == 2) for i in range(3)]
        Q = torch.stack([*turns, torch.eye(r, dtype=torch.float64)])
        for dtype in DTYPES:
            B, A = _pair(m, r, n, dtype, form.seed)
            yield _rotate_call(B, A, Q)


def _rotate_call(B: Tensor, A: Tensor, Q: Tensor) -> Call:
    N, m, r = B.shape
    n = A.shape[2]
    cases = tuple(f"{kind} {m} x {r} x {n}" for kind in ("turned", "turned by another", "reflected", "identity"))

    def run(backend: str, device: torch.device) -> Any:
        given = [to_device(Z, device) for Z in (B, A, Q)]
        return to_device(linalg.rotate_factors(*given, backend=backend, check=False), torch.device("cpu"))

    def judge(_: str, result: Any) -> Iterable[Verdict]:
        for i, case in enumerate(cases):
            yield Verdict(case, check_rotated(B[i], A[i], Q[i], result[0][i], result[1][i]))

    sizes = {"m": m, "r": r, "n": n, "N": N}
    return Call("rotate_factors", size_class("r", r, BOUNDS), B.dtype, sizes, cases, run, judge)


SIDES: Sequence[Any] = ("A", "B", (0.5, 2.0))


def align_factors_calls(form: Form) -> Iterator[Call]:
    """Clients that are turned copies of the reference with noise, or strangers to it; all sides."""
    for m, r, n in FULL_PAIRS if form.full else PAIRS:
        for dtype in DTYPES:
            B_ref, A_ref = _pair(m, r, n, torch.float64, form.seed)
            B, A = _pair(m, r, n, torch.float64, form.seed + 1)
            G = gauge(r, form.seed + 5)
            B[:2] = B_ref[:2] @ G.mT + 0.1 * B[:2]
            A[:2] = G @ A_ref[:2] + 0.1 * A[:2]
            given = [Z.to(dtype) for Z in (B, A, B_ref, A_ref)]
            for side in SIDES:
                ends = _ends(given, side)
                polar = remembered(*ends)
                for special, blend in ((True, 1.0), (False, 1.0), (True, 0.5)):
                    yield _align_call(given, ends, polar, side, special, blend)


def _ends(given: Sequence[Tensor], side: Any) -> tuple[Tensor, Tensor]:
    """Source and target (N, rows, r) of the rotation that a side stands for, in float64."""
    B, A, B_ref, A_ref = (Z.double() for Z in given)
    alpha, beta = {"A": (1.0, 0.0), "B": (0.0, 1.0)}[side] if isinstance(side, str) else side
    source, target = (
        torch.cat([alpha**0.5 * right.mT] * bool(alpha) + [beta**0.5 * left] * bool(beta), 1)
        for left, right in ((B, A), (B_ref, A_ref))
    )
    return source, target


def _align_call(
    given: Sequence[Tensor], ends: tuple[Tensor, Tensor], polar: Polar, side: Any, special: bool, blend: float
) -> Call:
    B, A = given[:2]
    N, m, r = B.shape
    n = A.shape[2]
    variant = f"side {side}, {'SO' if special else 'O'}" + (f", blend {blend:g}" if blend < 1 else "")
    cases = tuple(
        f"{kind} {m} x {r} x {n}, {variant}" for kind in ("turned", "turned, small", "stranger", "stranger, small")
    )

    def run(backend: str, device: torch.device) -> Any:
        moved = [to_device(Z, device) for Z in given]
        result = linalg.align_factors(
            moved[0],
            moved[1],
            (moved[2], moved[3]),
            side=side,
            special=special,
            blend=blend,
            backend=backend,
            check=False,
        )
        return to_device(result, torch.device("cpu"))

    def judge(_: str, result: Any) -> Iterable[Verdict]:
        left, right, rotation = result
        for i, case in enumerate(cases):
            here, exact = row_of(rotation, i), functools.partial(polar, i, special)
            checks = check_rotation(ends[0][i], ends[1][i], here, special=special, blend=blend, polar=exact)
            rotated = check_rotated(B[i], A[i], here.Q, left[i], right[i])
            yield Verdict(case, _worst_of_each([*checks, *rotated]), variant=variant)

    sizes = {"m": m, "r": r, "n": n, "N": N}
    return Call("align_factors", size_class("r", r, BOUNDS), B.dtype, sizes, cases, run, judge)


def _worst_of_each(checks: list[Any]) -> list[Any]:
    found: dict[str, Any] = {}
    for check in checks:
        if check.name not in found or check.value > found[check.name].value:
            found[check.name] = check
    return list(found.values())
