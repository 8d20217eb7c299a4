"""LoRA factors as federated clients send them, from harmless to adversarial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_kernels.testing.matrices import generator, orthonormal, prescribed, spectrum

__all__ = ["FAMILIES", "LoRAProblem"]


@dataclass(frozen=True)
class LoRAProblem:
    """One update ``sum_k weights[k] B[k] @ A[k]``: B[k] (m, r_k), A[k] (r_k, n), weights (K,) float64."""

    B: tuple[Tensor, ...]
    A: tuple[Tensor, ...]
    weights: Tensor

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each client."""
        return tuple(block.shape[1] for block in self.B)

    def update(self) -> Tensor:
        """The dense update (m, n) in float64."""
        pairs = zip(self.weights, self.B, self.A, strict=True)
        return sum((w * (B.double() @ A.double()) for w, B, A in pairs), torch.zeros((), dtype=torch.float64))

    def to(self, dtype: torch.dtype) -> LoRAProblem:
        """The same factors rounded to ``dtype``."""
        return LoRAProblem(tuple(b.to(dtype) for b in self.B), tuple(a.to(dtype) for a in self.A), self.weights)


Family = Callable[[int, int, Sequence[int], int], LoRAProblem]


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator(seed))


def _uniform_weights(K: int) -> Tensor:
    return torch.full((K,), 1 / max(K, 1), dtype=torch.float64)


