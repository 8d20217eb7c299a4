"""Singular value decompositions: of small dense matrices, and of weighted sums of low-rank products that are never formed."""

from __future__ import annotations

from typing import Any

from fedlora_kernels.backends.contract import Backend, RawProduct, RawSVD, RuleCode, RuleSpec
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.arrays import Array, Caller, parse_dtype
from fedlora_kernels.linalg.blocks import by_dtype, factor_problems, matrix_problems, solve
from fedlora_kernels.linalg.call import run
from fedlora_kernels.linalg.ragged import Ragged
from fedlora_kernels.linalg.results import Certificate, ProductSVD, SVDResult
from fedlora_kernels.linalg.rules import Energy, RankRule, spec_of

__all__ = ["core_svd", "product_svd"]

_OUTPUTS = ("usv", "left", "balanced")


def core_svd(C: Array | Ragged, *, check: bool = True, backend: str = "auto") -> Any:
    """SVD of each matrix of a batch, ``C = U diag(S) Vh`` with k = min(p, q) columns.

    Singular values are accurate to some rounding units of the largest. The backend ``cpu``, one-sided Jacobi for matrices up to
    32 x 32, does more: small ones are accurate relative to themselves, as far as the scaling of the shorter side of C allows.
    U and Vh are complete and orthonormal even where C is deficient; the first entry of (nearly) largest magnitude of each column
    of U is positive (docs/numerics.md, Sign rule).

    Args:
        C: ``(..., p, q)`` float64, float32, float16 or bfloat16, or `Ragged` of such.
        check: read ``info`` once and raise for trouble; False never raises for data, nor waits for the device but where the backend must.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        `SVDResult`; a list of them for `Ragged`. U, S, Vh in the input dtype, half inputs in float32.

    Raises:
        NonFiniteError: C holds NaN or Inf (``check=True``; the message names the matrix).
        ConvergenceError: the iteration hit its guard (``check=True``).
        InputError, TypeError, BackendError: shape, dtype, framework, device, backend.

    Source: docs/numerics.md, Core SVD; Demmel and Veselic (1992), Drmac and Veselic (2008).
    """
    caller = Caller("core_svd")
    problems = matrix_problems(caller, {"C": "pq"}, C=C)

    def work(chosen: Backend) -> list[RawSVD]:
        return solve(problems, lambda groups: chosen.core_svd([group.tensors[0] for group in groups]))

    return run(caller, problems, work, SVDResult, like=C, backend=backend, check=check)


def product_svd(
    B: Any,
    A: Any,
    *,
    weights: Any = None,
    rule: RankRule = Energy(1.0),  # noqa: B008 - frozen
    output: str = "usv",
    dtype: Any = None,
    check: bool = True,
    backend: str = "auto",
) -> Any:
    """Truncated SVD of ``W = sum_k w_k B_k A_k``, which is never formed.

    The rank p is what ``rule`` chooses from float64 singular values, never more than the numerical rank. ``error`` is
    ``|W - W_p|_F / |W|_F`` before the factors are rounded to their dtype; ``error_bound`` is what it surely does not exceed.
    ``certificate.sigma_err`` bounds the relative error of every kept singular value. W_p is the best approximation of its rank
    to within those bounds.

    Args:
        B: ``(..., m, R)``, or a list of client blocks ``(..., m, r_k)``, or `Ragged` of either; float64, float32, float16
            or bfloat16, mixed between blocks if need be. Leading dimensions are batch.
        A: ``(..., R, n)``, or a list of client blocks ``(..., r_k, n)``, or `Ragged`, as B.
        weights: None (all 1), ``(K,)`` or ``(..., K)`` finite reals of any sign, read as float64 on the host; they hold the
            client weight times the LoRA scale. A pair that is no list is one block. A client of weight 0 is never read.
        rule: any rank rule but `Budget`.
        output: ``usv``: left = U, right = V^T. ``left``: left = U S (FLoRIST's pair). ``balanced``: sqrt(S) on either side.
        dtype: of left and right; None is the common dtype of the blocks (NumPy arrays of bfloat16 answer in float32).
        check: read ``info`` once and raise for trouble; False never raises for data, nor waits for the device but where the backend must.
        backend: ``auto`` or a name of ``fedlora env``.

    Returns:
        `ProductSVD`, padded with zeros to min(m, n, R, cap) columns, R over all blocks; a list of them for `Ragged`.

    Raises:
        MismatchError: shapes that do not fit (the message names argument and block).
        WeightError: weights of the wrong number, or not finite.
        NonFiniteError: NaN or Inf in a factor (``check=True``; the message names the matrix).
        OutputOverflowError, ConvergenceError: as said by ``info`` (``check=True``).
        ValueError: the rule is a `Budget`. TypeError: it is no rule, or frameworks are mixed.
        InputError, BackendError: dtype, output, device, backend.

    Source: docs/numerics.md, One pass; FLoRIST, arXiv 2506.09199.
    """
    caller = Caller("product_svd")
    spec = spec_of(rule)
    if output not in _OUTPUTS:
        raise InputError(f"product_svd: output is {output!r}; one of {', '.join(_OUTPUTS)} is needed")
    asked = None if dtype is None else parse_dtype(caller.function, dtype)
    problems = factor_problems(caller, B, A, weights, _column_cap(spec))
    dtypes = [asked or caller.answer_dtype(problem.dtype) for problem in problems]

    def work(chosen: Backend) -> list[RawProduct]:
        return by_dtype(problems, dtypes, lambda dtype: lambda groups: chosen.product_svd(groups, spec, output, dtype))

    return run(caller, problems, work, _product, like=B, backend=backend, check=check)


def _column_cap(spec: RuleSpec) -> int | None:
    caps = [spec.cap] if spec.cap else []
    if spec.code == RuleCode.RANK:
        caps.append(int(spec.value))
    return min(caps, default=None)


def _product(*fields: Array) -> ProductSVD:
    given = RawProduct(*fields)
    certificate = Certificate(given.rho, given.sigma_err, given.passes, given.energy_abs, given.numerical_rank)
    return ProductSVD(
        given.left,
        given.S,
        given.right,
        given.rank,
        given.energy,
        given.error,
        given.error_bound,
        certificate,
        given.info,
        given.notes,
    )
