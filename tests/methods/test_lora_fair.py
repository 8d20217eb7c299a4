"""LoRA-FAIR: the mean of A, and B moved down the published objective, or to the least squares optimum."""

import math
from dataclasses import replace

import pytest
import torch
from equal_rank_problems import (
    EQUAL_RANKS,
    batch_of,
    common_factor,
    identical,
    split,
    unequal,
    without_client,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import Problem, distance, product, standard

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.linalg import core_svd
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods import factors, lora_fair
from fedlora_kernels.methods.contract import make_method

SOLVERS = ("gradient", "closed")


def means(p: Problem):
    B = sum(w * s * b.double() for w, s, b in zip(p.weight, p.scale, p.B, strict=True))
    A = sum(w * a.double() for w, a in zip(p.weight, p.A, strict=True))
    return B, A


def objective(X, D, A, B, lam):
    """The published f, densely."""
    Y = X @ A
    return 1.0 - (D * Y).sum() / (D.norm() * Y.norm()) + lam * ((X - B) ** 2).sum()


def gradient(X, D, A, B, lam):
    """Its gradient by automatic differentiation, which knows no formula of ours."""
    X = X.clone().requires_grad_()
    return torch.autograd.grad(objective(X, D, A, B, lam), X)[0]


def direct(p: Problem, lam=0.01, lr=0.01, steps=1000):
    """The m x r iteration as published, from dense products."""
    B, A = means(p)
    D = p.dense()
    G, H, d, X = A @ A.T, D @ A.T, D.norm(), B.clone()
    for _ in range(steps):
        e = (X @ G * X).sum().sqrt()
        X = X - lr * (-H / (d * e) + (H * X).sum() / (d * e**3) * X @ G + 2 * lam * (X - B))
    return X


def sized(problem: Problem, norm: float) -> Problem:
    """The same clients with updates scaled so that the mean pair has this norm: f depends on it."""
    B, A = means(problem)
    c = norm / float((B @ A).norm())
    return replace(problem, scale=[c * s for s in problem.scale])


@pytest.mark.parametrize(
    ("norm", "backend"), [(3.0, "torch"), (10.0, "reference"), (10.0, "torch"), (10.0, "auto"), (100.0, "torch")]
)
@pytest.mark.parametrize("shape", [(37, 29, 6), (23, 41, 6), (7, 5, 1), (29, 5, 6), (6, 29, 6)])
def test_small_coordinates_answer_what_the_published_iteration_does(shape, norm, backend):
    m, n, r = shape
    problem = sized(unequal(m=m, n=n, r=r), norm)
    outcome = problem.run("lora_fair", backend=backend)
    B, A = means(problem)
    wanted = direct(problem)
    assert distance(outcome.B[0], wanted) < 1e-10
    assert distance(outcome.B[0] - B, wanted - B) < 1e-10 * max(1.0, float(B.norm() / (wanted - B).norm()))
    assert distance(outcome.A[0], A) < 1e-14
    assert r == 1 or distance(wanted, B) > 1e-4


@pytest.mark.parametrize("options", [{"lam": 0.0}, {"lam": 1.0, "lr": 0.1}, {"steps": 7}, {"lr": 0.2, "steps": 50}])
def test_options_are_those_of_the_iteration(options):
    problem = sized(unequal(), 10.0)
    assert distance(problem.run("lora_fair", **options).B[0], direct(problem, **options)) < 1e-10


def test_published_gradient_is_that_of_the_published_objective():
    """One step of length lr is lr times the gradient, here against central differences of the dense f."""
    problem = sized(unequal(m=7, n=5, r=2), 4.0)
    B, A = means(problem)
    D = problem.dense()
    step = (B - problem.run("lora_fair", steps=1).B[0]) / 0.01
    h = 1e-5
    numeric = torch.zeros_like(B)
    for i in range(B.shape[0]):
        for j in range(B.shape[1]):
            E = torch.zeros_like(B)
            E[i, j] = h
            numeric[i, j] = (objective(B + E, D, A, B, 0.01) - objective(B - E, D, A, B, 0.01)) / (2 * h)
    # h^2 from the third derivative, and u64 f / h from the differences
    assert float((step - numeric).abs().max()) < 1e-9
    assert distance(step, gradient(B, D, A, B, 0.01)) < 1e-12


def test_the_second_step_uses_the_gradient_where_the_first_one_ends():
    problem = sized(unequal(m=7, n=5, r=2), 4.0)
    B, A = means(problem)
    first, second = (problem.run("lora_fair", lam=0.3, lr=0.1, steps=steps).B[0] for steps in (1, 2))
    assert distance((first - second) / 0.1, gradient(first, problem.dense(), A, B, 0.3)) < 1e-11


def test_descent_lowers_the_objective_and_the_angle_to_the_sum():
    problem = sized(unequal(), 10.0)
    B, A = means(problem)
    D = problem.dense()
    values = [
        float(objective(problem.run("lora_fair", steps=steps).B[0], D, A, B, 0.01)) for steps in (0, 10, 100, 1000)
    ]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]


