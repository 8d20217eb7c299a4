"""FLoRIST on every backend and through the public call: ranks and products, what clients do with the pair, sweeps of tau."""

from dataclasses import replace

import pytest
import torch
from method_problems import Problem, distance, normalised, standard, with_spectrum
from method_traits import LIMIT, SCALE, answer, clients_of, monomial, over, split

import fedlora_kernels as fk

MODULE = "model.layers.0.self_attn.q_proj"
TAUS = [round(0.80 + 0.01 * i, 2) for i in range(21)]
"""The published sweep."""


def problem(dtype=torch.float64) -> Problem:
    return standard(m=41, n=31, scale=SCALE, dtype=dtype)


def product(adapter) -> torch.Tensor:
    pair = adapter[MODULE]
    return pair.scale * pair.B.double() @ pair.A.double()


@over(["florist"])
@pytest.mark.parametrize("tau", [1e-9, 0.5, 0.9, 0.99, 1.0])
def test_the_rank_is_the_least_that_keeps_the_energy_and_the_error_what_is_left(name, backend, dtype, tau):
    p = problem(dtype)
    D = p.dense()
    energy = torch.linalg.svdvals(D).square()
    made = answer(p, name, backend=backend, rule=fk.Energy(tau))
    rank = int(made.outcome.rank[0])
    kept = energy[:rank].sum() / energy.sum()
    assert kept >= tau - 1e-6 if dtype == torch.float32 else kept >= tau - 1e-12
    assert rank == 1 or energy[: rank - 1].sum() < tau * energy.sum()
    assert rank <= min(D.shape)
    assert distance(made.pair, D) ** 2 == pytest.approx(float(1 - kept), abs=LIMIT[dtype], rel=1e-6)


@over(["florist"])
@pytest.mark.parametrize("change", ["gauge", "order", "split", "scale"])
@pytest.mark.parametrize("tau", [0.9, 1.0])
def test_rank_and_product_feel_no_change_that_leaves_the_sum(name, backend, dtype, change, tau):
    p = problem(dtype)
    other = {
        "gauge": lambda: monomial(p),
        "order": lambda: p.permuted([3, 0, 4, 2, 1]),
        "split": lambda: split(p, 2),
        "scale": lambda: replace(p, scale=[7.0 * s for s in p.scale]),
    }[change]()
    one, two = (answer(x, name, backend=backend, rule=fk.Energy(tau)) for x in (p, other))
    assert int(one.outcome.rank[0]) == int(two.outcome.rank[0])
    assert distance(two.pair, (7.0 if change == "scale" else 1.0) * one.pair) < LIMIT[dtype]


@over(["florist"])
def test_rows_are_orthonormal_and_singular_values_are_on_B(name, backend, dtype):
    p = problem(dtype)
    D = p.dense()
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    outcome = answer(p, name, backend=backend).outcome
    B, A = outcome.B[0].double(), outcome.A[0].double()
    k = A.shape[0]
    assert float((A @ A.T - torch.eye(k)).abs().max()) < 10 * LIMIT[dtype]
    assert distance(B.T @ B, S[:k].square().diag()) < 10 * LIMIT[dtype]
    assert distance(B, D @ A.T) < LIMIT[dtype]
    torch.testing.assert_close(outcome.spectrum.S[0, :k], S[:k], rtol=1e-9, atol=1e-12 * float(S[0]))
    for r in (1, 5, 17):
        assert distance(B[:, :r] @ A[:r], U[:, :r] * S[:r] @ Vh[:r]) < 10 * LIMIT[dtype]


@over(["florist"])
@pytest.mark.parametrize("kind", ["zero", "cancelled"])
def test_a_zero_update_has_rank_one_and_a_unit_row(name, backend, dtype, kind):
    p = problem(dtype)
    p = Problem([p.B[2], -p.B[2]], [p.A[2]] * 2, [2.0] * 2, [0.5] * 2) if kind == "cancelled" else p
    p = replace(p, scale=[0.0] * len(p.B)) if kind == "zero" else p
    made = answer(p, name, backend=backend)
    assert int(made.outcome.rank[0]) == 1
    assert not made.outcome.B.any()
    assert made.outcome.A[0, 0].tolist() == [1.0] + [0.0] * 30
    assert not int(made.outcome.info[0])


