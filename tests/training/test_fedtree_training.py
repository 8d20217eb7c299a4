"""FedTreeLoRA on the client: the layer that mixes two pairs, and how to take a mixed pair apart."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedlora_kernels.errors import InputError
from fedlora_kernels.methods.contract import Census, Group, make_method
from fedlora_kernels.methods.tree_plan import experts
from fedlora_kernels.training.fedtree import TreeLoRA, common_pair, split_pair, warm_up

M, N, R = 9, 7, 3


def pair(seed, r=R):
    made = torch.Generator().manual_seed(seed)
    return (
        torch.randn(M, r, generator=made, dtype=torch.float64),
        torch.randn(r, N, generator=made, dtype=torch.float64),
    )


def base(seed=9):
    torch.manual_seed(seed)
    return nn.Linear(N, M, dtype=torch.float64)


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 1.0])
def test_the_layer_adds_the_weighted_sum_of_both_products(lam):
    (B, A), (C, E) = pair(1), pair(2)
    layer = TreeLoRA(base(), (B, A), (C, E), lam=lam, scale=2.0)
    x = torch.randn(4, 5, N, dtype=torch.float64)
    W = base().weight + 2.0 * (lam * B @ A + (1.0 - lam) * C @ E)
    assert (layer(x) - (x @ W.T + base().bias)).abs().max() < 1e-12
    assert layer.share == lam


def test_the_layer_is_what_the_mixed_pair_computes():
    """For inference: one pair of rank 2r in place of both."""
    (B, A), (C, E) = pair(1), pair(2)
    layer = TreeLoRA(base(), (B, A), (C, E), lam=0.3)
    mixed = torch.cat([0.3 * B, 0.7 * C], 1) @ torch.cat([A, E], 0)
    x = torch.randn(6, N, dtype=torch.float64)
    assert (layer(x) - base()(x) - x @ mixed.T).abs().max() < 1e-12


def test_the_initial_share_is_one_half():
    assert TreeLoRA(base(), pair(1), pair(2)).share == 0.5


def test_trained_are_the_cluster_pair_and_the_share_alone():
    layer = TreeLoRA(base(), pair(1), pair(2))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B", "lam"}
    assert {"outside_A", "outside_B"} <= set(layer.state_dict())
    layer(torch.randn(4, N, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (layer.A, layer.B, layer.lam))
    assert layer.base.weight.grad is None


def test_gradients_are_those_of_finite_differences():
    layer = TreeLoRA(base(), pair(1), pair(2), lam=0.4)
    x = torch.randn(3, N, dtype=torch.float64)

    def output(lam, B, A):
        return torch.func.functional_call(layer, {"lam": lam, "B": B, "A": A}, (x,))

    free = [p.detach().clone().requires_grad_() for p in (layer.lam, layer.B, layer.A)]
    assert torch.autograd.gradcheck(output, free)


@pytest.mark.parametrize("start", [-0.2, 0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("grad", [-1.0, 1.0])
def test_a_share_at_an_end_takes_only_gradients_that_lead_back(start, grad):
    layer = TreeLoRA(base(), pair(1), pair(2))
    with torch.no_grad():
        layer.lam.fill_(start)
    x = torch.randn(N, dtype=torch.float64)
    with torch.no_grad():
        own, others = layer.B @ layer.A @ x, layer.outside_B @ layer.outside_A @ x
    direction = (own - others) / (own - others).square().sum()
    (layer(x) @ direction * grad).backward()
    outward = (start >= 1.0 and grad < 0.0) or (start <= 0.0 and grad > 0.0)
    assert float(layer.lam.grad) == pytest.approx(0.0 if outward else grad, abs=1e-12)
    assert layer.share == min(max(start, 0.0), 1.0)


def test_a_share_never_leaves_its_interval_nor_gets_stuck():
    """First the cluster fits the target, then the others do."""
    layer = TreeLoRA(base(), pair(1), pair(2))
    x = torch.randn(32, N, dtype=torch.float64)
    optimiser = torch.optim.SGD([layer.lam], lr=0.01)
    for wanted, (B, A) in ((1.0, pair(1)), (0.0, pair(2))):
        target = (base()(x) + x @ (B @ A).T).detach()
        for _ in range(60):
            optimiser.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimiser.step()
            assert 0.0 <= layer.share <= 1.0
        assert layer.share == pytest.approx(wanted, abs=1e-3)


def test_project_puts_an_overshoot_back():
    layer = TreeLoRA(base(), pair(1), pair(2))
    with torch.no_grad():
        layer.lam.fill_(3.0)
    x = torch.randn(4, N, dtype=torch.float64)
    overshot = layer(x)
    layer.project()
    assert float(layer.lam.detach()) == 1.0
    assert torch.equal(layer(x), overshot), "beyond an end lam counts as that end"
    TreeLoRA(base(), pair(1)).project()


def test_nobody_outside_fixes_the_share_at_one():
    B, A = pair(1)
    layer = TreeLoRA(base(), (B, A), lam=0.2)
    x = torch.randn(4, N, dtype=torch.float64)
    assert (layer(x) - base()(x) - x @ (B @ A).T).abs().max() < 1e-12
    assert layer.share == 1.0
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}


def test_layers_may_share_one_lam():
    lam = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    layers = nn.Sequential(
        TreeLoRA(nn.Identity(), (torch.eye(4), torch.eye(4)), (torch.eye(4),) * 2, lam=lam),
        TreeLoRA(nn.Identity(), (torch.eye(4), torch.eye(4)), (torch.eye(4),) * 2, lam=lam),
    )
    assert sum(p is lam for p in layers.parameters()) == 1


def test_the_layer_can_be_copied_and_saved():
    layer = TreeLoRA(base(), pair(1), pair(2), lam=0.3)
    twin = copy.deepcopy(layer)
    other = TreeLoRA(base(1), pair(3), pair(4))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, N, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(other(x), layer(x))


def test_half_precision_factors_keep_a_float32_share():
    pairs = [[x.to(torch.bfloat16) for x in pair(seed)] for seed in (1, 2)]
    layer = TreeLoRA(base().to(torch.bfloat16), *pairs)
    assert layer.lam.dtype == torch.float32
    assert layer(torch.randn(4, N, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_shares_outside_of_0_to_1_are_refused(lam):
    with pytest.raises(InputError, match="0 <= lam <= 1"):
        TreeLoRA(base(), pair(1), pair(2), lam=lam)
    with pytest.raises(InputError, match="0 <= lam <= 1"):
        split_pair(*pair(1, 4), lam)


def test_pairs_that_do_not_fit_are_refused():
    B, A = pair(1)
    with pytest.raises(InputError, match="cluster is B"):
        TreeLoRA(base(), (B, A[:2]))
    with pytest.raises(InputError, match="cluster is 9 x 7, outside 7 x 9"):
        TreeLoRA(base(), (B, A), (A.T, B.T))


def test_the_original_pair_is_left_alone():
    B, A = pair(1)
    kept = B.clone()
    layer = TreeLoRA(base(), (B, A), pair(2))
    with torch.no_grad():
        layer.B.add_(1.0)
    assert torch.equal(B, kept)
    sent, _ = layer.upload()
    assert torch.equal(sent, layer.B)
    assert not sent.requires_grad


@pytest.mark.parametrize("lam", [1e-3, 0.25, 0.9])
def test_a_mixed_pair_comes_apart(lam):
    (B, A), (C, E) = pair(1), pair(2)
    cluster, outside = split_pair(torch.cat([lam * B, (1.0 - lam) * C], 1), torch.cat([A, E], 0), lam)
    for found, wanted in zip((*cluster, *outside), (B, A, C, E), strict=True):
        assert (found - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_share_at_an_end_cannot_be_undone_and_says_what_can(lam):
    with pytest.raises(InputError, match="experts"):
        split_pair(*pair(1, 4), lam)


def test_an_odd_rank_is_no_mixed_pair():
    with pytest.raises(InputError, match="rank 3"):
        split_pair(*pair(1, 3), 0.5)


def test_all_clients_start_from_one_pair():
    B, A = common_pair("layers.0.q", M, N, R)
    assert torch.equal(A, common_pair("layers.0.q", M, N, R)[1])
    assert not torch.equal(A, common_pair("layers.1.q", M, N, R)[1])
    assert not torch.equal(A, common_pair("layers.0.q", M, N, R, seed=1)[1])
    assert (B.shape, A.shape, B.dtype, A.dtype) == ((M, R), (R, N), torch.float32, torch.float32)
    assert not B.any()
    assert float(A.abs().max()) <= N**-0.5


@pytest.mark.parametrize("e_warm", [1, 3])
def test_the_warm_up_is_so_many_rounds(e_warm):
    seen = []
    warm_up(seen.append, e_warm)
    assert seen == list(range(e_warm))


def test_the_warm_up_is_one_round_by_default_and_never_none():
    seen = []
    warm_up(seen.append)
    assert seen == [0]
    for e_warm in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="e_warm"):
            warm_up(seen.append, e_warm)


def test_two_groups_of_clients_find_their_clusters_and_learn_their_tasks():
    """Warm-up from a common pair, tree, then rounds: clusters are the groups, and each client's layer fits its own target."""
    made = torch.Generator().manual_seed(0)
    K, modules = 4, ("layers.0.q", "layers.1.q")
    x = torch.randn(128, N, generator=made, dtype=torch.float64)
    targets = {}
    for name in modules:
        left, right = torch.randn(2, M, R, generator=made).double(), torch.randn(2, R, N, generator=made).double()
        targets[name] = left @ right

    def train(layers, k, steps):
        """Local training of one client; returns the loss before and after."""
        optimiser = torch.optim.Adam(
            [p for layer in layers.values() for p in layer.parameters() if p.requires_grad], lr=0.02
        )
        losses = []
        for _ in range(steps):
            optimiser.zero_grad()
            loss = sum((layer(x) - x @ targets[name][k % 2].T).square().mean() for name, layer in layers.items())
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return losses[0], losses[-1]

    class Zero(nn.Module):
        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], M)

    method = make_method("fedtree", {})
    names, memory, state = tuple(f"c{k}" for k in range(K)), None, None
    before, reports = {}, None
    for number in range(3):
        clients = []
        for k in range(K):
            if state is None:
                pairs = {name: tuple(f.double() for f in common_pair(name, M, N, R)) for name in modules}
                layers = {name: TreeLoRA(Zero(), pairs[name]) for name in modules}
                warm_up(lambda i, layers=layers, k=k: before.setdefault(k, train(layers, k, 30)[0]))
            else:
                found = experts(state, names[k])
                layers = {name: TreeLoRA(Zero(), e.cluster, e.outside, lam=e.lam) for name, e in found.items()}
                train(layers, k, 40)
            clients.append(layers)
        uploads = [{name: layer.upload() for name, layer in layers.items()} for layers in clients]
        group = Group(
            modules=modules,
            kind="linear",
            m=M,
            n=N,
            B=tuple(torch.stack([upload[name][0] for name in modules]) for upload in uploads),
            A=tuple(torch.stack([upload[name][1] for name in modules]) for upload in uploads),
            scale=torch.ones(2, K, dtype=torch.float64),
            weight=torch.full((2, K), 1 / K, dtype=torch.float64),
            clients=tuple(range(K)),
            dtype=torch.float64,
            round=number,
        )
        if state is not None:
            reports = {names[k]: {name: clients[k][name].share for name in modules} for k in range(K)}
        ranks = torch.full((2, K), R).numpy()
        stats = method.survey(group).stats if method.surveys(memory) else {}
        plan = method.decide(stats, Census(modules, names, None, ranks, ranks[0] / R, ranks, number, memory, reports))
        outcome = method.combine(group, plan, None)
        memory = method.remember(plan)
        tensors = {
            f"{name}.{key}": t for name, own in zip(modules, outcome.state, strict=True) for key, t in own.items()
        }
        state = SimpleNamespace(tensors=tensors, memory=memory)
    assert plan.labels.tolist() == [[0, 1, 0, 1]] * 2
    assert ((plan.lam > 0.5) & (plan.lam <= 1.0)).all(), "the cluster is worth more than the others"
    for k in range(K):
        pairs = outcome.personal[k]
        loss = sum(
            (x @ (pairs.B[i] @ pairs.A[i] - targets[name][k % 2]).T).square().mean() for i, name in enumerate(modules)
        )
        assert float(loss) < 0.3 * before[k]
