"""Random rows of A for padding: a pair with zero columns of B and zero rows of A would never get a gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_rows"]


def random_rows(seed: int, round: int, module: str, rows: Iterable[int], n: int) -> Tensor:  # noqa: A002
    """Return rows of A, (len(rows), n) float64 on the host, uniform in [-1/sqrt(n), 1/sqrt(n)] as PEFT draws them.

    Each row comes from a Philox stream keyed by (seed, round, module, row), so it depends neither on the order of modules
    nor on how the work is split (docs/algorithms.md, Rules that hold for every method). ``round`` counts from 0.
    """
    drawn = [_row(f"{seed}\0{round}\0{module}\0{row}", n) for row in rows]
    return torch.from_numpy(np.stack(drawn) if drawn else np.empty((0, n)))


def _row(text: str, n: int) -> np.ndarray:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    # The raw stream is fixed for ever; what Generator makes of it may change between NumPy releases.
    raw = np.random.Philox(key=np.frombuffer(digest, dtype="<u8")).random_raw(n)
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray((2.0 * unit - 1.0) / np.sqrt(n))
