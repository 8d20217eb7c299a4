"""What a Procrustes rotation and a rotated pair must meet (docs/numerics.md, Procrustes), judged in float64 and wider."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.testing.check import Check
from fedlora_kernels.testing.check_svd import shifted, unit_scaled
from fedlora_kernels.testing.exact import exact_polar, exact_skew
from fedlora_kernels.testing.tolerances import U64, roundoff, tolerance

__all__ = ["check_rotated", "check_rotation"]

EXACT_SIZE = 40
"""Up to this the rotation itself is compared with the polar factor in extended precision."""


def check_rotation(
    X: Tensor,
    Y: Tensor,
    result: Any,
    *,
    special: bool,
    blend: float = 1.0,
    polar: Callable[[], tuple[Tensor, bool]] | None = None,
) -> list[Check]:
    """Checks of one rotation of X onto Y, both (rows, r); ``result`` holds Q, singular_values, info without batch dimension.

    A blend is judged by orthogonality and determinant alone. ``polar`` may remember `exact_polar` of this pair.
    """
    (X, e_X), (Y, e_Y) = unit_scaled(X), unit_scaled(Y)
    Q, s = result.Q, shifted(result.singular_values, -(e_X + e_Y))
    r = Q.shape[-1]
    eye = torch.eye(r, dtype=torch.float64)
    wrong = int(result.info != 0) + int(not bool(torch.isfinite(Q).all() and torch.isfinite(s).all()))
    if wrong:
        return [Check("structure", float(wrong), 0.0)]
    wrong = int(bool((s[1:] > s[:-1]).any() or (s < 0).any())) + int(special and bool(torch.linalg.det(Q) < 0))
    skew = float((Q.mT @ Q - eye).abs().max()) if r else 0.0
    if skew > tolerance("rotation") / 4:  # what judges comes near the limit itself
        skew = exact_skew(Q)
    checks = [
        Check("structure", float(wrong), 0.0),
        Check("orthogonality", skew, tolerance("rotation")),
    ]
    M, data = X.mT @ Y, float(X.norm() * Y.norm())
    if not r:
        return checks
    # the singular values that LAPACK finds are themselves some units off; they scale with M, its forming with the data
    values = torch.linalg.svdvals(M)
    checks.append(Check("values", float((s - values).abs().max()), 64 * U64 * data + r * 2.0**-1070))
    if blend == 1:
        checks += _optimal(M, Q, s, data, special)
        checks += _nearest(Q, values, data, special, polar or partial(exact_polar, X, Y, special=special))
    return checks


def _optimal(M: Tensor, Q: Tensor, s: Tensor, data: float, special: bool) -> list[Check]:
    """``Q^T M`` symmetric, positive semidefinite (but for one direction of a forced determinant) and of the largest trace."""
    size, total, last = float(M.norm()), float(s.sum()), float(s[-1])
    # what the forming of M costs; where singular values count as zero, what they may have been
    threshold = 8 * len(s) * U64 * data
    noise = 4 * U64 * data if last > threshold else threshold
    reflected = special and bool(torch.linalg.slogdet(M).sign < 0)  # a determinant itself may underflow
    H = Q.mT @ M
    lowest = float(torch.linalg.eigvalsh((H + H.mT) / 2)[0])
    best = total - 2 * last * reflected
    return [
        Check("symmetry", float((H - H.mT).norm()), 64 * U64 * size + 2 * noise),
        Check("semidefinite", -lowest - last * reflected, 64 * U64 * size + noise),
        Check("optimality", best - float(H.trace()), 1e-12 * total + len(s) * noise),
    ]


def _nearest(Q: Tensor, s: Tensor, data: float, special: bool, polar: Callable[[], tuple[Tensor, bool]]) -> list[Check]:
    """Distance from the polar factor in extended precision, where that is well determined."""
    r = len(s)
    if r > EXACT_SIZE or float(s[-1]) <= 64 * r * U64 * data:
        return []
    exact, reflected = polar()
    before = float(s[-2]) if r > 1 else float(s[-1])
    gap = before - float(s[-1]) if reflected else before + float(s[-1])
    if (r == 1 and special) or gap <= 1e4 * U64 * data:
        return []
    limit = 64 * U64 * float(s.norm()) / gap + 8 * U64 * data / gap + tolerance("rotation")
    return [Check("distance", float((Q - exact).norm()), limit)]


def check_rotated(B: Tensor, A: Tensor, Q: Tensor, left: Tensor, right: Tensor) -> list[Check]:
    """Checks of one pair ``(left, right) = (B Q, Q^T A)``: B (m, r), A (r, n), Q (r, r) float64 orthogonal.

    ``product``: the update is kept, relative to the norms of its factors; ``factors``: each is the rotated one, rounded.
    """
    wrong = int(left.dtype != B.dtype) + int(right.dtype != A.dtype)
    pairs = [(left.double(), B.double() @ Q), (right.double(), Q.mT @ A.double())]
    size = float(B.double().norm() * A.double().norm())
    lost = float((pairs[0][0] @ pairs[1][0] - B.double() @ A.double()).norm())
    worst = max(roundoff(B.dtype), roundoff(A.dtype))
    factors = [Check("factors", _relative(found, exact), 4 * worst) for found, exact in pairs]
    return [
        Check("product", lost / size if size else lost, 8 * worst),
        max(factors, key=lambda check: check.value),
        Check("structure", float(wrong), 0.0),
    ]


def _relative(found: Tensor, exact: Tensor) -> float:
    size = float(exact.norm())
    gap = float((found - exact).norm())
    return gap / size if size else gap
