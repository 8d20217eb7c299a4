"""What looks wrong with adapters that are to be combined, from the records of an inspection alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_kernels.adapters.variants import changes_base
from fedlora_kernels.engine.outliers import outliers

__all__ = ["suspicions"]

NEAR_DUPLICATE = 1e-3
CANCELS = 0.5
"""Share of the energy of orthogonal updates of these norms below which a sum is said to cancel."""
IMBALANCE = 1e4
"""Ratio of the norms of the factors, either way, from which on rounding to a half harms the small one."""

Records = Sequence[Mapping[str, Any]]


def suspicions(
    adapters: Records,
    comparison: Mapping[str, Any],
    warnings: Sequence[Sequence[str]],
    elsewhere: Mapping[str, str],
) -> list[str]:
    """Return texts on what looks wrong; ``warnings`` are those of reading, by adapter, ``elsewhere`` of whom `aloof` names."""
    findings: list[str] = []
    for record, texts in zip(adapters, warnings, strict=True):
        findings += [*texts, *_broken(record), *_zero(record), *_imbalance(record)]
    return [
        *findings,
        *_bases(adapters),
        *_inits(adapters),
        *_missing(adapters),
        *_loud(adapters),
        *_copies(adapters),
        *_twins(adapters, comparison),
        *(f"{name!r}: {text}" for name, text in elsewhere.items()),
        *_cancelling(comparison),
    ]


def _broken(record: Mapping[str, Any]) -> list[str]:
    broken = [row for row in record["modules"] if row["problem"] is not None]
    if not broken:
        return []
    more = f" (and {len(broken) - 1} more modules)" if len(broken) > 1 else ""
    first = broken[0]
    return [
        f"{record['name']!r}, module {first['name']!r}{_joint(first['problem'])}{first['problem']}{more}; "
        "left out of norms and cosines"
    ]


def _joint(problem: str) -> str:
    return ", " if problem.startswith("lora_") else ": "


def _zero(record: Mapping[str, Any]) -> list[str]:
    # a scale of 0 is already among the reader's warnings
    zero = [row["name"] for row in record["modules"] if row["numerical_rank"] == 0 and row["scale"] != 0.0]
    if not zero:
        return []
    if len(zero) == len(record["modules"]):
        return [f"{record['name']!r}: every update is zero; a fresh adapter that was never trained?"]
    return [f"{record['name']!r}: the update is zero in {_some(zero)}"]


def _imbalance(record: Mapping[str, Any]) -> list[str]:
    far = [
        (row["norm_B"] / row["norm_A"], row["name"])
        for row in record["modules"]
        if row["norm"]
        and row["norm_A"]
        and row["norm_B"]
        and not 1 / IMBALANCE < row["norm_B"] / row["norm_A"] < IMBALANCE
    ]
    if not far:
        return []
    ratio, _ = worst = max(far, key=lambda item: abs(math.log(item[0])))
    names = [worst[1], *(name for _, name in far if name != worst[1])]
    return [f"{record['name']!r}: factors far from balanced, |B| is {ratio:.1e} times |A|, in {_some(names)}"]


def _bases(adapters: Records) -> list[str]:
    bases = {str(record["base_model"]) for record in adapters}
    return [f"base models differ: {', '.join(sorted(bases))}"] if len(bases) > 1 else []


def _inits(adapters: Records) -> list[str]:
    """Initialisations of which one at least changes the base weights: reading warns of each, not of a mixture."""
    inits = {str(record["init"]) for record in adapters}
    if len(inits) < 2 or not any(map(changes_base, inits)):
        return []
    return [f"initialisations differ, so these adapters fit no common base: {', '.join(sorted(inits))}"]


def _missing(adapters: Records) -> list[str]:
    own = [{row["name"] for row in record["modules"]} for record in adapters]
    every: set[str] = set().union(*own)
    return [
        f"{record['name']!r} lacks {_some(sorted(every - names))}, which others have"
        for record, names in zip(adapters, own, strict=True)
        if every - names
    ]


def _loud(adapters: Records) -> list[str]:
    found = outliers([record["norm"] for record in adapters])
    return [f"{adapters[k]['name']!r}: {text}" for k, text in found.items()]


def _copies(adapters: Records) -> list[str]:
    by_content: dict[str, list[str]] = {}
    for record in adapters:
        by_content.setdefault(record["content"], []).append(record["name"])
    return [
        f"{names[0]!r} and {', '.join(map(repr, names[1:]))} hold the same tensors, bit for bit; one client given twice?"
        for names in by_content.values()
        if len(names) > 1
    ]


def _twins(adapters: Records, comparison: Mapping[str, Any]) -> list[str]:
    """Pairs of updates that are (almost) one: |D_i - D_j| at most 1e-3 of the larger norm; bitwise copies are told already."""
    norms, cosines = comparison["norms"], comparison["cosines"]
    if cosines is None:
        return [f"{i!r} and {j!r} are near duplicates" for i, j in comparison["near_twins"]]
    findings = []
    for i, j in itertools.combinations(range(len(adapters)), 2):
        larger = max(norms[i] or 0.0, norms[j] or 0.0)
        if larger == 0.0 or adapters[i]["content"] == adapters[j]["content"]:
            continue
        a, b = (norms[i] or 0.0) / larger, (norms[j] or 0.0) / larger
        relative = math.sqrt(max(a * a + b * b - 2.0 * a * b * (cosines[i][j] or 0.0), 0.0))
        if relative <= NEAR_DUPLICATE:
            findings.append(
                f"{adapters[i]['name']!r} and {adapters[j]['name']!r} are near duplicates: their updates differ by "
                f"{relative:.1e} of their norm"
            )
    return findings


def _cancelling(comparison: Mapping[str, Any]) -> list[str]:
    """A sum that is much smaller than that of orthogonal updates of the same norms."""
    norms, found = [norm or 0.0 for norm in comparison["norms"]], comparison["cancellation"]
    if found is None or sum(norm > 0.0 for norm in norms) < 2:
        return []
    orthogonal = comparison["orthogonal"]
    if orthogonal is None or found >= CANCELS * orthogonal:
        return []
    return [
        f"the updates cancel: |D|^2 of their weighted sum is {found / orthogonal:.2g} of what it would be if they were orthogonal"
    ]


def _some(modules: Sequence[str]) -> str:
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"module {modules[0]!r}{more}"
