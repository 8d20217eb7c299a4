"""Small client problems and their dense model, for tests of the public calls."""

import math

import numpy as np
import torch

M, N = 7, 11


def clients(ranks=(2, 3), batch=(), dtype=torch.float64, m=M, n=N, seed=0):
    """Blocks B[k] (*batch, m, r_k) and A[k] (*batch, r_k, n)."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64).to(dtype)

    return [draw(m, r) for r in ranks], [draw(r, n) for r in ranks]


def dense_update(B, A, weights=None):
    """Sum of w_k B_k A_k in float64; weights (K,) or (..., K)."""
    count = len(B)
    w = torch.ones(count) if weights is None else torch.as_tensor(weights)
    w = w.to(torch.float64)
    terms = [w[..., k, None, None] * (B[k].double() @ A[k].double()) for k in range(count)]
    return sum(terms[1:], terms[0])


def frobenius(x):
    return math.sqrt(float((torch.as_tensor(np.asarray(x)).double() ** 2).sum()))


def assert_near(got, wanted, limit=1e-10):
    """Relative to the norm of what is wanted."""
    got, wanted = torch.as_tensor(np.asarray(got)).double(), torch.as_tensor(np.asarray(wanted)).double()
    assert got.shape == wanted.shape
    assert frobenius(got - wanted) <= limit * max(frobenius(wanted), 1e-300), frobenius(got - wanted)
