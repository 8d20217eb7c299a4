"""Looking at adapters before they are combined: ranks, spectra, norms, cosines, and what looks wrong.

Reads module by module; no update is ever formed. Everything is defined on D = s B A, so that copies which differ by a
gauge (B Q, Q^-1 A) look the same; only the balance of the factors, which decides what rounding does to them, is told apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.model import Adapter, LoRAFactors, ModuleSpec
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.engine.alignment import aloof
from fedlora_kernels.engine.clients import Client, check_unchanged, normalised, open_clients
from fedlora_kernels.engine.comparison import Comparison, effective_rank, stable_rank
from fedlora_kernels.engine.outliers import outlier_scores
from fedlora_kernels.engine.report import number
from fedlora_kernels.errors import FedLoRAError, InputError
from fedlora_kernels.inspection.suspicion import suspicions
from fedlora_kernels.linalg import product_svd, update_gram
from fedlora_kernels.linalg.results import info_text
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Group

__all__ = ["inspect_adapters"]

SCHEMA = 1
"""Version of this report."""

FACTORS = (("lora_A", "A"), ("lora_B", "B"))
LARGEST_ENERGY = 2.0**1000
"""Squared norms from here on are left out: sums over modules must stay within float64."""
UNKNOWN = (
    "norm",
    "numerical_rank",
    "effective_rank",
    "stable_rank",
    "rank_90",
    "rank_99",
    "norm_A",
    "norm_B",
    "singular_values",
)
"""What stays None of a module that cannot be looked at."""


@dataclass
class _Tally:
    """What one adapter adds up to while its modules pass by."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    content: Any = field(default_factory=hashlib.sha256)


