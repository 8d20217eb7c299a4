"""HetLoRA's self-pruning: the tail and its penalty, the decision, the cut."""

import pytest
import torch

from fedlora_kernels.errors import InputError
from fedlora_kernels.training.hetlora import cut_pairs, kept_rank, pruned_rank, tail_penalty


def pairs_of(*ranks, seed=0):
    made = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}": (
            torch.randn(7, r, generator=made).double().requires_grad_(),
            torch.randn(r, 5, generator=made).double().requires_grad_(),
        )
        for i, r in enumerate(ranks)
    }


@pytest.mark.parametrize("rank", range(2, 101))
def test_up_to_rank_100_the_tail_is_exactly_one_index(rank):
    assert kept_rank(rank) == rank - 1


def test_the_rank_left_is_floor_gamma_r_and_at_least_one():
    assert [kept_rank(r) for r in (0, 1, 101, 200, 201, 1000)] == [0, 1, 99, 198, 198, 990]
    assert kept_rank(100, 0.29) == 29, "0.29 * 100 is 28.999999999999996"
    assert kept_rank(4, 0.01) == 1
    assert kept_rank(8, 1.0) == 8


def test_the_penalty_is_the_product_of_the_norms_of_the_tails():
    pairs = pairs_of(8, 8)
    for gamma, kept in ((0.5, 4), (0.99, 7)):
        wanted = sum(B[:, kept:].norm() * A[kept:].norm() for B, A in pairs.values())
        torch.testing.assert_close(tail_penalty(pairs, gamma), wanted, rtol=1e-15, atol=0)


def test_the_tail_is_that_of_the_client_so_smaller_pairs_have_none():
    pairs = pairs_of(8, 3)
    B, A = pairs["layers.0"]
    torch.testing.assert_close(tail_penalty(pairs, 0.5), B[:, 4:].norm() * A[4:].norm(), rtol=1e-15, atol=0)


def test_gradients_reach_the_tail_alone():
    pairs = pairs_of(6)
    B, A = pairs["layers.0"]
    tail_penalty(pairs, 0.5).backward()
    assert not B.grad[:, :3].any()
    assert not A.grad[:3].any()
    torch.testing.assert_close(B.grad[:, 3:], B[:, 3:] / B[:, 3:].norm() * A[3:].norm())
    assert torch.autograd.gradcheck(lambda B, A: tail_penalty({"q": (B, A)}, 0.5), (B, A))


def test_a_tail_of_zeros_has_a_finite_gradient():
    """B starts at zero in LoRA."""
    pairs = {"q": (torch.zeros(7, 4, requires_grad=True), torch.randn(4, 5).requires_grad_())}
    tail_penalty(pairs).backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in pairs["q"])


def test_rank_one_and_no_pairs_have_no_tail():
    assert float(tail_penalty(pairs_of(1)).detach()) == 0.0
    assert float(tail_penalty({})) == 0.0


@pytest.mark.parametrize(("before", "after", "wanted"), [(2.0, 1.0, 7), (1.0, 1.0, 8), (1.0, 2.0, 8)])
def test_the_rank_shrinks_where_the_tail_fell(before, after, wanted):
    assert pruned_rank(8, before, after) == wanted
    assert pruned_rank(8, torch.tensor(before), torch.tensor(after)) == wanted
    assert pruned_rank(1, before, after) == 1


def test_nan_shrinks_nothing():
    assert pruned_rank(8, 1.0, float("nan")) == 8


def test_training_with_the_penalty_prunes_the_pair():
    pairs = pairs_of(4, 4)
    trained = [x for pair in pairs.values() for x in pair]
    before = tail_penalty(pairs).detach()
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        tail_penalty(pairs).backward()
        optimizer.step()
    rank = pruned_rank(4, before, tail_penalty(pairs))
    assert rank == 3
    cut = cut_pairs(pairs, rank)
    assert [tuple(x.shape) for x in cut["layers.1"]] == [(7, 3), (3, 5)]


def test_the_cut_pair_is_the_prefix_as_new_leaves():
    pairs = {**pairs_of(6, 2), "frozen": (torch.ones(3, 6), torch.ones(6, 2))}
    cut = cut_pairs(pairs, 4)
    B, A = pairs["layers.0"]
    assert torch.equal(cut["layers.0"][0], B[:, :4])
    assert torch.equal(cut["layers.0"][1], A[:4])
    assert cut["layers.1"][1].shape == (2, 5)
    for name, pair in cut.items():
        for x, given in zip(pair, pairs[name], strict=True):
            assert x.is_leaf
            assert x.is_contiguous()
            assert x.data_ptr() != given.data_ptr()
            assert x.requires_grad == given.requires_grad


def test_bad_arguments_are_refused():
    for gamma in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(InputError, match="gamma"):
            tail_penalty(pairs_of(4), gamma)
    with pytest.raises(InputError, match="rank is 0"):
        cut_pairs(pairs_of(4), 0)
