"""LoRA-FAIR: the mean of A, and a B corrected so that their product comes closer to the sum of the updates (arXiv 2411.14961)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.backends.contract import U64
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg import core_svd, stacked_qr, update_gram
from fedlora_kernels.methods.contract import Group, Method, Outcome, Previous, register
from fedlora_kernels.methods.factors import (
    GRAM_ERROR,
    chunked,
    norms,
    owned,
    padded_mean,
    pair_outcome,
    require_equal_ranks,
    stack_error,
)
from fedlora_kernels.methods.gap import mean_gap

__all__ = ["LoraFair"]

SOLVERS = ("gradient", "closed")


@register
@dataclass(frozen=True)
class LoraFair(Method):
    """``Abar = sum_k w_k A_k`` and X in the place of ``Bbar = sum_k w_k s_k B_k``.

    ``solver="gradient"`` descends the published ``f(X) = 1 - cos(D, X Abar) + lam |X - Bbar|_F^2`` from X = Bbar, ``steps`` times
    by ``lr``; X = Bbar where D, Bbar Abar or their difference is zero. f does not scale with the updates, so neither does X, and
    small updates make long first steps: read ``error``. ``solver="closed"`` (our option) is the X that minimises
    ``|D - X Abar|_F^2 + lam |X - Bbar|_F^2``; it scales with the updates, and with lam = 0 no X comes closer to D.
    """

    name: ClassVar[str] = "lora_fair"
    summary: ClassVar[str] = "mean of A, and a B corrected towards the sum of the updates"
    exact: ClassVar[str] = "approximate"
    broadcast: ClassVar[str] = "mean A, corrected B"
    download: ClassVar[str] = "r(m+n)"
    equal_ranks: ClassVar[bool] = True

    solver: Literal["gradient", "closed"] = "gradient"
    lam: float = 0.01
    lr: float = 0.01
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise InputError(f"lora_fair: solver is {self.solver!r}; one of {', '.join(SOLVERS)} is needed")
        if not _is_number(self.lam) or not 0.0 <= self.lam < math.inf:
            raise InputError(f"lora_fair: lam is {self.lam!r}; a number with 0 <= lam < inf is needed")
        if not _is_number(self.lr) or not 0.0 < self.lr < math.inf:
            raise InputError(f"lora_fair: lr is {self.lr!r}; a number with 0 < lr < inf is needed")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise InputError(f"lora_fair: steps is {self.steps!r}; a whole number >= 0 is needed")
        if self.solver == "gradient" and self.lr * self.lam >= 1.0:
            raise InputError(
                f"lora_fair: lr is {self.lr!r}; lr < {1.0 / self.lam:g}, which is 1 / lam, is needed, or the descent diverges"
            )

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. MismatchError where ranks differ."""
        require_equal_ranks(group, self.name)
        return chunked(group, self._corrected, times=4)

    def _corrected(self, group: Group) -> Outcome:
        mean_B, mean_A = padded_mean(group, group.weight)
        gap = mean_gap(group, mean_B)
        frame = _frame(group, mean_A)
        missed = (gap.L @ (gap.R @ frame.W[:, None])).sum(1)
        if self.solver == "closed":
            change = missed * _filter(frame.S, self.lam)[:, None, :]
        else:
            aimed = (norms(missed) > 0.0) & ~_cancels(group, mean_B, mean_A, frame)  # else the means are the answer
            size = torch.where(aimed, _update_norm(group), 0.0)
            change = self._descent(mean_B @ frame.V, missed, frame.S, size)
        correction = change @ frame.V.mT

        def distance(rounding: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            signs = torch.ones(group.batch, gap.L.shape[1] + 1, dtype=torch.float64)
            signs[:, -1] = -1.0
            return stack_error(group, [*gap.lefts(), correction], [*gap.rights(), mean_A], signs, rounding)

        outcome = pair_outcome(group, mean_B + correction, mean_A, distance)
        return dataclasses.replace(outcome, info=outcome.info | frame.info)  # type: ignore[operator]

    def _descent(self, start: Tensor, missed: Tensor, S: Tensor, size: Tensor) -> Tensor:
        """``X V - Bbar V`` (N, m, k) after all steps, from ``start = Bbar V``, ``missed = (D - Bbar Abar) W`` and S (N, k).

        ``size`` (N,) is ``|D|_F``, or 0 where X stays at Bbar.

        In the frame of Abar column j of X stays in the span of column j of ``start`` and of ``H V = start S^2 + missed S``:
        two coordinates in an orthonormal basis of that plane, so the m x r iteration is one of 2 x k numbers per module.
        """
        length = torch.linalg.vector_norm(start, dim=1)
        first = _divided(start, length[:, None])
        along = (first * missed).sum(1)
        across = missed - first * along[:, None]
        height = torch.linalg.vector_norm(across, dim=1)
        second = _divided(across, height[:, None])
        origin = torch.cat([length, torch.zeros_like(length)], 1).cpu()
        aim = torch.cat([S * S * length + S * along, S * height], 1).cpu()
        weight = torch.cat([S * S, S * S], 1).cpu()
        final = _descend(origin, _divided(aim, size[:, None]), weight, self.lam, self.lr, self.steps)
        moved = (final - origin).to(start.device)[:, None, :]
        k = S.shape[1]
        return first * moved[:, :, :k] + second * moved[:, :, k:]


class _Frame(NamedTuple):
    """``Abar = V diag(S) W^T`` with k = min(r, n): V (N, r, k), S (N, k), W (N, n, k), float64; ``info`` (N,) on the host."""

    V: Tensor
    S: Tensor
    W: Tensor
    info: Tensor


def _frame(group: Group, mean_A: Tensor) -> _Frame:
    qr = stacked_qr(mean_A.mT, mode="reduced", check=False, backend=group.backend)
    svd = core_svd(qr.R, check=False, backend=group.backend)
    return _Frame(svd.Vh.mT, svd.S, qr.Q @ svd.U, (qr.info | svd.info).cpu())


def _filter(S: Tensor, lam: float) -> Tensor:
    """``S / (S^2 + lam)`` (N, k); 0 where Abar has no such direction."""
    noise = 4 * S.shape[-1] * U64 * S[:, :1]
    return torch.where(S <= noise, 0.0, S / (S * S + lam))


def _cancels(group: Group, mean_B: Tensor, mean_A: Tensor, frame: _Frame) -> Tensor:
    """Whether ``Bbar Abar`` (N,) is zero or the rounding noise of means that cancel: its direction means nothing, and 1 / e explodes."""
    terms_B, terms_A = _terms(group.B, group.weight * group.scale), _terms(group.A, group.weight)
    noise = 2 * (len(group.B) + 2) * U64 * (terms_B * norms(mean_A) + norms(mean_B) * terms_A)
    return norms((mean_B @ frame.V) * frame.S[:, None]) <= noise


def _terms(blocks: Sequence[Tensor], weight: Tensor) -> Tensor:
    """``sum_k |c_k| |X_k|_F`` (N,) on the host; what has no weight may be NaN."""
    sizes = torch.stack([norms(block) for block in blocks], 1)
    return torch.where(weight != 0.0, sizes * weight.abs(), 0.0).sum(1)


def _update_norm(group: Group) -> Tensor:
    """``|D|_F`` (N,) on the host, 0 where D is zero or the rounding noise of a sum that cancels."""
    B, A, weight = owned(group)
    square = update_gram(B, A, weights=weight, check=False, backend=group.backend).cpu().sum((1, 2))
    terms = torch.stack([norms(b) * norms(a) for b, a in zip(B, A, strict=True)], 1) * weight.abs()
    return torch.where(square <= GRAM_ERROR * terms.sum(1) ** 2, 0.0, square).sqrt()


def _descend(origin: Tensor, aim: Tensor, weight: Tensor, lam: float, lr: float, steps: int) -> Tensor:
    """``steps`` steps by ``lr`` from ``origin`` (N, q) against the gradient of ``-<aim, y> / e + lam |y - origin|^2``.

    ``e^2 = sum weight y^2`` with ``weight`` (N, q). Where e is 0, and where ``aim`` is, only the last term pulls.
    """
    tiny = torch.finfo(torch.float64).tiny
    y = origin
    for _ in range(steps):
        weighted = weight * y
        square = (weighted * y).sum(1, keepdim=True)
        inverse = torch.where(square < tiny, 0.0, square.rsqrt())
        cosine = (aim * y).sum(1, keepdim=True) * inverse
        slope = aim * inverse - weighted * (cosine * inverse * inverse)
        y = y + lr * (slope - 2.0 * lam * (y - origin))
    return y


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """``x / by``, 0 where ``by`` is 0."""
    return torch.where(by == 0.0, 0.0, x / by)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
