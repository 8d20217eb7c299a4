"""What methods share: the blocks that carry something, the cast to the output dtype, means of factors and their drift."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_kernels.backends.contract import U64, Note
from fedlora_kernels.errors import MismatchError
from fedlora_kernels.linalg import Ragged, WeightedSum, update_gram, weighted_sum
from fedlora_kernels.methods.contract import Group, Outcome, Pair, Spectrum, Sums

__all__ = [
    "GRAM_ERROR",
    "cast",
    "chunked",
    "chunks",
    "client_gram",
    "client_squares",
    "drift",
    "factor_sums",
    "far_or",
    "in_chunks",
    "joined",
    "mean_outcome",
    "mean_sums",
    "measured_dtype",
    "norms",
    "owned",
    "padded_mean",
    "pair_outcome",
    "ratio",
    "require_equal_ranks",
    "rounded",
    "rounding_of",
    "share",
    "stack_error",
    "sums_outcome",
    "unmeasured",
    "zero_outcome",
]

GRAM_ERROR = 18.0 * U64
"""Error of an inner product of updates from float64 Grams, relative to the product of the norms of its factors."""
FAR = 2.0**26
"""A squared distance of so many times the error of its Gram is taken as it is: it has seven digits and, in practice, ten."""
ROW = 4096
"""Numbers whose squares are added in float32, with an error of at most 2^-24 each."""
Measured = tuple[Tensor, Tensor, Tensor]
"""Error, error bound and energy of some modules, (N,) float64 on the host."""
Gap = Callable[[Group, slice, Tensor], Measured]
CHUNK = 16 << 20
"""Bytes of float64 factors that a method converts at once on a CPU: what stays in its caches, and in memory that it holds already."""


def owned(group: Group, weight: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Blocks B, A of the clients that own the modules and their ``w_k s_k`` (N, K'), float64 on the host.

    ``weight`` (N, K) replaces the weights of the group.
    """
    keep = [k for k, rank in enumerate(group.ranks) if rank > 0]
    folded = (group.weight if weight is None else weight) * group.scale
    return [group.B[k] for k in keep], [group.A[k] for k in keep], folded[:, keep]


def client_gram(group: Group) -> Tensor:
    """Inner products of the clients' scaled updates, (N, K, K) float64 on the host; NaN for a client that is not finite."""
    B, A, scale = owned(group, torch.ones_like(group.weight))
    gram = torch.zeros(group.batch, len(group.B), len(group.B), dtype=torch.float64)
    keep = torch.tensor([k for k, rank in enumerate(group.ranks) if rank > 0], dtype=torch.int64)
    if B:
        gram[:, keep[:, None], keep] = update_gram(B, A, weights=scale, check=False, backend=group.backend).cpu()
    return gram


def client_squares(group: Group) -> Tensor:
    """Squared norms of the clients' scaled updates, (N, K) float64 on the host; NaN for a client that is not finite.

    The diagonal of `client_gram` at a K-th of its cost, and without K^2 numbers for every module.
    """
    squares = torch.zeros(group.batch, len(group.B), dtype=torch.float64)
    owners = [k for k, rank in enumerate(group.ranks) if rank > 0]
    if owners:
        B, A = (Ragged([[blocks[k]] for k in owners]) for blocks in (group.B, group.A))
        weights = Ragged([group.scale[:, k : k + 1] for k in owners])
        grams = update_gram(B, A, weights=weights, check=False, backend=group.backend)
        for k, gram in zip(owners, grams, strict=True):
            squares[:, k] = gram.cpu()[:, 0, 0]
    return squares


