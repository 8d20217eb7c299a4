"""Orthogonal Procrustes by batched float64 SVD, and the rotations it asks for (docs/numerics.md, Procrustes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Info, Note, RawRotation
from fedlora_kernels.backends.torch.chunks import exponent, load, scale_pow2, slices
from fedlora_kernels.backends.torch.svd import svd

__all__ = ["align_factors", "procrustes_rotation", "rotate_factors"]


class _Cross(NamedTuple):
    """``X^T Y 2^-e`` (N, r, r) and ``|X|_F |Y|_F 2^-e`` (N,), float64; e (N,) int64; whether X and Y are finite (N,)."""

    M: Tensor
    size: Tensor
    exponent: Tensor
    finite: Tensor


SINGULAR_BLEND = 1e-6
"""Singular values of a blend that count as zero: eigenvalues -1 met halfway."""

_TILE = 1 << 20
"""Bytes of float64 copies at a time: they stay in the cache, which halves the time of small ranks."""


def procrustes_rotation(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    special: bool,
    blend: float,
) -> list[RawRotation]:
    """Rotation of every source onto its target; see `Backend.procrustes_rotation`. Groups of one rank are decomposed together."""
    products = [_cross_product(X, Y) for X, Y in zip(source, target, strict=True)]
    kinds = [(product.M.shape[-1], _unit(X, Y)) for product, X, Y in zip(products, source, target, strict=True)]
    out: dict[int, RawRotation] = {}
    for kind in dict.fromkeys(kinds):
        members = [g for g, own in enumerate(kinds) if own == kind]
        whole = _Cross(*(torch.cat(fields) for fields in zip(*(products[g] for g in members), strict=True)))
        rotation = _rotation([(whole, 1.0)], whole.finite, kind[1], special, blend)
        counts = [len(products[g].M) for g in members]
        pieces = zip(*(torch.split(field, counts) for field in rotation), strict=True)
        out.update(zip(members, map(RawRotation._make, pieces), strict=True))
    return [out[g] for g in range(len(products))]


def rotate_factors(B: Sequence[Tensor], A: Sequence[Tensor], Q: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """``(B Q, Q^T A)``, bit for bit B and A where Q is the identity; see `Backend.rotate_factors`."""
    return [(_rotated(b, q), _rotated(a.mT, q).mT) for b, a, q in zip(B, A, Q, strict=True)]


def align_factors(
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    reference_B: Sequence[Tensor] | None,
    reference_A: Sequence[Tensor] | None,
    side: tuple[float, float],
    special: bool,
    blend: float,
) -> list[tuple[Tensor, Tensor, RawRotation]]:
    """Every pair rotated towards its reference; see `Backend.align_factors`. Trouble in either factor marks the pair."""
    out = []
    for g, (b, a) in enumerate(zip(B, A, strict=True)):
        terms = []
        if reference_A is not None and side[0] != 0:
            terms.append((a.mT, reference_A[g].mT, side[0]))
        if reference_B is not None and side[1] != 0:
            terms.append((b, reference_B[g], side[1]))
        sources, targets, weights = zip(*terms, strict=True)
        products = list(map(_cross_product, sources, targets))
        finite = _finite(b) & _finite(a)
        for product in products:
            finite = finite & product.finite
        unit = max(map(_unit, sources, targets))
        rotation = _rotation(list(zip(products, weights, strict=True)), finite, unit, special, blend)
        left, right = _rotated(b, rotation.Q), _rotated(a.mT, rotation.Q).mT
        for factor in (left, right):
            factor.masked_fill_(~finite[:, None, None], torch.nan)
        overflow = finite & ~(_finite(left) & _finite(right))
        rotation.info.bitwise_or_((Info.OVERFLOW * overflow).to(torch.int32))
        out.append((left, right, rotation))
    return out


def _unit(X: Tensor, Y: Tensor) -> float:
    """The larger unit roundoff of two inputs."""
    return max(torch.finfo(x.dtype).eps / 2 for x in (X, Y))


def _rotation(
    terms: list[tuple[_Cross, float]], finite: Tensor, unit: float, special: bool, blend: float
) -> RawRotation:
    """Rotation for the weighted sum of products ``terms``; ``unit`` is the unit roundoff of what they were made of."""
    N, r, _ = terms[0][0].M.shape
    M, size, e = _correlation(terms, finite)
    U, s, Vh, info = svd(M)
    threshold = 8 * r * U64 * size
    reflected = torch.linalg.det(U @ Vh) < 0
    one = torch.eye(r, dtype=torch.float64, device=M.device).expand(N, r, r)
    if blend == 0:
        Q = one.clone()
    else:
        Q = _polar(M, (U, s, Vh), threshold, reflected & special, special)
        if blend < 1:
            mixed = (1 - blend) * one + blend * Q
            U_t, s_t, Vh_t, info_t = svd(mixed)
            info = info | info_t
            singular = torch.full_like(threshold, SINGULAR_BLEND)
            # no flip: without singular values that count as zero a blend of rotations has det +1
            Q = _polar(mixed, (U_t, s_t, Vh_t), singular, torch.zeros_like(reflected), special)
    unique, gap = _gap(s, threshold, reflected & special, special)
    singular_values = scale_pow2(s, e[:, None])
    condition = torch.where(gap > 0, 2 * size / gap, torch.inf)
    info = info | Info.NONFINITE * ~finite | Info.OVERFLOW * ~torch.isfinite(singular_values).all(-1)
    notes = Note.ILL_CONDITIONED * (finite & (gap <= 16 * unit * size))
    return RawRotation(
        torch.where(finite[:, None, None], Q, torch.nan),
        torch.where(finite[:, None], singular_values, torch.nan),
        unique & finite,
        torch.where(finite, condition, torch.nan),
        info.to(torch.int32),
        notes.to(torch.int32),
    )


def _correlation(terms: list[tuple[_Cross, float]], finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M with its largest element in [1, 2), ``sum |weight| |X|_F |Y|_F`` on that scale, and the exponent taken out.

    Taking the exponents out makes the rotation independent of powers of two to the bit, and keeps float64 in range.
    Matrices that are not finite get M = 0.
    """
    exponents = torch.stack([torch.where(finite & (part.size > 0), part.exponent, -5000) for part, _ in terms])
    e = exponents.amax(0)
    M, size = torch.zeros_like(terms[0][0].M), torch.zeros_like(terms[0][0].size)
    for (part, weight), part_e in zip(terms, exponents, strict=True):
        used = part_e > -5000
        shift = (part_e - e).clamp_min(-2000)
        M += torch.where(used[:, None, None], weight * scale_pow2(part.M, shift), 0.0)
        size += torch.where(used, abs(weight) * scale_pow2(part.size, shift), 0.0)
    e_M = exponent(M.abs().amax((-2, -1))) if M.shape[-1] else torch.zeros_like(e)
    e = torch.where(e > -5000, e, 0)
    return scale_pow2(M, -e_M), scale_pow2(size, -e_M), e + e_M


