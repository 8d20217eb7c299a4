"""The torch backend's bounded temporaries, exact powers of two and pivoted Cholesky."""

import pytest
import torch
from products import ALL, energy, factors, matrix

from fedlora_kernels.backends.contract import U64, RuleCode, RuleSpec
from fedlora_kernels.backends.torch import BACKEND, backtransform, gram, householder, product, svd
from fedlora_kernels.backends.torch.cholesky import pivoted_cholesky
from fedlora_kernels.backends.torch.chunks import column_exponents, exponent, load, pow2, scale_pow2, slices
from fedlora_kernels.testing import LoRAProblem, assert_close, prescribed, spectrum
from fedlora_kernels.testing.factors import cancelling, gaussian


def test_slices_cover_everything_once():
    for total, bytes_each, limit in ((10, 3, 7), (10, 100, 7), (1, 1, 1), (12, 3, 12)):
        parts = list(slices(total, bytes_each, limit))
        assert [i for part in parts for i in range(total)[part]] == list(range(total))
        assert all((part.stop - part.start) * bytes_each <= max(limit, bytes_each) for part in parts)
    assert list(slices(0, 8)) == []


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_chunks_change_nothing_but_rounding(monkeypatch, dtype, rows):
    """Every loop over rows, columns and matrices takes many turns; the sign still looks at whole columns."""
    one_pass = [gaussian(43, 31, (5, 3, 4), seed).to(dtype) for seed in range(7)]
    two_pass = [cancelling(43, 31, (5, 5), seed, delta=1e-6).to(dtype) for seed in range(3)]
    dense = [gaussian(13, 7, (9, 8), seed).to(dtype) for seed in range(3)]
    groups = [factors(*problems) for problems in (one_pass, two_pass, dense)]
    cores = torch.stack([prescribed(13, 11, spectrum("geometric", 11), seed, dtype) for seed in range(7)])

    def everything():
        grams, values = BACKEND.update_gram(groups), BACKEND.core_svd([cores])[0]
        return BACKEND.product_svd(groups, energy(0.99), "left", dtype), grams, values

    plain = everything()
    for module in (backtransform, gram, householder, product, svd):
        monkeypatch.setattr(module, "slices", lambda total, *_: slices(total, 1, rows))
    monkeypatch.setattr(gram, "_TILE", 6)
    chunked = everything()
    for one, other in zip(plain[0], chunked[0], strict=True):
        assert torch.equal(one.rank, other.rank)
        assert torch.equal(one.passes, other.passes)
        for i in range(len(one.rank)):
            limit = float(one.sigma_err[i]) + 8 * torch.finfo(dtype).eps
            assert_close(other.S[i], one.S[i], limit)
            assert_close(other.left[i], one.left[i], 30 * limit)
    for one, other in zip(plain[1], chunked[1], strict=True):
        assert_close(other, one, 1e-14)
    assert_close(chunked[2].U, plain[2].U, 1e-13 if dtype == torch.float64 else 1e-6)


def test_load_keeps_the_layout_and_widens():
    blocks = [torch.randn(2, 9, 3), torch.randn(2, 9, 2).bfloat16()]
    stack = load(blocks, slice(2, 7), None)
    assert stack.dtype == torch.float64
    assert torch.equal(stack, torch.cat([b.double() for b in blocks], -1)[:, 2:7])
    transposed = [torch.randn(2, 3, 9).mT, torch.randn(2, 2, 9).mT]
    stack = load(transposed, slice(0, 9), torch.tensor([[1], [-2]]))
    assert stack.mT.is_contiguous()
    assert torch.equal(stack, torch.cat(transposed, -1).double() * torch.tensor([0.5, 4.0])[:, None, None])


def test_powers_of_two_are_exact_over_the_whole_range():
    e = torch.arange(-1022, 1024)
    assert pow2(e).tolist() == [2.0**i for i in range(-1022, 1024)]
    assert scale_pow2(torch.tensor([5e-324], dtype=torch.float64), torch.tensor([1074])).item() == 1.0
    assert scale_pow2(torch.tensor([1.0], dtype=torch.float64), torch.tensor([-1074])).item() == 5e-324
    x = torch.tensor([1.0, 1.999, 2.0, -3.0, 0.0, torch.nan, torch.inf, 5e-324, 1e308], dtype=torch.float64)
    assert exponent(x).tolist() == [0, 0, 1, 1, 0, 0, 0, -1074, 1023]