def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``x`` (N, p, q) to ``dtype``.

    The second answer (N,) marks matrices with finite values that the dtype cannot hold, the third (N,) float64 is the
    Frobenius norm of what rounding took away; both on the host.
    """
    rounded = x.to(dtype)
    lost = torch.isfinite(x) & ~torch.isfinite(rounded)
    return rounded, lost.flatten(1).any(1).cpu(), norms(x - rounded)


def zero_outcome(group: Group) -> Outcome:
    """The answer for modules to which nobody contributes: p = 1, B = 0, A = e_1."""
    device = group.B[0].device if group.B else torch.device("cpu")
    B = torch.zeros(group.batch, group.m, 1, dtype=group.dtype, device=device)
    A = torch.zeros(group.batch, 1, group.n, dtype=group.dtype, device=device)
    A[:, 0, 0] = 1.0
    zero = torch.zeros(group.batch, dtype=torch.float64)
    rank = torch.ones(group.batch, dtype=torch.int64)
    notes = torch.full((group.batch,), int(Note.ZERO), dtype=torch.int32)
    return Outcome(B=B, A=A, rank=rank, error=zero, error_bound=zero, notes=notes, energy=zero)


def require_equal_ranks(group: Group, method: str) -> None:
    """Raise MismatchError where the owners of the modules have trained different ranks."""
    ranks = sorted({rank for rank in group.trained if rank > 0})
    if len(ranks) > 1:
        listing = ", ".join(map(str, ranks))
        raise MismatchError(
            f"module {group.modules[0]!r}: ranks {listing}; method {method!r} needs one rank for all clients. "
            "Use florist, flexlora, prelort or zero_pad, which take mixed ranks"
        )


def chunked(group: Group, work: Callable[[Group], Outcome], times: int = 1) -> Outcome:
    """Do ``work`` on a few modules at a time, so that float64 copies of the factors stay small; outcomes are joined."""
    return joined([work(group.part(start, stop)) for start, stop in chunks(group, times)])


def chunks(group: Group, times: int = 1) -> list[tuple[int, int]]:
    """Bounds of the parts that `chunked` works on, at least one: for work that also cuts tensors beside the group.

    ``times`` makes parts larger, for work of many small steps; on a GPU every step is small.
    """
    size = 8 * sum(group.ranks) * (group.m + group.n)
    limit = CHUNK * (times if group.device.type == "cpu" else 4)
    step = max(1, limit // max(1, size))
    return [(start, min(start + step, group.batch)) for start in range(0, group.batch, step)] or [(0, 0)]


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of several, for modules of one shape in this order; pairs are padded with zeros to the widest."""
    first = outcomes[0]
    if len(outcomes) == 1:
        return first
    whole: dict[str, Any] = {}
    for name in ("error", "error_bound", "notes", "info", "energy", "personal_error"):
        whole[name] = None if getattr(first, name) is None else torch.cat([getattr(o, name) for o in outcomes])
    common = _joined_pairs([None if o.B is None else Pair(o.B, o.A, o.rank) for o in outcomes])  # type: ignore[arg-type]
    whole["B"], whole["A"], whole["rank"] = common or (None, None, None)
    whole["residual"] = _joined_pairs([o.residual for o in outcomes])
    if first.personal is not None:
        columns = zip(*(o.personal for o in outcomes if o.personal is not None), strict=True)
        whole["personal"] = tuple(_joined_pairs(column) for column in columns)
    if first.spectrum is not None:
        spectra = [o.spectrum for o in outcomes if o.spectrum is not None]
        widest = max(spectrum.S.shape[1] for spectrum in spectra)
        fields = [f.name for f in dataclasses.fields(Spectrum)]
        parts = {f: [getattr(spectrum, f) for spectrum in spectra] for f in fields}
        parts["S"] = [pad(S, (0, widest - S.shape[1])) for S in parts["S"]]
        whole["spectrum"] = Spectrum(**{f: torch.cat(values) for f, values in parts.items()})
    whole["state"] = tuple(state for outcome in outcomes for state in outcome.state)
    return Outcome(**whole)


def _joined_pairs(pairs: Sequence[Pair | None]) -> Pair | None:
    there = [pair for pair in pairs if pair is not None]
    if not there:
        return None
    widest = max(pair.B.shape[-1] for pair in there)
    B = torch.cat([pad(pair.B, (0, widest - pair.B.shape[-1])) for pair in there])
    A = torch.cat([pad(pair.A, (0, 0, 0, widest - pair.A.shape[-2])) for pair in there])
    return Pair(B, A, torch.cat([pair.rank for pair in there]))


