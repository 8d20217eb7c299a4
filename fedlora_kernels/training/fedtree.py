"""FedTreeLoRA on the client: warm-up from one common pair, and a layer that mixes the cluster's and all others' pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_kernels.errors import InputError
from fedlora_kernels.rows import random_rows

__all__ = ["TreeLoRA", "common_pair", "split_pair", "warm_up"]

START_LAM = 0.5


def common_pair(module: str, m: int, n: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The pair that every client starts from, ``B = 0`` (m, rank) and random ``A`` (rank, n), float32.

    It depends on ``module`` and ``seed`` alone: distances of B say something of clients only where all start from one A.
    """
    return torch.zeros(m, rank), random_rows(seed, 0, module, range(rank), n).to(torch.float32)


def warm_up(train: Callable[[int], Any], e_warm: int = 1) -> None:
    """Call ``train(i)`` for i = 0 .. ``e_warm`` - 1: the local rounds before clients are compared."""
    if isinstance(e_warm, bool) or not isinstance(e_warm, int) or e_warm < 1:
        raise InputError(f"warm_up: e_warm is {e_warm!r}; a whole number of at least 1 is needed")
    for i in range(e_warm):
        train(i)


def split_pair(B: Tensor, A: Tensor, lam: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Undo the mixing of a pair ``B = [lam B_clus | (1 - lam) B_ext]`` (m, 2r), ``A = [A_clus ; A_ext]`` (2r, n).

    Returns:
        ``(B_clus, A_clus), (B_ext, A_ext)``, in the scale of B.

    Raises:
        InputError: an odd rank, or a share of 0 or 1, which leaves nothing of one pair: the server's ``experts`` then has both.
    """
    share = _unit(lam, "split_pair")
    rank = B.shape[-1]
    if rank % 2 or A.shape[-2] != rank:
        raise InputError(f"split_pair: B has rank {rank}, A {A.shape[-2]}; one even rank, that of two pairs, is needed")
    if share in (0.0, 1.0):
        raise InputError(f"split_pair: lam is {share:g}, so one pair is lost; take both from `experts` of the state")
    r = rank // 2
    return (B[..., :r] / share, A[..., :r, :]), (B[..., r:] / (1.0 - share), A[..., r:, :])


class TreeLoRA(nn.Module):
    """``h = base(x) + scale (lam B_clus A_clus x + (1 - lam) B_ext A_ext x)``; trained are B_clus, A_clus and lam.

    ``lam`` is a scalar parameter in [0, 1]: beyond an end it counts as that end, and a gradient that points further out is
    dropped, so that it never gets stuck there; `project` puts it back. `share` is what the client reports. Layers may
    share one lam.

    Args:
        base: the frozen layer that is adapted; its parameters lose their gradients.
        cluster: ``(B, A)``, (m, r) and (r, n), copied.
        outside: the frozen pair of all other clients, any rank; None where there are none, which fixes lam at 1.
        lam: the initial share, or a parameter of another layer.
        scale: the client's LoRA scale s; B of both pairs is then the folded one divided by s.
    """

    def __init__(
        self,
        base: nn.Module,
        cluster: tuple[Tensor, Tensor],
        outside: tuple[Tensor, Tensor] | None = None,
        *,
        lam: float | nn.Parameter = START_LAM,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        _require_pair("cluster", cluster)
        B, A = cluster
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.B = nn.Parameter(B.detach().clone())
        self.A = nn.Parameter(A.detach().clone())
        self.lam: nn.Parameter | None = None
        self.outside_B: Tensor | None
        self.outside_A: Tensor | None
        if outside is None:
            self.register_buffer("outside_B", None)
            self.register_buffer("outside_A", None)
            return
        _require_pair("outside", outside)
        if (outside[0].shape[0], outside[1].shape[1]) != (B.shape[0], A.shape[1]):
            raise InputError(
                f"TreeLoRA: cluster is {B.shape[0]} x {A.shape[1]}, outside {outside[0].shape[0]} x {outside[1].shape[1]}; one shape needed"
            )
        self.register_buffer("outside_B", outside[0].detach().clone())
        self.register_buffer("outside_A", outside[1].detach().clone())
        # at least float32: steps of a scalar in half precision are lost
        value = torch.tensor(_unit(lam, "TreeLoRA"), dtype=torch.promote_types(B.dtype, torch.float32), device=B.device)
        self.lam = lam if isinstance(lam, nn.Parameter) else nn.Parameter(value)

    @property
    def share(self) -> float:
        """The share of the cluster pair, in [0, 1]; 1 without an external pair."""
        return 1.0 if self.lam is None else float(self.lam.detach().clamp(0.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """The output for ``x`` (..., n), (..., m)."""
        h: Tensor = self.base(x)
        own = x @ self.A.mT @ self.B.mT
        if self.lam is None or self.outside_B is None or self.outside_A is None:
            return h + self.scale * own
        lam: Tensor = _Unit.apply(self.lam)  # type: ignore[no-untyped-call]
        lam = lam.to(own.dtype)
        others = x @ self.outside_A.mT @ self.outside_B.mT
        return h + self.scale * (lam * own + (1.0 - lam) * others)

    @torch.no_grad()
    def project(self) -> None:
        """Put lam back into [0, 1]; after an optimiser step this makes it projected descent, without it an overshoot is walked back."""
        if self.lam is not None:
            self.lam.clamp_(0.0, 1.0)

    def upload(self) -> tuple[Tensor, Tensor]:
        """The trained ``(B, A)``, what the client sends; the server folds its scale."""
        return self.B.detach().clone(), self.A.detach().clone()


class _Unit(torch.autograd.Function):
    """Clamp to [0, 1] that passes the gradient on, unless descent along it would lead outward."""

    @staticmethod
    def forward(ctx: Any, lam: Tensor) -> Tensor:
        ctx.save_for_backward(lam)
        return lam.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (lam,) = ctx.saved_tensors
        outward = ((lam >= 1.0) & (grad < 0.0)) | ((lam <= 0.0) & (grad > 0.0))
        return torch.where(outward, 0.0, grad)


def _require_pair(name: str, pair: tuple[Tensor, Tensor]) -> None:
    B, A = pair
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise InputError(f"TreeLoRA: {name} is B {tuple(B.shape)}, A {tuple(A.shape)}; (m, r) and (r, n) needed")


def _unit(lam: Any, who: str) -> float:
    value = float(lam.detach() if isinstance(lam, Tensor) else lam)
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise InputError(f"{who}: lam is {value:g}; 0 <= lam <= 1 is needed")
    return value