def gaussian(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """Independent Gaussian clients, weights uneven, summing to 1."""
    B = tuple(_normal(m, r, seed + 2 * k) for k, r in enumerate(ranks))
    A = tuple(_normal(r, n, seed + 2 * k + 1) for k, r in enumerate(ranks))
    weights = torch.arange(1, len(ranks) + 1, dtype=torch.float64)
    return LoRAProblem(B, A, weights / weights.sum())


def signed_weights(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """Gaussian clients of which every second one is subtracted."""
    base = gaussian(m, n, ranks, seed)
    signs = torch.tensor([1.0, -0.5]).repeat(len(ranks))[: len(ranks)].double()
    return LoRAProblem(base.B, base.A, signs)


def fresh(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """Newly initialised clients: every B is zero."""
    base = gaussian(m, n, ranks, seed)
    return LoRAProblem(tuple(torch.zeros_like(b) for b in base.B), base.A, base.weights)


def zero_client(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """The first client has not trained yet (B = 0), the others have."""
    base = gaussian(m, n, ranks, seed)
    return LoRAProblem((torch.zeros_like(base.B[0]), *base.B[1:]), base.A, base.weights)


def identical_clients(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """Every client sends the first client's factors; the stack has the rank of one."""
    base = gaussian(m, n, ranks[:1], seed)
    return LoRAProblem(base.B * len(ranks), base.A * len(ranks), _uniform_weights(len(ranks)))


def cancelling(m: int, n: int, ranks: Sequence[int], seed: int, delta: float = 0.0) -> LoRAProblem:
    """Pairs of clients that cancel up to a relative difference ``delta`` in A: rho is about ``1 / delta``."""
    base = gaussian(m, n, ranks[:1], seed)
    B, A, weights = [], [], []
    for k in range(len(ranks) // 2):
        B += [base.B[0]] * 2
        A += [base.A[0], base.A[0] + delta * _normal(ranks[0], n, seed + 100 + k)]
        weights += [1.0, -1.0]
    return LoRAProblem(tuple(B), tuple(A), torch.tensor(weights, dtype=torch.float64))


def graded_cancelling(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """A cancelling pair whose columns fall over six decades."""
    base = cancelling(m, n, ranks, seed, delta=1e-3)
    grades = torch.logspace(0, -6, ranks[0], dtype=torch.float64)
    return LoRAProblem(tuple(b * grades for b in base.B), base.A, base.weights)


def scalar_gauge(m: int, n: int, ranks: Sequence[int], seed: int, c: float = 1e6) -> LoRAProblem:
    """Clients that carry their size in different factors: ``(c B, A / c)`` and ``(B / c, c A)`` in turn."""
    base = gaussian(m, n, ranks, seed)
    gauge = [c if k % 2 else 1 / c for k in range(len(ranks))]
    B = tuple(b * g for b, g in zip(base.B, gauge, strict=True))
    return LoRAProblem(B, tuple(a / g for a, g in zip(base.A, gauge, strict=True)), base.weights)


def column_gauge(m: int, n: int, ranks: Sequence[int], seed: int, spread: float = 1e8) -> LoRAProblem:
    """Columns of B fall from 1 to ``1 / spread``, rows of A rise the other way."""
    base = gaussian(m, n, ranks, seed)
    gauges = [float(spread) ** -torch.linspace(0, 1, r, dtype=torch.float64) for r in ranks]
    B = tuple(b * g for b, g in zip(base.B, gauges, strict=True))
    A = tuple(a * g.flip(0)[:, None] for a, g in zip(base.A, gauges, strict=True))
    return LoRAProblem(B, A, base.weights)


def random_column_gauge(m: int, n: int, ranks: Sequence[int], seed: int, decades: float = 15.0) -> LoRAProblem:
    """Column j of B times 10^g, row j of A times 10^-g, g uniform in +-decades."""
    base = gaussian(m, n, ranks, seed)
    uniform = [torch.rand(r, dtype=torch.float64, generator=generator(seed + 50 + k)) for k, r in enumerate(ranks)]
    gauges = [10.0 ** (decades * (2 * u - 1)) for u in uniform]
    B = tuple(b * g for b, g in zip(base.B, gauges, strict=True))
    A = tuple(a / g[:, None] for a, g in zip(base.A, gauges, strict=True))
    return LoRAProblem(B, A, base.weights)


def full_gauge(m: int, n: int, ranks: Sequence[int], seed: int, kappa: float = 1e3) -> LoRAProblem:
    """``(B X, X^-1 A)`` with a dense X of condition kappa: what no diagonal scaling removes."""
    base = gaussian(m, n, ranks, seed)
    B, A = [], []
    for k, (b, a) in enumerate(zip(base.B, base.A, strict=True)):
        r = b.shape[1]
        P, Q = orthonormal(r, r, seed + 60 + k), orthonormal(r, r, seed + 80 + k)
        scales = float(kappa) ** -torch.linspace(0, 1, r, dtype=torch.float64)
        B.append(b @ (P * scales @ Q.mT))
        A.append((Q / scales @ P.mT) @ a)
    return LoRAProblem(tuple(B), tuple(A), base.weights)


def shared_subspace(m: int, n: int, ranks: Sequence[int], seed: int, noise: float = 1e-3) -> LoRAProblem:
    """Clients that learned the same subspace, apart from a little noise."""
    r = min(max(ranks), m, n)
    left, right = orthonormal(m, r, seed), orthonormal(n, r, seed + 1).mT
    B = [left @ _normal(r, k, seed + 10 + i) + noise * _normal(m, k, seed + 30 + i) for i, k in enumerate(ranks)]
    A = [_normal(k, r, seed + 50 + i) @ right + noise * _normal(k, n, seed + 70 + i) for i, k in enumerate(ranks)]
    return LoRAProblem(tuple(B), tuple(A), _uniform_weights(len(ranks)))


def rank_one_clients(m: int, n: int, ranks: Sequence[int], seed: int) -> LoRAProblem:
    """Clients whose declared rank is only used up to one."""
    base = gaussian(m, n, ranks, seed)
    A = tuple(a[:1].expand(a.shape[0], -1).contiguous() for a in base.A)
    return LoRAProblem(base.B, A, base.weights)


def _falling(m: int, n: int, kappa: float, seed: int) -> Tensor:
    return prescribed(m, n, spectrum("geometric", min(m, n), kappa), seed)


def ill_conditioned(m: int, n: int, ranks: Sequence[int], seed: int, kappa: float = 1e5) -> LoRAProblem:
    """Both factors of every client with singular values falling to ``1 / kappa`` in unrelated bases."""
    base = gaussian(m, n, ranks, seed)
    B = [_falling(m, r, kappa, seed + 4 * k) for k, r in enumerate(ranks)]
    A = [_falling(r, n, kappa, seed + 4 * k + 2) for k, r in enumerate(ranks)]
    return LoRAProblem(tuple(B), tuple(A), base.weights)


FAMILIES: Mapping[str, Family] = {
    family.__name__: family
    for family in (
        gaussian,
        signed_weights,
        fresh,
        zero_client,
        identical_clients,
        cancelling,
        graded_cancelling,
        scalar_gauge,
        column_gauge,
        random_column_gauge,
        full_gauge,
        shared_subspace,
        rank_one_clients,
        ill_conditioned,
    )
}
"""Functions ``(m, n, ranks, seed) -> LoRAProblem`` in float64; round with `LoRAProblem.to`."""
