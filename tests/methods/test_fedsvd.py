"""FedSVD: the product stays, A gets orthonormal rows, B orthogonal columns."""

from dataclasses import replace

import pytest
import torch
from common_problems import EQUAL, OUTPUTS, batched, common_A, cut, off_orthonormal, products, without
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import Problem, distance, normalised, product, standard

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import MismatchError
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods import factors
from fedlora_kernels.methods.contract import make_method

BACKENDS = ("torch", "reference", "auto")
SHAPES = {
    "standard": {"m": 48, "n": 40},
    "tall": {"m": 331, "n": 23},
    "wide": {"m": 19, "n": 257},
    "m_is_rank": {"m": 6, "n": 29},
    "n_is_rank": {"m": 29, "n": 6},
    "m_below_rank": {"m": 4, "n": 29},
    "n_below_rank": {"m": 29, "n": 4},
    "both_below_rank": {"m": 5, "n": 3},
    "rank_one": {"m": 7, "n": 5, "ranks": (1, 1)},
    "row": {"m": 1, "n": 17, "ranks": (2, 2)},
    "column": {"m": 17, "n": 1, "ranks": (2, 2)},
    "one_client": {"ranks": (7,)},
}


def problem(**fields) -> Problem:
    return common_A(ranks=fields.pop("ranks", EQUAL), **fields)


def combine(problems, **fields):
    return make_method("fedsvd", {}).combine(batched(problems, **fields), None, None)


