"""The report of an aggregation, schema 1: plain JSON values, NaN and infinities as None."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import Note
from fedlora_kernels.methods.contract import Method, Outcome

__all__ = ["SCHEMA", "certificates", "cut_row", "efficiency", "module_rows", "number", "totals"]

SCHEMA = 1
SMALLEST = 2.0**-480
"""Norms below it have squares that underflow, or nearly do: nothing is known of what is left of them."""


def number(value: float | Tensor) -> float | None:
    """Return a float, None where it is not finite."""
    real = float(value)
    return real if math.isfinite(real) else None


def module_rows(
    modules: Sequence[str],
    kind: str,
    m: int,
    n: int,
    ranks: Sequence[Sequence[int]],
    stacked: Sequence[int],
    outcome: Outcome,
    contributions: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Rows of a group: ``ranks[i]`` are what the clients trained in module i, 0 where one lacks it.

    ``stacked[i]`` is the sum of what they hold: that, and what they started from where it was subtracted.
    ``contributions`` (N, K) is the norm that each client adds, None where that was not looked at.
    """
    columns = {"rank": _ranks(outcome).tolist(), **_columns(outcome, len(modules))}
    parts = [None] * len(modules) if contributions is None else [_numbers(own) for own in contributions]
    return [
        {
            "name": name,
            "kind": kind,
            "m": m,
            "n": n,
            "ranks": list(ranks[i]),
            "stacked_rank": stacked[i],
            **{key: values[i] for key, values in columns.items()},
            "contributions": parts[i],
            "cancellation": _cancellation(columns["energy"][i], parts[i]),
        }
        for i, name in enumerate(modules)
    ]


def _cancellation(energy: float | None, contributions: Sequence[float | None] | None) -> float | None:
    """``|D|^2 / (sum_k |w_k| |D_k|)^2``: 1 where all agree, 0 where nothing is left; None where all is zero or nearly, or unknown."""
    if energy is None or contributions is None or any(size is None for size in contributions):
        return None
    whole = math.fsum(size for size in contributions if size is not None)
    return min(1.0, (math.sqrt(energy) / whole) ** 2) if whole > SMALLEST else None


def _columns(outcome: Outcome, count: int) -> dict[str, list[Any]]:
    """What an outcome says of each of its ``count`` modules, by the name of the report."""
    spectrum, residual = outcome.spectrum, outcome.residual
    unknown = [None] * count
    energy = outcome.energy if spectrum is None else spectrum.energy
    personal = outcome.personal_error
    return {
        "residual_rank": unknown if residual is None else residual.rank.tolist(),
        "numerical_rank": unknown if spectrum is None else spectrum.numerical_rank.tolist(),
        "energy": unknown if energy is None else _numbers(energy),
        "energy_kept": unknown if spectrum is None else [_kept(error) for error in _numbers(outcome.error)],
        "error": _numbers(outcome.error),
        "error_bound": _numbers(outcome.error_bound),
        # what cutting took of each client's own pair, relative to it
        "personal_error": unknown if personal is None else [_numbers(errors) for errors in personal],
        "rho": unknown if spectrum is None else _numbers(spectrum.rho),
        "sigma_err": unknown if spectrum is None else _numbers(spectrum.sigma_err),
        "passes": unknown if spectrum is None else spectrum.passes.tolist(),
        "notes": [[str(note.name) for note in Note if notes & note] for notes in outcome.notes.tolist()],
        "singular_values": unknown if spectrum is None else [[s for s in S if s > 0.0] for S in spectrum.S.tolist()],
    }


def _kept(error: float | None) -> float | None:
    """The share of the energy that a truncation keeps."""
    return None if error is None else max(0.0, 1.0 - error**2)


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _ranks(outcome: Outcome) -> Tensor:
    """Rank of the common pair, or of the largest personal one where there is none."""
    if outcome.rank is not None:
        return outcome.rank
    ranks = [pair.rank for pair in outcome.personal or () if pair is not None]
    return torch.stack(ranks).amax(0)


