"""Defects known from released implementations of these methods, each a test that sees it, through the public call.

Factors are float64 unless a defect lives in float32, so that limits are those of rounding.
"""

from dataclasses import replace

import pytest
import torch
from method_problems import Problem, distance, imbalanced, normalised, standard, with_spectrum
from method_traits import SCALE, clients_of, rotated_copies

import fedlora_kernels as fk

ALL = fk.Energy(1.0)
COUNTS = [10.0, 20.0, 30.0, 40.0, 50.0]
MODULE = "model.layers.0.self_attn.q_proj"
backends = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])


def run(problem: Problem, method: str, backend="auto", **options) -> fk.Result:
    return fk.aggregate(clients_of(problem), method, weights=problem.weight, backend=backend, **options)


def product(adapter) -> torch.Tensor:
    pair = adapter[MODULE]
    return pair.scale * pair.B.double() @ pair.A.double()


def total(result: fk.Result) -> torch.Tensor:
    """What the weight gains: pair and residual."""
    found = product(result.adapter)
    return found + product(result.residual) if result.residual is not None and len(result.residual) else found


def unequal(ranks=(4, 4, 8, 8, 12), m=48, n=40, scale=SCALE) -> Problem:
    return standard(m=m, n=n, ranks=ranks, scale=scale, counts=COUNTS[: len(ranks)])


def equal(r=6, m=41, n=31, scale=SCALE) -> Problem:
    return unequal((r,) * 5, m, n, scale)


