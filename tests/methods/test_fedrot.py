"""FedRot-LoRA: optimal soft rotations towards the last broadcast, products kept, degenerate cases closest to the identity."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import Problem, distance, normalised, product, standard

import fedlora_kernels.methods.factors as shared
from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.methods import fedrot
from fedlora_kernels.methods.contract import Group, Previous, make_method

M, N, R = 37, 29, 6
BACKENDS = ["auto", "torch", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)
sides = pytest.mark.parametrize("side", ["A", "B"])
LAMS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def special_orthogonal(r, seed=0):
    Q = torch.linalg.qr(normal(r, r, seed=1000 + seed))[0]
    if torch.linalg.det(Q) < 0:
        Q[:, 0] = -Q[:, 0]
    return Q


def plane(angle):
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


def turned_by(angle, r=R, seed=0):
    """A rotation whose planes all turn by ``angle``, for even r."""
    base = special_orthogonal(r, seed)
    return base @ torch.block_diag(*[plane(angle)] * (r // 2)) @ base.T


def problem(**fields) -> Problem:
    return standard(m=M, n=N, ranks=(R,) * 4, scale=(1.0, 3.0, 1.7, 0.6), **fields)


def copies(turns, scale=2.0, r=R):
    """Clients that hold one update in rotated factors: ``(B Q, Q^T A)``."""
    B, A = normal(M, r, seed=3), normal(r, N, seed=4)
    return Problem(
        [B @ Q for Q in turns], [Q.T @ A for Q in turns], [scale] * len(turns), normalised(range(1, len(turns) + 1))
    )


def reference(r=R, seed=7, like=None):
    return (
        (normal(1, M, r, seed=seed), normal(1, r, N, seed=seed + 1)) if like is None else (like[0][None], like[1][None])
    )


def before(side, pair=None):
    """What the round before left, such that this round aligns ``side``: A in round 1, B in round 2."""
    B, A = reference() if pair is None else pair
    return Previous(round=0 if side == "A" else 1, B=B, A=A)


def one(b, a, scale=1.0):
    return Problem([b], [a], [scale], [1.0])


def aligned(b, a, previous, side, lam=1.0, scale=1.0, **options):
    """The pair of one client after alignment: the mean over it alone."""
    outcome = one(b, a, scale).run("fedrot", previous=previous, lam=lam, **options)
    assert int(outcome.info[0]) == 0
    return outcome.B[0], outcome.A[0]


def rotation_of(b, a, previous, side, lam=1.0, **options):
    """The rotation itself, solved from the aligned full-rank pair; b and a must have full rank."""
    left, right = aligned(b, a, previous, side, lam, **options)
    from_B = torch.linalg.lstsq(b, left).solution
    from_A = torch.linalg.lstsq(a.T, right.T).solution
    torch.testing.assert_close(from_A, from_B, rtol=0, atol=1e-11)
    return from_B


def probe(group_M, side, lam, extra=0, **options):
    """The rotation for a given correlation M (r x r), read off exactly: the aligned factor starts with the identity."""
    r = group_M.shape[0]
    first = torch.cat([torch.eye(r), torch.zeros(extra, r)]).double()
    target = torch.cat([group_M, torch.zeros(extra, r)]).double()
    other = normal(r + 5, r, seed=11)
    if side == "A":
        _, right = aligned(
            other, first.T.contiguous(), before("A", (other[None], target.T[None])), side, lam, **options
        )
        return right[:, :r].T
    left, _ = aligned(first, other.T.contiguous(), before("B", (target[None], other.T[None])), side, lam, **options)
    return left[:r]


def same_bits(x, y):
    return torch.equal(x, y) and torch.equal(x.signbit(), y.signbit())


# what an alignment is


@backends
@sides
@pytest.mark.parametrize("lam", LAMS)
def test_products_do_not_change_and_rotations_are_special_orthogonal(backend, side, lam):
    p = problem()
    for k, (b, a) in enumerate(zip(p.B, p.A, strict=True)):
        left, right = aligned(b, a, before(side), side, lam, backend=backend)
        assert distance(left @ right, b @ a) < 1e-12
        Q = rotation_of(b, a, before(side), side, lam, backend=backend)
        assert (Q.T @ Q - torch.eye(R)).abs().max() < 1e-12, k
        assert float(torch.linalg.det(Q)) == pytest.approx(1.0, abs=1e-12)


@backends
@sides
def test_a_rotated_reference_is_recovered(backend, side):
    B_ref, A_ref = reference()
    Q = special_orthogonal(R, 5)
    b, a = (normal(M, R, seed=20), Q @ A_ref[0]) if side == "A" else (B_ref[0] @ Q, normal(R, N, seed=21))
    left, right = aligned(b, a, before(side, (B_ref, A_ref)), side, backend=backend)
    got, wanted = (right, A_ref[0]) if side == "A" else (left, B_ref[0])
    assert distance(got, wanted) < 1e-13


@backends
@sides
def test_the_distance_to_the_reference_never_grows_with_lam(backend, side):
    p, (B_ref, A_ref) = problem(), reference()
    for b, a in zip(p.B, p.A, strict=True):
        found = []
        for lam in (i / 10 for i in range(11)):
            left, right = aligned(b, a, before(side), side, lam, backend=backend)
            found.append(float(torch.linalg.norm(right - A_ref[0] if side == "A" else left - B_ref[0])))
        start = float(torch.linalg.norm(a - A_ref[0] if side == "A" else b - B_ref[0]))
        assert found[0] == pytest.approx(start, rel=1e-14)
        assert all(later <= earlier + 1e-12 * start for earlier, later in itertools.pairwise(found))
        assert found[-1] < 0.95 * start


@backends
@sides
def test_no_random_rotation_comes_closer(backend, side):
    p, (B_ref, A_ref) = problem(), reference()
    b, a = p.B[1], p.A[1]
    left, right = aligned(b, a, before(side), side, backend=backend)
    best = torch.linalg.norm(right - A_ref[0] if side == "A" else left - B_ref[0])
    Q = rotation_of(b, a, before(side), side, backend=backend)
    for seed in range(300):
        # far ones, and ones close to the answer, which are the harder rivals
        turn = special_orthogonal(R, seed)
        near = Q @ torch.linalg.matrix_exp(10.0 ** -(seed % 6) * (turn - turn.T))
        for rival in (turn, near):
            found = rival.T @ a - A_ref[0] if side == "A" else b @ rival - B_ref[0]
            assert torch.linalg.norm(found) >= best - 1e-12


@backends
@sides
def test_reflections_cannot_be_undone_but_in_o(backend, side):
    B_ref, A_ref = reference()
    flip = special_orthogonal(R, 5) @ torch.diag(torch.tensor([1.0] * (R - 1) + [-1.0], dtype=torch.float64))
    b, a = B_ref[0] @ flip, flip.T @ A_ref[0]
    previous = before(side, (B_ref, A_ref))
    Q = rotation_of(b, a, previous, side, backend=backend)
    assert float(torch.linalg.det(Q)) == pytest.approx(1.0)
    left, right = aligned(b, a, previous, side, backend=backend)
    assert distance(right if side == "A" else left, A_ref[0] if side == "A" else B_ref[0]) > 0.05
    left, right = aligned(b, a, previous, side, backend=backend, group="O")
    assert distance(left, B_ref[0]) < 1e-13
    assert distance(right, A_ref[0]) < 1e-13


def test_rank_one_may_change_its_sign_in_o():
    b, a = normal(M, 1, seed=1), normal(1, N, seed=2)
    left, right = aligned(b, a, before("A", (b[None], -a[None])), "A", group="O")
    assert torch.equal(left, -b)
    assert torch.equal(right, -a)


def test_the_form_of_the_paper_gives_the_same_rotation():
    p, (_, A_ref) = problem(), reference()
    for b, a in zip(p.B, p.A, strict=True):
        U, _, Vh = torch.linalg.svd(A_ref[0] @ a.T)
        last = torch.ones(R, dtype=torch.float64)
        last[-1] = torch.linalg.det(U @ Vh)
        assert (rotation_of(b, a, before("A"), "A") - Vh.T * last @ U.T).abs().max() < 1e-11


def test_rounds_take_the_factors_in_turns():
    """Odd rounds align A; ``first="B"`` swaps them; the reference of the other factor is not looked at."""
    p, (B_ref, A_ref) = problem(), reference()
    for round_, first, side in (
        (1, "A", "A"),
        (2, "A", "B"),
        (7, "A", "A"),
        (1, "B", "B"),
        (2, "B", "A"),
        (8, "B", "A"),
    ):
        previous = Previous(round=round_ - 1, B=B_ref, A=A_ref)
        got = p.run("fedrot", previous=previous, first=first)
        unread = replace(previous, **{"B" if side == "A" else "A": normal(*(B_ref if side == "A" else A_ref).shape)})
        assert same_bits(got.B, p.run("fedrot", previous=unread, first=first).B)
        wanted = p.run("fedrot", previous=before(side))
        assert same_bits(got.B, wanted.B)
        assert same_bits(got.A, wanted.A)
    assert make_method("fedrot", {}).aligned_factor(1) == "A"


# soft rotation


@backends
@sides
@pytest.mark.parametrize("lam", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("angle", [0.0, 0.7, 1.5, 3.0, -2.0])
def test_angles_of_a_soft_rotation(backend, side, lam, angle):
    base = special_orthogonal(5, 2)
    full = base @ torch.block_diag(plane(angle), plane(0.4), torch.eye(1)) @ base.T
    soft = [plane(math.atan2(lam * math.sin(x), 1 - lam + lam * math.cos(x))) for x in (angle, 0.4)]
    Q = probe(full, side, lam, backend=backend)
    assert (Q - base @ torch.block_diag(*soft, torch.eye(1)) @ base.T).abs().max() < 1e-13
    assert torch.linalg.norm(Q - torch.eye(5)) <= 2 * lam * torch.linalg.norm(full - torch.eye(5)) + 1e-13


@backends
def test_halfway_halves_every_angle(backend):
    full = torch.block_diag(plane(2.9), plane(-1.0), plane(0.3))
    half = torch.block_diag(plane(1.45), plane(-0.5), plane(0.15))
    assert (probe(full, "A", 0.5, backend=backend) - half).abs().max() < 1e-13


@backends
@sides
def test_half_turns_halfway_leave_their_plane(backend, side):
    full = torch.block_diag(-torch.eye(2), plane(0.7)).double()
    half = torch.block_diag(torch.eye(2), plane(0.35)).double()
    assert (probe(full, side, 0.5, extra=3, backend=backend) - half).abs().max() < 1e-13
    base = special_orthogonal(4, 8)
    Q = probe(base @ full @ base.T, side, 0.5, backend=backend)
    assert (Q - base @ half @ base.T).abs().max() < 1e-12


@backends
@pytest.mark.parametrize("lam", [0.3, 0.5, 0.5 + 2e-7, 0.5 + 5e-7, 0.5000005000000001, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_half_turns_stay_special_orthogonal(backend, lam, seed):
    """Also where the singular values of the blend, equal but for rounding, stand at the threshold itself."""
    base = special_orthogonal(7, seed)
    full = base @ torch.diag(torch.tensor([-1.0] * 6 + [1.0], dtype=torch.float64)) @ base.T
    Q = probe(full, "A", lam, backend=backend)
    assert (Q.T @ Q - torch.eye(7)).abs().max() < 1e-12
    assert float(torch.linalg.det(Q)) == pytest.approx(1.0)


# nothing to turn, nothing to turn to


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.3, 0.4), (0.7, -0.2, 1.1, 0.4)])
def test_lam_zero_round_zero_and_rank_one_are_fedit_to_the_bit(dtype, weights):
    p = replace(problem(dtype=dtype), weight=list(weights))
    thin = replace(standard(m=M, n=N, ranks=(1,) * 4, dtype=dtype), weight=list(weights))
    thin_before = Previous(round=0, B=-thin.B[0][None].double(), A=-thin.A[0][None].double())
    cases = [
        (p, p.run("fedrot", previous=before("A"), lam=0.0)),
        (p, p.run("fedrot", previous=before("B"), lam=0.0)),
        (p, p.run("fedrot", lam=1.0)),
        (thin, thin.run("fedrot", previous=thin_before, lam=1.0)),
    ]
    for clients, outcome in cases:
        mean = clients.run("fedit")
        assert same_bits(outcome.B, mean.B)
        assert same_bits(outcome.A, mean.A)
        assert torch.equal(outcome.error, mean.error)
        assert torch.equal(outcome.error_bound, mean.error_bound)


@backends
@pytest.mark.parametrize("missing", ["reference", "factor"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_zero_reference_or_factor_turns_nothing(backend, side, missing):
    """A reference of B = 0 in the first rounds must not turn clients at random."""
    p, (B_ref, A_ref) = problem(), reference()
    if missing == "reference":
        previous = before(side, (0 * B_ref, A_ref) if side == "B" else (B_ref, 0 * A_ref))
    else:
        previous = before(side)
        p = replace(p, **{side: [torch.zeros_like(x) for x in getattr(p, side)]})
    outcome = p.run("fedrot", previous=previous, lam=1.0, backend=backend)
    mean = p.run("fedit", backend=backend)
    assert same_bits(outcome.B, mean.B)
    assert same_bits(outcome.A, mean.A)


@backends
@sides
@pytest.mark.parametrize("rank", range(1, R))
@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_deficient_correlations_take_the_rotation_closest_to_the_identity(backend, side, rank, lam):
    U, V = special_orthogonal(R, rank), special_orthogonal(R, rank + 10)
    correlation = U[:, :rank] * torch.linspace(2, 1, rank, dtype=torch.float64) @ V[:, :rank].T
    Q = probe(correlation, side, lam, backend=backend)
    assert (Q.T @ Q - torch.eye(R)).abs().max() < 1e-12
    assert float(torch.linalg.det(Q)) == pytest.approx(1.0)
    if lam == 1.0:
        assert torch.linalg.norm(Q @ V[:, :rank] - U[:, :rank]) < 1e-12
        for seed in range(40):
            free = torch.linalg.qr(normal(R - rank, R - rank, seed=seed))[0]
            rival = U[:, :rank] @ V[:, :rank].T + U[:, rank:] @ free @ V[:, rank:].T
            if torch.linalg.det(rival) > 0:
                assert rival.trace() <= Q.trace() + 1e-12


@backends
@sides
def test_a_reference_without_overlap_turns_nothing(backend, side):
    """What correlates is rounding noise: its rotation would be arbitrary."""
    size = N if side == "A" else M
    frame = torch.linalg.qr(normal(size, 2 * R, seed=6))[0]
    mine, target = frame[:, :R], frame[:, R:]
    other_B, other_A = normal(M, R, seed=8), normal(R, N, seed=9)
    pair = (other_B, mine.T.contiguous()) if side == "A" else (mine, other_A)
    references = (other_B[None], target.T[None]) if side == "A" else (target[None], other_A[None])
    noise = mine.T @ target
    assert 0.0 < noise.abs().max() < 1e-15
    left, right = aligned(*pair, before(side, references), side, backend=backend)
    assert torch.equal(left, pair[0])
    assert torch.equal(right, pair[1])


# the aggregate


@backends
@sides
def test_gauge_copies_of_one_update_agree_whatever_the_reference(backend, side):
    p = copies([special_orthogonal(R, seed) for seed in range(5)])
    for seed in range(4):
        outcome = p.run("fedrot", previous=before(side, reference(seed=100 + seed)), lam=1.0, backend=backend)
        assert distance(product(outcome), p.dense()) < 1e-12
        assert float(outcome.error[0]) <= float(outcome.error_bound[0]) < 1e-11
        assert distance(product(outcome), p.dense()) <= float(outcome.error_bound[0])
    assert distance(product(p.run("fedit")), p.dense()) > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_with_lam_for_angles_below_one_around_a_common_base(seed):
    """Clients near one pair, turned by up to .9, and a reference that they all started from."""
    base = copies([torch.eye(R, dtype=torch.float64)])
    turns = [turned_by(angle, seed=10 * seed + i) for i, angle in enumerate((-0.9, -0.4, 0.3, 0.6, 0.9))]
    p = copies(turns)
    p = replace(p, A=[a + 1e-3 * normal(R, N, seed=seed + k) for k, a in enumerate(p.A)])
    previous = before("A", (2.0 * base.B[0][None], base.A[0][None]))
    errors = [float(p.run("fedrot", previous=previous, lam=lam).error[0]) for lam in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[0] > 0.1
    assert errors[2] < 0.5 * errors[0]
    assert errors[-1] < 5e-3


@sides
@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_one_client_keeps_its_update_and_equal_clients_theirs(side, lam):
    b, a = normal(M, R, seed=1), normal(R, N, seed=2)
    for count in (1, 3):
        p = Problem([b] * count, [a] * count, [3.0] * count, normalised([1, 2, 4][:count]))
        assert distance(product(p.run("fedrot", previous=before(side), lam=lam)), p.dense()) < 1e-13


@backends
@sides
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_the_distance_to_the_sum_of_the_updates(backend, side, dtype):
    p = problem(dtype=dtype)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    outcome = p.run("fedrot", dtype=out, previous=before(side), backend=backend)
    assert outcome.B.dtype == outcome.A.dtype == out
    measured = distance(product(outcome), p.dense())
    assert float(outcome.error[0]) == pytest.approx(measured, rel=1e-10 if out == torch.float64 else 1e-6)
    assert 0.05 < measured <= float(outcome.error_bound[0]) < measured * (1 + 1e-5)
    assert float(outcome.energy[0]) == pytest.approx(float(torch.linalg.norm(p.dense())) ** 2, rel=1e-12)


def test_unmeasured_groups_are_not_measured():
    p = problem()
    group = replace(p.group(measure=False), round=1)
    outcome = make_method("fedrot", {}).combine(group, None, before("A"))
    assert bool(outcome.error.isnan().all())
    assert same_bits(outcome.B, p.run("fedrot", previous=before("A")).B)


@backends
@sides
@pytest.mark.parametrize("lam", [0.4, 1.0])
def test_the_scale_is_folded_into_b_before_anything_else(backend, side, lam):
    p = problem()
    folded = replace(p, B=[s * b for s, b in zip(p.scale, p.B, strict=True)], scale=[1.0] * 4)
    first, second = (x.run("fedrot", previous=before(side), lam=lam, backend=backend) for x in (p, folded))
    assert distance(first.B, second.B) < 1e-13
    assert distance(first.A, second.A) < 1e-13


def test_a_negative_or_zero_scale_is_in_the_b_that_is_aligned():
    p = replace(problem(), scale=[-1.0, 4.0, 0.0, 0.5])
    folded = replace(p, B=[s * b for s, b in zip(p.scale, p.B, strict=True)], scale=[1.0] * 4)
    first, second = (x.run("fedrot", previous=before("B"), lam=1.0) for x in (p, folded))
    assert distance(first.B, second.B) < 1e-13
    assert distance(first.A, second.A) < 1e-13


@sides
def test_uniform_weights_are_those_of_the_formulas(side):
    p = problem()
    got = p.run("fedrot", previous=before(side), weights="uniform")
    wanted = replace(p, weight=[0.25] * 4).run("fedrot", previous=before(side))
    assert distance(got.B, wanted.B) < 1e-15
    assert distance(got.A, wanted.A) < 1e-15
    assert distance(got.B, p.run("fedrot", previous=before(side)).B) > 0.01
    # the error is that against the sum with the clients' own weights
    assert float(got.error[0]) == pytest.approx(distance(product(got), p.dense()), rel=1e-10)
    still = p.run("fedrot", weights="uniform")
    mean = replace(p, weight=[0.25] * 4).run("fedit")
    assert same_bits(still.B, mean.B)
    assert same_bits(still.A, mean.A)


@sides
@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("missing", ["renormalize", "zero"])
def test_a_missing_module_is_left_out_or_counts_as_zero(side, weights, missing):
    p = problem()
    kept = replace(p, B=p.B[:3], A=p.A[:3], scale=p.scale[:3], weight=p.weight[:3])
    absent = replace(p, B=[*p.B[:3], torch.zeros(M, 0).double()], A=[*p.A[:3], torch.zeros(0, N).double()])
    if missing == "renormalize":
        total = sum(kept.weight)
        kept = replace(kept, weight=[w / total for w in kept.weight])
        absent = replace(absent, weight=[*kept.weight, 0.0])
    elif weights == "uniform":
        kept = replace(kept, weight=[0.25] * 3)
    got = absent.run("fedrot", previous=before(side), weights=weights)
    share = "uniform" if weights == "uniform" and missing == "renormalize" else "samples"
    wanted = kept.run("fedrot", previous=before(side), weights=share)
    assert distance(got.B, wanted.B) < 1e-15
    assert distance(got.A, wanted.A) < 1e-15
    assert float(got.error[0]) == pytest.approx(distance(product(got), absent.dense()), rel=1e-10)


def test_clients_without_weight_or_module_are_not_aligned(monkeypatch):
    seen = []

    def watched(source, target, **options):
        seen.append(len(source))
        return real(source, target, **options)

    real = fedrot.procrustes_rotation
    monkeypatch.setattr(fedrot, "procrustes_rotation", watched)
    p = replace(problem(), weight=[0.5, 0.0, 0.5, 0.0])
    p = replace(p, B=[*p.B[:3], torch.zeros(M, 0).double()], A=[*p.A[:3], torch.zeros(0, N).double()])
    p.run("fedrot", previous=before("A"))
    p.run("fedrot", previous=before("A"), weights="uniform")
    p.run("fedrot", previous=before("A"), lam=0.0)
    p.run("fedrot")
    assert seen == [2, 2]
    nobody = replace(problem(), weight=[0.0] * 4).run("fedrot", previous=before("A"))
    assert seen == [2, 2, 0]
    assert int(nobody.notes[0]) & Note.ZERO


def test_weights_that_sum_to_anything_are_in_the_error():
    p = replace(problem(), weight=[0.7, -0.2, 1.1, 0.4])
    outcome = p.run("fedrot", previous=before("A"))
    assert float(outcome.error[0]) == pytest.approx(distance(product(outcome), p.dense()), rel=1e-10)


def test_the_order_of_the_clients_does_not_matter():
    p = problem()
    outcome, other = (x.run("fedrot", previous=before("B")) for x in (p, p.permuted([2, 0, 3, 1])))
    assert distance(other.B, outcome.B) < 1e-13
    assert distance(other.A, outcome.A) < 1e-13


# groups


def batch(count, ranks=(R,) * 3, dtype=torch.float64, m=M, n=N):
    singles = [standard(m=m, n=n, ranks=ranks, seed=seed, dtype=dtype) for seed in range(count)]
    K = len(ranks)
    weight = torch.tensor([singles[0].weight], dtype=torch.float64).repeat(count, 1)
    return Group(
        modules=tuple(f"layers.{i}.q_proj" for i in range(count)),
        kind="linear",
        m=m,
        n=n,
        B=tuple(torch.stack([p.B[k] for p in singles]) for k in range(K)),
        A=tuple(torch.stack([p.A[k] for p in singles]) for k in range(K)),
        scale=torch.tensor([p.scale for p in singles], dtype=torch.float64),
        weight=weight,
        clients=tuple(range(K)),
        dtype=dtype,
        backend="auto",
        round=1,
    ), Previous(round=0, B=normal(count, m, ranks[0], seed=50), A=normal(count, ranks[0], n, seed=51))


def test_a_group_without_modules():
    group, previous = batch(2)
    empty = Previous(previous.round, previous.B[:0], previous.A[:0])
    outcome = make_method("fedrot", {}).combine(group.part(0, 0), None, empty)
    assert outcome.B.shape == (0, M, R)
    assert outcome.info.shape == outcome.error.shape == (0,)


@backends
@sides
@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_modules_that_nobody_turns_get_the_bits_of_plain_means_next_to_others(backend, side, weights):
    group = replace(batch(5)[0], backend=backend, round=1 if side == "A" else 2)
    still = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    previous = before(side, tuple(x.repeat(5, 1, 1) * still for x in reference()))
    outcome, mean = (
        make_method("fedrot", {"lam": lam, "weights": weights}).combine(group, None, previous) for lam in (0.5, 0.0)
    )
    for found, plain in ((outcome.B, mean.B), (outcome.A, mean.A), (outcome.error, mean.error)):
        assert same_bits(found[[0, 3]], plain[[0, 3]])
        assert not any(torch.equal(found[i], plain[i]) for i in (1, 2, 4))
    assert outcome.rank.tolist() == [R] * 5


def alone(group, previous, i):
    part = Previous(previous.round, previous.B[i : i + 1], previous.A[i : i + 1])
    return make_method("fedrot", {}).combine(group.part(i, i + 1), None, part)


@pytest.mark.parametrize("chunk", [64 << 20, 1])
@pytest.mark.parametrize("round_", [1, 2])
def test_a_module_does_not_see_its_neighbours(monkeypatch, chunk, round_):
    monkeypatch.setattr(shared, "CHUNK", chunk)
    group, previous = batch(5)
    weight = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    group, previous = replace(group, round=round_, weight=weight), replace(previous, round=round_ - 1)
    whole = make_method("fedrot", {}).combine(group, None, previous)
    for i in range(5):
        single = alone(group, previous, i)
        assert distance(whole.B[i], single.B[0]) < 1e-13
        assert distance(whole.A[i], single.A[0]) < 1e-13
        assert float(whole.error[i]) == pytest.approx(float(single.error[0]), rel=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_value_that_is_not_finite_marks_its_module_alone(bad, factor):
    group, previous = batch(4)
    clean = make_method("fedrot", {}).combine(group, None, previous)
    getattr(group, factor)[1][2, 3, 4] = bad
    outcome = make_method("fedrot", {}).combine(group, None, previous)
    assert [bool(code & Info.NONFINITE) for code in outcome.info.tolist()] == [False, False, True, False]
    for i in (0, 1, 3):
        assert distance(outcome.B[i], clean.B[i]) < 1e-13
        assert float(outcome.error[i]) == pytest.approx(float(clean.error[i]), rel=1e-10)


@backends
def test_a_client_of_weight_zero_in_one_module_is_not_seen_there(backend):
    group, previous = batch(3)
    group.weight[1] = torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64)
    group = replace(group, backend=backend)
    clean = make_method("fedrot", {}).combine(group, None, previous)
    group.B[1][1, 2, 3], group.A[1][1, 0, 0] = math.nan, math.inf
    outcome = make_method("fedrot", {}).combine(group, None, previous)
    assert outcome.info.tolist() == [0, 0, 0]
    for got, wanted in ((outcome.B, clean.B), (outcome.A, clean.A)):
        assert distance(got, wanted) < 1e-13
    torch.testing.assert_close(outcome.error, clean.error)
    torch.testing.assert_close(outcome.error_bound, clean.error_bound)


def test_a_result_beyond_its_dtype_is_marked():
    outcome = replace(problem(), scale=[1e6] * 4).run("fedrot", dtype=torch.float16, previous=before("A"))
    assert int(outcome.info[0]) == Info.OVERFLOW


def test_a_rotation_that_fails_is_reported(monkeypatch):
    real = fedrot.procrustes_rotation

    def failing(*args, **options):
        rotations = real(*args, **options)
        rotations[1].info[2] |= int(Info.NOT_CONVERGED)
        return rotations

    monkeypatch.setattr(fedrot, "procrustes_rotation", failing)
    group, previous = batch(4)
    outcome = make_method("fedrot", {}).combine(group, None, previous)
    assert outcome.info.tolist() == [0, 0, int(Info.NOT_CONVERGED), 0]


def test_inputs_are_not_touched():
    group, previous = batch(3)
    kept = [x.clone() for x in (*group.B, *group.A, group.scale, group.weight, previous.B, previous.A)]
    make_method("fedrot", {}).combine(group, None, previous)
    now = (*group.B, *group.A, group.scale, group.weight, previous.B, previous.A)
    assert all(same_bits(x, y) for x, y in zip(now, kept, strict=True))


# refusals


@pytest.mark.parametrize("lam", [1.5, -0.1, math.nan, math.inf, "half", True, None])
def test_lam_outside_zero_to_one_is_refused(lam):
    """It must not mean hard alignment with reflections."""
    with pytest.raises(InputError, match=r"fedrot: lam is .*; 0 <= lam <= 1 is needed"):
        make_method("fedrot", {"lam": lam})


@pytest.mark.parametrize(("option", "value"), [("first", "C"), ("group", "SU"), ("weights", "counts")])
def test_unknown_choices_are_refused(option, value):
    with pytest.raises(InputError, match=f"fedrot: {option} is '{value}'; '.*' or '.*' is needed"):
        make_method("fedrot", {option: value})


def test_reflections_go_with_lam_one_only():
    with pytest.raises(InputError, match=r"'O' with lam 0\.5.*'SO' or lam 1"):
        make_method("fedrot", {"group": "O"})
    assert make_method("fedrot", {"group": "O", "lam": 1}).group == "O"


def test_defaults():
    assert make_method("fedrot", {}).options() == {"lam": 0.5, "first": "A", "group": "SO", "weights": "samples"}


def test_mixed_ranks_are_refused():
    with pytest.raises(MismatchError, match=r"layers\.0\.q_proj.*4, 8, 12.*'fedrot'"):
        standard(m=M, n=N).run("fedrot", previous=before("A"))


@sides
@pytest.mark.parametrize("rank", [R - 1, R + 2])
def test_a_previous_pair_of_another_rank_is_refused(side, rank):
    with pytest.raises(MismatchError, match=rf"layers\.0\.q_proj.*rank {rank}, the clients have rank {R}"):
        problem().run("fedrot", previous=before(side, reference(r=rank)))


def test_a_later_round_without_a_previous_pair_is_refused():
    group = problem().group(round=3)
    for previous in (None, Previous(round=2)):
        with pytest.raises(InputError, match="round 3 has no previous pair"):
            make_method("fedrot", {}).combine(group, None, previous)


# rounds


def test_over_rounds_clients_of_one_update_stay_one():
    """The state is the broadcast pair: each round starts from what the round before answered, in the dtype that it answered."""
    previous = None
    for round_ in range(5):
        p = copies([turned_by(0.8, seed=10 * round_ + k) for k in range(4)])
        outcome = p.run("fedrot", dtype=torch.float32, previous=previous, lam=1.0)
        if round_:
            assert distance(product(outcome), p.dense()) < 1e-6
        previous = Previous(round=round_, B=outcome.B, A=outcome.A)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    r=st.integers(1, 9), m=st.integers(1, 23), n=st.integers(1, 19), count=st.integers(1, 4), seed=st.integers(0, 999),
    lam=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), side=st.sampled_from("AB"), zeroed=st.integers(0, 9),
)  # fmt: skip
def test_any_problem_has_a_finite_answer_and_an_honest_error(r, m, n, count, seed, lam, side, zeroed):
    p = standard(m=m, n=n + (m == n), ranks=(r,) * count, seed=seed)
    B_ref, A_ref = normal(1, m, r, seed=seed + 1), normal(1, r, n + (m == n), seed=seed + 2)
    B_ref[:, :, :zeroed], A_ref[:, :zeroed] = 0.0, 0.0
    outcome = p.run("fedrot", previous=before(side, (B_ref, A_ref)), lam=lam, backend="auto")
    assert outcome.info.tolist() == [0]
    assert outcome.B.isfinite().all()
    measured = distance(product(outcome), p.dense())
    assert float(outcome.error[0]) == pytest.approx(measured, rel=1e-6, abs=1e-7)
    assert measured <= float(outcome.error_bound[0]) * (1 + 1e-9) + 1e-15
