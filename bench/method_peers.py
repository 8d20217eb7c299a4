# ruff: noqa: ARG001 - all loops are called alike
"""What a user writes today for each method: files read with safetensors, a Python loop over modules, plain torch in float32.

Each loop takes the clients' state dicts by module, ``clients[k][module] = (B, A)`` with the scale in B, their weights, the pair of the
round before, and the modules to work on; it answers pairs by module (what the server would send). Routes are those of the
released code where there is any: thin SVDs for FLoRIST, the SVD of the dense sum for FlexLoRA, gradient descent on dense products
for LoRA-FAIR, dense distances for the robust rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

Pairs = Mapping[str, tuple[Tensor, Tensor]]
Clients = Sequence[Pairs]
Made = dict[str, tuple[Tensor, Tensor]]
Loop = Callable[[Clients, Sequence[float], Pairs, Sequence[str]], Made]


def dense(clients: Clients, w: Sequence[float], name: str) -> Tensor:
    """The weighted sum of the updates."""
    total = None
    for k, client in enumerate(clients):
        B, A = client[name]
        D = w[k] * (B @ A)
        total = D if total is None else total + D
    assert total is not None
    return total


def mean(tensors: Sequence[Tensor], w: Sequence[float]) -> Tensor:
    """Weighted mean."""
    return sum((w[k] * x for k, x in enumerate(tensors)), torch.zeros_like(tensors[0]))


def fedit(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Means of the factors."""
    return {n: (mean([c[n][0] for c in clients], w), mean([c[n][1] for c in clients], w)) for n in names}


