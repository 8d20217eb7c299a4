"""The one contract between the kernel API and its backends: op names, argument order, shapes, codes.

Backends see only this: torch tensors on one device, detached, already validated, one *group* of equally shaped
problems per list entry, with the leading batch dimensions flattened to ``N``. A dense call is one group; a ragged
batch is several, and a backend is free to launch them all at once. Results come back as one raw record per group.

``weights`` are host (CPU) float64 and never zero: blocks whose weight is zero are removed before a backend is called.
Codes follow docs/numerics.md, Special inputs: `Info` is trouble, `Note` is fact; both are per matrix and stay on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "INFO_TEXT",
    "NOTE_TEXT",
    "OPS",
    "U64",
    "Backend",
    "Blocks",
    "Factors",
    "Info",
    "Mixed",
    "Note",
    "RawProduct",
    "RawQR",
    "RawRotation",
    "RawSVD",
    "RawSum",
    "RuleCode",
    "RuleSpec",
    "Stack",
]

U64 = 2.0**-53
"""Unit roundoff of float64."""

OPS = (
    "stacked_qr",
    "core_svd",
    "select_rank",
    "product_svd",
    "update_gram",
    "weighted_sum",
    "mixed_sum",
    "procrustes_rotation",
    "rotate_factors",
    "align_factors",
)


class Info(IntFlag):
    """Trouble, per matrix. Zero means fine."""

    NONFINITE = 1
    NOT_CONVERGED = 2
    OVERFLOW = 4


class Note(IntFlag):
    """Facts, per matrix. Never an error."""

    ZERO = 1
    RANK_DEFICIENT = 2
    TWO_PASS = 4
    DENSE = 8
    CAPPED = 16
    LOW_ACCURACY = 32
    ILL_CONDITIONED = 64


INFO_TEXT: Mapping[Info, str] = {
    Info.NONFINITE: "an input holds NaN or Inf; its outputs are NaN. Remove or repair that input",
    Info.NOT_CONVERGED: "an iteration hit its guard; the results are finite but not certified. Use backend='reference'",
    Info.OVERFLOW: "a result exceeds the range of the output dtype. Use output='balanced', bfloat16 or a wider dtype",
}

NOTE_TEXT: Mapping[Note, str] = {
    Note.ZERO: "the update is zero, or cancels to rounding noise",
    Note.RANK_DEFICIENT: "the numerical rank is below the number of columns given",
    Note.TWO_PASS: "cancellation or dependent columns hide small singular values from Grams; an orthogonalised second pass was used",
    Note.DENSE: "the stack is at least twice as wide as the matrix; the dense route was used",
    Note.CAPPED: "a cap cut the rank that the rule asked for",
    Note.LOW_ACCURACY: "the smallest kept singular values are certified to less than 1e-6",
    Note.ILL_CONDITIONED: "the rotation is decided by rounding of the inputs",
}


class RuleCode(IntEnum):
    """Rank rules as the kernels know them (docs/numerics.md, Rank rules)."""

    ENERGY = 0
    RANK = 1
    SV_RATIO = 2
    ABSOLUTE = 3
    SV_SUM = 4


class RuleSpec(NamedTuple):
    """A rank rule as plain numbers: what the C ABI and a compiled graph can carry.

    ``cap`` is 0 for "no cap". Rank(k) carries k in ``value``; Frobenius(f) arrives as ENERGY with ``f * f``.
    """

    code: RuleCode
    value: float
    cap: int = 0


@dataclass(frozen=True, slots=True)
class Stack:
    """Client blocks of N equally shaped stacked matrices ``[w_1 X_1 | ... | w_K X_K]``.

    ``blocks[k]`` is ``(N, m, r_k)`` (any strides, dtypes may differ between blocks), ``weights`` is ``(N, K)`` float64 on
    the host. ``m`` stands apart because K may be 0.
    """

    blocks: tuple[Tensor, ...]
    weights: Tensor
    m: int

    @property
    def batch(self) -> int:
        """Number of problems N."""
        return self.weights.shape[0]

    @property
    def width(self) -> int:
        """Total number of columns R."""
        return sum(block.shape[-1] for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Factors:
    """Client pairs of N equally shaped problems ``sum_k w_k B_k A_k``.

    ``B[k]`` is ``(N, m, r_k)``, ``A[k]`` is ``(N, r_k, n)``, ``weights`` is ``(N, K)`` float64 on the host. ``p_max`` is the
    padded number of output columns, counted over all blocks that the caller gave.
    """

    B: tuple[Tensor, ...]
    A: tuple[Tensor, ...]
    weights: Tensor
    m: int
    n: int
    p_max: int

    @property
    def batch(self) -> int:
        """Number of problems N."""
        return self.weights.shape[0]

    @property
    def width(self) -> int:
        """Stacked rank R of the blocks that are left."""
        return sum(block.shape[-1] for block in self.B)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Client blocks of N equally shaped sums ``sum_k w_k X_k``, each on the top left corner of the p x q sum.

    ``blocks[k]`` is ``(N, p_k, q_k)`` (any strides and dtypes), p_k <= p and q_k <= q; ``weights`` is ``(N, K)`` float64 on the host.
    """

    blocks: tuple[Tensor, ...]
    weights: Tensor
    p: int
    q: int

    @property
    def batch(self) -> int:
        """Number of problems N."""
        return self.weights.shape[0]


