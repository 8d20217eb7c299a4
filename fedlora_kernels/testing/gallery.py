"""All dense test matrices by name: what the tests and ``fedlora validate`` run every decomposition on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlora_kernels.testing.classics import HARD
from fedlora_kernels.testing.lapack import LAPACK
from fedlora_kernels.testing.magma import MAGMA
from fedlora_kernels.testing.matrices import Matrix

__all__ = ["GALLERY", "SAMPLE", "gallery"]

GALLERY: Mapping[str, Matrix] = {
    f"{source}: {name}": make
    for source, members in (("lapack", LAPACK), ("magma", MAGMA), ("classic", HARD))
    for name, make in members.items()
}
"""Functions ``(m, n, seed, dtype) -> (m, n)`` by ``source: name``."""

SAMPLE = (
    "lapack: zero",
    "lapack: random",
    "lapack: bidiagonal",
    "lapack: product geometric 2^60",
    "lapack: latms 1",
    "lapack: latms -5",
    "magma: condD",
    "magma: kronecker",
    "magma: svd cluster0",
    "magma: svd logrand ufl",
    "magma: svd arith ofl",
    "magma: diag geo small",
    "magma: svd rand dominant",
    "classic: laeuchli",
    "classic: kahan",
    "classic: hilbert",
    "classic: hadamard",
    "classic: twins",
    "classic: fourfold",
    "classic: half rank",
    "classic: duplicate columns",
    "classic: subnormal",
    "classic: columns 1e+-30",
    "classic: negative zero",
)
"""One member of each kind: what a quick run takes."""


def gallery(
    m: int, n: int, seed: int, dtype: torch.dtype, names: Iterable[str] = tuple(GALLERY)
) -> tuple[list[str], Tensor]:
    """Names and matrices (N, m, n) of those members that are finite in ``dtype``."""
    made = {name: GALLERY[name](m, n, seed, dtype) for name in names}
    kept = {name: X for name, X in made.items() if torch.isfinite(X).all()}
    return list(kept), torch.stack(list(kept.values())) if kept else torch.zeros(0, m, n, dtype=dtype)
