"""Truncated SVD of a sum of products by Householder QR of the factors, one matrix at a time (docs/numerics.md, Second pass).

The oracle: no Gram decides anything, only the bounds that make up floor and certificate are read from Grams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Factors, Info, Note, RawProduct, RuleCode, RuleSpec
from fedlora_kernels.backends.reference.powers import exponent_of, times_power
from fedlora_kernels.backends.reference.svd import signs_of
from fedlora_kernels.backends.reference.threshold import rank_of

__all__ = ["product_svd"]

LOW_ACCURACY = 1e-6
_POWERS = {"usv": (0.0, 0.0), "left": (1.0, 0.0), "balanced": (0.5, 0.5)}


def product_svd(groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype) -> list[RawProduct]:
    """Truncated SVD of each ``sum_k w_k B_k A_k``; see `Backend.product_svd`."""
    return [_group(group, rule, output, dtype) for group in groups]


def _group(group: Factors, rule: RuleSpec, output: str, dtype: torch.dtype) -> RawProduct:
    raw = _zeros(group, dtype)
    if not (group.m and group.n and group.width):
        raw.notes.fill_(Note.ZERO)
        return raw
    for i in range(group.batch):
        here = RawProduct(*(field[i] for field in raw))
        B = torch.cat([block[i].double() for block in group.B], 1)
        A = torch.cat([block[i].double() for block in group.A], 0)
        if torch.isfinite(B).all() and torch.isfinite(A).all():
            om = torch.cat([w.expand(block.shape[-1]) for w, block in zip(group.weights[i], group.B, strict=True)])
            try:
                found = _decomposed(B, om, A)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                here.info.fill_(Info.NOT_CONVERGED)
            else:
                _write(found, rule, output, here)
        else:
            _mark_nonfinite(here)
    return raw


def _zeros(group: Factors, dtype: torch.dtype) -> RawProduct:
    N, p = group.batch, group.p_max
    shapes = {"left": (N, group.m, p), "S": (N, p), "right": (N, p, group.n)}
    dtypes = {"left": dtype, "right": dtype, "rank": torch.int64, "numerical_rank": torch.int64}
    dtypes |= dict.fromkeys(("passes", "info", "notes"), torch.int32)
    fields = RawProduct._fields
    raw = RawProduct(*(torch.zeros(shapes.get(f, (N,)), dtype=dtypes.get(f, torch.float64)) for f in fields))
    for field, value in ((raw.rho, math.inf), (raw.sigma_err, math.inf), (raw.passes, 2)):
        field.fill_(value)
    return raw


def _mark_nonfinite(raw: RawProduct) -> None:
    for field in raw:
        field.fill_(math.nan if field.dtype.is_floating_point else 0)
    raw.info.fill_(Info.NONFINITE)


@dataclass(frozen=True)
class _Decomposition:
    """``W = 2^e U diag(s) V^T``; the numbers are those of ``2^-e W``.

    ``norm`` bounds the product of the factor norms; ``formed`` what the dense route rounded, 0 elsewhere; ``width`` is the
    number of stacked columns.
    """

    U: Tensor
    s: Tensor
    V: Tensor
    energy: float
    energy_abs: float
    floor: Tensor
    norm: float
    formed: float
    e: Tensor
    width: int
    is_dense: bool = False


def _decomposed(B: Tensor, om: Tensor, A: Tensor) -> _Decomposition:
    """SVD of ``B diag(om) A``, every column of B and row of A brought into range by exact powers of two."""
    e_B, e_A = exponent_of(B.abs().amax(0)) - 1, exponent_of(A.abs().amax(1)) - 1
    om = torch.where(B.any(0) & A.any(1), om, 0.0)
    e_update = (e_B + e_A + exponent_of(om) - 1)[om != 0]
    e = e_update.max() if e_update.numel() else torch.tensor(0)
    e = e + e % 2  # an even exponent has an exact square root, which the output "balanced" needs
    B, A, om = times_power(B, -e_B), times_power(A, -e_A[:, None]), times_power(om, e_B + e_A - e)
    route = _dense if B.shape[1] >= 2 * min(B.shape[0], A.shape[1]) else _factored
    return route(B, om[:, None] * A, e)


def _factored(B: Tensor, A: Tensor, e: Tensor) -> _Decomposition:
    live = B.any(0) & A.any(1)
    d = times_power(torch.ones(len(live), dtype=torch.float64), _balance(B, A))
    B, A = (B * d)[:, live], (A / d[:, None])[live]
    G_B, G_A = B.mT @ B, A @ A.mT
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    C = R_B @ R_A.mT
    U, s, Vh = torch.linalg.svd(C, full_matrices=False)
    norm = math.sqrt(_norm_bound(G_B) * _norm_bound(G_A))
    return _Decomposition(
        U=Q_B @ U,
        s=s,
        V=Q_A @ Vh.mT,
        energy=float((C * C).sum()),
        energy_abs=float((G_B * G_A).abs().sum()),
        floor=torch.tensor(4 * int(live.sum()) * U64 * norm, dtype=torch.float64),
        norm=norm,
        formed=0.0,
        e=e,
        width=len(live),
    )


def _balance(B: Tensor, A: Tensor) -> Tensor:
    """Exponents of the powers of two that bring column j of B and row j of A to nearly equal norm."""
    e_B, e_A = exponent_of((B * B).sum(0)), exponent_of((A * A).sum(1))
    return torch.div(e_A - e_B + 2, 4, rounding_mode="floor")  # rounded, ties up


def _dense(B: Tensor, A: Tensor, e: Tensor) -> _Decomposition:
    W = B @ A
    wide = W.shape[1] > W.shape[0]
    Q, R = torch.linalg.qr(W.mT if wide else W)
    U, s, Vh = torch.linalg.svd(R, full_matrices=False)
    U, V = Q @ U, Vh.mT
    formed = float((torch.linalg.vector_norm(B, dim=0) * torch.linalg.vector_norm(A, dim=1)).sum())
    return _Decomposition(
        U=V if wide else U,
        s=s,
        V=U if wide else V,
        energy=float((R * R).sum()),
        energy_abs=formed * formed,
        floor=torch.tensor(4 * math.sqrt(B.shape[1]) * U64 * formed, dtype=torch.float64),
        norm=math.sqrt(_norm_bound(R.mT @ R)),
        formed=formed,
        e=e,
        width=B.shape[1],
        is_dense=True,
    )


def _norm_bound(G: Tensor) -> float:
    """Upper bound of the 2-norm of a symmetric matrix."""
    return min(float(G.abs().sum(1).max()), float(torch.linalg.vector_norm(G))) if G.numel() else 0.0


def _write(found: _Decomposition, rule: RuleSpec, output: str, raw: RawProduct) -> None:
    true_s, s = times_power(found.s, found.e), found.s.tolist()
    if rule.code == RuleCode.ABSOLUTE:  # the only rule that knows a scale
        wanted = int(((true_s > rule.value) & (found.s > found.floor)).sum())
    else:
        wanted = rank_of(s, rule._replace(cap=0), found.energy, float(found.floor))
    p = min(wanted, rule.cap) if rule.cap else wanted

    left, right = _POWERS[output]
    U = times_power(found.U[:, :p] * found.s[:p] ** left, (found.e * left).long())
    V = times_power(found.V[:, :p] * found.s[:p] ** right, (found.e * right).long())
    signs = signs_of(U)
    raw.left[:, :p] = U * signs
    raw.right[:p] = (V * signs).mT
    raw.S[:p] = true_s[:p]
    _certify(found, s, p, raw)
    raw.energy.copy_(times_power(raw.energy, 2 * found.e))
    raw.energy_abs.copy_(times_power(raw.energy_abs, 2 * found.e))
    overflow = any(torch.isinf(x).any() for x in (raw.left, raw.S, raw.right))
    raw.info.fill_(Info.OVERFLOW if overflow else 0)
    raw.notes.fill_(_notes(found, p, wanted, raw))


def _certify(found: _Decomposition, s: list[float], p: int, raw: RawProduct) -> None:
    """Write the numbers of the certificate (docs/numerics.md, Floor and certificate)."""
    raw.rank.fill_(p)
    raw.numerical_rank.fill_(sum(x > found.floor for x in s))
    raw.energy.fill_(found.energy)
    raw.energy_abs.fill_(found.energy_abs)
    if p:
        rho = found.norm / s[p - 1]
        forming = 64 + 4 * found.formed / s[p - 1] if found.formed else 0.0
        raw.rho.fill_(rho)
        raw.sigma_err.fill_(U64 * (128 + 4 * rho + forming))
    if found.energy > 0:
        error = math.sqrt(sum(x * x for x in s[p:]) / found.energy)
        rho_1 = (found.formed or found.norm) / s[0]
        raw.error.fill_(error)
        raw.error_bound.fill_(math.sqrt(error * error + U64 * (256 + 16 * rho_1)))


def _notes(found: _Decomposition, p: int, wanted: int, raw: RawProduct) -> int:
    numerical = int(raw.numerical_rank)
    notes = Note.DENSE if found.is_dense else Note(0)
    if numerical == 0:
        notes |= Note.ZERO
    elif numerical < found.width:
        notes |= Note.RANK_DEFICIENT
    if p < wanted:
        notes |= Note.CAPPED
    if p and raw.sigma_err > LOW_ACCURACY:
        notes |= Note.LOW_ACCURACY
    return int(notes)