def padded_mean(group: Group, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``sum_k p_k s_k [B_k | 0]`` and ``sum_k p_k [A_k ; 0]`` in float64, padded to the largest rank; ``weight`` is p, (N, K)."""
    B, A = factor_sums(group, weight, torch.float64)
    return B.sum, A.sum


def factor_sums(group: Group, weight: Tensor, dtype: torch.dtype) -> tuple[WeightedSum, WeightedSum]:
    """The same means rounded once to ``dtype``, each factor read once, with their norms; NaN of a client of weight 0 is not seen."""
    options: dict[str, Any] = {"dtype": dtype, "check": False, "backend": group.backend}
    B = weighted_sum(list(group.B), weights=weight * group.scale, **options)
    return B, weighted_sum(list(group.A), weights=weight, **options)


def mean_sums(group: Group, weight: Tensor | None = None) -> Sums:
    """The sums that `mean_outcome` answers."""
    p = group.weight if weight is None else share(group, weight)
    return Sums(p * group.scale, p)


def mean_outcome(group: Group, weight: Tensor | None = None) -> Outcome:
    """Outcome of the padded factor means with weights ``weight`` (K,), by default the group's, with its exact drift."""
    p = group.weight if weight is None else share(group, weight)
    B, A = factor_sums(group, p, group.dtype)

    def near(part: Group, rows: slice, rounding: Tensor) -> Measured:
        return drift(part, p[rows], *padded_mean(part, p[rows]), rounding)

    def pair(part: Group, rows: slice) -> tuple[Tensor, Tensor]:
        if measured_dtype(group) == group.dtype:
            return B.sum[rows], A.sum[rows]
        return tuple(total.sum for total in factor_sums(part, p[rows], torch.float32))

    return _sums_outcome(group, B, A, far_or(in_chunks(near), pair))


def sums_outcome(
    group: Group,
    B: WeightedSum,
    A: WeightedSum,
    gap: Gap,
) -> Outcome:
    """The outcome of two sums in the dtype of the group, of full rank P.

    ``gap(part, rows, rounding)`` answers error, error bound and energy of some of the modules, where ``rounding`` is what the output
    dtype may add to the distance from D; it is called only if the group is to be measured.
    """
    return _sums_outcome(group, B, A, in_chunks(gap))


def unmeasured(group: Group, B: WeightedSum, A: WeightedSum) -> Outcome:
    """The outcome of two sums in the dtype of the group, of full rank P, without a distance."""
    unknown = torch.full((group.batch,), math.nan, dtype=torch.float64)
    return _outcome(group, B, A, unknown, unknown, None)


def _sums_outcome(group: Group, B: WeightedSum, A: WeightedSum, gap: Gap) -> Outcome:
    if not group.measure:
        return unmeasured(group, B, A)
    return _outcome(group, B, A, *gap(group, slice(0, group.batch), rounding_of(B, A)))


def in_chunks(gap: Gap) -> Gap:
    """The same, asked for a few modules at a time, so that float64 copies of the factors stay small."""

    def whole(part: Group, rows: slice, rounding: Tensor) -> Measured:
        parts = [
            gap(part.part(start, stop), slice(rows.start + start, rows.start + stop), rounding[start:stop])
            for start, stop in chunks(part)
        ]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    return whole


def measured_dtype(group: Group) -> torch.dtype:
    """In which dtype the distance of an answer is measured: its own, but a half's rounding is only in the bound."""
    return torch.promote_types(group.dtype, torch.float32)


def far_or(near: Gap, pair: Callable[[Group, slice], tuple[Tensor, Tensor]]) -> Gap:
    """The `Gap` of a pair B (N, m, P), A (N, P, n) that ``pair(part, rows)`` gives: one Gram where it is far from D, else ``near``.

    The pair, in float32 at least, stands beside the stored factors as one more client, of weight -1: the sum over all inner products is
    ``|D - B A|_F^2``, that over the clients' ``|D|_F^2``. They cancel, and what is left has the error of all the terms; where it is not
    `FAR` times as large, ``near`` must look without cancellation.
    """

    def gap(part: Group, rows: slice, rounding: Tensor) -> Measured:
        clients_B, clients_A, folded = owned(part)
        if not clients_B:
            return near(part, rows, rounding)
        weight = torch.cat([folded, torch.full((part.batch, 1), -1.0, dtype=torch.float64)], 1)
        B, A = pair(part, rows)
        stacks = [*clients_B, B], [*clients_A, A]
        gram = update_gram(*stacks, weights=weight, check=False, backend=part.backend).cpu()
        sizes = torch.stack([_size(b) * _size(a) for b, a in zip(*stacks, strict=True)], 1)
        terms = torch.where(weight != 0.0, sizes * weight.abs(), 0.0)  # what has no weight may be NaN
        square, energy = gram.sum((1, 2)), gram[:, :-1, :-1].sum((1, 2)).clamp(min=0.0)
        slack, least = GRAM_ERROR * terms.sum(1) ** 2, energy - GRAM_ERROR * terms[:, :-1].sum(1) ** 2
        error = ratio(square.sqrt(), energy.sqrt())
        bound = ratio((square + slack).sqrt() + rounding, least.clamp(min=0.0).sqrt())
        measured = torch.stack([error, torch.maximum(error, bound), energy])
        far = (square > FAR * slack) & torch.isfinite(measured).all(0)
        for start, stop in _runs(~far):
            offset = slice(rows.start + start, rows.start + stop)
            measured[:, start:stop] = torch.stack(near(part.part(start, stop), offset, rounding[start:stop]))
        return measured[0], measured[1], measured[2]

    return gap


def _runs(chosen: Tensor) -> list[tuple[int, int]]:
    """Bounds of the runs of True in ``chosen`` (N,)."""
    edges = torch.nn.functional.pad(chosen.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _size(x: Tensor) -> Tensor:
    """At least the Frobenius norm of each matrix of (N, p, q), by 0.1% at most, in a tenth of the time; (N,) float64 on the host."""
    flat = x.flatten(1)
    if x.dtype == torch.float64:
        return norms(x)
    whole = flat.shape[1] // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:, :whole].reshape(len(x), whole // ROW, ROW), dim=2, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True, dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([rows, rest], 1), dim=1, dtype=torch.float64).cpu()
    # beyond these, squares may leave float32
    safe = bool(((norm > 1e-10) & (norm < 1e18)).all())
    return norm * (1.0 + ROW * 2.0**-23) if safe else norms(x)


def share(group: Group, weight: Tensor) -> Tensor:
    """``weight`` (K,) for every module, (N, K); over the owners, to the same sum, where missing modules renormalise."""
    owned_by = weight * (group.weight != 0.0)
    total = owned_by.sum(1, keepdim=True)
    return torch.where(total > 0.0, owned_by * (weight.sum() / total), group.weight)


def pair_outcome(
    group: Group, B: Tensor, A: Tensor, gap: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
) -> Outcome:
    """The outcome of a float64 pair ``B`` (N, m, P), ``A`` (N, P, n) of full rank P: rounded, its overflows and zeros noted.

    ``gap(rounding)`` answers error, error bound and energy, where ``rounding`` (N,) is what the output dtype may add to the
    distance from D; it is called only if the group is to be measured.
    """
    left, right = (rounded(group, x) for x in (B, A))
    if not group.measure:
        return unmeasured(group, left, right)
    return _outcome(group, left, right, *gap(rounding_of(left, right)))


def rounded(group: Group, x: Tensor, factor: Tensor | None = None) -> WeightedSum:
    """``x`` (N, p, q), times ``factor`` (N, 1) if given, in the dtype of the group; one pass, and what is to be known of it."""
    answer: WeightedSum = weighted_sum([x], weights=factor, dtype=group.dtype, check=False, backend=group.backend)
    return answer


def rounding_of(B: WeightedSum, A: WeightedSum) -> Tensor:
    """What the output dtype may add to the distance of the pair, (N,)."""
    rounding: Tensor = B.rounding * A.norm + (B.norm + B.rounding) * A.rounding
    return rounding.cpu()


def _outcome(
    group: Group, B: WeightedSum, A: WeightedSum, error: Tensor, error_bound: Tensor, energy: Tensor | None
) -> Outcome:
    return Outcome(
        B=B.sum,
        A=A.sum,
        rank=torch.full((group.batch,), B.sum.shape[-1], dtype=torch.int64),
        error=error,
        error_bound=error_bound,
        notes=(B.notes | A.notes).cpu() & int(Note.ZERO),
        info=(B.info | A.info).cpu(),
        energy=energy,
    )


def drift(
    group: Group, weight: Tensor, mean_B: Tensor, mean_A: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Relative distance ``|D - Bbar Abar|_F / |D|_F`` of factor means, an upper bound of it, and ``|D|_F^2``; (N,) float64.

    Without cancellation, with centred blocks (docs/algorithms.md, FedIT): for means taken with weights p of sum P,
    ``D - Bbar Abar = sum p_k (B_k - Bbar_k)(A_k - Abar_k) + sum (w_k - p_k) B_k A_k + Bbar diag(v + 1 - P) Abar``, where Bbar_k,
    Abar_k are the first r_k columns and rows, and v_j is the weight of the clients that have no column j.
    Each squared norm comes from float64 Grams with an absolute error of at most 18 u64 (sum of the terms' norms)^2; the bound
    holds that and ``rounding`` (N,), what the output dtype may add to the distance. D = 0 with a pair that is not zero: both are infinite.
    """
    scale = group.scale.to(mean_B.device)[:, :, None, None]
    lefts, rights, coefficients = [], [], []
    unowned = (1.0 - weight.sum(1, keepdim=True)).repeat(1, mean_B.shape[-1])
    for k, rank in enumerate(group.ranks):
        unowned[:, rank:] += weight[:, k : k + 1]
        if rank > 0:
            lefts.append(group.B[k].to(torch.float64) * scale[:, k] - mean_B[:, :, :rank])
            rights.append(group.A[k].to(torch.float64) - mean_A[:, :rank])
            coefficients.append(weight[:, k])
    for k, rank in enumerate(group.ranks):
        if rank > 0 and bool((group.weight[:, k] != weight[:, k]).any()):
            lefts.append(group.B[k].to(torch.float64))
            rights.append(group.A[k].to(torch.float64))
            coefficients.append((group.weight[:, k] - weight[:, k]) * group.scale[:, k])
    if bool((unowned.abs() > len(group.ranks) * U64).any()):  # less is the rounding of normalised weights
        lefts.append(mean_B * unowned.to(mean_B.device)[:, None, :])
        rights.append(mean_A)
        coefficients.append(torch.ones(group.batch, dtype=torch.float64))
    return stack_error(group, lefts, rights, torch.stack(coefficients, 1), rounding)


def stack_error(
    group: Group, lefts: Sequence[Tensor], rights: Sequence[Tensor], coefficients: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``|sum_i c_i L_i R_i|_F / |D|_F``, an upper bound of it that allows for ``rounding`` (N,), and ``|D|_F^2``; (N,) float64.

    ``lefts`` (N, m, q_i), ``rights`` (N, q_i, n), ``coefficients`` (N, I) on the host. What is measured should be small term by term:
    a sum that cancels is known only to 1e-8 of its terms.
    """
    gap, gap_error = _squared_norm(lefts, rights, coefficients, group.backend)
    B, A, folded = owned(group)
    energy, energy_error = _squared_norm(B, A, folded, group.backend)
    upper = (gap + gap_error).sqrt() + rounding
    error = ratio(gap.sqrt(), energy.sqrt())
    return error, torch.maximum(error, ratio(upper, (energy - energy_error).clamp(min=0.0).sqrt())), energy


def _squared_norm(B: Sequence[Tensor], A: Sequence[Tensor], weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``|sum_k w_k B_k A_k|_F^2`` (N,) and a bound of its absolute error."""
    gram = update_gram(list(B), list(A), weights=weight, check=False, backend=backend).cpu()
    sizes = torch.stack([norms(b) * norms(a) for b, a in zip(B, A, strict=True)], 1)
    terms = torch.where(weight != 0.0, sizes * weight.abs(), 0.0)  # what has no weight may be NaN
    return gram.sum((1, 2)).clamp(min=0.0), GRAM_ERROR * terms.sum(1) ** 2


def norms(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix of (N, p, q), (N,) float64 on the host."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
    return norm.cpu()


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole`` with 0 / 0 = 0."""
    return torch.where(part == 0.0, torch.zeros_like(part), part / whole)