def efficiency(method: Method, rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """``broadcast_rank``, the ranks that every client is sent, summed over modules, and its inverse (arXiv 2506.09199)."""
    sent = math.fsum(
        method.broadcast_rank(_own_ranks(method, row), row["rank"], row["residual_rank"] or 0)
        for row in rows
        if row["rank"] > 0
    )
    return {"broadcast_rank": sent, "efficiency": 1.0 / sent if sent else None}


def _own_ranks(method: Method, row: Mapping[str, Any]) -> list[int]:
    """What counts as the own rank of the clients that have a module: all hold the same multiple of what they trained, or an SVD is cut."""
    trained = [rank for rank in row["ranks"] if rank]
    return [method.own_rank(rank, rank * row["stacked_rank"] // sum(trained)) for rank in trained]


def cut_row(row: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The row of the same module cut to a shorter prefix of its spectrum; of rank 0, nothing of it is left."""
    values = row["singular_values"]
    if rank == 0:
        return {
            **row,
            "rank": 0,
            "energy_kept": 0.0,
            "error": 1.0,
            "error_bound": 1.0,
            "singular_values": [],
            "rho": None,
        }
    # shares of what the row keeps: the energy itself may leave the range of float64
    squares = [(s / values[0]) ** 2 for s in values]
    tail = math.fsum(squares[rank:]) / math.fsum(squares) * (1.0 - row["error"] ** 2)
    error, bound = math.sqrt(row["error"] ** 2 + tail), row["error_bound"]
    if bound is not None:
        bound = math.sqrt(error**2 + max(0.0, bound**2 - row["error"] ** 2))
    kept = {"rank": rank, "energy_kept": _kept(error), "error": error, "error_bound": bound}
    return {**row, **kept, "singular_values": values[:rank], "rho": _scaled_rho(row, rank)}


def _scaled_rho(row: Mapping[str, Any], rank: int) -> float | None:
    """The rho of a cut: it belongs to the last kept singular value."""
    if row["rho"] is None:
        return None
    return float(row["rho"] * row["singular_values"][-1] / row["singular_values"][rank - 1])


def totals(rows: Iterable[Mapping[str, Any]], clients: int, parameters: int, nbytes: int) -> dict[str, Any]:
    """Sums over all modules; the error is ``|D - B A|_F / |D|_F`` of the whole model."""
    rows = list(rows)
    error = _overall(rows, "error")
    return {
        "modules": len(rows),
        "clients": clients,
        "rank_in": sum(row["stacked_rank"] for row in rows),
        "rank": sum(row["rank"] for row in rows),
        "parameters": parameters,
        "bytes": nbytes,
        "energy_kept": None if any(row["energy_kept"] is None for row in rows) else _kept(error),
        "error": error,
        "error_bound": _overall(rows, "error_bound"),
        "cancellation": _overall_cancellation(rows),
    }


def _overall_cancellation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The cancellation of the whole model: norms of clients over all modules."""
    if any(row["energy"] is None or row["contributions"] is None or None in row["contributions"] for row in rows):
        return None
    sizes = [math.hypot(*column) for column in zip(*(row["contributions"] for row in rows), strict=True)]
    return _cancellation(math.fsum(row["energy"] for row in rows), sizes)


def certificates(summary: Mapping[str, Any]) -> dict[str, str]:
    """What the metadata of a file says about the error: strings without times, so that two runs are bitwise equal."""
    texts = {}
    if summary["error"] is not None:
        texts["fedlora.energy_kept"] = repr(max(0.0, 1.0 - summary["error"] ** 2))
    if summary["error_bound"] is not None:
        texts["fedlora.error_bound"] = repr(summary["error_bound"])
    return texts


def _overall(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    if any(row[key] is None or row["energy"] is None for row in rows):
        return None
    energy = math.fsum(row["energy"] for row in rows)
    if energy > 0.0:
        return math.sqrt(math.fsum(row[key] ** 2 * row["energy"] for row in rows) / energy)
    # all updates are zero, or too small to be squared
    return max((row[key] for row in rows), default=0.0)