def inspect_adapters(
    adapters: Sequence[str] | Mapping[str, str],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    read: ReadOptions | None = None,
    backend: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Return everything ``fedlora inspect`` knows about adapters, as plain values.

    Args:
        adapters: folders, or a mapping from names to them.
        weights: one for each, as `aggregate` takes them: what is said of the weighted sum depends on them. None is uniform.
        normalize: divide the weights by their sum.
        read: how adapters are read. One whose initialisation changes the base weights is looked at as it is stored, and said to be
            such, unless ``init_factors`` subtracts its start.
        backend: "auto" or a backend's name.
        progress: called as ``progress("inspect", done_bytes, total_bytes)``.

    Returns:
        ``adapters`` (one record each, with its ``modules``), ``comparison`` of the updates with each other and with their weighted
        sum (a module that an adapter lacks counts as a zero update), ``findings`` (texts on what looks wrong).

    Raises:
        InputError: a folder that cannot be read. WeightError: a weight that cannot be.
    """
    read = read or ReadOptions()
    if read.init is None and read.init_factors is None:
        read = dataclasses.replace(read, init="keep")
    clients = open_clients(adapters, weights, normalize=normalize, read=read)
    try:
        for client in clients:
            for failure in client.failures:
                raise failure if isinstance(failure, FedLoRAError) else InputError(str(failure))
        shares = normalised([client.weight for client in clients], normalize)
        report = _report(clients, shares, normalize, backend, progress or (lambda *_: None))
        check_unchanged(clients)
        return report
    finally:
        for client in clients:
            client.close()


def _report(
    clients: Sequence[Client],
    weights: Sequence[float],
    normalize: bool,
    backend: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    adapters = {client.name: client.opened for client in clients}
    names, tallies = list(adapters), [_Tally() for _ in adapters]
    comparison, findings = Comparison(names), []
    modules = list(dict.fromkeys(module for adapter in adapters.values() for module in adapter))
    readers = [adapter.pairs([module for module in modules if module in adapter]) for adapter in adapters.values()]
    total, done = sum(adapter.nbytes for adapter in adapters.values()), 0
    for module in modules:
        pairs: dict[int, LoRAFactors] = {}
        for index, adapter in enumerate(adapters.values()):
            if module in adapter:
                _, pair = next(readers[index])
                done += pair.A.nbytes + pair.B.nbytes
                if _examine(adapter.modules[module], pair, tallies[index], backend):
                    pairs[index] = pair
        findings += _compare(comparison, module, pairs, weights, backend)
        progress("inspect", done, total)
    records = [
        _record(name, adapter, tally, weight)
        for (name, adapter), tally, weight in zip(adapters.items(), tallies, weights, strict=True)
    ]
    for record, score in zip(records, outlier_scores([record["norm"] for record in records]), strict=True):
        record["norm_score"] = score
    compared, warnings = comparison.report(modules), [adapter.warnings for adapter in adapters.values()]
    return {
        "schema": SCHEMA,
        "tool": {"name": "fedlora_kernels", "version": __version__},
        "normalize": normalize,
        "adapters": records,
        "comparison": compared,
        "findings": [*findings, *suspicions(records, compared, warnings, aloof(comparison.alignment))],
    }


def _examine(spec: ModuleSpec, pair: LoRAFactors, tally: _Tally, backend: str) -> bool:
    """Add a module's spectrum to the tally. False if it is not finite."""
    tally.content.update(f"{spec.name}\0{pair.scale}\0".encode("utf-8", "surrogatepass"))
    row: dict[str, Any] = {
        "name": spec.name,
        "kind": pair.kind,
        "m": pair.B.shape[0],
        "n": pair.A.shape[1],
        "rank": spec.trained,
        "start": spec.start,
        "scale": pair.scale,
        "dtype": str(pair.A.dtype).removeprefix("torch."),
        "problem": None,
        **dict.fromkeys(UNKNOWN),
    }
    tally.rows.append(row)
    for _, attribute in FACTORS:
        tally.content.update(getattr(pair, attribute).contiguous().view(torch.uint8).numpy())
    for label, attribute in FACTORS:
        bad = torch.isfinite(getattr(pair, attribute)).logical_not()
        if bool(bad.any()):
            first = ", ".join(str(int(index)) for index in bad.nonzero()[0])
            row["problem"] = f"{label}[{first}]: NaN or Inf"
            return False
    svd = product_svd(
        pair.B, pair.A, weights=[pair.scale], rule=Energy(1.0), output="usv", check=False, backend=backend
    )
    if info := int(svd.info):
        row["problem"] = "; ".join(info_text(info))
        return False
    if not float(svd.energy) < LARGEST_ENERGY:
        row["problem"] = "the squared norm of the update leaves float64"
        return False
    rank = int(svd.rank)
    values = svd.S[:rank].cpu()
    energy = torch.cumsum(values.square(), 0)
    row |= {
        "norm": math.sqrt(float(energy[-1])) if rank else 0.0,
        "numerical_rank": rank,
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank(values),
        "rank_90": _rank_for(energy, 0.90),
        "rank_99": _rank_for(energy, 0.99),
        "norm_A": number(torch.linalg.vector_norm(pair.A, dtype=torch.float64)),
        "norm_B": number(torch.linalg.vector_norm(pair.B, dtype=torch.float64)),
        "singular_values": values.tolist(),
    }
    return True


def _rank_for(energy: Tensor, threshold: float) -> int:
    """Smallest p that reaches the threshold of the energy; reaching it counts, whatever the rounding."""
    return int((energy < (threshold - 1e-12) * energy[-1]).sum()) + 1 if len(energy) else 0


def _compare(
    comparison: Comparison, module: str, pairs: Mapping[int, LoRAFactors], weights: Sequence[float], backend: str
) -> list[str]:
    """Add a module to the comparison; return findings on shapes that differ, whose updates have no common sum."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, pair in pairs.items():
        by_shape.setdefault((pair.B.shape[0], pair.A.shape[1]), []).append(index)
    if len(by_shape) == 1:
        comparison.add_group(_group(module, pairs, weights, backend))
        return []
    gram = np.zeros((len(weights), len(weights)))
    for members in by_shape.values():
        own = [pairs[i] for i in members]
        found = update_gram(
            [pair.B for pair in own], [pair.A for pair in own], weights=[pair.scale for pair in own], backend=backend
        )
        gram[np.ix_(members, members)] = found.cpu().numpy()
    comparison.add(module, gram, np.asarray(weights))
    if not by_shape:
        return []
    shapes = ", ".join(f"{m} x {n} in {comparison.clients[members[0]]!r}" for (m, n), members in by_shape.items())
    return [f"module {module!r}: shapes differ ({shapes}); these adapters do not belong to one model"]


def _group(module: str, pairs: Mapping[int, LoRAFactors], weights: Sequence[float], backend: str) -> Group:
    """The module as a problem of a method; an adapter that lacks it, or whose own is broken, has rank 0 there."""
    one = next(iter(pairs.values()))
    m, n = one.B.shape[0], one.A.shape[1]
    empty = LoRAFactors(one.B.new_zeros(m, 0), one.A.new_zeros(0, n), 0.0)
    every = [pairs.get(index, empty) for index in range(len(weights))]
    return Group(
        modules=(module,),
        kind=one.kind,
        m=m,
        n=n,
        B=tuple(pair.B[None] for pair in every),
        A=tuple(pair.A[None] for pair in every),
        scale=torch.tensor([[pair.scale for pair in every]], dtype=torch.float64),
        weight=torch.tensor([list(weights)], dtype=torch.float64),
        clients=tuple(range(len(weights))),
        dtype=torch.float64,
        backend=backend,
    )


def _record(name: str, adapter: Adapter, tally: _Tally, weight: float) -> dict[str, Any]:
    ranks = [row["rank"] for row in tally.rows]
    whole = all(row["problem"] is None for row in tally.rows)
    values = torch.tensor([s for row in tally.rows for s in row["singular_values"] or ()], dtype=torch.float64)
    return {
        "name": name,
        "source": adapter.label,
        "base_model": _text(adapter.config.get("base_model_name_or_path")),
        "init": _text(adapter.config.get("init_lora_weights")),
        "content": tally.content.hexdigest(),
        "weight": weight,
        "bytes": adapter.nbytes,
        "parameters": sum(row["rank"] * (row["m"] + row["n"]) for row in tally.rows),
        "rank_min": min(ranks, default=0),
        "rank_max": max(ranks, default=0),
        "scales": sorted({row["scale"] for row in tally.rows}),
        "dtypes": sorted({row["dtype"] for row in tally.rows}),
        "norm": math.sqrt(math.fsum(row["norm"] ** 2 for row in tally.rows)) if whole else None,
        "effective_rank": effective_rank(values) if whole else None,
        "stable_rank": stable_rank(values) if whole else None,
        "extras": [
            {"name": extra.name, "rule": extra.rule, "shape": list(extra.tensor.shape)}
            for extra in adapter.extras.values()
        ],
        "modules": tally.rows,
    }


def _text(value: Any) -> str | None:
    """A field of a configuration as text; true and false as JSON writes them."""
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)