@over(["florist"])
def test_ten_equal_values_with_tau_nine_tenths_give_nine(name, backend, dtype):
    p = with_spectrum([3.7] * 10)
    p = replace(p, B=[b.to(dtype) for b in p.B], A=[a.to(dtype) for a in p.A])
    assert int(answer(p, name, backend=backend, rule=fk.Energy(0.9)).outcome.rank[0]) == 9


def test_clients_that_merge_accumulate_the_updates_in_their_base():
    """Round by round the pair goes into W0 and fresh factors of the client's own rank start, A random, B = 0."""
    W0 = torch.randn(41, 31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    base = [W0.clone() for _ in range(5)]
    wanted = W0.clone()
    for seed in range(3):
        p = standard(m=41, n=31, scale=SCALE, seed=seed)
        result = fk.aggregate(clients_of(p), weights=p.weight, rule=fk.Energy(1.0), round=seed)
        wanted += p.dense()
        for k in range(5):
            sent = result.for_client(k)
            assert sent.modules[MODULE].scale == SCALE[k]
            base[k] += product(sent)
    for W in base:
        assert distance(W - W0, wanted - W0) < 1e-12


@pytest.mark.parametrize("tau", [0.3, 0.9, 1.0])
def test_clients_that_resume_at_their_own_rank_can_train_all_of_it(tau):
    """A shorter pair is padded so that the padding has a gradient; a longer one is cut to the best approximation."""
    p = standard(m=41, n=31, ranks=(2, 5, 12, 20), scale=SCALE[:4], counts=(1, 2, 3, 4))
    result = fk.aggregate(clients_of(p), weights=p.weight, rule=fk.Energy(tau))
    whole = product(result.adapter)
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    G = torch.randn(41, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rank = result.report["modules"][0]["rank"]
    for k, r in enumerate((2, 5, 12, 20)):
        sent = result.for_client(k, rank=r)
        kept = min(r, rank)
        assert sent.modules[MODULE].rank == r
        assert distance(product(sent), U[:, :kept] * S[:kept] @ Vh[:kept]) < 1e-12
        B, A = (x.clone().requires_grad_() for x in (sent[MODULE].B, sent[MODULE].A))
        (SCALE[k] * G * (B @ A)).sum().backward()
        assert not sent[MODULE].B[:, kept:].any()
        assert float(B.grad.norm(dim=0).min()) > 0.0
        assert float(A.grad[:kept].norm(dim=1).min()) > 0.0
        assert bool((sent[MODULE].A[kept:].abs() <= 31**-0.5).all())
    assert {0.3: rank < 5, 0.9: 5 < rank < 20, 1.0: rank == 31}[tau]


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sweep_of_tau_needs_one_decomposition(backend, dtype):
    """Every tau of the published sweep, cut from Energy(1.0), is what a run at that tau answers."""
    p = problem(dtype)
    full = fk.aggregate(clients_of(p), weights=p.weight, rule=fk.Energy(1.0), backend=backend)
    ranks = []
    for tau in TAUS:
        cut = full.at(fk.Energy(tau))
        direct = fk.aggregate(clients_of(p), weights=p.weight, rule=fk.Energy(tau), backend=backend)
        ranks.append(cut.report["modules"][0]["rank"])
        assert ranks[-1] == direct.report["modules"][0]["rank"] == cut.adapter[MODULE].A.shape[0]
        assert distance(product(cut.adapter), product(direct.adapter)) < LIMIT[dtype]
        assert cut.for_client(0).modules[MODULE].rank == ranks[-1]
        for key in ("error", "error_bound"):
            wanted = direct.report["modules"][0][key]
            assert cut.report["modules"][0][key] == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-2] < ranks[-1] == 31


def test_identical_clients_keep_rank_and_update_at_any_tau():
    one = standard(m=41, n=31, ranks=(6,), scale=(2.0,))
    p = Problem(one.B * 4, one.A * 4, [2.0] * 4, normalised([1, 2, 3, 4]))
    for tau in (0.5, 0.9, 1.0):
        many, alone = (fk.aggregate(clients_of(x), weights=x.weight, rule=fk.Energy(tau)) for x in (p, one))
        assert many.report["modules"][0]["rank"] == alone.report["modules"][0]["rank"] <= 6
        assert distance(product(many.adapter), product(alone.adapter)) < 1e-12
