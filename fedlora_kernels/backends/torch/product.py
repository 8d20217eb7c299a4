"""Truncated SVD of a sum of low-rank products that is never formed (docs/numerics.md, One pass)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Factors, Info, Note, RawProduct, RuleSpec
from fedlora_kernels.backends.torch.backtransform import write_left, write_right
from fedlora_kernels.backends.torch.certificate import Certificate, Spectrum, certify, overlooked
from fedlora_kernels.backends.torch.cholesky import pivoted_cholesky
from fedlora_kernels.backends.torch.chunks import (
    WORKSPACE,
    column_exponents,
    exponent,
    finite,
    pow2,
    scale_pow2,
    slices,
)
from fedlora_kernels.backends.torch.gram import gram
from fedlora_kernels.backends.torch.householder import (
    QR,
    SVD,
    Decomposition,
    Problem,
    dense,
    orthogonalised,
    qr,
    row_bound,
)
from fedlora_kernels.backends.torch.svd import column_signs, svd

__all__ = ["POWERS", "Kernels", "load_problem", "product_svd", "second_pass"]

Powers = tuple[float, float]

_FAR_APART = 200
"""Exponents between weights whose squares, times squares of float32, might leave the range of float64."""

POWERS: dict[str, Powers] = {"usv": (0.0, 0.0), "left": (1.0, 0.0), "balanced": (0.5, 0.5)}
"""Powers of the singular values that the left and right factor carry."""


class Kernels(NamedTuple):
    """The steps that a backend may do its own way; each keeps the contract of the function that it stands for.

    ``alone``: one matrix at a time, so that library routines cannot know the batch.
    """

    gram: Callable[[Sequence[Tensor], Tensor | None], Tensor] = gram
    cholesky: Callable[[Tensor, Tensor], Tensor] = pivoted_cholesky
    svd: SVD = svd
    qr: QR = qr
    write_left: Callable[[Sequence[Tensor], Tensor | None, Tensor, Tensor], Tensor] = write_left
    write_right: Callable[[Sequence[Tensor], Tensor | None, Tensor, Tensor], None] = write_right
    alone: bool = False


_TORCH = Kernels()


def product_svd(
    groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype, *, kernels: Kernels = _TORCH
) -> list[RawProduct]:
    """Truncated SVD of each ``sum_k w_k B_k A_k``; see `Backend.product_svd`."""
    return [_product_svd(group, rule, output, dtype, kernels) for group in groups]


def _product_svd(group: Factors, rule: RuleSpec, output: str, dtype: torch.dtype, kernels: Kernels) -> RawProduct:
    device = group.B[0].device if group.B else torch.device("cpu")
    raw = _zeros(group, dtype, device)
    m, n, R = group.m, group.n, group.width
    if not (m and n and R):
        raw.notes.fill_(Note.ZERO)
        return raw
    is_dense = 2 * min(m, n) <= R
    bytes_each = WORKSPACE if kernels.alone else 1 if is_dense else 8 * 8 * R * R
    for part in slices(group.batch, bytes_each, WORKSPACE):
        stack, here = load_problem(group, part), _rows(raw, part)
        if is_dense:
            _dense_route(stack, rule, POWERS[output], here, kernels)
        else:
            _gram_route(stack, rule, POWERS[output], here, kernels)
    return raw


def _zeros(group: Factors, dtype: torch.dtype, device: torch.device) -> RawProduct:
    N, p = group.batch, group.p_max
    values = [torch.zeros(N, dtype=torch.float64, device=device) for _ in range(6)]
    counts = [torch.zeros(N, dtype=torch.int64, device=device) for _ in range(2)]
    codes = [torch.zeros(N, dtype=torch.int32, device=device) for _ in range(3)]
    energy, error, error_bound, rho, sigma_err, energy_abs = values
    return RawProduct(
        left=torch.zeros(N, group.m, p, dtype=dtype, device=device),
        S=torch.zeros(N, p, dtype=torch.float64, device=device),
        right=torch.zeros(N, p, group.n, dtype=dtype, device=device),
        rank=counts[0],
        energy=energy,
        error=error,
        error_bound=error_bound,
        rho=rho.fill_(torch.inf),
        sigma_err=sigma_err.fill_(torch.inf),
        energy_abs=energy_abs,
        numerical_rank=counts[1],
        passes=codes[0].fill_(1),
        info=codes[1],
        notes=codes[2],
    )


def load_problem(group: Factors, part: slice) -> Problem:
    """The problems of one slice; e is the even exponent that brings the heaviest column of the update into range."""
    B, A = [block[part] for block in group.B], [block[part].mT for block in group.A]
    device = B[0].device
    weights = group.weights[part].to(device)
    ranks = torch.tensor([block.shape[-1] for block in B], device=device)
    om = weights.repeat_interleave(ranks, -1, output_size=group.width)
    # Weights far apart: the greatest may belong to a column of zeros, and then must not set the scale.
    e_w = exponent(group.weights[part])
    apart = bool((e_w.amax(-1) - e_w.amin(-1) > _FAR_APART).any())
    e_B, e_A = column_exponents(B, apart), column_exponents(A, apart)
    e_columns = sum((e for e in (e_B, e_A) if e is not None), start=torch.zeros_like(om, dtype=torch.int64))
    e = (e_columns + exponent(om)).amax(-1)
    e = e + e % 2
    return Problem(B, A, scale_pow2(om, e_columns - e[:, None]), e_B, e_A, e)


class _Core(NamedTuple):
    """The R x R half of the pipeline: Cholesky factors, singular vectors of the core, and the gauge of the columns of B and A."""

    L_B: Tensor
    L_A: Tensor
    U: Tensor
    V: Tensor
    d: Tensor
    D_A: Tensor
    live: Tensor
    spectrum: Spectrum
    bad: Tensor
    info: Tensor

    def coefficients(self, width: int) -> tuple[Tensor, Tensor]:
        """The first columns of K in ``U = B K_B``, ``V = A^T K_A``, before any scaling by S."""
        K_B = self.d[:, :, None] * (self.L_A @ self.V[..., :width])
        K_A = self.D_A[:, :, None] * (self.L_B @ self.U[..., :width])
        return K_B, K_A


def _gram_route(stack: Problem, rule: RuleSpec, powers: Powers, raw: RawProduct, kernels: Kernels) -> None:
    core = _core(stack, min(raw.left.shape[1], raw.right.shape[2]), kernels)
    certificate = certify(core.spectrum, rule)
    rho_max = 16 if raw.left.dtype == torch.float64 else 1e4
    doubtful = (certificate.rho > rho_max) | ~(core.spectrum.energy > 0)
    doubtful |= overlooked(core.spectrum, rule, certificate, core.live)
    again = (doubtful & (core.spectrum.energy_abs > 0) & ~core.bad).nonzero().flatten().tolist()
    # Columns that no matrix keeps are zero already; most rules keep far fewer than p_max.
    width = int(certificate.rank.amax())
    if len(again) < core.bad.shape[0]:
        K_B, K_A = core.coefficients(width)
        K_B = _scaled(K_B, core.spectrum, certificate.rank, powers[0], -1.0)
        K_A = _scaled(K_A, core.spectrum, certificate.rank, powers[1], -1.0)
        signs = kernels.write_left(stack.B, stack.e_left, K_B, raw.left)
        kernels.write_right(stack.A, stack.e_right, K_A * signs[:, None, :], raw.right)
    _store(core.spectrum, certificate, core.info, powers, width, raw)
    for i in again:
        here = _rows(raw, slice(i, i + 1))
        second_pass(_only(stack, i), core.d[i : i + 1], core.spectrum.row(i), rule, powers, here, kernels)
    _mark_nonfinite(raw, core.bad)


def second_pass(
    problem: Problem,
    d: Tensor,
    first: Spectrum,
    rule: RuleSpec,
    powers: Powers,
    raw: RawProduct,
    kernels: Kernels = _TORCH,
) -> None:
    """Do one problem again by Householder QR of its factors, balanced by d (1, R); ``first`` is what one pass knows of it."""
    _write(orthogonalised(problem, d, first, kernels.qr, kernels.svd), rule, powers, raw)
    raw.notes.bitwise_or_(Note.TWO_PASS)


def _core(stack: Problem, q: int, kernels: Kernels) -> _Core:
    """Lines 1 to 6: Grams, weights, balancing, bounds, Cholesky, core SVD."""
    om = stack.om
    grams = torch.stack([kernels.gram(stack.B, stack.e_left), kernels.gram(stack.A, stack.e_right)])
    grams[1] *= om[:, :, None] * om[:, None, :]
    diag = grams.diagonal(dim1=-2, dim2=-1)
    bad = ~torch.isfinite(diag).all(-1).all(0)
    live = (diag > 0).all(0) & ~bad[:, None]
    grams.masked_fill_(~(live[:, :, None] & live[:, None, :]), 0.0)
    e_B, e_A = exponent(diag)
    # Ties go up, not to even: then scaling B by a power of four shifts every exponent alike and no bit changes.
    shift = torch.div(e_A - e_B + 2, 4, rounding_mode="floor")
    d = torch.stack([pow2(shift), pow2(-shift)])
    grams *= d[:, :, :, None]
    grams *= d[:, :, None, :]

    product = grams[0] * grams[1]
    norm = (row_bound(grams[0]) * row_bound(grams[1])).sqrt()
    energy, energy_abs = product.sum((-2, -1)), product.abs().sum((-2, -1))
    width = live.sum(-1)

    L_B, L_A = kernels.cholesky(grams.flatten(0, 1), width.repeat(2)).view_as(grams)
    U, S, Vh, info = kernels.svd(L_B.mT @ L_A)
    k = min(q, S.shape[-1])
    spectrum = Spectrum(
        S=S[:, :k],
        energy=energy,
        energy_abs=energy_abs,
        floor=4 * width * U64 * norm,
        norm=norm,
        e=stack.e,
        passes=1,
        width=om.shape[-1],
    )
    return _Core(L_B, L_A, U, Vh.mT, d[0], om * d[1], width, spectrum, bad, info)


def _scaled(X: Tensor, spectrum: Spectrum, rank: Tensor, power: float, already: float) -> Tensor:
    """Columns of X (N, rows, k) times ``S^(power + already) 2^(e power)``, zero from the rank on."""
    S = spectrum.S[:, : X.shape[-1]]
    kept = torch.arange(S.shape[-1], device=S.device) < rank[:, None]
    factor = torch.where(kept, S ** (power + already), 0.0)
    return scale_pow2(X * factor[:, None, :], (spectrum.e * power).long())


def _dense_route(stack: Problem, rule: RuleSpec, powers: Powers, raw: RawProduct, kernels: Kernels) -> None:
    good = torch.stack([finite(block) for block in (*stack.B, *stack.A)]).all(0)
    for i in good.nonzero().flatten().tolist():
        here = _rows(raw, slice(i, i + 1))
        _write(dense(_only(stack, i), kernels.qr, kernels.svd), rule, powers, here)
        here.notes.bitwise_or_(Note.DENSE)
    _mark_nonfinite(raw, ~good)


def _write(found: Decomposition, rule: RuleSpec, powers: Powers, raw: RawProduct) -> None:
    """Write one problem whose singular vectors are at hand."""
    certificate = certify(found.spectrum, rule)
    width = int(certificate.rank)
    U = _scaled(found.U[..., :width], found.spectrum, certificate.rank, powers[0], 0.0)
    V = _scaled(found.V[..., :width], found.spectrum, certificate.rank, powers[1], 0.0)
    signs = column_signs(U)[:, None, :]
    raw.left.zero_()[..., : U.shape[-1]] = U * signs
    raw.right.zero_()[:, : V.shape[-1]] = (V * signs).mT
    _store(found.spectrum, certificate, found.info, powers, width, raw)


def _store(
    spectrum: Spectrum, certificate: Certificate, info: Tensor, powers: Powers, width: int, raw: RawProduct
) -> None:
    """Write everything but the factors, of which only those that carry singular values can overflow."""
    S = spectrum.S[:, : raw.S.shape[-1]]
    kept = torch.arange(S.shape[-1], device=S.device) < certificate.rank[:, None]
    raw.S[:, : S.shape[-1]] = scale_pow2(torch.where(kept, S, 0.0), spectrum.e)
    raw.energy.copy_(scale_pow2(spectrum.energy, 2 * spectrum.e))
    raw.energy_abs.copy_(scale_pow2(spectrum.energy_abs, 2 * spectrum.e))
    raw.passes.fill_(spectrum.passes)
    for name, value in certificate._asdict().items():
        getattr(raw, name).copy_(value)
    overflow = torch.isinf(raw.S).any(-1)
    for factor, power in ((raw.left[..., :width], powers[0]), (raw.right[:, :width], powers[1])):
        # No element is larger than its singular value, but for rounding.
        if power and width and bool((raw.S[:, 0] ** power > torch.finfo(factor.dtype).max / 2).any()):
            overflow |= _has_inf(factor)
    raw.info.copy_(info | Info.OVERFLOW * overflow)
    raw.notes.masked_fill_(info != 0, 0)  # nothing is known of an update whose SVD did not converge


def _has_inf(x: Tensor) -> Tensor:
    """Whether each of the N matrices holds an Inf, without a temporary of its size."""
    return torch.isinf(x.amax((-2, -1))) | torch.isinf(x.amin((-2, -1)))


def _mark_nonfinite(raw: RawProduct, bad: Tensor) -> None:
    if not bad.any():
        return
    for field in raw:
        fill = torch.nan if field.dtype.is_floating_point else 0
        field.masked_fill_(bad.reshape(-1, *[1] * (field.ndim - 1)), fill)
    raw.info.masked_fill_(bad, Info.NONFINITE)


def _only(stack: Problem, i: int) -> Problem:
    one = slice(i, i + 1)
    B, A = [block[one] for block in stack.B], [block[one] for block in stack.A]
    e_left, e_right = (None if e is None else e[one] for e in (stack.e_left, stack.e_right))
    return Problem(B, A, stack.om[one], e_left, e_right, stack.e[one])


def _rows(raw: RawProduct, part: slice) -> RawProduct:
    return RawProduct(*(field[part] for field in raw))
