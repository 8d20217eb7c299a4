"""Procrustes of every backend over all pairs of frames, the gallery as their correlation among them."""

import itertools

import pytest
import torch
from frames import DTYPES, every_backend

from fedlora_kernels.testing import FRAMES, check_rotation

backends = every_backend("procrustes_rotation")
SHAPES = ((37, 5), (31, 2), (41, 13), (23, 8), (37, 1))
MORE = ((3, 3), (37, 3), (64, 16), (67, 33), (97, 32))


def judge(backend, name, shape, dtype, special, seed=0):
    X, Y = FRAMES[name](*shape, seed, dtype)
    if not (torch.isfinite(X).all() and torch.isfinite(Y).all()):
        return
    rows, r = X.shape
    for blend in (1.0, 0.3):
        (raw,) = backend([X[None]], [Y[None]], special, blend, dtype=dtype, m=rows, r=r, N=1)
        row = type(raw)(*(field[0] for field in raw))
        failed = [check for check in check_rotation(X, Y, row, special=special, blend=blend) if not check.passed]
        assert not failed, f"{name} {shape} blend {blend}: {failed}"


@backends
@pytest.mark.parametrize("name", FRAMES)
def test_frames(backend, name):
    number = list(FRAMES).index(name)
    judge(backend, name, SHAPES[number % len(SHAPES)], DTYPES[number // 2 % len(DTYPES)], bool(number // 3 % 2))


@backends
def test_subnormal_float64(backend):
    """2^1024, which lifts them to 1, is no number."""
    judge(backend, "correlation classic: subnormal", (37, 5), torch.float64, False)
    judge(backend, "correlation classic: subnormal", (37, 13), torch.float64, True)


@backends
def test_small_singular_values_keep_the_rotation_orthogonal(backend):
    judge(backend, "kappa 1e9", (131, 64), torch.float64, False)
    judge(backend, "kappa 1e12", (131, 64), torch.float64, True)


@pytest.mark.full
@backends
@pytest.mark.parametrize("name", FRAMES)
def test_frames_full(backend, name):
    for dtype, special, (seed, shape) in itertools.product(DTYPES, (False, True), enumerate((*SHAPES, *MORE))):
        judge(backend, name, shape, dtype, special, seed)
