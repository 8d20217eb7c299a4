"""Orthogonal Procrustes by a float64 SVD, one matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Info, Note, RawRotation
from fedlora_kernels.backends.reference.powers import exponent_of, times_power

__all__ = ["align_factors", "procrustes_rotation", "rotate_factors"]

SINGULAR_BLEND = 1e-6


def procrustes_rotation(
    source: Sequence[Tensor], target: Sequence[Tensor], special: bool, blend: float
) -> list[RawRotation]:
    """Rotation of every source onto its target (docs/numerics.md, Procrustes)."""
    return [
        _stack_rotations([_rotation([(x, y, 1.0)], special, blend) for x, y in zip(X, Y, strict=True)], X)
        for X, Y in zip(source, target, strict=True)
    ]


def rotate_factors(B: Sequence[Tensor], A: Sequence[Tensor], Q: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """``(B Q, Q^T A)`` in float64, cast to the dtypes of B and A; bit for bit B and A where Q is the identity."""
    out = []
    for group_B, group_A, group_Q in zip(B, A, Q, strict=True):
        left, right = group_B.clone(), group_A.clone()
        for i, q in enumerate(group_Q):
            # multiplying by the identity would turn -0 into +0
            if not torch.equal(q, torch.eye(q.shape[0], dtype=q.dtype, device=q.device)):
                left[i] = group_B[i].double() @ q
                right[i] = q.T @ group_A[i].double()
        out.append((left, right))
    return out


def align_factors(
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    reference_B: Sequence[Tensor] | None,
    reference_A: Sequence[Tensor] | None,
    side: tuple[float, float],
    special: bool,
    blend: float,
) -> list[tuple[Tensor, Tensor, RawRotation]]:
    """Every pair rotated towards its reference; a non-finite pair or reference gives NaN in the whole pair."""
    out = []
    for g, (group_B, group_A) in enumerate(zip(B, A, strict=True)):
        rotations = []
        for i in range(group_B.shape[0]):
            terms = []
            if reference_A is not None and side[0] != 0:
                terms.append((group_A[i].T, reference_A[g][i].T, side[0]))
            if reference_B is not None and side[1] != 0:
                terms.append((group_B[i], reference_B[g][i], side[1]))
            rotations.append(_rotation(terms, special, blend, also=(group_B[i], group_A[i])))
        rotation = _stack_rotations(rotations, group_B)
        ((left, right),) = rotate_factors([group_B], [group_A], [rotation.Q])
        for i in range(group_B.shape[0]):
            if rotation.info[i] & Info.NONFINITE:
                left[i] = torch.nan
                right[i] = torch.nan
            elif not (torch.isfinite(left[i]).all() and torch.isfinite(right[i]).all()):
                rotation.info[i] |= Info.OVERFLOW
        out.append((left, right, rotation))
    return out


@dataclass
class _Rotation:
    Q: Tensor
    singular_values: Tensor
    unique: bool
    condition: float
    info: int = 0
    notes: int = 0


def _stack_rotations(rotations: list[_Rotation], like: Tensor) -> RawRotation:
    r, device = like.shape[-1], like.device
    Q = torch.zeros(len(rotations), r, r, dtype=torch.float64, device=device)
    values = torch.zeros(len(rotations), r, dtype=torch.float64, device=device)
    for i, rotation in enumerate(rotations):
        Q[i] = rotation.Q
        values[i] = rotation.singular_values
    unique = torch.tensor([each.unique for each in rotations], dtype=torch.bool, device=device)
    condition = torch.tensor([each.condition for each in rotations], dtype=torch.float64, device=device)
    info = torch.tensor([each.info for each in rotations], dtype=torch.int32, device=device)
    notes = torch.tensor([each.notes for each in rotations], dtype=torch.int32, device=device)
    return RawRotation(Q, values, unique, condition, info, notes)


def _rotation(
    terms: list[tuple[Tensor, Tensor, float]], special: bool, blend: float, also: tuple[Tensor, ...] = ()
) -> _Rotation:
    """Rotation for ``M = sum weight X^T Y`` over the terms; ``also`` must be finite too."""
    r = terms[0][0].shape[-1]
    one = torch.eye(r, dtype=torch.float64, device=terms[0][0].device)
    if not all(torch.isfinite(x).all() for x in (*also, *(t for term in terms for t in term[:2]))):
        nan = torch.full_like(one, torch.nan)
        return _Rotation(nan, nan[:, 0], False, math.nan, int(Info.NONFINITE))
    if r == 0:
        return _Rotation(one, one.new_zeros(0), True, 0.0)
    M, size, exponent = _correlation(terms)
    U, s, Vh = torch.linalg.svd(M)
    threshold = 8 * r * U64 * size
    reflected = special and bool(torch.linalg.det(U @ Vh) < 0)
    Q = _polar(M, threshold, special)
    if blend == 0:
        Q = one
    elif blend < 1:
        Q = _polar((1 - blend) * one + blend * Q, SINGULAR_BLEND, special)
    singular_values = times_power(s, exponent)
    unit_in = max(torch.finfo(t.dtype).eps / 2 for term in terms for t in term[:2])
    unique, gap = _gap(s, threshold, special, reflected)
    return _Rotation(
        Q,
        singular_values,
        unique,
        2 * size / gap if gap else math.inf,
        0 if torch.isfinite(singular_values).all() else int(Info.OVERFLOW),
        int(Note.ILL_CONDITIONED) if gap <= 16 * unit_in * size else 0,
    )


def _correlation(terms: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, float, Tensor]:
    """M with its largest element in [1/2, 1), the size ``sum |weight| |X|_F |Y|_F`` on that scale, and the exponent taken out."""
    scaled = []
    for source, target, weight in terms:
        (X, e_X), (Y, e_Y) = _scaled(source), _scaled(target)
        size = abs(weight) * torch.linalg.vector_norm(X) * torch.linalg.vector_norm(Y)
        scaled.append((weight * (X.T @ Y), size, e_X + e_Y))
    exponents = [e for _, size, e in scaled if size > 0]
    largest = max(exponents) if exponents else torch.zeros_like(scaled[0][2])
    M, size = torch.zeros_like(scaled[0][0]), torch.zeros_like(scaled[0][1])
    for term, term_size, e in scaled:
        if term_size > 0:
            shift = (e - largest).clamp(min=-2000)
            M += times_power(term, shift)
            size += times_power(term_size, shift)
    e_M = exponent_of(M.abs().max())
    return times_power(M, -e_M), float(times_power(size, -e_M)), largest + e_M


def _scaled(X: Tensor) -> tuple[Tensor, Tensor]:
    exponent = exponent_of(X.double().abs().max() if X.numel() else X.sum())
    return times_power(X.double(), -exponent), exponent


def _polar(M: Tensor, threshold: float, special: bool) -> Tensor:
    """Orthogonal factor of M; where singular values count as zero, the solution closest to the identity."""
    U, s, Vh = torch.linalg.svd(M)
    k = int((s > threshold).sum())
    if k == 0:
        return torch.eye(len(s), dtype=s.dtype, device=s.device)
    values = torch.where(s > threshold, s, 0.0)
    if k == len(s):
        if special and torch.linalg.det(U @ Vh) < 0:
            U[:, -1] = -U[:, -1]
            values[-1] = -values[-1]
        Q = U @ Vh
    else:
        Q = _completed(U, Vh, k, special)
    return _orthonormalised(_refined(Q, M, values, Vh))


def _completed(U: Tensor, Vh: Tensor, k: int, special: bool) -> Tensor:
    U1, U2, V1h, V2h = U[:, :k], U[:, k:], Vh[:k], Vh[k:]
    P, _, Rh = torch.linalg.svd(U2.T @ V2h.T)
    Q: Tensor = U1 @ V1h + U2 @ P @ Rh @ V2h
    if special and torch.linalg.det(Q) < 0:
        P[:, -1] = -P[:, -1]
        Q = U1 @ V1h + U2 @ P @ Rh @ V2h
    return Q


def _refined(Q: Tensor, M: Tensor, values: Tensor, Vh: Tensor) -> Tensor:
    """One Newton step towards a symmetric ``H = Q^T M``, whose eigenvalues and eigenvectors are ``values`` and V."""
    # LAPACK's bidiagonal QR stops at 90 units of rounding; with Q (I + W), W skew, solve H - H^T = W H + H W
    H = Q.T @ M
    K = Vh @ (H - H.T) @ Vh.T
    D = values[:, None] + values
    W = Vh.T @ torch.where(K.abs() < 1e-4 * D, K / D, 0.0) @ Vh
    return Q + Q @ ((W - W.T) / 2)


def _orthonormalised(Q: Tensor) -> Tensor:
    # Newton-Schulz: LAPACK's singular vectors miss orthogonality by a multiple of u that grows with r, and the refinement by the
    # square of its step, which one step leaves visible where singular values are small
    one = torch.eye(Q.shape[0], dtype=Q.dtype, device=Q.device)
    for _ in range(2):
        Q = Q @ (1.5 * one - 0.5 * Q.T @ Q)
    return Q


def _gap(s: Tensor, threshold: float, special: bool, reflected: bool) -> tuple[bool, float]:
    """Whether the rotation is unique, and the gap that divides perturbations of M. SO(1) has one element, O(1) a sign."""
    values = s.tolist()
    r, k = len(values), sum(value > threshold for value in values)
    if special and r == 1:
        return True, math.inf
    last, before = values[-1], values[-2] if r > 1 else values[-1]
    if not special:
        return k == r, before + last
    if reflected and k == r:
        return before - last > threshold, before - last
    return k >= r - 1, before + last