def test_only_float64_is_scaled_on_load():
    assert column_exponents([torch.full((2, 3, 2), 1e30)]) is None
    blocks = [torch.full((2, 3, 2), 8.0, dtype=torch.float64), torch.full((2, 3, 1), 100.0)]
    blocks[0][1, :, 0] = -1e200
    blocks[0][1, :, 1] = 0
    e = column_exponents(blocks)
    assert e.tolist() == [[3, 3, 6], [664, e[1, 1], 6]]
    assert e[1, 1] < -4000
    assert load(blocks, slice(0, 3), e).abs().amax(-2).tolist() == [[1, 1, 100 / 64], [1e200 / 2.0**664, 0, 100 / 64]]


@pytest.mark.parametrize("R", [1, 5, 63, 64, 65, 150])
@pytest.mark.parametrize("rank", [1, 4, 1000])
def test_pivoted_cholesky_reproduces_and_finds_the_rank(R, rank):
    rank = min(rank, R)
    X = torch.randn(3, 200, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(R))
    mix = torch.randn(3, rank, R, dtype=torch.float64, generator=torch.Generator().manual_seed(R + 1))
    X = X @ mix if rank < R else X
    G = X.mT @ X
    L = pivoted_cholesky(G.clone(), torch.full((3,), R))
    assert_close(L @ L.mT, G, 20 * R * U64)
    assert (L[:, :, :rank] != 0).any(1).all()
    # What is left of a Gram beyond its rank is rounding: a few u64 of its diagonal, dropped or not.
    assert (L[:, :, rank:].square() <= 16 * R * U64 * G.max()).all()


def test_pivoted_cholesky_ends_on_zero_and_nan_and_leaves_neighbours():
    X = torch.randn(3, 90, 70, dtype=torch.float64)
    G = X.mT @ X
    alone = pivoted_cholesky(G[:1].clone(), torch.tensor([70]))
    G[1] = 0
    G[2] = torch.nan
    L = pivoted_cholesky(G, torch.full((3,), 70))
    assert_close(L[:1], alone, 1e-13)
    assert not L[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stacks_of_several_panels(dtype):
    """R above the panel width of the Cholesky, twice over, once deficient by half."""
    full = gaussian(181, 163, (70, 71, 5), 1).to(dtype)
    twins = LoRAProblem((full.B[0], full.B[0]), (full.A[0], full.A[0]), full.weights[:2])
    for problem, rank in ((full, 146), (twins, 70)):
        raw = BACKEND.product_svd([factors(problem)], ALL, "usv", dtype)[0]
        assert raw.rank.tolist() == [rank]
        s = torch.linalg.svdvals(problem.update())[:rank]
        assert_close(raw.S[0, :rank], s, float(raw.sigma_err) + 100 * U64)
        from_left = raw.left[0, :, :rank].double() * raw.S[0, :rank] @ raw.right[0, :rank].double()
        assert_close(from_left, problem.update(), 30 * torch.finfo(dtype).eps)


def test_a_large_batch_of_small_updates():
    """Tens of thousands of matrices, several waves: each as if alone."""
    N = 30_011
    make = torch.Generator().manual_seed(1)
    B, A = torch.randn(N, 5, 2, generator=make), torch.randn(N, 2, 3, generator=make)
    problem = LoRAProblem((B[17],), (A[17],), torch.ones(1, dtype=torch.float64))
    group = factors(problem)
    many = type(group)((B,), (A,), torch.ones(N, 1, dtype=torch.float64), 5, 3, 2)
    raw = BACKEND.product_svd([many], RuleSpec(RuleCode.RANK, 2.0), "left", torch.float32)[0]
    assert (raw.rank == 2).all()
    assert_close(raw.left @ raw.right, B @ A, 1e-6)
    alone = BACKEND.product_svd([group], RuleSpec(RuleCode.RANK, 2.0), "left", torch.float32)[0]
    assert_close(
        matrix(type(raw)(*(x[17] for x in raw)), "left"), matrix(type(raw)(*(x[0] for x in alone)), "left"), 1e-6
    )
