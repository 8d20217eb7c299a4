"""The eight checks of a truncated SVD against the exact one (docs/numerics.md, Limits that tests hold)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Note, RuleCode, RuleSpec
from fedlora_kernels.testing.exact import Exact
from fedlora_kernels.testing.tolerances import U64, tolerance

__all__ = ["Check", "check_product"]


class Check(NamedTuple):
    """One metric: passes while ``value <= limit``; a NaN does not pass."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.limit


class _Given(NamedTuple):
    """One result in float64: orthonormal U, S and V as read from left and right, and what the certificate says."""

    U: Tensor
    S: Tensor
    V: Tensor
    p: int
    norm: float
    passes: int
    energy: float
    energy_abs: float
    energy_ratio: float
    dtype: torch.dtype
    dense: bool
    underflow: float
    core: float


def check_product(
    result: Any, exact: Exact, rule: RuleSpec, output: str, width: int, *, lapack: bool = False
) -> list[Check]:
    """Metrics P1 to P8 of one result (a `RawProduct` or `ProductSVD` without batch dimensions), in that order.

    ``width`` is the stacked rank R, ``lapack`` says that the core SVD was a library's, whose residual is larger than ours.
    Metrics that have no meaning for the result, such as an angle without a gap, are left out.
    """
    given = _given(result, output, width if lapack else 0)
    checks = [_structure(result, given)]
    if given.p and exact.energy > 0:
        checks += _values(given, exact) + _vectors(given, exact)
    if exact.energy > 0:
        checks += _rank(given, exact, rule, width)
    return sorted(checks)


def _given(result: Any, output: str, lapack: int) -> _Given:
    p = int(result.rank)
    S = result.S[:p].double()
    left = {"usv": torch.ones_like(S), "left": S, "balanced": S.sqrt()}[output]
    right = {"usv": torch.ones_like(S), "left": torch.ones_like(S), "balanced": S.sqrt()}[output]
    certificate = getattr(result, "certificate", result)
    energy, energy_abs = float(result.energy), float(certificate.energy_abs)
    dense = bool(int(result.notes) & Note.DENSE)
    norm = float(certificate.rho) * float(S[-1]) if p else 0.0
    return _Given(
        U=result.left[:, :p].double() / left,
        S=S,
        V=result.right[:p].double().mT / right,
        p=p,
        # The dense route rounds when it forms the update, which costs as much as that sum is large.
        norm=max(norm, math.sqrt(energy_abs)) if dense else norm,
        passes=int(certificate.passes),
        energy=energy,
        energy_abs=energy_abs,
        energy_ratio=energy_abs / energy if energy else math.inf,
        dtype=result.left.dtype,
        dense=dense,
        underflow=_underflow(result, left, right) if p else 0.0,
        core=tolerance("lapack", size=lapack) if lapack and result.left.dtype == torch.float64 else 0.0,
    )


def _underflow(result: Any, left: Tensor, right: Tensor) -> float:
    """Relative error that a column suffers where its elements are subnormal in the output type."""
    smallest = torch.finfo(result.left.dtype).smallest_normal * torch.finfo(result.left.dtype).eps / 2
    losses = (
        math.sqrt(X.numel() / len(X)) * smallest / float(scale.min())
        for X, scale in ((result.left.mT, left), (result.right, right))
    )
    return max(losses)


def _values(given: _Given, exact: Exact) -> list[Check]:
    """P1 and P7: singular values and energy. P1 is the worst error in units of its own limit."""
    s = exact.s[: given.p]
    errors = ((given.S - s).abs() / s).tolist()
    limits = [tolerance("P1", rho=given.norm / x, passes=given.passes) for x in s.tolist()]
    if given.dense:
        limits = [limit + 64 * U64 for limit in limits]
    rho_1 = given.norm / float(s[0])
    energy = abs(given.energy - exact.energy) / exact.energy
    return [
        Check("P1", max(error / limit for error, limit in zip(errors, limits, strict=True)), 1.0),
        Check("P7", energy, tolerance("P7", rho=rho_1, passes=given.passes, energy_ratio=given.energy_ratio)),
    ]


