"""What the tests of QR and Procrustes share: the table of backends and matrices with known properties."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlora_kernels import backends
from fedlora_kernels.testing import orthonormal, prescribed, spectrum

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def every_backend(op):
    """Parametrise over all backends that have ``op``; those that cannot run here show up as skipped, with their reason."""
    params = []
    for name, (available, reason) in backends.status().items():
        if not available:
            params.append(pytest.param(None, id=name, marks=pytest.mark.skip(reason=reason)))
        elif hasattr(backends.get(name), op):
            params.append(pytest.param(Served(backends.get(name), op), id=name))
    return pytest.mark.parametrize("backend", params)


class Served:
    """A backend whose operation is called only where it says that it serves it; else the test is skipped."""

    def __init__(self, backend, op):
        self.backend, self.op, self.bitwise, self.name = backend, op, op in backend.bitwise, backend.name

    def __call__(self, *args, dtype=torch.float64, **sizes):
        serves, reason = self.backend.serves(self.op, dtype, torch.device("cpu"), sizes)
        if not serves:
            pytest.skip(reason)
        return getattr(self.backend, self.op)(*args)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * seed + sum(shape)))


def orthogonal(r, seed=0, det=None):
    """Haar orthogonal r x r, of the given determinant if any."""
    Q = orthonormal(r, r, seed)
    if det is not None and r and torch.linalg.det(Q) * det < 0:
        Q[:, 0] = -Q[:, 0]
    return Q


def with_kappa(m, r, kappa, seed=0):
    """m x r with singular values falling geometrically from 1 to 1/kappa."""
    return prescribed(m, r, spectrum("geometric", min(m, r), kappa), seed)


def rotation2(angle):
    c, s = torch.cos(torch.tensor(angle, dtype=torch.float64)), torch.sin(torch.tensor(angle, dtype=torch.float64))
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


def same_bits(a, b):
    """Equal to the bit, signs of zero and NaNs included."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that torch creates inside the ``with`` block."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out
