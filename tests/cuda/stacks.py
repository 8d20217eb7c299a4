"""What the tests of Grams and cross products share: stacks, their Grams, copies on the device that lie as they did."""

import math

import torch
from guards import LAYOUTS

from fedlora_kernels.backends.native.library import counts, table
from fedlora_kernels.backends.torch.chunks import pow2


def draw(m, ranks, dtypes, batch=2, seed=0, by_columns=False):
    made = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(batch, m, r, generator=made, dtype=torch.float64) for r in ranks]
    X = [x.to(dtypes[k % len(dtypes)]) for k, x in enumerate(numbers)]
    return [LAYOUTS["turned"](x) for x in X] if by_columns else X


def whole(X):
    """The stack in float64."""
    return torch.cat([x.double() for x in X], -1)


def grams(cuda, *stacks, e=None, function="fedlora_gram"):
    """Grams of any number of stacks in one call; of columns times ``2^-e``."""
    backend, device = cuda
    there = [[moved(x, device) for x in X] for X in stacks]
    sizes = [(len(X[0]), sum(x.shape[-1] for x in X)) for X in stacks]
    out = [torch.full((N, R, R), math.nan, dtype=torch.float64, device=device) for N, R in sizes]
    scales = [
        torch.empty(N, 0, R, dtype=torch.float64, device=device) if e is None else pow2(-e)[:, None].to(device)
        for N, R in sizes
    ]
    X, numbers, G = table([x for X in there for x in X]), counts([len(X) for X in stacks]), table(out)
    n = len(stacks)
    backend.library.run("update_gram", function, (X, numbers, G, n), (X, numbers, table(scales), G, n), device)
    return [g.cpu() for g in out]


def moved(x, device):
    """A tensor on another device with the same strides and the same place within 16 bytes; itself where it is there."""
    if x.device.type == device.type:
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())
