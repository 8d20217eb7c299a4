"""How many singular values a rank rule keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import RuleCode, RuleSpec
from fedlora_kernels.errors import InputError, MismatchError, NonFiniteError
from fedlora_kernels.linalg.arrays import Caller
from fedlora_kernels.linalg.blocks import unflatten
from fedlora_kernels.linalg.ragged import Ragged, each_problem
from fedlora_kernels.linalg.rules import RankRule, spec_of

__all__ = ["select_rank"]


def select_rank(
    S: Any,
    rule: RankRule,
    *,
    total_energy: Any = None,
    floor: Any = None,
    check: bool = True,
    backend: str = "auto",
) -> Any:
    """Rank that ``rule`` chooses for each spectrum: counts, with boundaries as in docs/numerics.md, Rank rules.

    Never more than the numerical rank ``#{s_i > floor}``; 0 for a zero spectrum. On the S of a `ProductSVD` pass its
    ``energy`` as ``total_energy`` and cap the answer at its ``certificate.numerical_rank``.

    Args:
        S: ``(..., k)`` singular values, descending and >= 0, float64, float32, float16 or bfloat16; or `Ragged` of such.
        rule: any rank rule but `Budget`.
        total_energy: ``(...)`` or one number, ``|W|_F^2``; None is the sum of s_i^2, free of overflow.
        floor: ``(...)`` or one number, below which a value is noise; None is ``4 k u s_1``, u the unit roundoff of S's dtype.
        check: raise for data that are no spectrum; False answers 0 where a value is not finite, and never waits.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        ``(...)`` int64; a list for `Ragged`.

    Raises:
        NonFiniteError: NaN or Inf in S (``check=True``; the message names the spectrum).
        InputError: S negative or not descending, total_energy or floor negative or not finite (``check=True``); dtype.
        MismatchError: shapes that do not fit. ValueError: the rule is a `Budget`. TypeError, BackendError.

    Source: docs/numerics.md, Rank rules.
    """
    spec = spec_of(rule)
    results = [
        _select(where, *values, spec=spec, check=check, backend=backend)
        for where, values in each_problem(
            "select_rank", ("total_energy", "floor"), S=S, total_energy=total_energy, floor=floor
        )
    ]
    return results if isinstance(S, Ragged) else results[0]


def _select(where: str, S: Any, total_energy: Any, floor: Any, *, spec: RuleSpec, check: bool, backend: str) -> Any:
    caller = Caller("select_rank")
    given = caller.take("S", S)
    if given.dim() < 1:
        raise MismatchError(f"{where}S is a single number; singular values (..., k) are needed")
    batch, k = tuple(given.shape[:-1]), given.shape[-1]
    values = given.to(torch.float64).reshape(math.prod(batch), k)
    energies = _per_spectrum(caller, where, "total_energy", total_energy, batch)
    floors = _per_spectrum(caller, where, "floor", floor, batch)
    if check:
        zeros = values.new_zeros(len(values))
        _require_spectrum(where, batch, values, *(zeros if x is None else x for x in (energies, floors)))

    # Squares and sums are those of spectra with s_1 in [1, 2): their own may leave the range of float64.
    largest = values[:, 0] if k else values.sum(-1)
    power = _power_of_two_below(largest)
    scaled, largest = values / power[:, None], largest / power
    energies = (scaled * scaled).sum(-1) if energies is None else _divided(_divided(energies, power), power)
    floors = 2.0 * k * torch.finfo(given.dtype).eps * largest if floors is None else _divided(floors, power)
    if spec.code == RuleCode.ABSOLUTE:  # the only rule that knows a scale
        scaled, floors = values, floors * power
    sizes = {"p": k, "N": len(values)}
    chosen = backends.choose("select_rank", backend, given.dtype, caller.device, sizes)
    return caller.give(unflatten(chosen.select_rank(scaled, spec, energies, floors), batch))


def _power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two that is at most x; 1 where x is not positive and finite."""
    usable = torch.where((x > 0) & x.isfinite(), x, 1.0)
    return usable / (2 * torch.frexp(usable).mantissa)  # exact: the quotient is a power of two


def _divided(x: Tensor, power: Tensor) -> Tensor:
    """``x / power``, finite where x is."""
    return torch.where(x.isfinite(), (x / power).clamp_max(torch.finfo(x.dtype).max), x)


def _per_spectrum(caller: Caller, where: str, name: str, value: Any, batch: tuple[int, ...]) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return torch.full((math.prod(batch),), float(value), dtype=torch.float64, device=caller.device)
    tensor = caller.take(name, value).to(torch.float64)
    if tensor.dim() and tuple(tensor.shape) != batch:
        raise MismatchError(f"{where}{name} has shape {tuple(tensor.shape)}; {batch} or one number is needed")
    return tensor.expand(batch).reshape(math.prod(batch))


def _require_spectrum(where: str, batch: tuple[int, ...], S: Tensor, energies: Tensor, floors: Tensor) -> None:
    finite = S.isfinite().all(-1)
    ordered = (S >= 0).all(-1) & (S[:, 1:] <= S[:, :-1]).all(-1)
    bounds = (energies >= 0) & energies.isfinite() & (floors >= 0) & floors.isfinite()
    faults = torch.stack([~finite, ~ordered, ~bounds]).cpu()
    if not faults.any():
        return
    kind, row = (int(i) for i in faults.nonzero()[0])
    spot = where if not batch else f"{where}spectrum {tuple(int(i) for i in np.unravel_index(row, batch))}: "
    if kind == 0:
        raise NonFiniteError(f"{spot}S holds NaN or Inf; finite singular values are needed. Repair that input")
    if kind == 1:
        raise InputError(f"{spot}S is not descending and >= 0; sort it first")
    raise InputError(
        f"{spot}total_energy is {energies[row].item()} and floor {floors[row].item()}; finite numbers >= 0 are needed"
    )