@dataclass(frozen=True, slots=True)
class Mixed:
    """Client blocks of N equally shaped sums ``sum_k X_k M_k``.

    ``blocks[k]`` is ``(N, p, r_k)`` (any strides and dtypes), ``mixers[k]`` is ``(N, r_k, q)`` float64 on their device. There is at
    least one block.
    """

    blocks: tuple[Tensor, ...]
    mixers: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, p, q)`` of the sum."""
        N, p, _ = self.blocks[0].shape
        return N, p, self.mixers[0].shape[-1]

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Room for the sum, by columns in memory if the first block is."""
        first, (N, p, q) = self.blocks[0], self.shape
        by_columns = first.stride(-1) > first.stride(-2)
        out = torch.empty((N, q, p) if by_columns else (N, p, q), dtype=dtype, device=first.device)
        return out.mT if by_columns else out


class RawSVD(NamedTuple):
    """``C = U diag(S) Vh``: U (N, p, k), S (N, k) descending, Vh (N, k, q), k = min(p, q); info, notes (N,) int32."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    info: Tensor
    notes: Tensor


class RawQR(NamedTuple):
    """Q (N, m, k) or None, R (N, k, width), k = min(m, width); rank (N,) int64; info, notes (N,) int32."""

    Q: Tensor | None
    R: Tensor
    rank: Tensor
    info: Tensor
    notes: Tensor


class RawProduct(NamedTuple):
    """Truncated SVD of ``sum_k w_k B_k A_k``.

    left (N, m, p_max) and right (N, p_max, n) in the output dtype; S (N, p_max) float64; rank and numerical_rank (N,)
    int64; energy, error, error_bound, rho, sigma_err, energy_abs (N,) float64; passes (N,) int32; info, notes (N,) int32.
    """

    left: Tensor
    S: Tensor
    right: Tensor
    rank: Tensor
    energy: Tensor
    error: Tensor
    error_bound: Tensor
    rho: Tensor
    sigma_err: Tensor
    energy_abs: Tensor
    numerical_rank: Tensor
    passes: Tensor
    info: Tensor
    notes: Tensor


class RawRotation(NamedTuple):
    """Q (N, r, r) float64, singular_values (N, r) float64, unique (N,) bool, condition (N,) float64; info, notes (N,) int32."""

    Q: Tensor
    singular_values: Tensor
    unique: Tensor
    condition: Tensor
    info: Tensor
    notes: Tensor


class RawSum(NamedTuple):
    """Sum (N, p, q), rounded once from float64; norms of the sum and of what rounding took, (N,) float64; info, notes (N,) int32."""

    sum: Tensor
    norm: Tensor
    rounding: Tensor
    info: Tensor
    notes: Tensor


class Backend(Protocol):
    """What a backend is. Ops that it does not serve may be absent; `serves` is asked first.

    ``bitwise`` are the ops that give a matrix the same bits whatever batch it stands in.
    """

    name: str
    bitwise: frozenset[str]

    def available(self) -> tuple[bool, str]:
        """Whether this machine can run it, and why (not)."""

    def serves(self, op: str, dtype: torch.dtype, device: torch.device, sizes: Mapping[str, int]) -> tuple[bool, str]:
        """Whether ``op`` runs here for these sizes (keys among m, n, p, q, r, R, K, N: the largest of the call), and why (not)."""

    def stacked_qr(self, groups: Sequence[Stack], want_q: bool) -> list[RawQR]:
        """Thin QR of each stacked matrix. Answers in ``output_dtype`` of the blocks, half inputs in float32."""

    def core_svd(self, groups: Sequence[Tensor]) -> list[RawSVD]:
        """SVD of each matrix of ``(N, p, q)``; answers in the input dtype, half inputs in float32."""

    def select_rank(
        self,
        S: Tensor,
        rule: RuleSpec,
        total_energy: Tensor,
        floor: Tensor,
    ) -> Tensor:
        """Rank (N,) int64 that ``rule`` chooses for the rows of ``S`` (N, k) float64, descending; 0 where a value is not finite."""

    def product_svd(
        self, groups: Sequence[Factors], rule: RuleSpec, output: str, dtype: torch.dtype
    ) -> list[RawProduct]:
        """Truncated SVD of each ``sum_k w_k B_k A_k``, never formed; ``output`` is usv, left or balanced."""

    def update_gram(self, groups: Sequence[Factors]) -> list[Tensor]:
        """(N, K, K) float64 inner products of the weighted updates ``w_k B_k A_k``; NaN in row and column of a non-finite client."""

    def weighted_sum(self, groups: Sequence[Blocks], dtype: torch.dtype) -> list[RawSum]:
        """Weighted sum of each group in ``dtype``: float64 products and sums in the order of the blocks, halves by way of float32."""

    def mixed_sum(self, groups: Sequence[Mixed], dtype: torch.dtype) -> list[RawSum]:
        """``sum_k X_k M_k`` of each group in ``dtype``, from float64 (halves by way of float32); a block of mixer zero is not seen."""

    def procrustes_rotation(
        self, source: Sequence[Tensor], target: Sequence[Tensor], special: bool, blend: float
    ) -> list[RawRotation]:
        """Orthogonal Q minimising ``|source Q - target|_F``, inputs (N, rows, r)."""

    def rotate_factors(
        self, B: Sequence[Tensor], A: Sequence[Tensor], Q: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """``(B Q, Q^T A)``; B (N, m, r), A (N, r, n), Q (N, r, r) float64; answers in the dtypes of B and A."""

    def align_factors(
        self,
        B: Sequence[Tensor],
        A: Sequence[Tensor],
        reference_B: Sequence[Tensor] | None,
        reference_A: Sequence[Tensor] | None,
        side: tuple[float, float],
        special: bool,
        blend: float,
    ) -> list[tuple[Tensor, Tensor, RawRotation]]:
        """Fused rotation towards a reference; ``side`` is (weight on A, weight on B), a reference of weight 0 may be None."""