def _vectors(given: _Given, exact: Exact) -> list[Check]:
    """P2, P3, P4 and P6: orthogonality, residuals, truncation error and subspaces."""
    U, S, V, W, p = given.U, given.S, given.V, exact.W, given.p
    rho_1, rho_p, size = given.norm / float(exact.s[0]), given.norm / float(S[-1]), math.sqrt(exact.energy)
    # One pass makes each side from the other side's vector, divided by the singular value, and so with the core's residual.
    apart = rho_p / rho_1 if given.passes == 1 and not given.dense else 1.0
    eye = torch.eye(p, dtype=torch.float64)
    orthogonality = max(float((X.mT @ X - eye).abs().max()) for X in (U, V))
    residual = max(float((W @ V - U * S).norm()), float((W.mT @ U - V * S).norm())) / size
    tail = float((exact.s[p:] ** 2).sum())
    excess = (float((W - U * S @ V.mT).norm()) ** 2 - tail) / exact.energy
    limit = partial(tolerance, dtype=given.dtype, passes=given.passes, underflow=given.underflow)
    checks = [
        Check("P2", orthogonality, limit("P2", rho=rho_p) + 64 * U64 * given.dense),
        Check("P3", residual, limit("P3", rho=rho_1 * rho_p if given.passes == 1 else rho_1) + given.core * apart),
        Check("P4", excess, limit("P4", energy_ratio=given.energy_ratio)),
    ]
    s_1, s_p = float(exact.s[0]), float(exact.s[p - 1])
    gap = s_p - (float(exact.s[p]) if p < len(exact.s) else 0.0)
    if gap >= 1e-4 * s_1:
        angle = max(_sine(U, exact.U[:, :p]), _sine(V, exact.V[:, :p]))
        checks.append(Check("P6", angle, (limit("P6", rho=rho_1) + given.core) * s_1 / gap))
    return checks


def _sine(X: Tensor, exact: Tensor) -> float:
    """Largest sine of the angles from span(X) to span(exact), both with orthonormal columns."""
    return float(torch.linalg.matrix_norm(X - exact @ (exact.mT @ X), 2))


def _rank(given: _Given, exact: Exact, rule: RuleSpec, width: int) -> list[Check]:
    """P5: the rank of the exact spectrum, unless a threshold is so near that rounding decides."""
    s = exact.s
    root = math.sqrt(width) if given.dense else width
    if not given.p:
        # Balanced columns and rows have norms within a factor 3: |B||A| <= 3 sum |b_j||a_j| <= 3 sqrt(R Eabs).
        floor = 4 * root * U64 * 3 * math.sqrt(width * given.energy_abs)
        lost = rule.code != RuleCode.ABSOLUTE and float(s[0]) > 100 * floor
        return [Check("P5", 1, 0)] if lost else []
    floor = 4 * root * U64 * given.norm
    if ((s > floor / 100) & (s < floor * 100)).any():
        return []
    numerical = int((s > floor).sum())
    wanted = numerical
    if rule.code == RuleCode.RANK:
        wanted = int(rule.value)
    elif rule.code == RuleCode.ENERGY and rule.value < 1:
        reached = (s * s).cumsum(0) / exact.energy
        rho_1 = given.norm / float(s[0])
        near = tolerance("P5", rho=rho_1, passes=given.passes, energy_ratio=given.energy_ratio)
        if ((reached - rule.value).abs() <= near).any():
            return []
        wanted = int((reached < rule.value).sum()) + 1
    elif rule.code not in (RuleCode.ENERGY, RuleCode.RANK):
        return []
    wanted = min(wanted, numerical, rule.cap or wanted)
    return [Check("P5", abs(given.p - wanted), 0)]


def _structure(result: Any, given: _Given) -> Check:
    """P8: order, sign, padding and codes; the value counts the violations."""
    p, S, left = given.p, result.S, result.left.double()
    largest = given.U.abs().amax(0) if given.U.numel() else torch.zeros(0, dtype=torch.float64)
    first = (
        (given.U.abs() >= (1 - 2.0**-20) * largest).to(torch.uint8).argmax(0)
        if p
        else torch.zeros(0, dtype=torch.int64)
    )
    # A narrow output merges near ties, and which of them came first is no longer to be seen.
    tied = (given.U.abs() >= largest * (1 - 4 * torch.finfo(given.dtype).eps)).sum(0) > 1
    wrong = [
        bool((S[:-1] < S[1:]).any()),
        not bool(torch.isfinite(S).all() and torch.isfinite(left).all()),
        bool((S[:p] <= 0).any()) or bool((S[p:] != 0).any()),
        bool((left[:, p:] != 0).any()) or bool((result.right[p:] != 0).any()),
        bool(((given.U.gather(0, first[None, :])[0] < 0) & ~tied).any()) if p else False,
        bool(int(result.info)),
    ]
    return Check("P8", float(sum(wrong)), 0.0)