def test_no_steps_is_fedit():
    problem = unequal()
    first, second = problem.run("lora_fair", steps=0), problem.run("fedit")
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("lam", [1e-6, 0.01, 1.0, 1e3])
@pytest.mark.parametrize("variant", [name for name in EQUAL_RANKS if name != "gauge_imbalanced"])
def test_closed_form_is_the_optimum_of_the_frobenius_target(variant, lam, backend):
    """The gradient of |D - X A|^2 + lam |X - B|^2 vanishes there; the quadratic is convex."""
    problem = EQUAL_RANKS[variant]()
    B, A = means_of(problem)
    D = problem.dense()
    X = problem.run("lora_fair", backend=backend, solver="closed", lam=lam).B[0]
    slope = (X @ A - D) @ A.T + lam * (X - B)
    size = float(D.norm() * A.norm() + (B.norm() + X.norm()) * (A.norm() ** 2 + lam))
    assert float(slope.norm()) < 1e-13 * size


def means_of(problem: Problem):
    """Means over the owners, of the weights as they are."""
    owners = [k for k, b in enumerate(problem.B) if b.shape[1] > 0]
    return means(problem.permuted(owners))


def test_closed_form_is_the_published_formula():
    problem = unequal()
    B, A = means(problem)
    G, H = A @ A.T, problem.dense() @ A.T
    wanted = B + (H - B @ G) @ torch.linalg.inv(G + 0.01 * torch.eye(6, dtype=torch.float64))
    assert distance(problem.run("lora_fair", solver="closed").B[0], wanted) < 1e-12


@pytest.mark.parametrize("variant", ["tall", "wide", "m_is_rank", "rank_one", "unnormalised", "missing_zero"])
def test_closed_form_without_penalty_comes_as_close_to_the_sum_as_its_rows_allow(variant):
    problem = EQUAL_RANKS[variant]()
    _, A = means_of(problem)
    D = problem.dense()
    outcome = problem.run("lora_fair", solver="closed", lam=0.0)
    Q = torch.linalg.qr(A.T)[0]
    assert distance(product(outcome), D @ Q @ Q.T) < 1e-12
    assert float(outcome.error[0]) <= float(problem.run("fedit").error[0])


@pytest.mark.parametrize("lam", [0.0, 1e-6, 0.01, 1.0, 100.0])
def test_closed_form_is_never_worse_than_fedit(lam):
    for make in (unequal, lambda: unequal(m=23, n=41), lambda: sized(unequal(), 0.01)):
        problem = make()
        before = distance(product(problem.run("fedit")), problem.dense())
        assert distance(product(problem.run("lora_fair", solver="closed", lam=lam)), problem.dense()) < before