def means(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of the folded B and of A."""
    B = sum(w * s * b for w, s, b in zip(problem.weight, problem.scale, problem.B, strict=True))
    return B, sum(w * a for w, a in zip(problem.weight, problem.A, strict=True))


@backends
@pytest.mark.parametrize("method", ["florist", "flora", "norm_clip"])
def test_01_no_client_is_stacked_twice(method, backend):
    """FLoRIST: a loop's `else` belongs to the `for`, so client 0 counts w_0 + w_0^2; with mixed ranks the stack is re-weighted."""
    problem = unequal()
    options = {"florist": {"rule": ALL}, "norm_clip": {"max_update_norm": float("inf")}}.get(method, {})
    D = product(run(problem, method, backend, **options).adapter)
    columns = torch.stack([d.flatten() for d in problem.updates()], 1)
    found = torch.linalg.lstsq(columns, D.flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(found, torch.tensor(problem.weight, dtype=torch.float64), rtol=1e-11, atol=0)


@pytest.mark.parametrize("method", ["florist", "flora", "flexlora", "zero_pad", "fedit"])
@pytest.mark.parametrize("shape", [(6, 31), (31, 6), (6, 6)], ids=["m_is_r", "n_is_r", "both"])
def test_02_factors_are_told_apart_by_name(method, shape):
    """FLoRIST: A and B told apart by `shape[0] == r`; a layer with m = r or n = r has them exchanged."""
    problem = equal(6, *shape)
    B, A = means(problem)
    wanted = B @ A if method in ("fedit", "zero_pad") else problem.dense()
    rule = {"rule": ALL} if method == "florist" else {}
    assert distance(product(run(problem, method, **rule).adapter), wanted) < 1e-12


@backends
@pytest.mark.parametrize("method", ["florist", "flora", "flexlora", "fedex", "fedmomentum"])
def test_03_scales_of_the_clients_are_in_the_sum(method, backend):
    """FLoRIST: alpha / r is not in the aggregate, which is then right only where all scales are equal."""
    problem = unequal((9,) * 5, 9, 31)
    options = {"florist": {"rule": ALL}, "fedmomentum": {"energy": 1.0}}.get(method, {})
    assert distance(total(run(problem, method, backend, **options)), problem.dense()) < 1e-12


@pytest.mark.parametrize("method", ["flora", "zero_pad", "fedit"])
def test_04_baselines_have_the_scale_that_was_trained(method):
    """FLoRIST: the configurations of FLoRA (scale 1.68) and zero-padding (32) differ from the 2 of training."""
    problem = equal(scale=(2.0,) * 5) if method == "fedit" else unequal((4, 8, 12), scale=(2.0,) * 3)
    r = max(b.shape[1] for b in problem.B)
    B = [torch.nn.functional.pad(b, (0, r - b.shape[1])) for b in problem.B]
    A = [torch.nn.functional.pad(a, (0, 0, 0, r - a.shape[0])) for a in problem.A]
    mean_B, mean_A = means(replace(problem, B=B, A=A))
    wanted = problem.dense() if method == "flora" else mean_B @ mean_A
    result = run(problem, method)
    assert distance(product(result.adapter), wanted) < 1e-12
    for k in range(len(problem.B)):
        sent = result.for_client(k)
        assert sent.modules[MODULE].scale == 2.0
        assert distance(product(sent), wanted) < 1e-12
        config = sent.config
        assert config["lora_alpha"] / sent.modules[MODULE].rank == 2.0


@pytest.mark.filterwarnings("ignore:method 'hetlora' uses no weights")
@pytest.mark.parametrize("method", ["flexlora", "hetlora", "prelort", "raflora", "clair"])
def test_05_every_client_has_its_own_rank(method):
    """FLoRIST, the branch of FlexLoRA: one dict is appended for all clients, so that everyone gets the last rank."""
    problem = unequal((12, 2, 7, 4, 9))
    result = run(problem, method)
    sent = [result.for_client(k) for k in range(5)]
    for k, adapter in enumerate(sent):
        r = problem.B[k].shape[1]
        assert (adapter[MODULE].B.shape, adapter[MODULE].A.shape) == ((48, r), (r, 40))
    if method == "flexlora":
        U, S, Vh = torch.linalg.svd(problem.dense(), full_matrices=False)
        for k, adapter in enumerate(sent):
            r = problem.B[k].shape[1]
            assert distance(product(adapter), U[:, :r] * S[:r] @ Vh[:r]) < 1e-12


@pytest.mark.parametrize("method", ["florist", "flexlora", "fedmomentum"])
def test_06_the_padding_of_a_resumed_pair_has_a_gradient(method):
    """Resuming from a pair zero-padded in both factors: grad_B = G A^T and grad_A = B^T G vanish there for ever."""
    problem = equal(8)
    one = replace(problem, B=[problem.B[0][:, :3] @ problem.A[0][:3, :8]] * 5, A=[problem.A[0]] * 5, scale=[2.0] * 5)
    sent = run(one, method, **({"rule": ALL} if method == "florist" else {})).for_client(1, rank=8)
    B, A = (x.clone().requires_grad_() for x in (sent[MODULE].B, sent[MODULE].A))
    G = torch.randn(41, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (G * (B @ A)).sum().backward()
    assert not sent[MODULE].B[:, 3:].any()
    assert float(B.grad[:, 3:].norm(dim=0).min()) > 0.1
    assert float(A.grad[:3].norm(dim=1).min()) > 0.0
    assert distance(product(sent), one.dense()) < 1e-12


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_07_energy_is_summed_in_float64(dtype, backend):
    """A running fp32 sum reaches 1 too early: 4 ones and 8 times 1e-4 give p = 4 instead of 12 at tau = 1."""
    problem = with_spectrum([1.0] * 4 + [1e-4] * 8)
    problem = Problem([x.to(dtype) for x in problem.B], [x.to(dtype) for x in problem.A], [1.0], [1.0])
    ranks = [run(problem, "florist", backend, rule=fk.Energy(tau)) for tau in (1.0, 1.0 - 1e-8, 0.9)]
    assert [result.report["modules"][0]["rank"] for result in ranks] == [12, 8, 4]


@backends
@pytest.mark.parametrize("method", ["florist", "flexlora", "fedmomentum"])
@pytest.mark.parametrize("seed", [0, 1])
def test_08_imbalanced_gauges_do_no_harm(method, backend, seed):
    """A Gram route without balancing: 54 % error where clients hold (t B_k, A_k / t) with t in {1e4, 1, 1e-4}."""
    m, r = (9, 9) if method == "flexlora" else (41, 6)
    problem = imbalanced(standard(m=m, n=31, ranks=(r,) * 5, scale=SCALE, seed=seed))
    options = {"florist": {"rule": ALL}, "fedmomentum": {"energy": 1.0}}.get(method, {})
    result = run(problem, method, backend, **options)
    assert distance(total(result), problem.dense()) < 1e-12
    if method == "florist":
        assert result.report["modules"][0]["rank"] == 30


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_08_balanced_columns_leave_imbalanced_clients_in_one_pass(backend):
    """Without balancing the certificate of the Gram route fails and a second pass has to mend it."""
    problem = imbalanced(standard(m=197, n=173, ranks=(6,) * 5, scale=SCALE, dtype=torch.float32))
    row = run(problem, "florist", backend, rule=ALL).report["modules"][0]
    assert (row["passes"], row["rank"]) == (1, 30)


@pytest.mark.parametrize("lam", [1.5, 1.0 + 1e-9, -0.1, float("nan")])
def test_09_lam_outside_zero_to_one_is_refused(lam):
    """FedRot: the default lam = 1.5 silently selects hard alignment in O(r)."""
    with pytest.raises(fk.InputError, match=r"fedrot: lam is"):
        run(equal(), "fedrot", lam=lam)


@backends
@pytest.mark.parametrize("round_", [1, 2])
@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_09_rotations_have_determinant_one(backend, round_, lam):
    """FedRot: hard alignment in O(r) without the determinant fix reflects a client. One client shows its rotation."""
    problem = standard(m=41, n=31, ranks=(6,), scale=(1.0,))
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    last = replace(problem, B=[problem.B[0] @ mirror], A=[mirror @ problem.A[0]])
    before = run(last, "fedrot")
    made = run(problem, "fedrot", backend, lam=lam, round=round_, previous=before).adapter
    turned, own = made[MODULE].A.double(), problem.A[0]
    Q = own @ torch.linalg.pinv(turned)
    assert float((Q.T @ Q - torch.eye(6)).abs().max()) < 1e-12
    assert float(torch.linalg.det(Q)) == pytest.approx(1.0, abs=1e-12)
    assert distance(product(made), problem.dense()) < 1e-12


@backends
@pytest.mark.parametrize("lam", [0.5, 1.0])
@pytest.mark.parametrize("round_", [2, 4])
def test_10_a_reference_of_zero_turns_nothing_in_any_round(backend, lam, round_):
    """FedRot: only round 0 is skipped, so B_ref = 0 in a later B-round gives an arbitrary rotation."""
    problem = equal()
    previous = run(replace(problem, B=[torch.zeros_like(b) for b in problem.B]), "fedrot")
    made = run(problem, "fedrot", backend, lam=lam, round=round_, previous=previous).adapter[MODULE]
    wanted = run(problem, "fedit", backend).adapter[MODULE]
    assert distance(made.B, wanted.B) < 1e-15
    assert distance(made.A, wanted.A) < 1e-15


@backends
def test_11_fedit_is_the_mean_of_all_clients(backend):
    """FLoRA, the branch of FedIT: a misspelt accumulator leaves w_0 times client 0."""
    problem = unequal((6,) * 3, scale=(2.0, 0.5, 4.0))
    pair, (B, A) = run(problem, "fedit", backend).adapter[MODULE], means(problem)
    assert distance(pair.B, B) < 1e-15
    assert distance(pair.A, A) < 1e-15


@backends
def test_12_fedex_weighs_its_means_by_sample_counts(backend):
    """FedEx-LoRA: unweighted means; pair and residual are then the plain mean of the updates."""
    problem = equal()
    result, (B, A) = run(problem, "fedex", backend), means(problem)
    assert distance(total(result), problem.dense()) < 1e-12
    assert distance(product(result.adapter), B @ A) < 1e-12


@backends
@pytest.mark.parametrize("shape", [(41, 31), (31, 41), (29, 29)], ids=["tall", "wide", "square"])
def test_13_the_residual_of_fedex_is_not_transposed(shape, backend):
    """FedEx-LoRA: the residual is always transposed, right for one kind of layer, unseen where m = n."""
    problem = equal(6, *shape)
    result, (B, A) = run(problem, "fedex", backend), means(problem)
    assert distance(product(result.residual), problem.dense() - B @ A) < 1e-12


@backends
def test_14_pair_and_residual_of_fedex_have_one_weighting_and_the_scales(backend):
    """A public FedEx-LoRA: no alpha / r, and a weighted product less unweighted means of factors."""
    problem = equal(scale=(0.5, 4.0, 1.0, 2.0, 8.0))
    result = run(problem, "fedex", backend)
    assert distance(total(result), problem.dense()) < 1e-12
    assert distance(product(result.residual) + product(run(problem, "fedit").adapter), problem.dense()) < 1e-12


@backends
@pytest.mark.parametrize("method", ["flexlora", "florist", "raflora", "fedmomentum"])
def test_15_singular_values_come_once(method, backend):
    """A public FlexLoRA: sqrt(S) on B and nothing on A, so that the product has sqrt(S)."""
    problem = unequal((9,) * 5, 9, 31)
    pair = run(problem, method, backend, **({"rule": ALL} if method == "florist" else {})).adapter[MODULE]
    assert distance(pair.B @ pair.A, problem.dense()) < 1e-12
    S = torch.linalg.svdvals(problem.dense())
    torch.testing.assert_close(torch.linalg.svdvals(pair.B @ pair.A)[:9], S, rtol=1e-12, atol=0)


@backends
@pytest.mark.parametrize("r", [1, 5, 11, 20])
def test_16_truncation_is_optimal_and_ignores_the_order_of_columns(r, backend):
    """ILoRA: QR without pivoting as a low-rank truncation is not optimal and depends on the order of the columns."""
    problem = unequal()
    S = torch.linalg.svdvals(problem.dense())
    shuffled = problem.permuted([3, 0, 4, 2, 1])
    orders = [torch.randperm(b.shape[1], generator=torch.Generator().manual_seed(4)) for b in shuffled.B]
    B = [b[:, order] for b, order in zip(shuffled.B, orders, strict=True)]
    A = [a[order] for a, order in zip(shuffled.A, orders, strict=True)]
    first, second = (
        product(run(p, "florist", backend, rule=fk.Rank(r)).adapter) for p in (problem, replace(shuffled, B=B, A=A))
    )
    lost = float((problem.dense() - first).norm())
    assert lost == pytest.approx(float(S[r:].norm()), rel=1e-12)
    assert distance(second, first) < 1e-12


@backends
@pytest.mark.parametrize("rule", [fk.Krum(1), fk.MultiKrum(1, q=2), fk.TrimmedMean(0.2)], ids=lambda rule: rule.name)
def test_17_robust_rules_choose_by_updates_not_by_factors(rule, backend):
    """Distances of raw factors take gauge copies of one update for outliers, and the choice depends on the gauge."""
    problem = nearly_equal()
    choices = []
    for seed in (None, 1, 2):
        p = problem if seed is None else gauged(problem, seed)
        result = run(p, "florist", backend, rule=ALL, robust=rule)
        choices.append([row["rejected"] for row in result.report["robust"]["clients"].values()])
    assert choices[0] == choices[1] == choices[2]
    assert choices[0][3] or rule.name == "trimmed_mean"
    assert any(choices[0])


def nearly_equal() -> Problem:
    """Seven clients near one update, at distances that differ; client 3 is far."""
    one = rotated_copies(1)
    made = torch.Generator().manual_seed(6)
    noise = [0.02, 0.05, 0.03, 2.0, 0.07, 0.04, 0.06]
    B = [one.B[0] + e * torch.randn(41, 6, generator=made, dtype=torch.float64) for e in noise]
    return Problem(B, one.A * 7, [2.0] * 7, normalised(range(1, 8)))


def gauged(problem: Problem, seed: int) -> Problem:
    """Every client in another gauge, some of great size."""
    moved = problem.gauged(seed)
    t = [10.0 ** ((seed * k) % 5 - 2) for k in range(len(problem.B))]
    return replace(
        moved, B=[b * x for b, x in zip(moved.B, t, strict=True)], A=[a / x for a, x in zip(moved.A, t, strict=True)]
    )


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_18_distances_of_near_clients_keep_their_digits(dtype, backend):
    """Squared distances from fp32 Gram matrices: of clients that differ by 1e-4 relative they are rounding.

    Krum must still find the client in the middle, and its scores must be those of dense differences.
    """
    made = torch.Generator().manual_seed(8)
    base = standard(m=41, n=31, ranks=(6,), scale=(1.0,))
    step = torch.randn(41, 6, generator=made, dtype=torch.float64)
    step *= 1e-4 * base.B[0].norm() / step.norm()
    B = [(base.B[0] + place * step).to(dtype) for place in (0.0, 0.5, 1.1, 1.5, 2.0)]
    problem = Problem(B, [base.A[0].to(dtype)] * 5, [1.0] * 5, [0.2] * 5)
    result = run(problem, "krum", backend, f=1)
    rows = list(result.report["robust"]["clients"].values())
    D = problem.updates()
    squares = torch.stack([torch.stack([(x - y).square().sum() for y in D]) for x in D])
    wanted = squares.sort(dim=1).values[:, 1:3].sum(1)
    found = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert [row["rejected"] for row in rows] == [k != int(wanted.argmin()) for k in range(5)]
