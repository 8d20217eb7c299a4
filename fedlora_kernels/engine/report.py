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


def number(value: float | Tensor) -> float | None:
    """Return a float, None where it is not finite."""
    real = float(value)
    return real if math.isfinite(real) else None


def module_rows(
    modules: Sequence[str], kind: str, m: int, n: int, ranks: Sequence[Sequence[int]], outcome: Outcome
) -> list[dict[str, Any]]:
    """Rows of a group: ``ranks[i]`` are what the clients trained in module i, 0 where one lacks it."""
    spectrum = outcome.spectrum
    rank = _ranks(outcome)
    residual = outcome.residual
    rows = []
    for i, name in enumerate(modules):
        energy = outcome.energy if spectrum is None else spectrum.energy
        rows.append(
            {
                "name": name,
                "kind": kind,
                "m": m,
                "n": n,
                "ranks": list(ranks[i]),
                "stacked_rank": sum(ranks[i]),
                "rank": int(rank[i]),
                "residual_rank": None if residual is None else int(residual.rank[i]),
                "numerical_rank": None if spectrum is None else int(spectrum.numerical_rank[i]),
                "energy": None if energy is None else number(energy[i]),
                "error": number(outcome.error[i]),
                "error_bound": number(outcome.error_bound[i]),
                "personal_error": _personal(outcome, i),
                "rho": None if spectrum is None else number(spectrum.rho[i]),
                "sigma_err": None if spectrum is None else number(spectrum.sigma_err[i]),
                "passes": None if spectrum is None else int(spectrum.passes[i]),
                "notes": [str(note.name) for note in Note if int(outcome.notes[i]) & note],
                "singular_values": None if spectrum is None else [s for s in spectrum.S[i].tolist() if s > 0.0],
            }
        )
    return rows


def _personal(outcome: Outcome, i: int) -> list[float | None] | None:
    """What cutting took of each client's own pair, relative to it."""
    return None if outcome.personal_error is None else [number(error) for error in outcome.personal_error[i]]


def _ranks(outcome: Outcome) -> Tensor:
    """Rank of the common pair, or of the largest personal one where there is none."""
    if outcome.rank is not None:
        return outcome.rank
    ranks = [pair.rank for pair in outcome.personal or () if pair is not None]
    return torch.stack(ranks).amax(0)


def efficiency(method: Method, rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """``broadcast_rank``, the ranks that every client is sent, summed over modules, and its inverse (arXiv 2506.09199)."""
    sent = math.fsum(
        method.broadcast_rank([r for r in row["ranks"] if r], row["rank"], row["residual_rank"] or 0)
        for row in rows
        if row["rank"] > 0
    )
    return {"broadcast_rank": sent, "efficiency": 1.0 / sent if sent else None}


def cut_row(row: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The row of the same module cut to a shorter prefix of its spectrum."""
    values = row["singular_values"]
    tail = math.fsum(s * s for s in values[rank:]) / row["energy"]
    slack = max(0.0, row["error_bound"] ** 2 - row["error"] ** 2)
    error = math.sqrt(row["error"] ** 2 + tail)
    bound = math.sqrt(error**2 + slack)
    kept = {"rank": rank, "error": error, "error_bound": bound, "singular_values": values[:rank]}
    return {**row, **kept, "rho": _scaled_rho(row, rank)}


def _scaled_rho(row: Mapping[str, Any], rank: int) -> float | None:
    """The rho of a cut: it belongs to the last kept singular value."""
    if row["rho"] is None:
        return None
    return float(row["rho"] * row["singular_values"][-1] / row["singular_values"][rank - 1])


def totals(rows: Iterable[Mapping[str, Any]], clients: int, parameters: int, nbytes: int) -> dict[str, Any]:
    """Sums over all modules; the error is ``|D - B A|_F / |D|_F`` of the whole model."""
    rows = list(rows)
    return {
        "modules": len(rows),
        "clients": clients,
        "rank_in": sum(row["stacked_rank"] for row in rows),
        "rank": sum(row["rank"] for row in rows),
        "parameters": parameters,
        "bytes": nbytes,
        "error": _overall(rows, "error"),
        "error_bound": _overall(rows, "error_bound"),
    }


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
