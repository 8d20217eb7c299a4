"""Numbers that cannot be used: the error that names client, module, tensor and place."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.slabs import Block
from fedlora_kernels.errors import FedLoRAError, NonFiniteError, OutputOverflowError

__all__ = ["beyond_float64", "nonfinite", "nonfinite_factor"]


def nonfinite(value: Tensor, where: str) -> FedLoRAError | None:
    """The error that names the first NaN or Inf of ``value``; None if there is none."""
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return None
    index = tuple(torch.nonzero(bad)[0].tolist())
    found = float(value[index])
    return NonFiniteError(
        f"{where}: {found} at index {index}; finite numbers needed. Repair that client or leave it out"
    )


def nonfinite_factor(block: Block, i: int, k: int, client: str) -> FedLoRAError | None:
    """The error of the first NaN or Inf in the factors of client k in module i of a block; None if all is finite."""
    where = _where(block, i, client)
    return nonfinite(block.A[k][i], f"{where}, lora_A") or nonfinite(block.B[k][i], f"{where}, lora_B")


def beyond_float64(block: Block, i: int, client: str) -> FedLoRAError:
    """The error of finite factors whose product is too large."""
    return OutputOverflowError(
        f"{_where(block, i, client)}: the squared norm of the update exceeds float64; less than 1e154 needed. Scale it down"
    )


def _where(block: Block, i: int, client: str) -> str:
    return f"client {printable(client)!r}, module {printable(block.plan.modules[i])!r}"
