"""Who loads the output: whether what the clients and the method give fits what that loader takes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora_kernels.adapters.forms import factor_keys
from fedlora_kernels.adapters.model import Adapter, ModuleSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import WriteOptions
from fedlora_kernels.adapters.output_file import names_file
from fedlora_kernels.errors import InputError
from fedlora_kernels.methods.contract import Method

__all__ = ["settle_target", "target_findings"]

KINDS = {
    "kohya": ("linear", "conv1d", "conv2d", "conv3d"),
    "vllm": ("linear", "embedding"),
}
"""Kinds of layer that a loader takes; one that is not named takes all."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; 16 by itself."""


def settle_target(
    write: WriteOptions,
    clients: Mapping[str, Adapter],
    modules: Mapping[str, ModuleSpec],
    method: Method,
    out: str | os.PathLike[str] | None,
    *,
    per_client: bool = False,
) -> WriteOptions:
    """The options with their target; None becomes the first client's own format.

    Args:
        write: as asked for.
        clients: those that take part, by name, in order.
        modules: of the output.
        method: what it gives decides whether one file can hold it.
        out: where the output goes.
        per_client: whether each client's own adapter is written too.

    Raises InputError where the target cannot hold these modules, or ``out`` is a file for what needs a folder.
    """
    name, first = next(iter(clients.items()))
    kohya = first.spelling is not None
    target = write.target or ("kohya" if kohya else "peft")
    if kohya != (target == "kohya"):
        raise InputError(_other_format(target, name, first))
    known = KINDS.get(target)
    other = next((module for module in modules.values() if known is not None and module.kind not in known), None)
    if other is not None:
        raise InputError(
            f"module {printable(other.name)!r}: target {target!r} takes no {other.kind}; leave this module out, or write target 'peft'"
        )
    if out is not None and names_file(out):
        _check_one_file(target, method, per_client)
    return dataclasses.replace(write, target=target)


def target_findings(target: str | None, ranks: Iterable[int]) -> tuple[list[str], list[str]]:
    """Warnings and notes on what the loader must be told."""
    largest = max(ranks, default=0)
    if target != "vllm" or not largest:
        return [], []
    enough = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    if enough is None:
        return [
            f"rank {largest}: vLLM takes at most {VLLM_RANKS[-1]}; aggregate with a smaller rank, such as --max-rank 512"
        ], []
    return [], [f"rank {largest} in every module: start vLLM with --max-lora-rank {enough} or more"]


def _other_format(target: str, name: str, first: Adapter) -> str:
    key = printable(factor_keys(next(iter(first.modules.values())))[1])
    if target == "kohya":
        return (
            f"client {printable(name)!r}: target 'kohya' needs kohya files, and this is a PEFT adapter, as its key {key!r} says. "
            "Leave target= out and convert the result (fedlora convert --to kohya)"
        )
    return (
        f"client {printable(name)!r}: target {target!r} needs PEFT adapters, and this is a kohya file, as its key {key!r} says: its names "
        "are no module paths. Leave target= out and convert the result (fedlora convert --to peft)"
    )


def _check_one_file(target: str, method: Method, per_client: bool) -> None:
    if target != "kohya":
        raise InputError("out is a file, and PEFT adapters are folders; name one without .safetensors")
    more: Sequence[Any] = [given for given in method.gives if given != "common"]
    if more or per_client or "common" not in method.gives:
        what = (
            "adapters of the clients"
            if per_client
            else f"what method {method.name!r} gives ({', '.join(sorted(method.gives))})"
        )
        raise InputError(f"out is a file, which cannot hold {what}; name a folder, without .safetensors")
