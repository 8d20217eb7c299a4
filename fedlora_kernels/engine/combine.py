"""The last pass: what the method makes of each module, in canonical order, and a row of the report for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.backends.native.threads import spare_threads
from fedlora_kernels.engine.delivery import ModuleOutput
from fedlora_kernels.engine.faults import nonfinite_factor, nonfinite_previous
from fedlora_kernels.engine.frozen import check_frozen
from fedlora_kernels.engine.report import module_rows
from fedlora_kernels.engine.slabs import Block, Drain
from fedlora_kernels.engine.sums import Summing
from fedlora_kernels.engine.underflow import UNDERFLOW, underflows
from fedlora_kernels.engine.walk import Summed, Walk
from fedlora_kernels.errors import ConvergenceError, OutputOverflowError, RunError
from fedlora_kernels.methods.contract import Group, Method, Outcome, Pair, Previous
from fedlora_kernels.methods.factors import client_squares

__all__ = ["combine"]

Rows = list[dict[str, Any]]


def combine(
    walk: Walk,
    plan: Any,
    sink: Callable[[Sequence[ModuleOutput], Rows, Any], None],
    done: Sequence[Rows] = (),
    told: bool = False,
) -> Rows:
    """Give what modules leave to ``sink`` slab by slab in canonical order, in a thread; return the rows of the report.

    With them go their rows and, if ``told``, what is found of the clients beside each other. ``done`` are the rows of the slabs that
    an earlier process went through; they are not read again.
    """
    index = walk.cohort.index
    rows: Rows = [row for slab in done for row in slab]

    def write(slab: tuple[Sequence[ModuleOutput], Rows, Any]) -> None:
        with walk.timed("write"):
            sink(*slab)

    # what streams is done as fast as it is read: its sums leave a processor to the reader and the writer
    spared = int(walk.settings.method.streams and not walk.settings.measure)
    with (
        walk.slabs("combine", False, Summing.of(walk, plan), skip=len(done)) as slabs,
        Drain(write) as drain,
        spare_threads(spared),
    ):
        for slab in slabs:
            modules: list[ModuleOutput] = []
            described: Rows = []
            for block in slab:
                made, new = _made(walk, *_combined(walk, block, plan))
                for module, row in zip(made, new, strict=True):
                    module.spectrum = row["singular_values"]
                    if walk.settings.write.drop_zero:
                        _drop(module, row)
                modules += made
                described += new
                del block  # its memory takes the next one
            modules.sort(key=lambda module: index[module.name])
            rows += described
            drain.put((modules, described, walk.told() if told else None))
    if sorted(row["name"] for row in rows) != sorted(index):
        raise RunError(
            "the slabs of this run do not go on where those done before end; delete what was kept and run again"
        )
    return sorted(rows, key=lambda row: index[row["name"]])


def _combined(walk: Walk, block: Block | Summed, plan: Any) -> tuple[Group, Outcome]:
    if isinstance(block, Summed):
        return block.group, block.outcome
    with walk.timed("compute"):
        return _combine_block(walk, block, plan)


def _combine_block(walk: Walk, block: Block, plan: Any) -> tuple[Group, Outcome]:
    group, method = walk.group(block), walk.settings.method
    previous = walk.previous(block)
    frozen = method.frozen_factor(group.round)
    if frozen is not None:
        check_frozen(walk.as_sent(group), frozen, [client.name for client in walk.cohort.clients])
    outcome = method.combine(group, plan, previous)
    _raise_for_info(walk, block, group, plan, previous, outcome)
    _check_given(method, outcome)
    walk.look(group)
    return group, outcome


def _made(walk: Walk, group: Group, outcome: Outcome) -> tuple[list[ModuleOutput], list[dict[str, Any]]]:
    """What the modules of a group leave, and their rows of the report."""
    made = [_module(name, i, outcome) for i, name in enumerate(group.modules)]
    rows = [walk.cohort.index[name] for name in group.modules]
    trained, stacked = [walk.cohort.trained[row] for row in rows], [sum(walk.cohort.ranks[row]) for row in rows]
    described = module_rows(
        group.modules, group.kind, group.m, group.n, trained, stacked, outcome, _contributions(walk, group, outcome)
    )
    for i, (module, row) in enumerate(zip(made, described, strict=True)):
        if walk.dtype == torch.float16 and _underflows(module, row, group, i):
            row["notes"].append(UNDERFLOW)
    return made, described


def _contributions(walk: Walk, group: Group, outcome: Outcome) -> Tensor | None:
    """What each client adds to the sum, ``|w_k| |D_k|_F`` (N, K), where weights are taken as they are: they may cancel."""
    if walk.settings.normalize or outcome.spectrum is None:
        return None
    with walk.timed("compute"):
        return group.weight.abs() * client_squares(group).clamp(min=0.0).sqrt()


def _check_given(method: Method, outcome: Outcome) -> None:
    there = {"common": outcome.B is not None, "personal": outcome.personal is not None}
    for what, given in there.items():
        if given != (what in method.gives):
            raise RunError(f"method {method.name!r} declares to give {', '.join(method.gives)}, but {what} disagrees")


def _module(name: str, i: int, outcome: Outcome) -> ModuleOutput:
    made = ModuleOutput(name)
    if outcome.state:
        # copies, as of pairs
        made.state = {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in outcome.state[i].items()}
    if outcome.B is not None and outcome.A is not None and outcome.rank is not None:
        made.common = _cut(Pair(outcome.B, outcome.A, outcome.rank), i)
    if outcome.residual is not None and int(outcome.residual.rank[i]) > 0:
        made.residual = _cut(outcome.residual, i)
    for k, pair in enumerate(outcome.personal or ()):
        if pair is not None and int(pair.rank[i]) > 0:
            made.personal[k] = _cut(pair, i)
    return made


def _cut(pair: Pair, i: int) -> tuple[Tensor, Tensor]:
    """The pair of one module on the host: a view of the batch, or a copy where that would keep the padding of the batch alive."""
    p = int(pair.rank[i])
    copy = p < pair.A.shape[1]
    return tuple(x.to("cpu", copy=copy) for x in (pair.B[i, :, :p], pair.A[i, :p]))  # type: ignore[return-value]


def _raise_for_info(
    walk: Walk, block: Block, group: Group, plan: Any, previous: Previous | None, outcome: Outcome
) -> None:
    if outcome.info is None or not bool(outcome.info.any()):
        return
    i = int(outcome.info.nonzero()[0, 0])
    code = int(outcome.info[i])
    where = f"module {printable(group.modules[i])!r}"
    if code & Info.NONFINITE:
        for k, client in enumerate(walk.cohort.clients):
            if (error := nonfinite_factor(block, i, k, client.name)) is not None:
                raise error
        if previous is not None and (error := nonfinite_previous(previous, i, group.modules[i])) is not None:
            raise error
        raise RunError(
            f"{where}: the result is not finite although every input is; report this with the adapters' shapes"
        )
    if code & Info.NOT_CONVERGED:
        raise ConvergenceError(
            f"{where}: an iteration hit its guard; certified results needed. Use backend='reference'"
        )
    largest = _largest(walk.settings.method, group, i, plan, previous)
    balance = "output='balanced', " if getattr(walk.settings.method, "output", "") == "left" else ""
    raise OutputOverflowError(
        f"{where}: max|x| of the result is {largest:.4g}; {str(walk.dtype).removeprefix('torch.')} holds "
        f"{torch.finfo(walk.dtype).max:.4g}. Use {balance}bfloat16 or a wider dtype"
    )


def _largest(method: Method, group: Group, i: int, plan: Any, previous: Previous | None) -> float:
    one = dataclasses.replace(group.part(i, i + 1), dtype=torch.float64)
    if previous is not None:
        B, A = (None if factor is None else factor[i : i + 1] for factor in (previous.B, previous.A))
        previous = dataclasses.replace(previous, B=B, A=A, state=previous.state[i : i + 1])
    wide = method.combine(one, plan, previous)
    pairs = [pair for pair in (wide.residual, *(wide.personal or ())) if pair is not None]
    if wide.B is not None and wide.A is not None:
        pairs.append(Pair(wide.B, wide.A, torch.empty(0)))
    return max(float(factor.abs().max()) for pair in pairs for factor in (pair.B, pair.A) if factor.numel())


def _underflows(module: ModuleOutput, row: Mapping[str, Any], group: Group, i: int) -> bool:
    """Whether the dtype takes more of a module than rounding does; what was zero before is not lost."""
    if Note.ZERO.name in row["notes"] or row["singular_values"] == []:
        return False
    shared = [pair for pair in (module.common, module.residual) if pair is not None]
    own = [pair for k, pair in module.personal.items() if bool(group.B[k][i].any()) and bool(group.A[k][i].any())]
    return underflows(shared) or any(underflows([pair]) for pair in own)


def _drop(module: ModuleOutput, row: dict[str, Any]) -> None:
    """Leave out what is zero of a module whose update is, or is cut to nothing; with nothing left, its rank in the report is 0."""
    if Note.ZERO.name not in row["notes"] and row["singular_values"] != []:
        return
    module.common = None
    module.personal = {k: (B, A) for k, (B, A) in module.personal.items() if bool(B.any()) and bool(A.any())}
    row["rank"] = max((A.shape[0] for _, A in module.personal.values()), default=0)
