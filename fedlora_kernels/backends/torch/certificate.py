"""Rank, certified errors and notes of a batch of spectra (docs/numerics.md, Floor and certificate)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64, Note, RuleCode, RuleSpec
from fedlora_kernels.backends.torch.chunks import scale_pow2
from fedlora_kernels.backends.torch.threshold import select_rank

__all__ = ["Certificate", "Spectrum", "certify", "overlooked"]

_LOW_ACCURACY = 1e-6


class Spectrum(NamedTuple):
    """What is known of N updates once their singular values are: all of one scale, ``2^-e`` of the true one.

    S (N, k); the rest is (N,), ``norm`` a bound of the product of the factor norms. ``formed`` bounds the sum that the
    dense route rounded when it formed the update; None elsewhere. ``width`` is the number of stacked columns.
    """

    S: Tensor
    energy: Tensor
    energy_abs: Tensor
    floor: Tensor
    norm: Tensor
    e: Tensor
    passes: int
    width: int
    formed: Tensor | None = None

    def row(self, i: int) -> Spectrum:
        """Answer the spectrum of update i alone."""
        fields: list[Any] = [x[i : i + 1] if isinstance(x, Tensor) else x for x in self]
        return Spectrum(*fields)


class Certificate(NamedTuple):
    """Fields of `RawProduct` that follow from a spectrum, each (N,)."""

    rank: Tensor
    numerical_rank: Tensor
    error: Tensor
    error_bound: Tensor
    rho: Tensor
    sigma_err: Tensor
    notes: Tensor


def certify(spectrum: Spectrum, rule: RuleSpec) -> Certificate:
    """Choose the rank and bound the errors."""
    S, floor = spectrum.S, spectrum.floor
    wanted = _wanted(spectrum, S, rule)
    rank = wanted.clamp_max(rule.cap) if rule.cap else wanted
    numerical = (S > floor[:, None]).sum(-1)
    error, error_bound = _truncation(spectrum, rank)
    last = _kept(S, rank)
    rho = torch.where(rank > 0, spectrum.norm / last, torch.inf)
    sigma_err = U64 * (256 + 4 * rho * rho) if spectrum.passes == 1 else U64 * (128 + 4 * rho)
    if spectrum.formed is not None:
        sigma_err = sigma_err + U64 * (64 + 4 * torch.where(rank > 0, spectrum.formed / last, torch.inf))
    low = (sigma_err > _LOW_ACCURACY) & (rank > 0) & (spectrum.passes == 2)
    notes = (
        Note.ZERO * (numerical == 0)
        | Note.RANK_DEFICIENT * ((numerical > 0) & (numerical < spectrum.width))
        | Note.CAPPED * (rank < wanted)
        | Note.LOW_ACCURACY * low
    )
    return Certificate(rank, numerical, error, error_bound, rho, sigma_err, notes.int())


def overlooked(spectrum: Spectrum, rule: RuleSpec, certificate: Certificate, count: Tensor) -> Tensor:
    """Whether the rule might keep values that one pass cannot see, of updates that have ``count`` (N,) columns to give.

    The Cholesky drops what lies below some ``sqrt(u64)`` of the largest column. The rule is asked again with as many values of
    that size as are missing.
    """
    S, numerical = spectrum.S, certificate.numerical_rank
    hidden = torch.minimum(_kept(S, numerical), spectrum.width * U64**0.5 * spectrum.norm)
    place = torch.arange(S.shape[-1], device=S.device)
    missing = (place >= numerical[:, None]) & (place < count[:, None])
    more = _wanted(spectrum, torch.where(missing, hidden[:, None], S), rule)
    return (more.clamp_max(rule.cap) if rule.cap else more) > certificate.rank


def _wanted(spectrum: Spectrum, S: Tensor, rule: RuleSpec) -> Tensor:
    """Rank (N,) that the rule asks for, but for its cap, if the singular values are S."""
    if rule.code == RuleCode.ABSOLUTE:
        # The only rule that knows a scale; a value beyond float64 is above every cutoff.
        return ((scale_pow2(S, spectrum.e) > rule.value) & (S > spectrum.floor[:, None])).sum(-1)
    return select_rank(S, rule._replace(cap=0), spectrum.energy, spectrum.floor)


def _kept(S: Tensor, rank: Tensor) -> Tensor:
    """The smallest kept value (N,), 0 where none is kept."""
    return torch.where(rank > 0, S.gather(-1, (rank - 1).clamp_min(0)[:, None]).squeeze(-1), 0.0)


def _truncation(spectrum: Spectrum, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Relative truncation error and its bound."""
    S, energy = spectrum.S, spectrum.energy
    beyond = torch.arange(S.shape[-1], device=S.device) >= rank[:, None]
    tail = (S * S * beyond).sum(-1)
    if spectrum.passes == 1:
        doubt = 18 * U64 * spectrum.energy_abs / energy
    else:
        norm = spectrum.norm if spectrum.formed is None else spectrum.formed
        doubt = U64 * (256 + 16 * norm / S[:, 0])
    error = (tail / energy).sqrt()
    something = energy > 0
    return torch.where(something, error, 0.0), torch.where(something, (error * error + doubt).sqrt(), 0.0)
