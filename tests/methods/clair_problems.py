"""Clients that share a column space, some of them contaminated; and CLAIR as it is defined, densely in float64."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from method_problems import Problem

from fedlora_kernels.methods.contract import Census, Group, make_method


def randn(made, *shape):
    return torch.randn(*shape, generator=made, dtype=torch.float64)


def orthonormal(made, rows, columns):
    return torch.linalg.qr(randn(made, rows, columns))[0]


@dataclass
class Contaminated:
    """A problem, who is bad, the shared basis (m, r), and the updates before noise."""

    problem: Problem
    bad: np.ndarray
    basis: torch.Tensor
    clean: list


def contaminated(K, bad, noise=0.0, m=60, n=40, r=4, rank=4, mixed=False, kind="gaussian", seed=0) -> Contaminated:
    """K clients of one shared r-dimensional column space, the first ``bad`` of them not.

    Benign: B = U G of norm 1, plus Gaussian noise of norm ``noise``; A has orthonormal rows. Bad: "gaussian" B, of one other
    "colluding" column space, or of rank "one". ``mixed``: norms log-uniform in [0.3, 3].
    """
    made = torch.Generator().manual_seed(seed)
    U, other = orthonormal(made, m, r), orthonormal(made, m, r)
    B, A, clean = [], [], []
    for k in range(K):
        b = U @ randn(made, r, rank)
        if k < bad:
            b = {
                "gaussian": lambda: randn(made, m, rank),
                "colluding": lambda: other @ randn(made, r, rank),
                "one": lambda: randn(made, m, 1) @ randn(made, 1, rank),
            }[kind]()
        b = b / b.norm()
        a = orthonormal(made, n, rank).T.contiguous()
        size = 0.3 * 10 ** float(torch.rand((), generator=made)) if mixed else 1.0
        clean.append(size * b @ a)
        if k >= bad and noise:
            e = randn(made, m, rank)
            b = b + noise * e / e.norm()
        B.append(size * b)
        A.append(a)
    problem = Problem(B, A, [1.0] * K, [1.0 / K] * K)
    return Contaminated(problem, np.arange(K) < bad, U, clean)


def stacked(problems: list, **fields) -> Group:
    """Problems of the same shapes as the modules of one group."""
    groups = [problem.group(**fields) for problem in problems]
    return replace(
        groups[0],
        modules=tuple(f"layers.{i}.q_proj" for i in range(len(groups))),
        B=tuple(torch.cat(blocks) for blocks in zip(*(group.B for group in groups), strict=True)),
        A=tuple(torch.cat(blocks) for blocks in zip(*(group.A for group in groups), strict=True)),
        scale=torch.cat([group.scale for group in groups]),
        weight=torch.cat([group.weight for group in groups]),
    )


def census(group: Group) -> Census:
    L, K = group.weight.shape
    return Census(
        modules=group.modules,
        clients=tuple(f"client_{k}" for k in range(K)),
        gram=None,
        ranks=np.tile(group.ranks, (L, 1)),
        weight=group.weight[0].numpy(),
        shapes=np.tile([group.m, group.n], (L, 1)),
    )


def clair(data, backend="torch", dtype=None, **options):
    """Plan, the group with what the survey carried, and the outcome: what the engine does, for one group."""
    method = make_method("clair", options)
    group = data if isinstance(data, Group) else data.group(dtype, backend=backend)
    plan = None
    if method.surveys(None):
        survey = method.survey(group)
        group = replace(group, carry=survey.carry)
        plan = method.decide(survey.stats, census(group))
    return plan, group, method.combine(group, plan, None)


def personal(outcome, k, i=0) -> torch.Tensor:
    """The product of client k's own pair."""
    pair = outcome.personal[k]
    p = int(pair.rank[i])
    return pair.B[i, :, :p].double() @ pair.A[i, :p].double()


def dense_split(X, widths, lam, tol=1e-7, max_iter=500):
    """The definition, step by step; (L, S, steps)."""
    X, starts = X.numpy(), np.cumsum(widths)[:-1]
    S = Y = L = np.zeros_like(X)
    top, steps = np.linalg.norm(X, 2), 0
    if top > 0.0:
        mu = 1.25 / top
        mu_max = 1e7 * mu
        for steps in range(1, max_iter + 1):  # noqa: B007
            U, s, Vh = np.linalg.svd(X - S + Y / mu, full_matrices=False)
            L = U * np.maximum(s - 1 / mu, 0.0) @ Vh
            T = X - L + Y / mu
            norms = [(t, np.linalg.norm(t)) for t in np.split(T, starts, 1)]
            S = np.concatenate([t * max(0.0, 1 - lam / (mu * size)) if size else t for t, size in norms], 1)
            Y = Y + mu * (X - L - S)
            mu = min(1.02 * mu, mu_max)
            if np.linalg.norm(X - L - S) <= tol * np.linalg.norm(X):
                break
    return torch.from_numpy(L), torch.from_numpy(S), steps


@dataclass
class Dense:
    """What the definition answers."""

    L: torch.Tensor
    S: torch.Tensor
    steps: int
    scores: np.ndarray
    flags: np.ndarray
    basis: torch.Tensor
    mean: torch.Tensor
    refined: list


def dense_clair(problem, shared_rank, lam, tol=1e-7, max_iter=500, normalise=True, gap_min=0.15) -> Dense:
    updates = problem.updates()
    K, n = len(updates), updates[0].shape[1]
    X = torch.cat([d / (float(d.norm()) or 1.0) if normalise else d for d in updates], 1)
    L, S, steps = (X, torch.zeros_like(X), 0) if K <= 2 else dense_split(X, [n] * K, lam, tol, max_iter)
    blocks = zip(S.split(n, 1), X.split(n, 1), strict=True)
    scores = np.array([float(s.norm()) / (float(x.norm()) or 1.0) for s, x in blocks])
    flags = dense_flags(scores, gap_min)
    U, s, _ = torch.linalg.svd(L, full_matrices=False)
    basis = U[:, : min(shared_rank, int((s > 1e-6 * s[0]).sum()))]
    benign = [k for k in range(K) if not flags[k]]
    total = sum(problem.weight[k] for k in benign)
    mean = sum(problem.weight[k] / total * updates[k] for k in benign)
    P = basis @ basis.T
    refined = [d if flags[k] else P @ d + mean - P @ mean for k, d in enumerate(updates)]
    return Dense(L, S, steps, scores, flags, basis, mean, refined)


def dense_flags(scores, gap_min):
    K = len(scores)
    order = sorted(scores)
    best, cut = -1.0, None
    for i in range(K - 1):
        if i + 1 >= K // 2 + 1 and order[i + 1] - order[i] > best:
            best, cut = order[i + 1] - order[i], order[i]
    return np.array([cut is not None and best >= gap_min and s > cut for s in scores])