@pytest.mark.parametrize("lam", [0.0, 0.01])
def test_closed_form_with_dependent_rows_of_the_mean(lam):
    """Abar of rank 3 of 6: the smallest change of B, nothing in the directions that Abar does not have."""
    problem = unequal()
    made = torch.Generator().manual_seed(3)
    mix = torch.randn(6, 3, generator=made, dtype=torch.float64)
    problem = replace(problem, A=[mix @ a[:3] for a in problem.A])
    B, A = means(problem)
    assert int(torch.linalg.matrix_rank(A)) == 3
    X = problem.run("lora_fair", solver="closed", lam=lam).B[0]
    U, S, _ = torch.linalg.svd(A, full_matrices=False)
    inverse = U[:, :3] @ torch.diag(1.0 / (S[:3] ** 2 + lam)) @ U[:, :3].T
    wanted = B + (problem.dense() - B @ A) @ A.T @ inverse
    assert distance(X, wanted) < 1e-11


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e4])
def test_correction_is_zero_where_a_is_common(solver, norm):
    """For updates of any size: small ones would otherwise amplify rounding from step to step."""
    problem = sized(common_factor("A"), norm)
    outcome = problem.run("lora_fair", solver=solver)
    assert torch.equal(outcome.B, problem.run("fedit").B)
    assert distance(product(outcome), problem.dense()) < 1e-13
    assert float(outcome.error[0]) == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("copies", [1, 2, 4])
def test_one_client_and_identical_clients_return_that_update(solver, copies):
    outcome = identical(copies).run("lora_fair", solver=solver)
    assert distance(product(outcome), identical(1).dense()) < 1e-14
    assert float(outcome.error[0]) == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("variant", EQUAL_RANKS)
