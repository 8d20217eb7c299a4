"""Looking at adapters before they are combined: ranks, spectra, norms, cosines, and what looks wrong.

Reads module by module; no update is ever formed. Everything is defined on D = s B A, so that copies which differ by a
gauge (B Q, Q^-1 A) look the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.model import Adapter, LoRAFactors
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.engine.clients import check_unchanged, open_clients
from fedlora_kernels.errors import FedLoRAError, InputError
from fedlora_kernels.linalg import product_svd, update_gram
from fedlora_kernels.linalg.results import info_text
from fedlora_kernels.linalg.rules import Energy

__all__ = ["effective_rank", "inspect_adapters"]

SCHEMA = 1
"""Version of this report."""

FACTORS = (("lora_A", "A"), ("lora_B", "B"))
OUTLIER_SCORE = 3.5
OUTLIER_FACTOR = 2.0
NEAR_DUPLICATE = 1e-3
LARGEST_ENERGY = 2.0**1000
"""Squared norms from here on are left out: sums over modules must stay within float64."""


@dataclass
class _Tally:
    """What one adapter adds up to while its modules pass by."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)


def inspect_adapters(
    adapters: Sequence[str] | Mapping[str, str],
    *,
    read: ReadOptions | None = None,
    backend: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Return everything ``fedlora inspect`` knows about adapters, as plain values.

    ``adapters`` maps names to PEFT folders, or lists folders. Keys: ``adapters`` (one record each, with its ``modules``),
    ``cosines`` (K x K over all modules; a module that an adapter lacks counts as a zero update), ``findings`` (texts).
    Raises InputError for a folder that cannot be read.
    """
    clients = open_clients(adapters, None, normalize=True, read=read or ReadOptions())
    try:
        for client in clients:
            for failure in client.failures:
                raise failure if isinstance(failure, FedLoRAError) else InputError(str(failure))
        opened = {client.name: client.opened for client in clients}
        report = _report(opened, backend, progress or (lambda *_: None))
        check_unchanged(clients)
        return report
    finally:
        for client in clients:
            client.close()


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the energy shares ``s_i^2 / sum s_j^2``: r for r equal values, 1 for one, 0 for none."""
    energy = singular_values.double().square()
    share = energy[energy > 0] / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def _report(adapters: Mapping[str, Adapter], backend: str, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    names = list(adapters)
    gram = np.zeros((len(names), len(names)))
    tallies = {name: _Tally() for name in names}
    findings: list[str] = []
    modules = list(dict.fromkeys(module for adapter in adapters.values() for module in adapter))
    total, done = sum(adapter.nbytes for adapter in adapters.values()), 0
    for module in modules:
        pairs: dict[int, LoRAFactors] = {}
        for index, name in enumerate(names):
            if module in adapters[name]:
                pair = adapters[name][module]
                done += pair.A.nbytes + pair.B.nbytes
                if _examine(module, pair, tallies[name], backend):
                    pairs[index] = pair
        findings += _add_gram(gram, module, pairs, names, backend)
        progress("inspect", done, total)
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    records = [
        _record(name, adapters[name], tallies[name], float(norm)) for name, norm in zip(names, norms, strict=True)
    ]
    findings = _suspicions(adapters, tallies) + findings + _outliers(names, norms) + _twins(names, gram)
    return {
        "schema": SCHEMA,
        "tool": {"name": "fedlora_kernels", "version": __version__},
        "adapters": records,
        "cosines": _cosines(gram, norms),
        "findings": findings,
    }


def _examine(module: str, pair: LoRAFactors, tally: _Tally, backend: str) -> bool:
    """Add a module's spectrum to the tally. False if it is not finite."""
    row: dict[str, Any] = {
        "name": module,
        "kind": pair.kind,
        "m": pair.B.shape[0],
        "n": pair.A.shape[1],
        "rank": pair.A.shape[0],
        "scale": pair.scale,
        "dtype": str(pair.A.dtype).removeprefix("torch."),
    }
    tally.rows.append(row)
    for label, attribute in FACTORS:
        bad = torch.isfinite(getattr(pair, attribute)).logical_not()
        if bool(bad.any()):
            first = ", ".join(str(int(index)) for index in bad.nonzero()[0])
            tally.broken.append(f"module {module!r}, {label}[{first}]: NaN or Inf")
            return False
    svd = product_svd(
        pair.B, pair.A, weights=[pair.scale], rule=Energy(1.0), output="usv", check=False, backend=backend
    )
    if info := int(svd.info):
        tally.broken.append(f"module {module!r}: {'; '.join(info_text(info))}")
        return False
    if not float(svd.energy) < LARGEST_ENERGY:
        tally.broken.append(f"module {module!r}: the squared norm of the update leaves float64")
        return False
    rank = int(svd.rank)
    values = svd.S[:rank].cpu()
    energy = torch.cumsum(values.square(), 0)
    row |= {
        "norm": math.sqrt(float(energy[-1])) if rank else 0.0,
        "numerical_rank": rank,
        "effective_rank": effective_rank(values),
        "rank_90": _rank_for(energy, 0.90),
        "rank_99": _rank_for(energy, 0.99),
        "singular_values": values.tolist(),
    }
    if rank == 0:
        tally.zero.append(module)
    return True


def _rank_for(energy: Tensor, threshold: float) -> int:
    """Smallest p that reaches the threshold of the energy; reaching it counts, whatever the rounding."""
    return int((energy < (threshold - 1e-12) * energy[-1]).sum()) + 1 if len(energy) else 0


def _add_gram(
    gram: np.ndarray[Any, np.dtype[np.float64]],
    module: str,
    pairs: Mapping[int, LoRAFactors],
    names: Sequence[str],
    backend: str,
) -> list[str]:
    """Add a module's inner products in place; return findings on shapes that differ."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, pair in pairs.items():
        by_shape.setdefault((pair.B.shape[0], pair.A.shape[1]), []).append(index)
    for members in by_shape.values():
        found = update_gram(
            [pairs[i].B for i in members],
            [pairs[i].A for i in members],
            weights=[pairs[i].scale for i in members],
            backend=backend,
        )
        gram[np.ix_(members, members)] += found.cpu().numpy()
    if len(by_shape) < 2:
        return []
    shapes = ", ".join(f"{m} x {n} in {names[members[0]]!r}" for (m, n), members in by_shape.items())
    return [f"module {module!r}: shapes differ ({shapes}); these adapters do not belong to one model"]


def _record(name: str, adapter: Adapter, tally: _Tally, norm: float) -> dict[str, Any]:
    ranks = [row["rank"] for row in tally.rows]
    return {
        "name": name,
        "source": adapter.label,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "bytes": adapter.nbytes,
        "parameters": sum(row["rank"] * (row["m"] + row["n"]) for row in tally.rows),
        "rank_min": min(ranks, default=0),
        "rank_max": max(ranks, default=0),
        "scales": sorted({row["scale"] for row in tally.rows}),
        "dtypes": sorted({row["dtype"] for row in tally.rows}),
        "norm": None if tally.broken else norm,
        "extras": [
            {"name": extra.name, "rule": extra.rule, "shape": list(extra.tensor.shape)}
            for extra in adapter.extras.values()
        ],
        "modules": tally.rows,
    }


def _cosines(
    gram: np.ndarray[Any, np.dtype[np.float64]], norms: np.ndarray[Any, np.dtype[np.float64]]
) -> list[list[float]]:
    scale = np.outer(norms, norms)
    cosines = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    return [[float(value) for value in row] for row in np.clip(cosines, -1.0, 1.0)]


def _suspicions(adapters: Mapping[str, Adapter], tallies: Mapping[str, _Tally]) -> list[str]:
    findings: list[str] = []
    for name, adapter in adapters.items():
        tally = tallies[name]
        findings += adapter.warnings
        if tally.broken:
            more = f" (and {len(tally.broken) - 1} more modules)" if len(tally.broken) > 1 else ""
            findings.append(f"{name!r}, {tally.broken[0]}{more}; left out of norms and cosines")
        # a scale of 0 is already among the reader's warnings
        unexplained = [module for module in tally.zero if adapter.modules[module].scale != 0.0]
        if unexplained and len(unexplained) == len(tally.rows):
            findings.append(f"{name!r}: every update is zero; a fresh adapter that was never trained?")
        elif unexplained:
            findings.append(f"{name!r}: the update is zero in {_some(unexplained)}")
    bases = {str(adapter.config.get("base_model_name_or_path")) for adapter in adapters.values()}
    if len(bases) > 1:
        findings.append(f"base models differ: {', '.join(sorted(bases))}")
    every = set().union(*(adapter.modules for adapter in adapters.values()))
    for name, adapter in adapters.items():
        if missing := sorted(every - set(adapter.modules)):
            findings.append(f"{name!r} lacks {_some(missing)}, which others have")
    return findings


def _some(modules: Sequence[str]) -> str:
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"module {modules[0]!r}{more}"


def _outliers(names: Sequence[str], norms: np.ndarray[Any, np.dtype[np.float64]]) -> list[str]:
    """Name norms far from the median: modified z-score of the log-norm above 3.5 and a factor of 2 away."""
    logs = {name: math.log(norm) for name, norm in zip(names, norms, strict=True) if norm > 0}
    if len(logs) < 3:
        return []
    middle = statistics.median(logs.values())
    spread = 1.4826 * statistics.median(abs(value - middle) for value in logs.values())
    far = {name: value - middle for name, value in logs.items() if abs(value - middle) > math.log(OUTLIER_FACTOR)}
    return [
        f"{name!r}: its norm is {math.exp(distance):.3g} times the median of all"
        for name, distance in far.items()
        if abs(distance) > OUTLIER_SCORE * spread
    ]


def _twins(names: Sequence[str], gram: np.ndarray[Any, np.dtype[np.float64]]) -> list[str]:
    """Name pairs of updates that are (almost) one: |D_i - D_j| at most 1e-3 of the larger norm."""
    findings = []
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            larger = max(gram[i, i], gram[j, j])
            distance = math.sqrt(max(gram[i, i] + gram[j, j] - 2.0 * gram[i, j], 0.0))
            if larger > 0 and distance <= NEAR_DUPLICATE * math.sqrt(larger):
                relative = distance / math.sqrt(larger)
                findings.append(
                    f"{names[i]!r} and {names[j]!r} are near duplicates: their updates differ by {relative:.1e} of their norm"
                )
    return findings