def _cross_product(source: Tensor, target: Tensor) -> _Cross:
    """The product of the matrices scaled to a largest element in [1, 2), and the exponent taken out."""
    N, rows, r = source.shape
    M = torch.zeros(N, r, r, dtype=torch.float64, device=source.device)
    squares = torch.zeros(2, N, dtype=torch.float64, device=M.device)
    largest_X, largest_Y = _largest(source), _largest(target)
    # within the powers of two that are numbers themselves: subnormal matrices stay below 1
    e_X, e_Y = (exponent(largest).clamp(-1022, 1022) for largest in (largest_X, largest_Y))
    for wave in slices(N, 16 * r * min(rows, 512), _TILE):
        X, Y = source[wave], target[wave]
        for part in slices(rows, 16 * r * X.shape[0], _TILE):
            x, y = load([X], part, e_X[wave, None]), load([Y], part, e_Y[wave, None])
            M[wave].baddbmm_(x.mT, y)
            squares[0, wave] += x.square().sum((-2, -1))
            squares[1, wave] += y.square().sum((-2, -1))
    finite = torch.isfinite(largest_X) & torch.isfinite(largest_Y)
    return _Cross(M, squares[0].sqrt() * squares[1].sqrt(), e_X + e_Y, finite)


def _polar(
    M: Tensor, decomposition: tuple[Tensor, Tensor, Tensor], threshold: Tensor, flip: Tensor, special: bool
) -> Tensor:
    """Orthogonal factors of M; where singular values count as zero, the solution closest to the identity."""
    U, s, Vh = decomposition
    r = s.shape[-1]
    one = torch.eye(r, dtype=s.dtype, device=s.device)
    last = torch.ones_like(s)
    if r:
        last[:, -1] = torch.where(flip, -1.0, 1.0)
    Q = (U * last[:, None, :]) @ Vh
    k = (s > threshold[:, None]).sum(-1)
    for i in torch.nonzero((k > 0) & (k < r)).flatten().tolist():
        Q[i] = _completed(U[i], Vh[i], int(k[i]), special)
    Q = _refined(Q, M, torch.where(s > threshold[:, None], s * last, 0.0), Vh)
    # Newton-Schulz: LAPACK's singular vectors miss orthogonality by a multiple of u that grows with r, and the refinement by the
    # square of its step, which one step leaves visible where singular values are small
    for _ in range(2):
        Q = Q @ (1.5 * one - 0.5 * Q.mT @ Q)
    return torch.where((k == 0)[:, None, None], one, Q)