def test_error_is_the_distance_to_the_sum(solver, variant):
    problem = EQUAL_RANKS[variant]()
    outcome = problem.run("lora_fair", solver=solver)
    found = distance(product(outcome), problem.dense())
    # what is measured is a sum of terms of the size of the gap: known to 1e-8 of them
    gap = float(problem.run("fedit").error[0])
    assert float(outcome.error[0]) == pytest.approx(found, rel=1e-9, abs=1e-7 * max(1.0, gap))
    assert found <= float(outcome.error_bound[0]) * (1.0 + 1e-12) + 1e-13
    if variant == "tall":
        assert float(outcome.error[0]) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_correction_of_nearly_equal_clients_does_not_drown_in_rounding(delta):
    """H - Bbar G as a difference of two products would be off by u64 |D| / delta^2, a tenth of it at the last delta."""
    base, noise = standard(m=37, n=29, ranks=(6,), scale=(2.0,)), unequal()
    problem = Problem(
        [base.B[0] + delta * b for b in noise.B], [base.A[0] + delta * a for a in noise.A], [2.0] * 4, noise.weight
    )
    B, A = means(problem)
    w = torch.tensor(problem.weight, dtype=torch.float64)[:, None, None]
    E = (w * 2.0 * (torch.stack(problem.B) - B / 2.0) @ (torch.stack(problem.A) - A)).sum(0)
    change = E @ A.T @ torch.linalg.inv(A @ A.T + 0.01 * torch.eye(6, dtype=torch.float64))
    outcome = problem.run("lora_fair", solver="closed")
    # the answer carries B, so its own rounding is u64 |B| / |change|
    allowed = 64 * 2**-53 / delta + 4 * 2**-53 * float(B.norm() / change.norm())
    assert distance(outcome.B[0] - B, change) < allowed
    wanted = float((E - change @ A).norm() / problem.dense().norm())
    assert float(outcome.error[0]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("c", [4.0, 3.0, 0.7, 11.3])
def test_zero_sum_returns_the_mean(c):
    """D_1 = -D_2, exactly or but for rounding noise, with means that are not zero: d = 0, so the mean stays."""
    made = standard(m=37, n=29, ranks=(6, 6), scale=(1.0, 1.0), counts=[1, 1])
    problem = Problem([c * made.B[0], -made.B[0]], [made.A[0], c * made.A[0]], [2.0, 2.0], [0.5, 0.5])
    assert float(problem.dense().norm()) < 1e-12
    outcome = problem.run("lora_fair")
    assert product(outcome).norm() > 0.1
    assert torch.equal(outcome.B, problem.run("fedit").B)
    assert float(outcome.error[0]) > 1e5  # the distance from nothing


def test_a_zero_product_of_the_means_returns_the_mean():
    """Bbar = 0 while D is not: e = 0, so the mean stays."""
    made = standard(m=37, n=29, ranks=(6, 6), scale=(1.0, 1.0), counts=[1, 1])
    problem = Problem([made.B[0], -made.B[0]], made.A, [2.0, 2.0], [0.5, 0.5])
    outcome = problem.run("lora_fair")
    assert not outcome.B.any()
    assert int(outcome.notes[0]) & Note.ZERO
    assert float(outcome.error[0]) == pytest.approx(1.0, rel=1e-12)
    closed = problem.run("lora_fair", solver="closed")
    assert not product(closed).isnan().any()
    assert float(closed.error[0]) < 1.0


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("c", [0.3, 0.7, 11.3])
def test_a_product_of_the_means_that_is_rounding_noise_returns_the_mean(c, factor):
    """Means that cancel but for rounding have no direction: steps of 1 / e would end at numbers of 1e12."""
    made = standard(m=37, n=29, ranks=(6, 6), scale=(1.0, 1.0), counts=[1, 1])
    other = getattr(made, factor)[0]
    problem = replace(made, **{factor: [other, -other / c]}, weight=[1.0 / (1.0 + c), c / (1.0 + c)], scale=[2.0, 2.0])
    fedit = problem.run("fedit")
    assert 0.0 < float(getattr(fedit, factor).norm()) < 1e-13
    outcome = problem.run("lora_fair")
    assert torch.equal(outcome.B, fedit.B)
    assert float(outcome.error[0]) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "change", [lambda p: p.permuted([3, 0, 2, 1]), lambda p: split(p, 3)], ids=["order", "split client"]
)
def test_order_and_splitting_change_nothing(solver, change):
    problem = sized(unequal(), 10.0)
    first, second = (p.run("lora_fair", solver=solver) for p in (problem, change(problem)))
    assert distance(product(second), product(first)) < 1e-11


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_gauge_change_must_change_the_product(solver):
    problem = sized(unequal(), 10.0)
    first, second = (p.run("lora_fair", solver=solver) for p in (problem, problem.gauged()))
    assert distance(product(second), product(first)) > 0.05


@pytest.mark.parametrize("c", [-1.0, 0.125, 7.3])
def test_closed_form_scales_with_the_updates(c):
    first = unequal().run("lora_fair", solver="closed")
    second = replace(unequal(), scale=[c * s for s in unequal().scale]).run("lora_fair", solver="closed")
    assert distance(product(second), c * product(first)) < 1e-12


def test_the_published_objective_does_not_scale_with_the_updates():
    first, second = (sized(unequal(), norm).run("lora_fair") for norm in (3.0, 30.0))
    assert distance(product(second), 10.0 * product(first)) > 0.01
    mirrored = replace(sized(unequal(), 3.0), scale=[-s for s in sized(unequal(), 3.0).scale])
    assert distance(product(mirrored.run("lora_fair")), -product(first)) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("k", range(4))
def test_a_missing_client_that_renormalises_is_not_there(solver, k):
    weight = [0.0 if i == k else w for i, w in enumerate(unequal().weight)]
    problem = sized(replace(unequal(), weight=[w / sum(weight) for w in weight]), 10.0)
    first = without_client(problem, k).run("lora_fair", solver=solver)
    second = problem.permuted([i for i in range(4) if i != k]).run("lora_fair", solver=solver)
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)


