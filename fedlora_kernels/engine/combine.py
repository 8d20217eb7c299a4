"""The second, or only, pass: the method's pairs in canonical order, and a row of the report for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.engine.faults import nonfinite_factor
from fedlora_kernels.engine.output import Pair
from fedlora_kernels.engine.report import module_rows
from fedlora_kernels.engine.slabs import Block, Drain
from fedlora_kernels.engine.walk import Walk
from fedlora_kernels.errors import ConvergenceError, OutputOverflowError, RunError
from fedlora_kernels.methods.contract import Group, Method, Outcome

__all__ = ["combine"]


def combine(walk: Walk, plan: Any, sink: Callable[[Sequence[Pair]], None]) -> list[dict[str, Any]]:
    """Give pairs to ``sink`` in canonical order, in a thread; return the rows of the report. ``plan`` is what was decided."""
    index = walk.cohort.index
    rows: list[dict[str, Any]] = []

    def write(pairs: Sequence[Pair]) -> None:
        with walk.timed("write"):
            sink(pairs)

    with walk.slabs("combine", keep=False) as slabs, Drain(write) as drain:
        for slab in slabs:
            pairs: list[Pair] = []
            for block in slab:
                with walk.timed("compute"):
                    made, described = _combine_block(walk, block, plan)
                if walk.settings.write.drop_zero:
                    made = [pair for pair, row in zip(made, described, strict=True) if not _drop(row)]
                pairs += made
                rows += described
            pairs.sort(key=lambda pair: index[pair[0]])
            drain.put(pairs)
    return sorted(rows, key=lambda row: index[row["name"]])


def _combine_block(walk: Walk, block: Block, plan: Any) -> tuple[list[Pair], list[dict[str, Any]]]:
    group = walk.group(block)
    outcome = walk.settings.method.combine(group, plan, None)
    _raise_for_info(walk, block, group, plan, outcome)
    assert outcome.B is not None
    assert outcome.A is not None
    assert outcome.rank is not None
    pairs: list[Pair] = []
    for i, name in enumerate(group.modules):
        p = int(outcome.rank[i])
        # a copy: a view would keep the padding of the whole batch alive
        B = outcome.B[i, :, :p].to("cpu", copy=True).contiguous()
        A = outcome.A[i, :p].to("cpu", copy=True).contiguous()
        pairs.append((name, B, A))
    trained = [walk.cohort.ranks[walk.cohort.index[name]] for name in group.modules]
    return pairs, module_rows(group.modules, group.kind, group.m, group.n, trained, outcome)


def _raise_for_info(walk: Walk, block: Block, group: Group, plan: Any, outcome: Outcome) -> None:
    if outcome.info is None or not bool(outcome.info.any()):
        return
    i = int(outcome.info.nonzero()[0, 0])
    code = int(outcome.info[i])
    where = f"module {printable(group.modules[i])!r}"
    if code & Info.NONFINITE:
        for k, client in enumerate(walk.cohort.clients):
            if (error := nonfinite_factor(block, i, k, client.name)) is not None:
                raise error
        raise RunError(
            f"{where}: the result is not finite although every input is; report this with the adapters' shapes"
        )
    if code & Info.NOT_CONVERGED:
        raise ConvergenceError(
            f"{where}: an iteration hit its guard; certified results needed. Use backend='reference'"
        )
    largest = _largest(walk.settings.method, group, i, plan)
    raise OutputOverflowError(
        f"{where}: max|x| of the result is {largest:.4g}; {str(walk.dtype).removeprefix('torch.')} holds "
        f"{torch.finfo(walk.dtype).max:.4g}. Use output='balanced', bfloat16 or a wider dtype"
    )


def _largest(method: Method, group: Group, i: int, plan: Any) -> float:
    one = dataclasses.replace(
        group,
        modules=group.modules[i : i + 1],
        B=tuple(B[i : i + 1] for B in group.B),
        A=tuple(A[i : i + 1] for A in group.A),
        scale=group.scale[i : i + 1],
        weight=group.weight[i : i + 1],
        dtype=torch.float64,
    )
    wide = method.combine(one, plan, None)
    assert wide.B is not None
    assert wide.A is not None
    return max(float(wide.B.abs().max()), float(wide.A.abs().max()))


def _drop(row: dict[str, Any]) -> bool:
    """Whether a row is that of a zero module, which then stands in the report with rank 0."""
    if Note.ZERO.name not in row["notes"]:
        return False
    row["rank"] = 0
    return True
