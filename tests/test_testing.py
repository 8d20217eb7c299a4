"""The public test material: prescribed spectra, families of factors, exact answers, limits."""

import mpmath
import pytest
import torch

from fedlora_kernels.testing import (
    CLASSICS,
    FAMILIES,
    SPECTRA,
    U64,
    LoRAProblem,
    assert_close,
    exact_svd,
    orthonormal,
    prescribed,
    roundoff,
    spectrum,
    tolerance,
)
from fedlora_kernels.testing.factors import cancelling, column_gauge, full_gauge, ill_conditioned, shared_subspace


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_spectra_descend_from_one(name, k):
    s = spectrum(name, k, 1e5)
    assert s.shape == (k,)
    assert s.dtype == torch.float64
    assert (s.diff() <= 0).all()
    assert (s >= 0).all()
    if name not in ("rand", "logrand"):
        assert s[0] == 1
    if name in ("even", "geometric", "cluster0", "cluster1") and k > 1:
        assert s[-1] == pytest.approx(1e-5)


def test_prescribed_matrices_have_their_spectrum():
    s = spectrum("geometric", 7, 1e4)
    assert_close(torch.linalg.svdvals(prescribed(11, 7, s, 3)), s, 1e-14)
    Q = orthonormal(11, 7, 1)
    assert_close(Q.mT @ Q, torch.eye(7, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("name", CLASSICS)
def test_classics_are_float64_of_their_shape(name):
    for shape in ((5, 8), (8, 5)):
        X = CLASSICS[name](*shape)
        assert X.shape == shape
        assert X.dtype == torch.float64
        assert torch.isfinite(X).all()


def test_hadamard_has_equal_singular_values():
    assert_close(torch.linalg.svdvals(CLASSICS["hadamard"](16, 16)), torch.full((16,), 4.0).double(), 1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_seeded_and_fit_together(family):
    one, same, other = (FAMILIES[family](17, 13, (4, 4), seed) for seed in (1, 1, 2))
    assert isinstance(one, LoRAProblem)
    assert one.update().shape == (17, 13)
    assert all(torch.equal(x, y) for x, y in zip(one.B + one.A, same.B + same.A, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(one.B + one.A, other.B + other.A, strict=True))
    assert one.weights.dtype == torch.float64
    assert one.to(torch.bfloat16).B[0].dtype == torch.bfloat16
    assert one.ranks == (4, 4)


def test_families_do_what_they_say():
    assert cancelling(17, 13, (4, 4), 1).update().abs().max() == 0
    nearly = cancelling(17, 13, (4, 4), 1, delta=1e-5)
    assert 1e-6 < nearly.update().norm() / (nearly.B[0] @ nearly.A[0]).norm() < 1e-4
    graded = column_gauge(17, 13, (4,), 1, spread=1e8)
    assert 1e7 < graded.B[0].norm(dim=0).max() / graded.B[0].norm(dim=0).min() < 1e10
    assert torch.linalg.cond(full_gauge(17, 13, (4,), 1, kappa=1e6).B[0]) > 1e5
    assert torch.linalg.cond(ill_conditioned(17, 13, (4,), 1, kappa=1e6).A[0]) == pytest.approx(1e6, rel=1e-6)
    s = torch.linalg.svdvals(shared_subspace(17, 13, (4, 4), 1, noise=1e-6).update())
    assert s[4] < 1e-4 * s[3]
    assert FAMILIES["fresh"](17, 13, (4,), 1).update().abs().max() == 0
    assert (FAMILIES["signed_weights"](17, 13, (4, 4), 1).weights < 0).any()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_exact_svd_against_sixty_digits(shape):
    """Down to the smallest value of a pair that cancels to 1e-7."""
    problem = cancelling(*shape, (3, 3), 1, delta=1e-7)
    exact = exact_svd(problem)
    mpmath.mp.dps = 60
    W = mpmath.zeros(*shape)
    for w, B, A in zip(problem.weights.tolist(), problem.B, problem.A, strict=True):
        W += w * mpmath.matrix(B.tolist()) * mpmath.matrix(A.tolist())
    values = torch.tensor([float(x) for x in mpmath.svd_r(W, compute_uv=False)[:3]], dtype=torch.float64)
    assert ((exact.s[:3] - values).abs() <= 1e-11 * values).all()
    assert exact.energy == pytest.approx(float(values.square().sum()), rel=1e-11)


def test_exact_svd_is_a_decomposition():
    problem = FAMILIES["gaussian"](13, 17, (5, 4), 1)
    exact = exact_svd(problem)
    assert_close(exact.W, problem.update(), 1e-14)
    assert_close(exact.U * exact.s @ exact.V.mT, exact.W, 1e-14)
    assert_close(exact.U[:, :9].mT @ exact.U[:, :9], torch.eye(9, dtype=torch.float64), 1e-14)
    assert (exact.s.diff() <= 0).all()


def test_limits_are_those_of_the_formulas():
    assert roundoff(torch.float64) == U64 == 2.0**-53
    assert roundoff(torch.bfloat16) == 2.0**-8
    assert tolerance("P1", rho=10) == U64 * (256 + 400)
    assert tolerance("P1", rho=10, passes=2) == U64 * (128 + 40)
    assert tolerance("P2", dtype=torch.bfloat16, rho=0) == pytest.approx(2.0**-6)
    assert tolerance("P3", dtype=torch.float32) == 8 * 2.0**-24
    assert tolerance("P7", energy_ratio=3) == 768 * U64
    assert tolerance("core", dtype=torch.float32, size=16) == 16 * 2.0**-24
    with pytest.raises(KeyError):
        tolerance("P9")


def test_assert_close_names_the_worst_element():
    expected = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    actual = expected.clone()
    assert_close(actual, expected, 0.0)
    actual[1, 0] += 1
    with pytest.raises(
        AssertionError,
        match=r"element \(1, 0\): 4\.0, expected 3\.0; relative error 2\.000e-01, limit .*float64, seed 7",
    ):
        assert_close(actual, expected, 0.1, seed=7)
    assert_close(actual, expected, 0.21)
    assert_close(actual, expected, 0.1, scale=20.0)
    actual[0, 1] = torch.nan
    with pytest.raises(AssertionError, match=r"\(0, 1\): nan"):
        assert_close(actual, expected, 1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(actual, expected[:1], 1.0)
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3), 0.0)