def _refined(Q: Tensor, M: Tensor, values: Tensor, Vh: Tensor) -> Tensor:
    """One Newton step towards a symmetric ``H = Q^T M = V diag(values) V^T``.

    LAPACK's bidiagonal QR stops at 90 units of rounding, whatever the size, and leaves H that far from symmetric. With
    ``Q (I + W)``, W skew, ``H - H^T = W H + H W`` is solved in the basis V; what is not small there is not touched.
    """
    H = Q.mT @ M
    K = Vh @ (H - H.mT) @ Vh.mT
    D = values[:, :, None] + values[:, None, :]
    W = Vh.mT @ torch.where(K.abs() < 1e-4 * D, K / D, 0.0) @ Vh
    return Q + Q @ ((W - W.mT) / 2)


def _completed(U: Tensor, Vh: Tensor, k: int, special: bool) -> Tensor:
    U1, U2, V1h, V2h = U[:, :k], U[:, k:], Vh[:k], Vh[k:]
    P, _, Rh = torch.linalg.svd(U2.mT @ V2h.mT)
    Q: Tensor = U1 @ V1h + U2 @ P @ Rh @ V2h
    if special and torch.linalg.det(Q) < 0:
        P[:, -1] = -P[:, -1]
        Q = U1 @ V1h + U2 @ P @ Rh @ V2h
    return Q


def _gap(s: Tensor, threshold: Tensor, reflected: Tensor, special: bool) -> tuple[Tensor, Tensor]:
    """Whether each rotation is unique, and the gap that divides perturbations of M. SO(1) has one element, O(1) a sign."""
    r = s.shape[-1]
    if r == 0 or (special and r == 1):
        return torch.ones_like(reflected), torch.full_like(threshold, torch.inf)
    k = (s > threshold[:, None]).sum(-1)
    last, before = s[:, -1], s[:, max(r - 2, 0)]
    if not special:
        return k == r, before + last
    reflected = reflected & (k == r)
    return (k >= r - 1) & ~(reflected & (before - last <= threshold)), before + torch.where(reflected, -last, last)


def _largest(X: Tensor) -> Tensor:
    """Largest magnitude of each matrix, float64; NaN if it holds one."""
    if not X.numel():
        return torch.zeros(X.shape[0], dtype=torch.float64, device=X.device)
    # 50 times faster than the infinity norm of torch.linalg
    return torch.maximum(X.amax((-2, -1)), -X.amin((-2, -1))).double()


def _finite(X: Tensor) -> Tensor:
    return torch.isfinite(_largest(X))


def _rotated(X: Tensor, Q: Tensor) -> Tensor:
    """``X Q`` in the dtype of X (N, rows, r), laid out in memory as X is; X itself, copied, where Q is the identity."""
    N, rows, r = X.shape
    # float64 also keeps a caller's TF32 setting out of float32 factors
    wide = torch.float64 if X.dtype in (torch.float32, torch.float64) else torch.float32
    by_columns = X.stride(-1) > X.stride(-2)
    shape = (N, r, rows) if by_columns else (N, rows, r)
    out = torch.empty(shape, dtype=X.dtype, device=X.device)
    out = out.mT if by_columns else out
    kept = (Q == torch.eye(r, dtype=Q.dtype, device=Q.device)).all(-1).all(-1)[:, None, None]
    for wave in slices(N, 16 * r * min(rows, 512), _TILE):
        q, still = Q[wave].to(wide), kept[wave]
        for part in slices(rows, 16 * r * q.shape[0], _TILE):
            x = X[wave, part]
            # multiplying by the identity would turn -0 into +0
            out[wave, part] = torch.where(still, x, (x.to(wide) @ q).to(x.dtype))
    return out
