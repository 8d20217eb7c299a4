"""Adapters cut to a smaller rank: each the aggregate of itself alone, read once and written once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.folder import OUR_FILES, OUR_FOLDERS, OutputFolder, check_out
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import WRITTEN_HERE, ReadOptions, WriteOptions
from fedlora_kernels.adapters.output_file import names_file
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.engine.clients import Client, check_apart, open_clients
from fedlora_kernels.engine.delivery import folder_names, write_report
from fedlora_kernels.engine.policy import drop
from fedlora_kernels.engine.report import SCHEMA
from fedlora_kernels.engine.result import Result
from fedlora_kernels.engine.settings import Progress, options_of
from fedlora_kernels.engine.state import REPORT_NAME
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import RankRule
from fedlora_kernels.methods.florist import DEFAULT_RULE

__all__ = ["resize", "resize_all", "summary"]

ALONE = ("clients", "cancellation", "broadcast_rank", "efficiency")
"""Totals that say nothing of a single adapter."""


def resize(
    adapter: Any,
    *,
    rule: RankRule = DEFAULT_RULE,
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
    compare: bool = False,
    name: str | None = None,
) -> Result:
    """Cut an adapter to the ranks that a rule chooses: the best approximation of each module's update, never formed.

    Args:
        adapter: a path, an Adapter or a (state_dict, config) pair.
        rule: rank rule, such as ``Energy(0.99)``, ``Rank(16)`` or ``Budget("10MB")``.
        read: how it is read, `ReadOptions`.
        write: what the output looks like, `WriteOptions`.
        out: folder to write, as a stream, atomically; None keeps the result in memory.
        seed: key of random padding rows.
        backend: "auto" or a backend's name.
        device: where to compute; None is the GPU where there is one and the backend can use it.
        dtype: of the result; None is float32, or float64 if the adapter is float64.
        memory: bytes for data in flight (1 GiB), an int or a text such as "512MiB".
        progress: called as ``progress(stage, done_bytes, total_bytes)``.
        overwrite: replace an existing ``out`` that holds only files written here.
        compare: also report the whole spectrum of every module, as `aggregate` does; it costs about as much as the resizing.
        name: what messages and report call it; None is the name of its file or folder.

    Returns:
        `Result` with the resized adapter (scale baked to 1) and a report: per module the rank before and after, the share of the
        energy kept, the error and its bound.

    Raises:
        InputError, RunError: as `aggregate`.
    """
    return aggregate(
        [adapter] if name is None else {name: adapter},
        rule=rule,
        read=read,
        write=write,
        out=out,
        seed=seed,
        backend=backend,
        device=device,
        dtype=dtype,
        memory=memory,
        progress=progress,
        overwrite=overwrite,
        compare=compare,
    )


def resize_all(
    adapters: Sequence[Any] | Mapping[str, Any],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    read: ReadOptions | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Result]:
    """Resize several adapters, one after another, each for itself: they need not have anything in common.

    Args:
        adapters: paths, Adapters or (state_dict, config) pairs, or a mapping from name to any of them. Names default to
            those of files and folders, made unique.
        out: folder to write: ``out/NAME/`` for each adapter and ``out/report.json``; it appears complete or not at all. None keeps
            the results in memory.
        overwrite: replace an existing ``out`` that holds only files written here.
        read: how adapters are read, `ReadOptions`.
        progress: called as ``progress("resize", done_bytes, total_bytes)``.
        **options: the other arguments of `resize`.

    Returns:
        The `Result` of each adapter, by name.

    Raises:
        InputError, RunError: as `aggregate`. All adapters are opened before the first is resized, and all that cannot be read
            are named together.
    """
    options_of("read", read, ReadOptions)
    if out is not None and names_file(out):
        raise InputError(
            f"output {printable(out)} is a file, which holds one adapter; name a folder, without .safetensors"
        )
    if out is not None:
        check_out(out, overwrite)
    with ExitStack() as stack:
        roster = open_clients(adapters, None, normalize=True, read=read or ReadOptions(), written=True)
        for client in roster:
            stack.callback(client.close)
        if failing := [client for client in roster if client.failures]:
            drop(roster, failing, Policy("strict"))
        steps = _Steps(roster, progress)
        if out is None:
            return {client.name: steps.run(client, None, read, options) for client in roster}
        check_apart(roster, out, read)
        places = _places([client.name for client in roster])
        folder = stack.enter_context(OutputFolder(out, overwrite))
        results = {
            client.name: steps.run(client, folder.path / place, read, options)
            for client, place in zip(roster, places, strict=True)
        }
        write_report(folder.path / REPORT_NAME, summary(results))
        folder.commit()
    return {
        name: _reopened(result, Path(folder.out) / place)
        for (name, result), place in zip(results.items(), places, strict=True)
    }


def summary(results: Mapping[str, Result]) -> dict[str, Any]:
    """The report on several adapters, schema 1: a row for each, which stands in its own report at length."""
    rows = []
    for (name, result), place in zip(results.items(), _places(list(results)), strict=True):
        report = result.report
        (client,), totals = report["clients"], report["totals"]
        rows.append(
            {
                "name": name,
                "source": client["source"],
                "folder": place,
                "rule": report["method"]["rule"],
                "dtype": report["dtype"],
                "bytes_in": client["bytes"],
                **{key: value for key, value in totals.items() if key not in ALONE},
                "warnings": report["warnings"],
                "notes": report["notes"],
            }
        )
    return {"schema": SCHEMA, "tool": {"name": "fedlora_kernels", "version": __version__}, "adapters": rows}


def _places(names: Sequence[str]) -> list[str]:
    """The folder of each adapter within the output."""
    return folder_names([name.removesuffix(".safetensors") for name in names], (*OUR_FILES, *OUR_FOLDERS))


class _Steps:
    """One adapter after another, with the progress of all."""

    def __init__(self, roster: Sequence[Client], progress: Progress | None) -> None:
        self._total = sum(client.opened.nbytes for client in roster)
        self._progress = progress or (lambda *_: None)
        self._done = 0

    def run(self, client: Client, out: Path | None, read: ReadOptions | None, options: Mapping[str, Any]) -> Result:
        def progress(_stage: str, done: int, _total: int) -> None:
            self._progress("resize", self._done + done, self._total)

        adapter = client.opened
        result = resize(adapter, name=client.name, out=out, read=read, progress=progress, **options)
        self._done += adapter.nbytes
        self._progress("resize", self._done, self._total)
        client.close()
        return result


def _reopened(result: Result, place: Path) -> Result:
    """The result with its adapter where it is by now."""
    assert result.adapter is not None
    result.adapter.close()
    adapter = open_adapter(place, WRITTEN_HERE)
    return dataclasses.replace(result, adapter=adapter, state=dataclasses.replace(result.state, adapter=adapter))
