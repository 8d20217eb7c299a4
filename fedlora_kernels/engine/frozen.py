"""Factors that clients have not trained: the same in all of them, or an error that names two that differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.faults import nonfinite
from fedlora_kernels.errors import MismatchError
from fedlora_kernels.methods.common import holders, leaders
from fedlora_kernels.methods.contract import Group

__all__ = ["check_frozen"]

CHUNK = 64 << 20
"""Bytes of one client's factors that are compared at once."""


def check_frozen(group: Group, factor: str, names: Sequence[str]) -> None:
    """Raise where clients that own a module, with a weight other than 0, do not hold one and the same frozen factor.

    ``factor`` is "A", or "B" for ``s_k B_k``, folded in float64 with ``group.scale``, which must be the clients' own scales,
    before any clipping. Values are compared exactly, in a dtype that holds both; a smaller rank with the first rows of A, or
    columns of B, of the first client of largest rank. 0 and -0 are one value. A number that differs because it is NaN or Inf is
    named as such; Inf that all clients hold alike is left to the method's ``info``. ``names`` are those of the group's clients.

    Raises:
        MismatchError: names both clients, the module and the place.
        NonFiniteError: names client, module and place.
    """
    size = 8 * max(group.ranks, default=0) * (group.n if factor == "A" else group.m)
    step = max(1, CHUNK // max(1, size))
    for start in range(0, group.batch, step):
        _check(group.part(start, start + step), factor, names)


def _check(group: Group, factor: str, names: Sequence[str]) -> None:
    taking, leader = holders(group), leaders(group)
    others = taking & (leader[:, None] != torch.arange(len(group.B)))
    apart = [k for k in range(len(group.B)) if bool(others[:, k].any()) and not _alike(group, factor, k, leader)]
    if not apart:
        return
    reference = _reference(group, factor, leader)
    differs = torch.zeros(len(group.B), group.batch, dtype=torch.bool, device=group.device)
    for k in apart:
        own = _rows(group, factor, k)[:, : reference.shape[1]]
        differs[k] = (own != reference[:, : group.ranks[k]]).flatten(1).any(1)
    found = (differs.cpu().T & taking).nonzero()
    if len(found):
        i, k = found[0].tolist()
        _raise(group.part(i, i + 1), factor, names, k, int(leader[i]))


def _alike(group: Group, factor: str, k: int, leader: Tensor) -> bool:
    """Whether one look shows that client ``k`` holds what one leader of all modules does: it takes one pass over stored numbers."""
    first, rank = int(leader[0]), group.ranks[k]
    if bool((leader != first).any()):
        return False
    stored = group.A if factor == "A" else group.B
    own, other = stored[k], stored[first]
    if factor == "B" and not (torch.equal(group.scale[:, k], group.scale[:, first]) and bool(group.scale[:, k].all())):
        return False
    return own.dtype == other.dtype and torch.equal(own, other[:, :rank] if factor == "A" else other[:, :, :rank])


def _reference(group: Group, factor: str, leader: Tensor) -> Tensor:
    """The frozen factor of each module's leader, (N, r, n) or (N, r, m)."""
    rows = {k: _rows(group, factor, k) for k in sorted(set(leader.tolist()))}
    if len(rows) == 1:
        return next(iter(rows.values()))
    reference = torch.zeros(
        group.batch,
        max(block.shape[1] for block in rows.values()),
        next(iter(rows.values())).shape[2],
        dtype=torch.float64,
        device=group.device,
    )
    for k, block in rows.items():
        mine = (leader == k).to(group.device)
        reference[mine, : block.shape[1]] = block[mine].to(torch.float64)
    return reference


def _rows(group: Group, factor: str, k: int) -> Tensor:
    """What of client k must agree with the others, direction by direction: (N, r_k, n) as stored, or (N, r_k, m) float64."""
    if factor == "A":
        return group.A[k]
    return (group.B[k].to(torch.float64) * group.scale[:, k].to(group.device)[:, None, None]).mT


def _raise(group: Group, factor: str, names: Sequence[str], k: int, leader: int) -> None:
    """Raise for the one module of ``group``, where client ``k`` differs from ``leader``."""
    module = printable(group.modules[0])
    stored = group.A if factor == "A" else group.B
    for client in (leader, k):
        where = f"client {printable(names[client])!r}, module {module!r}, lora_{factor}"
        if (error := nonfinite(stored[client][0], where)) is not None:
            raise error
    rank = group.ranks[k]
    own, other = _rows(group, factor, k)[0], _rows(group, factor, leader)[0, :rank]
    place = int((own != other).any(1).nonzero()[0, 0])
    what = f"row {place} of lora_A differs" if factor == "A" else f"column {place} of lora_B times its scale differs"
    first, second = (repr(printable(names[client])) for client in sorted((leader, k)))
    raise MismatchError(
        f"clients {first} and {second}, module {module!r}: {what}; a frozen factor must be the same number for number in all "
        f"clients. Start all clients from one adapter and do not train lora_{factor}, or use a method that takes any factors, "
        "such as florist"
    )