def rank_two() -> Problem:
    """Every B_k has two directions only, though the rank is 6."""
    p = problem()
    return replace(p, B=[b[:, :2] @ torch.ones(2, 6).double().tril() for b in p.B])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_does_not_change_and_A_is_orthonormal(shape, backend):
    p = problem(**SHAPES[shape])
    outcome = p.run("fedsvd", backend=backend)
    before = sum(w * s * b for w, s, b in zip(p.weight, p.scale, p.B, strict=True)) @ p.A[0]
    assert distance(product(outcome), before) < 1e-12
    assert distance(product(outcome), p.dense()) <= float(outcome.error_bound[0]) < 1e-11
    assert float(outcome.error[0]) < 1e-12
    assert off_orthonormal(outcome.A[0]) < 1e-13
    assert int(outcome.rank[0]) == min(p.A[0].shape)
    assert int(outcome.info[0]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_B_is_U_diag_S(shape, backend):
    p = problem(**SHAPES[shape])
    outcome = p.run("fedsvd", backend=backend)
    S = torch.linalg.svdvals(p.dense())[: int(outcome.rank[0])]
    gram = outcome.B[0].T @ outcome.B[0]
    wanted = torch.zeros_like(gram)
    wanted.diagonal()[: len(S)] = S**2
    assert float((gram - wanted).abs().max()) < 1e-13 * float(S[0]) ** 2
    assert float(outcome.energy[0]) == pytest.approx(float(p.dense().norm()) ** 2, rel=1e-12)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.integers(1, 12),
    seed=st.integers(0, 99),
    weight=st.lists(st.floats(0.01, 2.0), min_size=3, max_size=3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape_and_any_weights(m, n, r, seed, weight):
    p = replace(problem(m=m, n=n, ranks=(r,) * 3, seed=seed), weight=weight)
    outcome = p.run("fedsvd")
    assert distance(product(outcome), p.dense()) < 1e-12
    assert off_orthonormal(outcome.A[0]) < 1e-13
    assert outcome.A.shape[1] == min(r, n)


def test_the_same_as_the_truncated_svd_at_full_rank():
    p = problem()
    svd, florist = p.run("fedsvd"), p.run("florist", rule=Energy(1.0))
    assert distance(product(svd), product(florist)) < 1e-12
    assert distance(svd.B[0].norm(dim=0), florist.B[0, :, :6].norm(dim=0)) < 1e-12
    assert distance(product(svd), product(p.run("ffa"))) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_directions_of_no_weight_keep_orthonormal_rows_within_the_frozen_A(backend):
    p = rank_two()
    outcome = p.run("fedsvd", backend=backend)
    assert outcome.rank.tolist() == [6]
    assert int(outcome.notes[0]) == Note.RANK_DEFICIENT
    assert off_orthonormal(outcome.A[0]) < 1e-13
    assert not outcome.B[0, :, 2:].any()
    assert bool(outcome.B[0, :, :2].any(0).all())
    assert distance(product(outcome), p.dense()) < 1e-12
    assert distance(p.A[0] @ outcome.A[0].T @ outcome.A[0], p.A[0]) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left", [0, 1, 3])
def test_deficient_frozen_A_is_completed(left, backend):
    """Rows beyond ``left`` are copies, or all rows are zero: unit vectors take their places."""
    p = problem()
    A = p.A[0].clone()
    A[left:] = A[0] if left else 0.0
    p = replace(p, A=[A] * 5)
    outcome = p.run("fedsvd", backend=backend)
    assert off_orthonormal(outcome.A[0]) < 1e-13
    assert distance(product(outcome), p.dense()) < 1e-12
    assert int((outcome.B[0] != 0).any(0).sum()) == left
    assert bool(int(outcome.notes[0]) & Note.ZERO) == (left == 0)


def test_unit_vectors_within_the_frozen_rows_are_skipped():
    p = problem()
    A = torch.zeros_like(p.A[0])
    A[0, 0], A[1, 2], A[2, 0] = 3.0, -2.0, 1.0
    outcome = replace(p, A=[A] * 5).run("fedsvd")
    assert off_orthonormal(outcome.A[0]) < 1e-14
    assert distance(A @ outcome.A[0].T @ outcome.A[0], A) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_update_keeps_an_orthonormal_A(backend):
    p = problem()
    outcome = replace(p, B=[torch.zeros_like(b) for b in p.B]).run("fedsvd", backend=backend)
    assert int(outcome.notes[0]) & Note.ZERO
    assert not outcome.B.any()
    assert outcome.rank.tolist() == [6]
    assert off_orthonormal(outcome.A[0]) < 1e-13
    assert distance(p.A[0] @ outcome.A[0].T @ outcome.A[0], p.A[0]) < 1e-13
    assert float(outcome.error[0]) == float(outcome.error_bound[0]) == float(outcome.energy[0]) == 0.0


def test_cancellation_to_rounding_noise_is_zero():
    p = problem(ranks=(6, 6, 6))
    p = replace(p, scale=[1.0] * 3, weight=[0.1, 0.2, 0.7])
    p = replace(p, B=[p.B[0], p.B[1], -(0.1 * p.B[0] + 0.2 * p.B[1]) / 0.7])
    assert float(p.dense().norm()) > 0.0
    outcome = p.run("fedsvd")
    assert int(outcome.notes[0]) & Note.ZERO
    assert not outcome.B.any()
    assert off_orthonormal(outcome.A[0]) < 1e-13


@pytest.mark.parametrize("delta", [1e-4, 1e-8, 1e-11])
def test_what_cancellation_leaves_is_kept(delta):
    p = problem(ranks=(6, 6))
    p = replace(p, scale=[1.0] * 2, weight=[0.5, 0.5], B=[p.B[0], delta * p.B[1] - p.B[0]])
    outcome = p.run("fedsvd")
    exact = 0.5 * (p.B[0] + p.B[1]) @ p.A[0]
    assert int(outcome.notes[0]) == 0
    assert distance(product(outcome), 0.5 * (p.B[0] + p.B[1]) @ p.A[0]) < 1e-12 + 1e-14 / delta, exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("span", [1e4, 1e8, 1e12])
def test_gauges_between_columns_and_rows_do_no_harm(span, backend):
    p = problem()
    d = torch.logspace(0, 1, 6, base=span, dtype=torch.float64)
    turned = replace(p, B=[b * d for b in p.B], A=[a / d[:, None] for a in p.A])
    outcome = turned.run("fedsvd", backend=backend)
    assert int(outcome.notes[0]) == 0
    assert off_orthonormal(outcome.A[0]) < 1e-13
    assert distance(product(outcome), p.dense()) < 1e-12


def test_a_gauge_common_to_all_clients_changes_nothing():
    p = problem()
    G = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3 * torch.eye(6).double()
    turned = replace(p, B=[b @ G for b in p.B], A=[torch.linalg.solve(G, p.A[0])] * 5)
    first, second = turned.run("fedsvd"), p.run("fedsvd")
    assert distance(product(first), product(second)) < 1e-12
    assert distance(first.B[0].norm(dim=0), second.B[0].norm(dim=0)) < 1e-12


@pytest.mark.parametrize("gauge", [1e-6, 1.0, 1e6])
def test_small_singular_values_are_kept(gauge):
    """Twelve orders below the largest, still far above the floor, however the size is shared between the factors."""
    p = problem(ranks=(6,))
    U = torch.linalg.qr(p.B[0])[0]
    V = torch.linalg.qr(p.A[0].T)[0]
    S = torch.logspace(0, -12, 6, dtype=torch.float64)
    outcome = Problem([U * S * gauge], [V.T / gauge], [1.0], [1.0]).run("fedsvd")
    assert int(outcome.notes[0]) == 0
    assert float((outcome.B[0].norm(dim=0) / S - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("stored", OUTPUTS)
def test_every_dtype_in_and_out(stored, dtype):
    p = problem(dtype=stored)
    outcome = p.run("fedsvd", dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert outcome.B.dtype == outcome.A.dtype == dtype
    assert distance(product(outcome), p.dense()) <= float(outcome.error_bound[0]) < 4 * eps + 1e-11
    assert off_orthonormal(outcome.A[0]) < eps + 1e-13
    assert float(outcome.error[0]) < 1e-12


def test_mixed_ranks_are_refused():
    with pytest.raises(MismatchError, match=r"layers\.0\.q_proj.*4, 8, 12"):
        standard().run("fedsvd")


def test_one_client_and_identical_clients_return_that_update():
    one = problem(ranks=(7,))
    for copies in (1, 4):
        p = Problem(one.B * copies, one.A * copies, one.scale * copies, normalised([1, 2, 4, 5][:copies]))
        assert distance(product(p.run("fedsvd")), one.dense()) < 1e-13


def test_splitting_a_client_and_their_order_change_nothing():
    p = problem()
    order = [0, 1, 1, 4, 3, 2]
    split = replace(p.permuted(order), weight=[p.weight[k] / (2 if k == 1 else 1) for k in order])
    assert distance(product(split.run("fedsvd")), product(p.run("fedsvd"))) < 1e-13


@pytest.mark.parametrize("c", [0.3, 7.0])
def test_scaling_every_update_scales_the_product(c):
    p = problem()
    scaled = replace(p, scale=[c * s for s in p.scale])
    assert distance(product(scaled.run("fedsvd")), c * product(p.run("fedsvd"))) < 1e-13


def test_a_second_round_from_the_broadcast_pair_keeps_its_product():
    first = problem().run("fedsvd")
    again = Problem([first.B[0]] * 3, [first.A[0]] * 3, [1.0] * 3, normalised([1, 2, 3])).run("fedsvd")
    assert distance(product(again), product(first)) < 1e-13
    assert distance(again.B[0].norm(dim=0), first.B[0].norm(dim=0)) < 1e-13


def test_a_client_without_the_module_adds_nothing():
    p = problem()
    for weight in ([0.0, 0.2, 0.1, 0.3, 0.4], p.weight):  # renormalised over the owners, or kept for a zero update
        absent = without(p, 0, weight)
        outcome = absent.run("fedsvd")
        assert distance(product(outcome), absent.dense()) < 1e-13
        assert int(outcome.info[0]) == 0
    empty = Problem([b[:, :0] for b in p.B], [a[:0] for a in p.A], [0.0] * 5, p.weight)
    assert int(empty.run("fedsvd").notes[0]) == Note.ZERO


def test_what_has_weight_zero_is_not_read():
    p = problem()
    p.B[0][:] = float("nan")
    p.A[0][:] = float("inf")
    p = replace(p, weight=[0.0, 0.25, 0.25, 0.25, 0.25])
    outcome = p.run("fedsvd")
    assert int(outcome.info[0]) == 0
    assert distance(product(outcome), p.permuted([1, 2, 3, 4]).dense()) < 1e-13


def test_overflow_is_flagged():
    p = problem(scale=(1e6,) * 5)
    assert int(p.run("fedsvd", dtype=torch.float16).info[0]) == Info.OVERFLOW
    assert int(p.run("fedsvd", dtype=torch.float32).info[0]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("k", [0, 3])
def test_bad_numbers_of_any_client_are_flagged_for_their_module_alone(backend, bad, factor, k):
    problems = [problem(seed=seed) for seed in range(3)]
    problems = [replace(p, A=[a.clone() for a in p.A]) for p in problems]
    clean = combine(problems, backend=backend)
    getattr(problems[1], factor)[k][2, 1] = bad
    outcome = combine(problems, backend=backend)
    assert [int(code) & Info.NONFINITE for code in outcome.info] == [0, Info.NONFINITE, 0]
    for i in (0, 2):
        assert off_orthonormal(outcome.A[i]) < 1e-13
        assert distance(product(cut(outcome, i)), product(cut(clean, i))) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_neighbours_and_pieces_change_last_digits_at_most(monkeypatch, backend):
    """Not one bit would be too much to ask: products of a batch are torch's, which on several threads rounds by its size."""
    problems = [problem(seed=1), rank_two(), replace(problem(seed=2), B=[torch.zeros(37, 6).double()] * 5), problem()]
    whole = combine(problems, backend=backend)
    monkeypatch.setattr(factors, "CHUNK", 1)
    part = combine(problems, backend=backend)
    for field in ("rank", "notes", "info"):
        assert torch.equal(getattr(part, field), getattr(whole, field))
    for field in ("error", "error_bound"):
        assert torch.allclose(getattr(part, field), getattr(whole, field), rtol=1e-6, atol=1e-15)
    dense = torch.stack([p.dense() for p in problems])
    for outcome in (whole, part):
        for found, wanted, A in zip(products(outcome), dense, outcome.A, strict=True):
            assert torch.linalg.norm(found - wanted) <= 1e-12 * torch.linalg.norm(wanted)
            assert off_orthonormal(A) < 1e-13


@pytest.mark.full
@pytest.mark.parametrize("r", [16, 64, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_modules(r, backend):
    p = problem(m=1531, n=1024, ranks=(r,) * 8, scale=(2.0,) * 8, counts=range(1, 9))
    outcome = p.run("fedsvd", backend=backend)
    assert distance(product(outcome), p.dense()) < 1e-12
    assert off_orthonormal(outcome.A[0]) < 1e-13
    assert float(outcome.error[0]) == 0.0


def test_what_it_declares():
    method = make_method("fedsvd", {})
    assert method.frozen_factor(0) == method.frozen_factor(3) == "A"
    assert method.equal_ranks
    assert method.gives == ("common",)
    assert method.broadcast_rank((6, 6), 6, 0) == 6
