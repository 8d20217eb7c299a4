"""Client weights: host float64, one per client block, checked before anything is computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.errors import BackendError, WeightError

__all__ = ["host_weights"]


def host_weights(where: str, weights: Any, batch: tuple[int, ...], count: int) -> Tensor:
    """Return weights as a (N, count) float64 CPU tensor, N the product of ``batch``.

    ``weights`` is None (all one), a number if ``count`` is 1, ``(count,)`` or ``(*batch, count)``; any framework, list of
    numbers included. WeightError names a weight that is not finite; BackendError refuses weights on an accelerator,
    because reading them would stop the host.
    """
    size = math.prod(batch)
    if weights is None:
        return torch.ones(size, count, dtype=torch.float64)
    values = _as_float64(where, weights)
    if values.ndim == 0 and count == 1:
        values = values.reshape(1)
    if values.shape not in ((count,), (*batch, count)):
        needed = f"({count},)" if not batch else f"({count},) or {(*batch, count)}"
        raise WeightError(f"{where}weights has shape {values.shape}; {needed} is needed: one weight per client block")
    finite = np.isfinite(values)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        label = ", ".join(map(str, index))
        raise WeightError(
            f"{where}weights[{label}] is {values[index]}; a finite number is needed. Repair or drop that client"
        )
    return torch.tensor(np.broadcast_to(values, (*batch, count)).reshape(size, count), dtype=torch.float64)


def _as_float64(where: str, weights: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(weights, Tensor):
        if weights.device.type != "cpu":
            raise BackendError(f"{where}weights are on {weights.device}; the host is needed. Pass weights.cpu()")
        if weights.is_complex() or weights.dtype == torch.bool:
            raise WeightError(f"{where}weights have dtype {weights.dtype}; real numbers are needed")
        return weights.detach().to(torch.float64).numpy()
    try:
        values = np.asarray(weights)
    except (ValueError, TypeError) as error:
        raise WeightError(f"{where}weights cannot be read as an array of numbers: {error}") from error
    if values.dtype.name != "bfloat16" and values.dtype.kind not in "iuf" and values.size:
        raise WeightError(f"{where}weights have dtype {values.dtype}; real numbers are needed")
    return values.astype(np.float64)
