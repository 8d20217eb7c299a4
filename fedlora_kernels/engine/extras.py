"""Tensors that are no factors: weighted means of absolute values, weighted sums of bias changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.clients import Client
from fedlora_kernels.engine.faults import nonfinite
from fedlora_kernels.errors import FedLoRAError, InputError, NonFiniteError, OutputOverflowError, WeightError

__all__ = ["check_mean", "combine_extra", "own_extra", "scan_extras"]


def combine_extra(
    name: str,
    clients: Sequence[Client],
    weights: Sequence[float],
    scales: Sequence[float] | None,
    *,
    rule: str,
    missing: str,
    dtype: torch.dtype,
) -> tuple[Tensor, str]:
    """Combine one extra over its owners in float64 and say by which rule.

    Absolute values (``scales`` is None): the weighted mean over the owners, or the first owner's tensor with
    ``rule="first"``. A bias change: ``sum_k w_k s_k b_k`` with these scales, over all clients with ``missing="zero"``, else with
    the owners' weights made to sum to the whole.

    Raises:
        InputError: weights that do not sum to 1 and absolute values.
        WeightError: owners whose weights sum to 0.
        NonFiniteError: NaN or Inf, naming client and tensor.
        OutputOverflowError: the result does not fit ``dtype``.
    """
    owners = [k for k, client in enumerate(clients) if name in client.opened.extras]
    if scales is None and rule == "first":
        return _cast(name, _read(clients[owners[0]], name), dtype), "first"
    share = math.fsum(weights[k] for k in owners)
    whole = math.fsum(weights)
    if scales is None:
        check_mean(name, weights)
        whole = 1.0
    complete = len(owners) == len(clients) or missing == "zero"
    if share == 0.0 and not (scales is not None and complete):
        raise WeightError(f"tensor {printable(name)!r}: the weights of its owners sum to 0; a positive sum needed")
    rescale = 1.0 if scales is not None and complete else whole / share
    total: Tensor | None = None
    for k in owners:
        factor = weights[k] * rescale * (1.0 if scales is None else scales[k])
        value = _read(clients[k], name).to(torch.float64, copy=True).mul_(factor)
        total = value if total is None else total.add_(value)
    assert total is not None
    return _cast(name, total, dtype), "mean" if scales is None else "sum"


def check_mean(name: str, weights: Sequence[float]) -> None:
    """Raise InputError where the weights of a mean of absolute values do not sum to 1."""
    whole = math.fsum(weights)
    if abs(whole - 1.0) > 1e-9:
        raise InputError(
            f"tensor {printable(name)!r}: the weights sum to {whole:g}, and a mean of values needs 1. "
            "Use normalize=True, or extras='first'"
        )


def own_extra(name: str, client: Client, scale: float | None, dtype: torch.dtype) -> Tensor:
    """An extra that stays on its client: its value, or its bias change with the scale folded in."""
    value = _read(client, name)
    return _cast(name, value if scale is None else value.to(torch.float64) * scale, dtype)


def _read(client: Client, name: str) -> Tensor:
    value = client.opened.extra(name).cpu()
    if (error := nonfinite(value, f"client {printable(client.name)!r}, tensor {printable(name)!r}")) is not None:
        raise error
    return value


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    result = value.to(dtype)
    if not bool(torch.isfinite(result).all()):
        size = float(value.abs().max())
        raise OutputOverflowError(
            f"tensor {printable(name)!r}: max|x| is {size:.4g}; {dtype} cannot hold it. Use bfloat16 or a wider dtype"
        )
    return result.contiguous()


def scan_extras(clients: Sequence[Client], names: Sequence[str]) -> Iterator[tuple[Client, FedLoRAError]]:
    """Yield every client whose extras hold NaN or Inf, with the error that says where."""
    for client in clients:
        for name in names:
            if name in client.opened.extras:
                try:
                    _read(client, name)
                except NonFiniteError as error:
                    yield client, error
                    break
