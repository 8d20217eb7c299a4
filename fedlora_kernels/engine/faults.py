"""Numbers that cannot be used: the error that names client, module, tensor and place."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.slabs import Block
from fedlora_kernels.errors import FedLoRAError, NonFiniteError, OutputOverflowError
from fedlora_kernels.methods.contract import Previous

__all__ = ["beyond_float64", "nonfinite", "nonfinite_factor", "nonfinite_previous"]


def nonfinite(value: Tensor, where: str, what: str = "that client", *, first: int = 0) -> FedLoRAError | None:
    """The error that names the first NaN or Inf of ``value``, whose rows count from ``first``; None if there is none."""
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return None
    index = tuple(torch.nonzero(bad)[0].tolist())
    found = float(value[index])
    index = (index[0] + first, *index[1:]) if index else index
    return NonFiniteError(f"{where}: {found} at index {index}; finite numbers needed. Repair {what} or leave it out")


def nonfinite_factor(block: Block, i: int, k: int, client: str) -> FedLoRAError | None:
    """The error of the first NaN or Inf in the factors of client k in module i of a block; None if all is finite."""
    where = _where(block, i, client)
    return nonfinite(block.A[k][i], f"{where}, lora_A") or nonfinite(block.B[k][i], f"{where}, lora_B")


def nonfinite_previous(previous: Previous, i: int, module: str) -> FedLoRAError | None:
    """The error of the first NaN or Inf in what the round before left of module i of a block; None if all is finite."""
    tensors = {} if previous.A is None or previous.B is None else {"lora_A": previous.A[i], "lora_B": previous.B[i]}
    tensors |= previous.state[i] if previous.state else {}
    errors = (nonfinite(x, f"previous, module {printable(module)!r}, {name}", "it") for name, x in tensors.items())
    return next((error for error in errors if error is not None), None)


def beyond_float64(block: Block, i: int, client: str) -> FedLoRAError:
    """The error of finite factors whose product is too large."""
    return OutputOverflowError(
        f"{_where(block, i, client)}: the squared norm of the update exceeds float64; less than 1e154 needed. Scale it down"
    )


def _where(block: Block, i: int, client: str) -> str:
    return f"client {printable(client)!r}, module {printable(block.plan.modules[i])!r}"
