"""Aggregation of LoRA adapters: the one call that joins clients, a method, a policy and an output."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from fedlora_kernels import backends
from fedlora_kernels.adapters.folder import KeptFolder, OutputFolder, check_out
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.engine.clients import check_apart, open_clients, present
from fedlora_kernels.engine.fingerprint import fingerprint
from fedlora_kernels.engine.journal import Journal
from fedlora_kernels.engine.policy import admit
from fedlora_kernels.engine.result import Result
from fedlora_kernels.engine.run import Run
from fedlora_kernels.engine.settings import (
    Progress,
    Settings,
    budget_of,
    check_delivery,
    client_state_of,
    count_of,
    device_of,
    dtype_of,
    memory_of,
    method_of,
    options_of,
    robust_of,
    round_of,
)
from fedlora_kernels.engine.state import check_state, previous_state
from fedlora_kernels.engine.target import settle_target
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import RankRule
from fedlora_kernels.methods.contract import Method

__all__ = ["aggregate"]


def aggregate(
    clients: Sequence[Any] | Mapping[str, Any],
    method: str | Method = "florist",
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    rule: RankRule | None = None,
    robust: Any = None,
    previous: Any = None,
    round: int | None = None,  # noqa: A002
    client_state: Any = None,
    policy: str | Policy = "strict",
    read: ReadOptions | None = None,
    write: WriteOptions | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    backend: str = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    resume: bool = False,
    per_client: bool = False,
    measure: bool = True,
    compare: bool = False,
    **method_options: Any,
) -> Result:
    """Combine the LoRA adapters of several clients into one.

    Args:
        clients: PEFT folders, kohya files, Adapters or (state_dict, config) pairs, or a mapping from name to any of them. Their order
            is kept; names default to folder names, made unique.
        method: name of a method, or a Method; ``rule`` and ``method_options`` are its options.
        weights: one per client, such as sample counts; None is uniform. A client of weight 0 counts as absent: its headers are
            checked, its tensors never read.
        normalize: divide the weights by their sum (then all are >= 0). False takes any finite reals as they are.
        rule: rank rule of a method that chooses its rank, such as ``Energy(0.95)`` or ``Rank(16)``.
        robust: a rule such as ``Krum(f=2)`` whose coefficients replace the weights before the method runs.
        previous: output folder, Adapter, Result or State of the round before; gives ``round``, and what some methods remember.
        round: 0-based; None is the round of ``previous`` + 1, or 0.
        client_state: what clients report beside their factors, by name or in their order (fedtree: mixing coefficients).
        policy: what happens to bad clients: "strict", "drop", "clip" or a `Policy`.
        read: how clients are read, `ReadOptions`.
        write: what the output looks like, `WriteOptions`.
        out: folder to write, as a stream, atomically, or ``FILE.safetensors`` where the clients are kohya files, with its report
            beside it as ``FILE.safetensors.report.json``; None keeps the result in memory.
        seed: key of random padding rows; nothing else is random.
        backend: "auto" or a backend's name.
        device: where to compute; None is the GPU where there is one and the backend can use it.
        dtype: of the result; None is float32, or float64 if a client is float64.
        memory: bytes for data in flight (1 GiB), an int or a text such as "512MiB". Two slabs of a quarter each are alive; a
            single module larger than that is still read whole.
        progress: called as ``progress(stage, done, total)`` in the caller's thread: at the start of a stage ("survey", "combine")
            and after each block, in bytes of factors. What it raises ends the run.
        overwrite: replace an existing ``out`` that holds only files written here.
        resume: keep ``out.partial-<hash of inputs and options>`` when the run is ended before its time, and go on after the last
            slab of modules in it: the result is the same to the last bit. A survey is made again. Other files, options or
            versions have another hash.
        per_client: also write ``out/clients/<name>/``, what each client receives, with scale 1.
        measure: report the distance of factor means from the weighted sum; it costs more than the means themselves. Without it nobody
            looks either at whose update points elsewhere.
        compare: also report how the clients' updates compare with each other and with their sum: norms, cosines, cancellation, what
            factor means would lose, and the whole spectrum of the sum; it costs about as much as the exact sum once more.
        **method_options: options of the method.

    Returns:
        `Result` with the adapter (scale baked to 1), the report and what each client receives.

    Raises:
        InputError: anything wrong with arguments or clients; its subclasses FormatError, UnsupportedVariantError, MismatchError,
            NonFiniteError, LimitError and WeightError say what, and name client, module and remedy.
        RunError: ConvergenceError, BackendError, OutputOverflowError, or a disc that cannot be written.
    """
    started = time.perf_counter()
    write = options_of("write", write, WriteOptions)
    made = method_of(method, rule, write, method_options)
    check_delivery(made, out, per_client)
    if resume and out is None:
        raise InputError("resume=True goes on with what is on disc; give out=")
    before = previous_state(previous)
    number = round_of(round, before)
    whole, budget = budget_of(made)
    settings = Settings(
        method=whole,
        policy=Policy.of(policy),
        read=options_of("read", read, ReadOptions),
        write=write,
        normalize=normalize,
        dtype=dtype_of(dtype),
        device=device_of(device, backend),
        backend=backend,
        memory=memory_of(memory),
        seed=count_of("seed", seed),
        round=number,
        progress=progress or (lambda *_: None),
        robust=robust_of(robust, made),
        budget=budget,
        state=check_state(before, made, number),
        per_client=per_client,
        measure=measure,
        compare=compare,
    )
    if backend != "auto":
        backends.get(backend)
    if out is not None:
        check_out(out, overwrite)
    with ExitStack() as stack:
        roster = open_clients(clients, weights, normalize=normalize, read=settings.read, written=per_client)
        for client in roster:
            stack.callback(client.close)
        if out is not None:
            check_apart(roster, out, settings.read)
        names = [client.name for client in roster]
        settings = dataclasses.replace(settings, client_state=client_state_of(client_state, made, names))
        seen = stack.enter_context(backends.record())
        check = admit(roster, settings.policy, settings.read)
        taking_part = {client.name: client.opened for client in present(roster)}
        write = settle_target(write, taking_part, check.modules, made, out, per_client=per_client)
        settings = dataclasses.replace(settings, write=write)
        run = Run(settings, roster, check)
        folder, journal = None, None
        if out is not None and resume:
            folder, journal = _kept(out, fingerprint(settings, roster), overwrite, run.warnings, stack)
        elif out is not None:
            folder = stack.enter_context(OutputFolder(out, overwrite))
        delivered, report = run.execute(folder, seen, started, journal)
    for text in report["warnings"]:
        warnings.warn(text, UserWarning, stacklevel=2)
    readable = {client.name: client.adapter for client in roster if client.adapter is not None}
    return Result(
        delivered.adapter,
        report,
        delivered.state,
        residual=delivered.residual,
        clients=readable,
        method=made,
        personal=delivered.clients,
    )


def _kept(
    out: str | os.PathLike[str], key: str, overwrite: bool, warned: list[str], stack: ExitStack
) -> tuple[OutputFolder, Journal]:
    """What an earlier run of the same key has kept, or the beginning of it; ``warned`` of what is there and not used."""
    folder = stack.enter_context(KeptFolder(out, key, overwrite))
    journal = Journal(folder, key)
    stack.callback(journal.close)
    warned += [
        f"{printable(other)} is of a run with other files, options or versions and not used; go on with that run, or delete it"
        for other in folder.others()
    ]
    if journal.warning is not None:
        warned.append(journal.warning)
    return folder, journal
