"""PreLort's nested loss: its value, its gradients, its levels, and models of several modules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from fedlora_kernels.errors import InputError
from fedlora_kernels.training.pairs import prefix, top_rank
from fedlora_kernels.training.prelort import nested_levels, nested_loss

M, N, R = 7, 5, 6
LEVELS = (1, 2, 4)
WEIGHTS = {1: 0.5, 2: 0.125, 4: 0.25, 6: 0.125}


def problem(seed=0, rank=R, scale=1.5):
    """A pair, and the loss of one linear layer with a curved head, which any prefix may enter."""
    made = torch.Generator().manual_seed(seed)
    W0, x, y = (torch.randn(*shape, generator=made).double() for shape in ((M, N), (N, 11), (M, 11)))
    B = torch.randn(M, rank, generator=made).double().requires_grad_()
    A = torch.randn(rank, N, generator=made).double().requires_grad_()

    def of_weight(W):
        return ((torch.tanh(W @ x) - y) ** 2).mean()

    return {"q": (B, A)}, lambda pairs: of_weight(W0 + scale * pairs["q"][0] @ pairs["q"][1]), of_weight, W0


def value(x):
    return float(x.detach())


def test_the_loss_is_the_weighted_sum_over_the_prefixes():
    pairs, loss, _, _ = problem()
    B, A = pairs["q"]
    wanted = sum(a * loss({"q": (B[:, :r], A[:r])}) for r, a in WEIGHTS.items())
    assert value(nested_loss(loss, pairs, LEVELS, WEIGHTS)) == pytest.approx(value(wanted), rel=1e-15)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_gradients_are_those_of_the_formula(scale):
    """grad_B[:, j] = sum_{r >= j} a_r s G_r A[j]^T, grad_A[j] = sum_{r >= j} a_r s B[:, j]^T G_r."""
    pairs, loss, of_weight, W0 = problem(scale=scale)
    B, A = pairs["q"]
    found = torch.autograd.grad(nested_loss(loss, pairs, LEVELS, WEIGHTS), (B, A))
    G = {}
    for r in WEIGHTS:
        W = (W0 + scale * B[:, :r] @ A[:r]).detach().requires_grad_()
        (G[r],) = torch.autograd.grad(of_weight(W), W)
    for j in range(R):
        on_B = sum(a * scale * G[r] @ A[j] for r, a in WEIGHTS.items() if r >= j + 1)
        on_A = sum(a * scale * B[:, j] @ G[r] for r, a in WEIGHTS.items() if r >= j + 1)
        torch.testing.assert_close(found[0][:, j], on_B.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[1][j], on_A.detach(), rtol=1e-12, atol=1e-14)


def test_gradients_match_finite_differences():
    pairs, loss, _, _ = problem()
    B, A = pairs["q"]
    found = torch.autograd.grad(nested_loss(loss, pairs, LEVELS, WEIGHTS), (B, A))
    step = 1e-6
    for which, x in enumerate((B, A)):
        measured = torch.zeros_like(x)
        for index in np.ndindex(*x.shape):
            values = []
            for sign in (1, -1):
                moved = x.detach().clone()
                moved[index] += sign * step
                pair = (moved, A) if which == 0 else (B, moved)
                values.append(value(nested_loss(loss, {"q": pair}, LEVELS, WEIGHTS)))
            measured[index] = (values[0] - values[1]) / (2 * step)
        # truncation step^2, rounding u / step
        torch.testing.assert_close(found[which], measured, rtol=1e-7, atol=1e-9)
    assert torch.autograd.gradcheck(lambda B, A: nested_loss(loss, {"q": (B, A)}, LEVELS, WEIGHTS), (B, A))


def test_an_index_beyond_a_prefix_gets_nothing_from_it():
    pairs, loss, _, _ = problem()
    B, A = pairs["q"]
    only = {1: 0.0, 2: 1.0, 4: 0.0, 6: 0.0}
    on_B, on_A = torch.autograd.grad(nested_loss(loss, pairs, LEVELS, only), (B, A))
    assert bool(on_B[:, :2].any())
    assert not on_B[:, 2:].any()
    assert not on_A[2:].any()


def test_weights_are_uniform_unless_given():
    pairs, loss, _, _ = problem()
    wanted = sum(loss(prefix(pairs, r)) for r in (1, 2, 4, 6)) / 4
    assert value(nested_loss(loss, pairs, LEVELS)) == pytest.approx(value(wanted), rel=1e-15)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 12)), st.integers(1, 9))
def test_levels_end_at_the_rank_of_the_client_which_is_one_of_them(levels, rank):
    found = nested_levels({"q": (torch.zeros(3, rank), torch.zeros(rank, 2))}, levels)
    assert found == sorted({level for level in levels if level < rank} | {rank})


def test_one_level_is_the_plain_loss():
    pairs, loss, _, _ = problem()
    for mode in ("sum", "sample"):
        assert value(nested_loss(loss, pairs, (), mode=mode)) == value(loss(pairs))
        assert value(nested_loss(loss, pairs, (R, 9), mode=mode)) == value(loss(pairs))


def test_sampling_draws_one_level_with_its_probability():
    pairs, _, _, _ = problem()
    seen = []

    def loss(given):
        seen.append(top_rank(given))
        return given["q"][0].sum()

    made, draws = torch.Generator().manual_seed(1), 4000
    for _ in range(draws):
        nested_loss(loss, pairs, LEVELS, WEIGHTS, mode="sample", generator=made)
    assert len(seen) == draws
    for rank, p in WEIGHTS.items():
        assert seen.count(rank) / draws == pytest.approx(p, abs=4 * (p * (1 - p) / draws) ** 0.5)


def test_sampling_is_repeatable_and_has_the_gradient_of_one_prefix():
    pairs, loss, _, _ = problem()
    B, A = pairs["q"]
    of = {r: torch.autograd.grad(loss(prefix(pairs, r)), (B, A)) for r in (1, 2, 4, 6)}
    drawn = []
    for _ in range(2):
        made = torch.Generator().manual_seed(3)
        picks = [nested_loss(loss, pairs, LEVELS, mode="sample", generator=made) for _ in range(6)]
        drawn.append([value(pick) for pick in picks])
        found = torch.autograd.grad(picks[0], (B, A))
        assert any(all(torch.equal(x, y) for x, y in zip(found, grads, strict=True)) for grads in of.values())
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


class Adapted(nn.Module):
    """A frozen layer and a pair beside it, named as PEFT names them."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))


