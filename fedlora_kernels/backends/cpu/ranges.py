"""Matrices that lie in files: their sums, and whether they are the same, without holding them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.backends.contract import RawSum
from fedlora_kernels.backends.native.library import DTYPE_CODE, Library, counts, rows, table
from fedlora_kernels.backends.native.sums import room

__all__ = ["Ranges", "read_alike", "read_sum", "read_turned"]

_UNREADABLE = 5
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Ranges:
    """Matrices of K clients in N problems: ``places`` (N, K, 5) int64 is what `fedlora_range` holds."""

    places: np.ndarray

    @classmethod
    def of(
        cls,
        files: Sequence[Sequence[tuple[int, int]]],
        shapes: Sequence[tuple[int, int]],
        dtypes: Sequence[torch.dtype],
    ) -> Ranges:
        """``files[k]`` holds the descriptor and the offset of each of client k's N matrices, ``shapes[k]`` their one shape."""
        places = np.empty((len(files[0]), len(files), 5), dtype=np.int64)
        for k, (own, shape, dtype) in enumerate(zip(files, shapes, dtypes, strict=True)):
            places[:, k, :2] = own
            places[:, k, 2:] = (*shape, DTYPE_CODE[dtype])
        return cls(places)


def read_sum(
    library: Library, groups: Sequence[tuple[Ranges, Tensor]], shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> list[RawSum] | None:
    """`Backend.weighted_sum` of matrices in files with weights (N, K) float64, (p, q) being the ``shapes`` of the sums.

    The same bits; what has weight 0 is not read. None where a file cannot be read.
    """
    op = "weighted_sum"
    results = [
        room(library, (len(weights), *shape), dtype, _HOST) for (_, weights), shape in zip(groups, shapes, strict=True)
    ]
    places = _joined([ranges for ranges, _ in groups])
    numbers = counts([ranges.places.shape[1] for ranges, _ in groups])
    weights = table([weights[None] for _, weights in groups])
    tables = [table([rows(getattr(result, field)) for result in results]) for field in RawSum._fields]
    arguments = (places.ctypes.data, numbers, weights, *tables, len(groups))
    status = library.status(op, "fedlora_read_sum", (tables[0], len(groups)), arguments, _HOST)
    if status == _UNREADABLE:
        return None
    library.require(op, status)
    return results


def read_turned(
    library: Library,
    factors: tuple[Ranges, Ranges],
    weights: tuple[Tensor, Tensor],
    reference: Ranges,
    side: Literal["B", "A"],
    special: bool,
    blend: float,
    dtype: torch.dtype,
) -> tuple[RawSum, RawSum] | None:
    """``sum_k w_k B_k Q_k`` and ``sum_k w'_k Q_k^T A_k`` of pairs in files, ``factors`` and ``weights`` being those of B and of A.

    Q_k is the `procrustes_rotation` of the factor on this side towards its ``reference``. The bits of `mixed_sum`, but None where
    a file cannot be read, and where in some problem nobody turns or a rotation is in trouble.
    """
    op = "procrustes_rotation"
    places_B, places_A = (own.places for own in factors)
    N, K = places_B.shape[:2]
    (m, r), (_, n) = places_B[0, 0, 2:4].tolist(), places_A[0, 0, 2:4].tolist()
    results = room(library, (N, m, r), dtype, _HOST), room(library, (N, r, n), dtype, _HOST)
    places, targets = _joined(factors), reference.places.reshape(-1, 5)
    turning = 0 if side == "B" else 1
    tables = [table([rows(getattr(result, field)) for result in results]) for field in RawSum._fields]
    plain = np.zeros(N, dtype=np.int32)
    given = places.ctypes.data, targets.ctypes.data, turning, K
    shares = table([w[None] for w in weights])
    codes = {*factors[turning].places[:, :, 4].flat, *targets[:, 4].tolist()}
    unit = max(torch.finfo(kind).eps / 2 for kind, code in DTYPE_CODE.items() if code in codes)
    arguments = (*given, shares, *tables, unit, int(special), blend, plain.ctypes.data)
    status = library.status(op, "fedlora_read_turned", (*given, tables[0]), arguments, _HOST)
    if status == _UNREADABLE or plain.any():
        return None
    library.require(op, status)
    return results


def read_alike(library: Library, ranges: Sequence[Ranges]) -> bool:
    """Whether in every problem all matrices hold, bit for bit, as many of the first rows of the first as they have rows.

    False where a file cannot be read, too.
    """
    op = "weighted_sum"
    places = _joined(ranges)
    numbers = counts([own.places.shape[1] for own in ranges for _ in range(len(own.places))])
    alike = np.zeros(sum(len(own.places) for own in ranges), dtype=np.int32)
    arguments = (places.ctypes.data, numbers, len(alike), alike.ctypes.data)
    status = library.status(op, "fedlora_read_alike", (), arguments, _HOST)
    if status != _UNREADABLE:
        library.require(op, status)
    return status != _UNREADABLE and bool(alike.all())


def _joined(ranges: Sequence[Ranges]) -> np.ndarray:
    """The ranges of all problems one after the other."""
    return np.concatenate([own.places.reshape(-1, 5) for own in ranges])