def test_a_missing_client_that_counts_as_zero_shrinks_the_means():
    problem = sized(unequal(), 10.0)
    absent = without_client(problem, 1)
    zero = replace(
        problem,
        B=[torch.zeros_like(b) if k == 1 else b for k, b in enumerate(problem.B)],
        A=[torch.zeros_like(a) if k == 1 else a for k, a in enumerate(problem.A)],
    )
    first, second = absent.run("lora_fair"), zero.run("lora_fair")
    assert distance(first.B[0], second.B[0]) < 1e-12
    assert distance(first.B[0], direct(zero)) < 1e-10
    assert float(first.error[0]) == pytest.approx(distance(product(first), absent.dense()), rel=1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
def test_unequal_weights_and_scales_are_in_the_target(solver):
    """Clients weighed or scaled alike would give another answer."""
    problem = sized(unequal(), 10.0)
    for other in (replace(problem, weight=[0.25] * 4), replace(problem, scale=[1.0] * 4)):
        first, second = (p.run("lora_fair", solver=solver) for p in (problem, other))
        assert distance(product(first), product(second)) > 0.05


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes(solver, dtype):
    problem = sized(unequal(dtype=dtype), 10.0)
    exact = replace(problem, B=[b.double() for b in problem.B], A=[a.double() for a in problem.A])
    outcome, wanted = (
        problem.run("lora_fair", dtype=torch.float32, solver=solver),
        exact.run("lora_fair", solver=solver),
    )
    assert outcome.B.dtype == torch.float32
    assert distance(product(outcome), product(wanted)) < 1e-6
    low = problem.run("lora_fair", dtype=dtype, solver=solver)
    assert low.B.dtype == low.A.dtype == dtype
    assert distance(product(low), problem.dense()) <= float(low.error_bound[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_clients_of_several_dtypes_are_read_exactly(solver):
    problem = sized(unequal(), 10.0)
    kinds = (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    mixed = replace(
        problem,
        B=[b.to(kind) for b, kind in zip(problem.B, kinds, strict=True)],
        A=[a.to(kind) for a, kind in zip(problem.A, kinds, strict=True)],
    )
    exact = replace(mixed, B=[b.double() for b in mixed.B], A=[a.double() for a in mixed.A])
    first, second = (p.run("lora_fair", dtype=torch.float64, solver=solver) for p in (mixed, exact))
    assert distance(product(first), product(second)) < 1e-13


@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_and_chunks_answer_each_module_by_itself(solver, monkeypatch):
    problems = [sized(unequal(seed=seed), norm) for seed, norm in enumerate((3.0, 30.0, 300.0))] + [common_factor("A")]
    method = make_method("lora_fair", {"solver": solver})
    whole = method.combine(batch_of(problems), None, None)
    monkeypatch.setattr(factors, "CHUNK", 1)
    parts = method.combine(batch_of(problems), None, None)
    for i, problem in enumerate(problems):
        alone = problem.run("lora_fair", solver=solver)
        for outcome in (whole, parts):
            assert distance(outcome.B[i], alone.B[0]) < 1e-13
            assert float(outcome.error[i]) == pytest.approx(float(alone.error[0]), rel=1e-10, abs=1e-13)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    m=st.integers(1, 19),
    n=st.integers(1, 19),
    r=st.integers(1, 5),
    weight=st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.3]), min_size=1, max_size=4),
    lam=st.sampled_from([0.0, 0.01, 3.0]),
    solver=st.sampled_from(SOLVERS),
)
def test_answers_are_finite_and_measured_for_any_weights(m, n, r, weight, lam, solver):
    problem = standard(m=m, n=n + (n == m), ranks=(r,) * len(weight), counts=[1] * len(weight))
    problem = replace(problem, weight=weight)
    outcome = problem.run("lora_fair", solver=solver, lam=lam, steps=50)
    assert torch.isfinite(outcome.B).all()
    assert int(outcome.info[0]) == 0
    D = problem.dense()
    if float(D.norm()) > 0.0:
        assert distance(product(outcome), D) <= float(outcome.error_bound[0]) + 1e-12
        assert solver == "gradient" or float(outcome.error[0]) <= float(problem.run("fedit").error[0]) + 1e-7