def test_a_torch_module_trains_through_functional_call():
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(5, 7, 4), nn.Tanh(), Adapted(7, 3, 2)).double()
    x, y = torch.randn(13, 5).double(), torch.randn(13, 3).double()
    pairs = {name: (model[int(name)].lora_B.weight, model[int(name)].lora_A.weight) for name in ("0", "2")}

    def loss(given):
        weights = {
            f"{name}.lora_{factor}.weight": value
            for name, pair in given.items()
            for factor, value in zip("BA", pair, strict=True)
        }
        return nn.functional.mse_loss(functional_call(model, weights, (x,)), y)

    assert nested_levels(pairs, (1, 2)) == [1, 2, 4]
    before = value(nested_loss(loss, pairs, (1, 2)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nested_loss(loss, pairs, (1, 2)).backward()
        optimizer.step()
    assert value(nested_loss(loss, pairs, (1, 2))) < 0.5 * before
    assert [model[i].base.weight.grad for i in (0, 2)] == [None, None]


def test_kernels_of_convolutions_are_cut_on_the_rank():
    pairs = {"conv": (torch.zeros(8, 6, 1, 1), torch.zeros(6, 3, 3, 3)), "q": (torch.zeros(4, 2), torch.zeros(2, 4))}
    cut = prefix(pairs, 3)
    assert [tuple(x.shape) for x in (*cut["conv"], *cut["q"])] == [(8, 3, 1, 1), (3, 3, 3, 3), (4, 2), (2, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": (0, 2)}, "levels hold 0"),
        ({"a_r": {1: 1.0}}, "no weight for rank 2"),
        ({"a_r": {1: 1.0, 2: -1.0, 4: 1.0, 6: 1.0}}, "finite weights >= 0"),
        ({"a_r": {1: 1.0, 2: float("nan"), 4: 1.0, 6: 1.0}}, "finite weights >= 0"),
        ({"a_r": dict.fromkeys((1, 2, 4, 6), 0.0)}, "one above 0"),
        ({"mode": "all"}, "'sum' or 'sample'"),
        ({"pairs": {}}, "rank of the pairs is 0"),
        ({"pairs": {"q": (torch.zeros(3, 0), torch.zeros(0, 2))}}, "rank of the pairs is 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    pairs, loss, _, _ = problem()
    with pytest.raises(InputError, match=message):
        nested_loss(**{"loss": loss, "pairs": pairs, "levels": LEVELS, **arguments})
