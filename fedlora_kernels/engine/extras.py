"""Tensors that are no factors: weighted means of absolute values, weighted sums of bias changes.

An embedding saved along may be larger than all factors together, so tensors are taken in pieces of some rows: beside the result
nothing whole lies in memory.
"""

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

PIECE = 32 << 20
"""Bytes of a piece in float64."""


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
        return own_extra(name, clients[owners[0]], None, dtype), "first"
    share = math.fsum(weights[k] for k in owners)
    whole = math.fsum(weights)
    if scales is None:
        check_mean(name, weights)
        whole = 1.0
    complete = len(owners) == len(clients) or missing == "zero"
    if share == 0.0 and not (scales is not None and complete):
        raise WeightError(f"tensor {printable(name)!r}: the weights of its owners sum to 0; a positive sum needed")
    rescale = 1.0 if scales is not None and complete else whole / share
    factors = [weights[k] * rescale * (1.0 if scales is None else scales[k]) for k in owners]
    result = _combined(name, [clients[k] for k in owners], factors, dtype)
    return result, "mean" if scales is None else "sum"


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
    return _combined(name, [client], [1.0 if scale is None else scale], dtype)


def _combined(name: str, clients: Sequence[Client], factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The sum of the clients' tensors times their factors."""
    shape = clients[0].opened.extras[name].tensor.shape
    result = torch.empty(shape, dtype=dtype)
    for start, stop in _cuts(shape):
        total: Tensor | None = None
        for client, factor in zip(clients, factors, strict=True):
            value = _read(client, name, start, stop).to(torch.float64, copy=True).mul_(factor)
            total = value if total is None else total.add_(value)
        assert total is not None
        (result[start:stop] if shape else result).copy_(_cast(name, total, dtype))
    return result


def _cuts(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Bounds of pieces of some rows; a single number is one."""
    rows = shape[0] if shape else 1
    step = max(1, PIECE // (8 * math.prod(shape[1:])))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _read(client: Client, name: str, start: int, stop: int) -> Tensor:
    adapter = client.opened
    value = adapter.extra_rows(name, start, stop) if adapter.extras[name].tensor.shape else adapter.extra(name).cpu()
    where = f"client {printable(client.name)!r}, tensor {printable(name)!r}"
    if (error := nonfinite(value, where, first=start)) is not None:
        raise error
    return value


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    result = value.to(dtype)
    if not bool(torch.isfinite(result).all()):
        size = float(value.abs().max())
        raise OutputOverflowError(
            f"tensor {printable(name)!r}: max|x| is {size:.4g}; {dtype} cannot hold it. Use bfloat16 or a wider dtype"
        )
    return result


def scan_extras(clients: Sequence[Client], names: Sequence[str]) -> Iterator[tuple[Client, FedLoRAError]]:
    """Yield every client whose extras hold NaN or Inf, with the error that says where."""
    for client in clients:
        for name in names:
            if name in client.opened.extras:
                try:
                    for start, stop in _cuts(client.opened.extras[name].tensor.shape):
                        _read(client, name, start, stop)
                except NonFiniteError as error:
                    yield client, error
                    break