def test_small_updates_stay_finite():
    """Long first steps, as published; the error says what they do."""
    problem = sized(unequal(), 1e-9)
    outcome = problem.run("lora_fair")
    assert torch.isfinite(outcome.B).all()
    assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), problem.dense()), rel=1e-6)


def test_zero_updates():
    problem = unequal()
    for solver in SOLVERS:
        outcome = replace(problem, B=[torch.zeros_like(b) for b in problem.B]).run("lora_fair", solver=solver)
        assert not outcome.B.any()
        assert int(outcome.notes[0]) & Note.ZERO
        assert float(outcome.error[0]) == float(outcome.error_bound[0]) == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_trouble_is_reported_in_info_and_spares_the_neighbours(solver, factor, value):
    large = replace(unequal(), scale=[1e6] * 4)
    assert int(large.run("lora_fair", dtype=torch.float16, solver=solver).info[0]) == Info.OVERFLOW
    broken = sized(unequal(seed=7), 10.0)
    getattr(broken, factor)[1][2, 3] = value
    fine = sized(unequal(), 10.0)
    outcome = make_method("lora_fair", {"solver": solver}).combine(batch_of([fine, broken]), None, None)
    assert int(outcome.info[0]) == 0
    assert int(outcome.info[1]) & Info.NONFINITE
    assert distance(outcome.B[0], fine.run("lora_fair", solver=solver).B[0]) < 1e-13


def test_an_iteration_at_its_guard_is_reported(monkeypatch):
    def unfinished(*args, **options):
        found = core_svd(*args, **options)
        return replace(found, info=found.info | int(Info.NOT_CONVERGED))

    monkeypatch.setattr(lora_fair, "core_svd", unfinished)
    assert int(unequal().run("lora_fair").info[0]) == Info.NOT_CONVERGED


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"solver": "newton"}, r"^lora_fair: solver is 'newton'; one of gradient, closed is needed$"),
        ({"lam": -0.1}, "^lora_fair: lam is -0.1; a number with 0 <= lam < inf is needed$"),
        ({"lam": math.nan}, "lam is nan"),
        ({"lam": True}, "lam is True"),
        ({"lr": 0.0}, "^lora_fair: lr is 0.0; a number with 0 < lr < inf is needed$"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"steps": -1}, "^lora_fair: steps is -1; a whole number >= 0 is needed$"),
        ({"steps": 10.0}, "steps is 10.0"),
        ({"lr": 20.0, "lam": 0.05}, r"^lora_fair: lr is 20.0; lr < 20, which is 1 / lam, is needed"),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(InputError, match=text):
        make_method("lora_fair", options)


def test_defaults_are_those_of_the_paper():
    assert make_method("lora_fair", {}).options() == {"solver": "gradient", "lam": 0.01, "lr": 0.01, "steps": 1000}
    assert make_method("lora_fair", {"solver": "closed", "lam": 1e6}).options()["lam"] == 1e6


def test_mixed_ranks_and_rules_are_refused():
    with pytest.raises(MismatchError, match="4, 8, 12"):
        standard().run("lora_fair")
    with pytest.raises(InputError, match="rule"):
        make_method("lora_fair", {}, Energy(0.9))


def test_nothing_is_measured_unless_asked():
    for solver in SOLVERS:
        group = unequal().group(measure=False)
        assert torch.isnan(make_method("lora_fair", {"solver": solver}).combine(group, None, None).error).all()
