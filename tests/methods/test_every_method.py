"""What every method owes its callers, whatever the clients: shapes, finite answers or trouble named, honest errors."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from common_problems import batched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from method_problems import Problem, distance, normalised
from method_traits import LIMIT, TRAITS, Answer, answer, furthest, over, planned, product_of, typical

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.methods.contract import Outcome, Pair, Previous, make_method, method_class

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "torch", "reference")
U64 = 2.0**-53


@dataclass(frozen=True)
class Case:
    """Clients as a method accepts them, the dtype of the answer, the backend, and the round before."""

    problem: Problem
    dtype: torch.dtype
    backend: str
    previous: Previous | None


@st.composite
def cases(draw, name: str) -> Case:
    """Any shapes, ranks, weights, scales and dtypes; zero factors and zero weights now and then."""
    traits = TRAITS[name]
    m, n = draw(st.integers(1, 21)), draw(st.integers(1, 21))
    few = [1, 5, 6] if name in ("krum", "multi_krum") else [1, 2, 3, 5, 6]
    K = draw(st.sampled_from(few))
    same = traits.clients in ("equal", "frozen")
    r = draw(st.integers(1, 7))
    ranks = [r if same else draw(st.integers(1, 7)) for _ in range(K)]
    counts = [draw(st.integers(1, 50)) for _ in range(K)]
    # only that much weight may be taken from a rule that counts clients
    if K in (2, 3) and draw(st.booleans()):
        counts[0] = 0
    scale = [draw(st.sampled_from([1.0, 0.5, 2.0, 0.3, 16.0, 1e-3, 0.0, -1.5])) for _ in range(K)]
    made = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([1.0, 1e-2, 30.0]))
    stored, dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    B = [(size * torch.randn(m, rank, generator=made, dtype=torch.float64)).to(stored) for rank in ranks]
    A = [torch.randn(rank, n, generator=made, dtype=torch.float64).to(stored) for rank in ranks]
    for k in range(K):
        if draw(st.integers(0, 5)) == 0:
            B[k] = torch.zeros_like(B[k])
    if traits.clients in ("nested", "frozen"):
        widest = A[ranks.index(max(ranks))]
        A = [widest[:rank].clone() for rank in ranks]
    before = None
    if draw(st.booleans()) and method_class(traits.method or name).reads_previous == "pair":
        top = r if same else draw(st.integers(1, 9))
        pair = (torch.randn(1, *shape, generator=made, dtype=torch.float64) for shape in ((m, top), (top, n)))
        before = Previous(draw(st.integers(0, 1)), *pair)
    return Case(Problem(B, A, scale, normalised(counts)), dtype, draw(st.sampled_from(BACKENDS)), before)


@pytest.mark.parametrize("name", TRAITS)
def test_any_clients_have_an_honest_answer(name):
    check(name, 14)


@pytest.mark.full
@pytest.mark.parametrize("name", TRAITS)
def test_any_clients_have_an_honest_answer_in_the_long_form(name):
    check(name, 150)


@over(TRAITS, [torch.float64])
def test_the_order_of_clients_moves_pairs_with_them(name, backend, dtype):
    """What is common stays, what is personal goes along with its client."""
    problem, order = typical(name, dtype), [3, 0, 4, 2, 1]
    plain, moved = (answer(p, name, backend=backend) for p in (problem, problem.permuted(order)))
    limit = 1e3 * LIMIT[dtype] if name == "geometric_median" else LIMIT[dtype]
    assert furthest(moved.updates, [plain.updates[k] for k in order]) < limit


@over(TRAITS, [torch.float32])
def test_a_batch_answers_each_module_as_alone(name, backend, dtype):
    """Under one decision for all of them; the middle module is zero."""
    method = make_method(TRAITS[name].method or name, TRAITS[name].options)
    problems = [typical(name, dtype, seed=seed) for seed in (1, 2, 3)]
    problems[1] = replace(problems[1], B=[torch.zeros_like(b) for b in problems[1].B])
    group, plan = planned(method, batched(problems, backend=backend))
    whole = method.combine(group, plan, None)
    for i in range(3):
        alone = method.combine(group.part(i, i + 1), plan, None)
        for pair, own in zip(pairs(whole), pairs(alone), strict=True):
            assert int(pair.rank[i]) == int(own.rank[0])
            one = Pair(pair.B[i : i + 1], pair.A[i : i + 1], pair.rank[i : i + 1])
            assert distance(product_of(one), product_of(own)) < LIMIT[dtype]
        for field in ("notes", "info"):
            assert int(getattr(whole, field)[i]) == int(getattr(alone, field)[0])
        for field in ("error", "error_bound"):
            found, wanted = float(getattr(whole, field)[i]), float(getattr(alone, field)[0])
            assert found == pytest.approx(wanted, rel=1e-6, abs=1e-7, nan_ok=True)


def pairs(outcome: Outcome) -> list[Pair]:
    """All pairs of an outcome: common, residual, personal."""
    common = [] if outcome.B is None else [Pair(outcome.B, outcome.A, outcome.rank)]
    residual = [] if outcome.residual is None else [outcome.residual]
    return [*common, *residual, *(outcome.personal or ())]


def check(name: str, examples: int) -> None:
    @settings(derandomize=True, deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(cases(name))
    def run(case: Case) -> None:
        made = answer(case.problem, name, backend=case.backend, dtype=case.dtype, previous=case.previous)
        require_contract(name, case, made)
        if not int(made.outcome.info[0]):
            require_finite(made)
            require_honest(name, case, made)

    run()


def require_contract(name: str, case: Case, made: Answer) -> None:
    """Shapes and dtypes of everything, and that there is what ``gives`` says."""
    outcome, gives = made.outcome, method_class(TRAITS[name].method or name).gives
    assert (outcome.B is not None) == (outcome.A is not None) == (outcome.rank is not None) == ("common" in gives)
    assert (outcome.personal is not None) == ("personal" in gives)
    assert (outcome.residual is not None) == ("residual" in gives)
    assert bool(outcome.state) == ("state" in gives)
    if "common" in gives:
        require_pair(Pair(outcome.B, outcome.A, outcome.rank), case, 1)
    if "residual" in gives:
        require_pair(outcome.residual, case, 0)
    for k, pair in enumerate(outcome.personal or ()):
        if case.problem.weight[k] != 0.0:
            require_pair(pair, case, 1)
    for values in (outcome.error, outcome.error_bound):
        assert (values.shape, values.dtype) == ((1,), torch.float64)
    for flags in (outcome.notes, outcome.info):
        assert flags.shape == (1,)
        assert not flags.dtype.is_floating_point
    allowed = int(Info.OVERFLOW) if case.dtype == torch.float16 else 0
    assert not int(outcome.info[0]) & ~allowed


def require_pair(pair: Pair, case: Case, least: int) -> None:
    m, n = case.problem.B[0].shape[0], case.problem.A[0].shape[1]
    P = pair.B.shape[2]
    assert pair.B.shape == (1, m, P)
    assert pair.A.shape == (1, P, n)
    assert pair.B.dtype == pair.A.dtype == case.dtype
    assert (pair.rank.shape, pair.rank.dtype, pair.rank.device.type) == ((1,), torch.int64, "cpu")
    assert least <= int(pair.rank[0]) <= P


def require_finite(made: Answer) -> None:
    outcome = made.outcome
    tensors = [x for x in (outcome.B, outcome.A) if x is not None]
    for pair in (outcome.residual, *(outcome.personal or ())):
        tensors += [] if pair is None else [pair.B, pair.A]
    assert all(bool(torch.isfinite(x).all()) for x in tensors)


def require_honest(name: str, case: Case, made: Answer) -> None:
    """The error says how far the pair is from the dense sum, within its bound; pair and residual make an exact sum."""
    outcome, problem = made.outcome, made.behind
    D = problem.dense()
    size = float(torch.linalg.norm(D))
    terms = zip(problem.weight, problem.scale, problem.B, problem.A, strict=True)
    # what the dense sum itself rounds
    noise = 16 * U64 * sum(abs(w * s) * float(b.double().norm() * a.double().norm()) for w, s, b, a in terms)
    if outcome.personal_error is not None:
        share = outcome.personal_error[~torch.isnan(outcome.personal_error)]
        assert bool(((share >= 0.0) & (share <= 1.0 + 1e-12)).all())
    if outcome.B is None:
        return
    error, bound = float(outcome.error[0]), float(outcome.error_bound[0])
    assert 0.0 <= error <= bound
    pair = made.pair
    if int(outcome.notes[0]) & int(Note.ZERO):
        assert not pair.any()
    if size <= 1e3 * noise:
        assert math.isinf(bound) or not TRAITS[name].exact or float(torch.linalg.norm(pair)) <= 1e4 * noise + size
        return
    found = distance(pair, D)
    assert found <= bound * (1 + 1e-12) + noise / size
    # what separates both is the rounding of the answer
    rounding = rounding_of(outcome, case.dtype)
    assert abs(found - error) <= 2 * rounding / size + 1e-9 * error + 1e-7 * (error < 1e-6) + noise / size
    if TRAITS[name].exact and not TRAITS[name].cuts:
        assert float(torch.linalg.norm(made.updates[0] - D)) <= 2 * rounding + 1e3 * noise


def rounding_of(outcome, dtype: torch.dtype) -> float:
    """A bound of what rounding to ``dtype`` does to the products of pair and residual."""
    info = torch.finfo(dtype)
    total = 0.0
    for pair in (Pair(outcome.B, outcome.A, outcome.rank), outcome.residual):
        if pair is None or not int(pair.rank[0]):
            continue
        b, a = (float(x.double().norm()) for x in (pair.B, pair.A))
        least = info.smallest_normal * info.eps
        cut_b, cut_a = info.eps * b + least * pair.B.numel() ** 0.5, info.eps * a + least * pair.A.numel() ** 0.5
        total += cut_b * a + b * cut_a + cut_b * cut_a
    return total