def zero_pad(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Means of the padded factors."""
    made = {}
    for n in names:
        r = max(c[n][1].shape[0] for c in clients)
        B = mean([pad(c[n][0], (0, r - c[n][0].shape[1])) for c in clients], w)
        A = mean([pad(c[n][1], (0, 0, 0, r - c[n][1].shape[0])) for c in clients], w)
        made[n] = (B, A)
    return made


def hetlora(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Padded means weighted by the norms of the updates."""
    norms = [sum(float(torch.linalg.norm(c[n][0] @ c[n][1]) ** 2) for n in names) ** 0.5 for c in clients]
    return zero_pad(clients, [norm / sum(norms) for norm in norms], before, names)


def mean_B(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """FFA-LoRA, and RoLoRA in even rounds: A is common."""
    return {n: (mean([c[n][0] for c in clients], w), clients[0][n][1]) for n in names}


def fedsvd(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """SVD of the new dense product."""
    made = {}
    for n in names:
        U, S, Vh = torch.linalg.svd(mean([c[n][0] for c in clients], w) @ clients[0][n][1], full_matrices=False)
        r = clients[0][n][1].shape[0]
        made[n] = (U[:, :r] * S[:r], Vh[:r])
    return made


def flora(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Stacks."""
    return {
        n: (torch.cat([c[n][0] for c in clients], 1), torch.cat([w[k] * c[n][1] for k, c in enumerate(clients)]))
        for n in names
    }


def florist(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Two thin SVDs, the SVD of their core, a threshold at 0.9 of the energy."""
    made = {}
    for n, (B, A) in flora(clients, w, before, names).items():
        U_B, S_B, V_B = torch.linalg.svd(B, full_matrices=False)
        U_A, S_A, V_A = torch.linalg.svd(A, full_matrices=False)
        U, S, V = torch.linalg.svd(torch.diag(S_B) @ V_B @ U_A @ torch.diag(S_A), full_matrices=False)
        p = int((torch.cumsum(S**2, 0) / (S**2).sum() < 0.9).sum()) + 1
        made[n] = ((U_B @ U)[:, :p] * S[:p], (V @ V_A)[:p])
    return made


def flexlora(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """SVD of the dense sum."""
    made = {}
    for n in names:
        U, S, Vh = torch.linalg.svd(dense(clients, w, n), full_matrices=False)
        r = max(c[n][1].shape[0] for c in clients)
        made[n] = (U[:, :r] * S[:r], Vh[:r])
    return made


def fedmomentum(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Randomised SVD of the dense sum with a sketch of K r, as published."""
    made = {}
    for n in names:
        r = clients[0][n][1].shape[0]
        D = dense(clients, w, n)
        U, S, V = torch.svd_lowrank(D, q=min(len(clients) * r, *D.shape))
        made[n] = (U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * V[:, :r].T)
    return made


def fedex(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Means, and the dense residual for the base weight."""
    made = fedit(clients, w, before, names)
    for n, (B, A) in made.items():
        residual = dense(clients, w, n) - B @ A
        assert residual.shape == (B.shape[0], A.shape[1])
    return made


def lora_fair(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Gradient descent on the dense cosine, 1000 steps."""
    made = {}
    for n, (B, A) in fedit(clients, w, before, names).items():
        D, X = dense(clients, w, n).flatten(), B.clone().requires_grad_()
        for _ in range(1000):
            loss = 1 - torch.cosine_similarity(D, (X @ A).flatten(), dim=0) + 0.01 * ((X - B) ** 2).sum()
            (gradient,) = torch.autograd.grad(loss, X)
            X = (X - 0.01 * gradient).detach().requires_grad_()
        made[n] = (X.detach(), A)
    return made


def raflora(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """SVD of the dense sum of segments."""
    made = {}
    for n in names:
        levels = [0, *sorted({c[n][1].shape[0] for c in clients})]
        B, A = clients[0][n]
        total = B.new_zeros(B.shape[0], A.shape[1])
        for low, high in pairwise(levels):
            owners = [k for k, c in enumerate(clients) if c[n][1].shape[0] >= high]
            mass = sum(w[k] for k in owners)
            for k in owners:
                total += w[k] / mass * clients[k][n][0][:, low:high] @ clients[k][n][1][low:high]
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        r = levels[-1]
        made[n] = (U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vh[:r])
    return made


def prelort(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Means segment by segment."""
    made = {}
    for n in names:
        levels = [0, *sorted({c[n][1].shape[0] for c in clients})]
        Bs, As = [], []
        for low, high in pairwise(levels):
            owners = [k for k, c in enumerate(clients) if c[n][1].shape[0] >= high]
            share = [w[k] / sum(w[j] for j in owners) for k in owners]
            Bs.append(mean([clients[k][n][0][:, low:high] for k in owners], share))
            As.append(mean([clients[k][n][1][low:high] for k in owners], share))
        made[n] = (torch.cat(Bs, 1), torch.cat(As))
    return made


def fedrot(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Rotation of each client towards the pair of the round before (an A-round), half way, then means."""
    made = {}
    for n in names:
        A_ref = before[n][1]
        Bs, As = [], []
        for client in clients:
            B, A = client[n]
            U, _, Vh = torch.linalg.svd(A @ A_ref.T)
            if torch.det(U @ Vh) < 0:
                U[:, -1] *= -1
            r = len(U)
            U, _, Vh = torch.linalg.svd(0.5 * torch.eye(r) + 0.5 * U @ Vh)
            Bs.append(B @ (U @ Vh))
            As.append((U @ Vh).T @ A)
        made[n] = (mean(Bs, w), mean(As, w))
    return made


def clair(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """The program on the dense stack, then the mean of all clients (the flags need no more time)."""
    made = {}
    for n in names:
        D = [B @ A for B, A in (c[n] for c in clients)]
        X = torch.cat([d / torch.linalg.norm(d) for d in D], 1)
        width, rank, K = D[0].shape[1], clients[0][n][1].shape[0], len(clients)
        b = (rank / K) ** 0.5
        lam = min(max(1.5 * b, min(2 * b, 0.9)), 0.7 * rank**0.5)
        S, Y = torch.zeros_like(X), torch.zeros_like(X)
        mu = 1.25 / float(torch.linalg.matrix_norm(X, 2))
        top = 1e7 * mu
        for _ in range(500):
            U, s, Vh = torch.linalg.svd(X - S + Y / mu, full_matrices=False)
            L = (U * (s - 1 / mu).clamp(min=0)) @ Vh
            T = X - L + Y / mu
            norms = T.reshape(len(T), K, width).permute(1, 0, 2).flatten(1).norm(dim=1)
            shrink = (1 - lam / (mu * norms)).clamp(min=0)
            S = T * shrink.repeat_interleave(width)
            gap = X - L - S
            Y, mu = Y + mu * gap, min(1.02 * mu, top)
            if torch.linalg.norm(gap) <= 1e-7 * torch.linalg.norm(X):
                break
        U, s, Vh = torch.linalg.svd(dense(clients, w, n), full_matrices=False)
        made[n] = (U[:, :rank] * s[:rank], Vh[:rank])
    return made


def fedtree(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Distances of all pairs in all modules, and uniform means (the tree itself needs no time)."""
    for n in names:
        for i, one in enumerate(clients):
            for other in clients[:i]:
                float(torch.linalg.norm(one[n][0] - other[n][0]))
    return fedit(clients, [1 / len(clients)] * len(clients), before, names)


def dense_distances(clients: Clients, w: Sequence[float], before: Pairs, names: Sequence[str]) -> Made:
    """Robust rules: inner products of dense updates, then the dense sum and its SVD."""
    for n in names:
        D = torch.stack([(B @ A).flatten() for B, A in (c[n] for c in clients)])
        assert len(D @ D.T) == len(clients)
    return florist(clients, w, before, names)


LOOPS: dict[str, tuple[Loop, int]] = {
    "fedit": (fedit, 0),
    "zero_pad": (zero_pad, 0),
    "hetlora": (hetlora, 0),
    "ffa": (mean_B, 0),
    "rolora": (mean_B, 0),
    "fedsa": (mean_B, 0),
    "prelort": (prelort, 0),
    "flora": (flora, 0),
    "fedrot": (fedrot, 0),
    "fedex": (fedex, 0),
    "fedtree": (fedtree, 0),
    "florist": (florist, 28),
    "geometric_median": (dense_distances, 28),
    "fedmomentum": (fedmomentum, 28),
    "flexlora": (flexlora, 3),
    "raflora": (raflora, 3),
    "fedsvd": (fedsvd, 3),
    "lora_fair": (lora_fair, 1),
    "clair": (clair, 1),
}
"""The loop of each method, and on how many modules it is timed (0: all); the rest is in proportion."""
