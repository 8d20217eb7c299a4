"""LoRA factors over all degrees of trouble: the families of `factors` and their variants, as functions ``(m, n, ranks, seed)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from fedlora_kernels.testing.factors import (
    FAMILIES,
    Family,
    LoRAProblem,
    cancelling,
    column_gauge,
    full_gauge,
    gaussian,
    ill_conditioned,
    scalar_gauge,
)
from fedlora_kernels.testing.matrices import SPECTRA, generator, orthonormal, spectrum

__all__ = ["LORA", "opposite_clients", "quantised", "with_spectrum", "zero_weight"]


def with_spectrum(m: int, n: int, ranks: Sequence[int], seed: int, *, values: str, cond: float = 1e4) -> LoRAProblem:
    """An update with singular values `spectrum` ``(values, min(m, n, R), cond)``, spread over all clients by a random rotation."""
    R = sum(ranks)
    k = min(m, n, R)
    s = spectrum(values, k, cond, seed)
    turn = orthonormal(R, R, seed + 5)[:k]
    B = orthonormal(m, k, seed) * s.sqrt() @ turn
    A = turn.mT @ (s.sqrt()[:, None] * orthonormal(n, k, seed + 1).mT)
    ones = torch.ones(len(ranks), dtype=torch.float64)
    return LoRAProblem(torch.split(B, list(ranks), 1), torch.split(A, list(ranks)), ones)


def opposite_clients(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """The second client is the negative of the first, the rest Gaussian: part of the update cancels exactly."""
    base = gaussian(m, n, ranks, seed)
    if len(ranks) < 2 or ranks[0] != ranks[1]:
        return base
    weights = base.weights.clone()
    weights[1] = weights[0]
    return LoRAProblem((base.B[0], -base.B[0], *base.B[2:]), (base.A[0], base.A[0], *base.A[2:]), weights)


def zero_weight(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """The last client counts nothing, though its factors are large."""
    base = gaussian(m, n, ranks, seed)
    weights = base.weights.clone()
    if len(ranks) > 1:
        weights[-1] = 0
    return LoRAProblem((*base.B[:-1], 1e3 * base.B[-1]), base.A, weights)


def quantised(m: int, n: int, ranks: Sequence[int], seed: int, *, dtype: torch.dtype) -> LoRAProblem:
    """Gaussian factors that were stored in a half type: few distinct mantissas, many ties."""
    base = gaussian(m, n, ranks, seed)
    return replace(base.to(dtype).to(torch.float64), weights=base.weights)


def many_scales(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """Clients whose updates differ by twelve orders of magnitude, half of them by their weight."""
    base = gaussian(m, n, ranks, seed)
    u = torch.rand(len(ranks), 2, dtype=torch.float64, generator=generator(seed + 3))
    B = tuple(b * 1e-6 ** float(x) for b, x in zip(base.B, u[:, 0], strict=True))
    return LoRAProblem(B, base.A, base.weights * 1e-6 ** u[:, 1])


LORA: Mapping[str, Family] = {
    **FAMILIES,
    "opposite_clients": opposite_clients,
    "zero_weight": zero_weight,
    "many_scales": many_scales,
    "quantised_bfloat16": partial(quantised, dtype=torch.bfloat16),
    "quantised_float16": partial(quantised, dtype=torch.float16),
    "scalar_gauge_1e-6": partial(scalar_gauge, c=1e-6),
    "column_gauge_1e4": partial(column_gauge, spread=1e4),
    "full_gauge_1e6": partial(full_gauge, kappa=1e6),
    **{f"cancelling_1e-{e}": partial(cancelling, delta=10.0**-e) for e in range(1, 8)},
    **{f"ill_conditioned_1e{e}": partial(ill_conditioned, kappa=10.0**e) for e in (2, 4, 6, 8, 10, 12, 14)},
    **{f"spectrum_{values}": partial(with_spectrum, values=values) for values in SPECTRA},
}
"""By name; all in float64, to be rounded with `LoRAProblem.to`."""
