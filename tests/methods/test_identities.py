"""The numbered identities of docs/algorithms.md, Identities between methods: on every backend, against dense float64 sums.

What binds which method stands in `method_traits.TRAITS`.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common_problems import EQUAL, common_A, common_B, off_orthonormal
from method_problems import Problem, distance, normalised, standard
from method_traits import (
    LIMIT,
    SCALE,
    SERVED,
    TRAITS,
    answer,
    chosen,
    clients_of,
    furthest,
    monomial,
    over,
    rotated_copies,
    shared,
    split,
    typical,
)

from fedlora_kernels import MismatchError, aggregate
from fedlora_kernels.linalg.rules import Energy, Rank
from fedlora_kernels.methods.contract import Previous, method_class, method_names

F64, F32 = torch.float64, torch.float32
EXACT = chosen(exact=True)
RULES = ("krum", "multi_krum", "geometric_median", "trimmed_mean", "norm_clip")
GAP = {F64: 1e-9, F32: 1e-5}
"""Limits where an iteration stops at its own tolerance."""


def cut(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with factors of another dtype."""
    B, A = ([x.to(dtype) for x in factor] for factor in (problem.B, problem.A))
    return replace(problem, B=B, A=A)


def previous(m=41, n=31, r=6, number=0) -> Previous:
    made = torch.Generator().manual_seed(9)
    B, A = (torch.randn(1, *shape, generator=made, dtype=F64) for shape in ((m, r), (r, n)))
    return Previous(round=number, B=B, A=A)


def identical(name: str, K: int, dtype=F64) -> Problem:
    """K clients that hold the last factors of the typical problem, of unequal weights."""
    one = typical(name, dtype)
    return Problem(one.B[-1:] * K, one.A[-1:] * K, [2.0] * K, normalised(range(1, K + 1)))


def test_every_method_says_what_binds_it():
    """A method that is registered and stands in no table fails here."""
    assert {traits.method or name for name, traits in TRAITS.items()} == set(method_names())
    for name in TRAITS:
        assert {backend for entry, backend in SERVED if entry == name} >= {"auto", "torch", "reference"}
    for name, traits in TRAITS.items():
        cls = method_class(traits.method or name)
        assert cls.equal_ranks == (traits.clients in ("equal", "frozen")), name
        assert (cls.frozen is not None) == (traits.gauge == "refused"), name
        assert not cls.product_only or traits.gauge == "same", name
        assert ("yes" in cls.exact.split() or "rank" in cls.exact or "energy" in cls.exact) >= traits.exact, name


def test_every_numbered_identity_is_a_test():
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    section = text.partition("## Identities between methods")[2].partition("\n## ")[0]
    listed = {int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)}
    tested = {int(name[5:7]) for name in vars(sys.modules[__name__]) if re.match(r"test_\d\d_", name)}
    assert listed == tested == set(range(1, 19))


# 1 to 3: exact sums and their truncations


@over(EXACT)
def test_01_exact_methods_give_the_dense_sum(name, backend, dtype):
    """Pair and residual; where the pair is cut to the clients' rank, m is that rank."""
    fields = {"m": 9, "ranks": (4, 4, 8, 8, 9), "scale": SCALE} if TRAITS[name].cuts else {}
    problem = cut(standard(n=31, **fields), dtype) if fields else typical(name, dtype)
    made = answer(problem, name, backend=backend)
    assert distance(made.updates[0], problem.dense()) < LIMIT[dtype]
    assert not int(made.outcome.info[0])


@over(chosen(exact=True, clients=("mixed", "equal")))
def test_01_exact_methods_agree_on_one_problem(name, backend, dtype):
    problem = cut(standard(m=9, n=31, ranks=(9,) * 5, scale=SCALE), dtype)
    assert distance(answer(problem, name, backend=backend).updates[0], problem.dense()) < LIMIT[dtype]


@over(["flexlora", "florist", "fedmomentum", "raflora"])
def test_02_truncations_to_r_are_the_best_approximation_of_rank_r(name, backend, dtype):
    """raFLoRA of equal ranks and the adapter of FedMomentum have the product of FlexLoRA, balanced otherwise."""
    r = 6
    problem = cut(standard(m=41, n=31, ranks=(r,) * 5, scale=SCALE), dtype)
    made = answer(problem, name, backend=backend, **({"rule": Rank(r)} if name == "florist" else {}))
    U, S, Vh = torch.linalg.svd(problem.dense(), full_matrices=False)
    assert int(made.outcome.rank[0]) == r
    assert distance(made.pair, U[:, :r] * S[:r] @ Vh[:r]) < LIMIT[dtype]
    B, A = made.outcome.B[0].double(), made.outcome.A[0].double()
    halved = name in ("fedmomentum", "raflora")
    sizes = S[:r].diag() if halved else torch.eye(r, dtype=F64)
    assert distance(A @ A.T, sizes) < 10 * LIMIT[dtype]
    assert distance(B.T @ B, S[:r].diag() if halved else S[:r].square().diag()) < 10 * LIMIT[dtype]


@over(["florist"])
def test_03_prefixes_of_florist_are_flexlora_at_that_rank(name, backend, dtype):
    """Also what each client of FlexLoRA receives: its own prefix."""
    problem = cut(standard(m=41, n=31, ranks=(2, 5, 7, 11), scale=SCALE[:4]), dtype)
    long = answer(problem, name, backend=backend, rule=Energy(0.9999))
    p = int(long.outcome.rank[0])
    assert p > 11
    flex = answer(problem, "flexlora", backend=backend).outcome
    for rank in (2, 5, 7, 11):
        r = method_class("flexlora")().client_rank(rank, int(flex.rank[0]))
        prefix = long.outcome.B[0, :, :r].double() @ long.outcome.A[0, :r].double()
        short = answer(problem, name, backend=backend, rule=Rank(r)).pair
        assert distance(flex.B[0, :, :r].double() @ flex.A[0, :r].double(), prefix) < LIMIT[dtype]
        assert distance(short, prefix) < LIMIT[dtype]


# 4 and 5: what becomes FedIT


@over(["fedrot"])
def test_04_fedrot_without_a_turn_is_fedit_bitwise(name, backend, dtype):
    problem, thin = typical(name, dtype), cut(standard(m=41, n=31, ranks=(1,) * 5, scale=SCALE), dtype)
    fedit, of_rank_one = (answer(p, "fedit", backend=backend).outcome for p in (problem, thin))
    for made, wanted in (
        (answer(problem, name, backend=backend, lam=0.0, previous=previous()), fedit),
        (answer(problem, name, backend=backend, lam=1.0), fedit),
        (answer(thin, name, backend=backend, lam=1.0, previous=previous(r=1)), of_rank_one),
    ):
        assert torch.equal(made.outcome.B, wanted.B)
        assert torch.equal(made.outcome.A, wanted.A)
    turned = answer(problem, name, backend=backend, lam=1.0, previous=previous()).pair
    assert distance(turned, answer(problem, "fedit").pair) > 0.05


@over(["prelort", "zero_pad", "hetlora"])
def test_05_equal_ranks_are_fedit(name, backend, dtype):
    """PreLort and zero-padding to the bit; HetLoRA of equal norms with uniform weights."""
    problem = typical("fedit", dtype)
    if name == "hetlora":
        made = [b.double() / d.norm() for b, d in zip(problem.B, problem.updates(), strict=True)]
        problem = cut(replace(problem, B=made), dtype)
        uniform = answer(replace(problem, weight=[0.2] * 5), "fedit", backend=backend)
        assert distance(answer(problem, name, backend=backend).pair, uniform.pair) < LIMIT[dtype]
        return
    made, fedit = answer(problem, name, backend=backend).outcome, answer(problem, "fedit", backend=backend).outcome
    assert torch.equal(made.B, fedit.B)
    assert torch.equal(made.A, fedit.A)


# 6 to 8: one factor in common


COMMON_A = ("fedit", "ffa", "rolora", "fedsvd", "flora", "florist", "flexlora", "fedex", "fedmomentum", "zero_pad",
            "prelort", "raflora", "fedrot", "lora_fair", "lora_fair_closed")  # fmt: skip


@over(COMMON_A)
def test_06_a_common_A_makes_means_exact(name, backend, dtype):
    problem = common_A(ranks=EQUAL, m=41, n=31, dtype=dtype)
    made = answer(problem, name, backend=backend)
    assert distance(made.pair, problem.dense()) < LIMIT[dtype]
    if name == "fedex":
        assert float(made.residual.norm()) < LIMIT[dtype] * float(problem.dense().norm())
    if name.startswith("lora_fair"):
        fedit = answer(problem, "fedit", backend=backend).outcome
        assert distance(made.outcome.B.double(), fedit.B.double()) < LIMIT[dtype]


@over(["fedit", "fedex", "rolora", "zero_pad", "prelort"])
def test_06_a_common_B_makes_means_exact(name, backend, dtype):
    problem = common_B(m=41, n=31, dtype=dtype)
    odd = Previous(round=0) if name == "rolora" else None
    made = answer(problem, name, backend=backend, previous=odd)
    assert distance(made.pair, problem.dense()) < LIMIT[dtype]
    assert float(made.residual.norm()) < LIMIT[dtype] * float(problem.dense().norm())


@over(["fedex"])
def test_07_the_residual_is_the_covariance_of_the_factors(name, backend, dtype):
    problem = typical(name, dtype)
    made = answer(problem, name, backend=backend)
    folded = [s * b.double() for b, s in zip(problem.B, problem.scale, strict=True)]
    mean_B = sum(w * b for w, b in zip(problem.weight, folded, strict=True))
    mean_A = sum(w * a.double() for w, a in zip(problem.weight, problem.A, strict=True))
    triples = zip(problem.weight, folded, problem.A, strict=True)
    covariance = sum(w * (b - mean_B) @ (a.double() - mean_A) for w, b, a in triples)
    assert distance(made.residual, covariance) < LIMIT[dtype]
    assert distance(made.residual, problem.dense() - mean_B @ mean_A) < LIMIT[dtype]
    assert int(made.outcome.residual.rank[0]) <= 4 * 6


@over(["fedsvd"])
def test_08_fedsvd_keeps_the_product_and_turns_A_orthonormal(name, backend, dtype):
    problem = typical(name, dtype)
    made = answer(problem, name, backend=backend)
    triples = zip(problem.weight, problem.scale, problem.B, strict=True)
    mean_B = sum(w * s * b.double() for w, s, b in triples)
    assert distance(made.pair, mean_B @ problem.A[0].double()) < LIMIT[dtype]
    assert off_orthonormal(made.outcome.A[0]) < 2 * LIMIT[dtype]


# 9 and 10: nothing to combine


@over(chosen(identical=True))
def test_09_one_client_is_returned(name, backend, dtype):
    problem = identical(name, 1, dtype)
    assert furthest(answer(problem, name, backend=backend).updates, problem.updates()) < LIMIT[dtype]


@over(["fedrot", "prelort", "raflora"])
def test_09_one_client_is_returned_in_later_rounds(name, backend, dtype):
    problem = identical("fedit", 1, dtype)
    made = answer(problem, name, backend=backend, previous=previous())
    assert distance(made.pair, problem.dense()) < LIMIT[dtype]


@over(chosen(identical=True))
def test_10_identical_clients_are_returned(name, backend, dtype):
    problem = identical(name, 5, dtype)
    made = answer(problem, name, backend=backend)
    assert furthest(made.updates, problem.updates()) < LIMIT[dtype]
    if name == "fedtree":
        assert made.plan.cuts.tolist() == [1]
    if name == "clair":
        assert not made.plan.flags.any()


# 11 and 12: personal pairs


@over(["fedtree"])
def test_11_one_cluster_is_fedit_with_uniform_weights(name, backend, dtype):
    problem = typical(name, dtype)
    fedit = answer(replace(problem, weight=[0.2] * 5), "fedit", backend=backend).outcome
    made = answer(problem, name, backend=backend, window=1)
    assert made.plan.cuts.tolist() == [1]
    for pair in made.outcome.personal:
        assert torch.equal(pair.B, fedit.B)
        assert torch.equal(pair.A, fedit.A)


@over(["fedtree"])
def test_11_cluster_and_outside_means_recombine_to_the_mean_of_all(name, backend, dtype):
    problem = typical(name, dtype)
    made = answer(problem, name, backend=backend, min_silhouette=-1.0)
    state = made.outcome.state[0]
    labels = made.plan.labels[0]
    assert labels.max() > 0
    folded = [s * b.double() for b, s in zip(problem.B, problem.scale, strict=True)]
    for factor, blocks in (("B", folded), ("A", [a.double() for a in problem.A])):
        for c in range(labels.max() + 1):
            inside = int((labels == c).sum())
            cluster, outside = (state[f"{which}_{factor}"][c].double() for which in ("cluster", "outside"))
            whole = (inside * cluster + (5 - inside) * outside) / 5
            assert distance(whole, sum(blocks) / 5) < LIMIT[dtype]


@over(["clair"])
def test_12_clair_between_the_inputs_and_their_sum(name, backend, dtype):
    """The whole space as the shared subspace returns the inputs, none of it D, where nobody is flagged."""
    problem = shared(dtype=dtype)
    none = {"gap_min": 2.0, "out_rank": "exact", "backend": backend}
    everything = answer(problem, name, shared_rank=41, lam=10.0, **none)
    assert not everything.plan.flags.any()
    assert furthest(everything.updates, problem.updates()) < LIMIT[dtype]
    nothing = answer(problem, name, shared_rank=0, **none)
    assert furthest(nothing.updates, [problem.dense()] * 5) < LIMIT[dtype]
    assert distance(nothing.pair, problem.dense()) < LIMIT[dtype]


@over(["clair"])
def test_12_side_right_is_the_transpose_of_left(name, backend, dtype):
    problem = shared(dtype=dtype)
    turned = Problem([a.mT for a in problem.A], [b.mT for b in problem.B], problem.scale, problem.weight)
    left, right = answer(problem, name, backend=backend), answer(turned, name, backend=backend, side="right")
    assert left.plan.flags.tolist() == right.plan.flags.tolist()
    assert furthest(right.updates, [d.T for d in left.updates]) < LIMIT[dtype]


# 13 and 14: re-weighted and robust sums


@over(["raflora"])
def test_13_raflora_has_the_target_D_with_equal_ranks_alone(name, backend, dtype):
    """With mixed ranks it is neither D nor PreLort; m is r_max, so that nothing is cut."""
    equal, mixed = (cut(standard(m=12, n=31, ranks=r, scale=SCALE), dtype) for r in ((12,) * 5, (4, 4, 8, 8, 12)))
    assert distance(answer(equal, name, backend=backend).pair, equal.dense()) < LIMIT[dtype]
    raflora, prelort = answer(mixed, name, backend=backend).pair, answer(mixed, "prelort", backend=backend).pair
    assert distance(raflora, prelort) > 0.1
    assert distance(raflora, mixed.dense()) > 0.1
    assert distance(prelort, mixed.dense()) > 0.1


@over(RULES)
def test_14_rules_that_leave_nothing_out_are_the_dense_sum(name, backend, dtype):
    options = {"multi_krum": {"f": 1, "q": 5}, "trimmed_mean": {"beta": 0.0}, "norm_clip": {"max_update_norm": np.inf}}
    problem = typical(name, dtype)
    if name in options:
        assert distance(answer(problem, name, backend=backend, **options[name]).pair, problem.dense()) < LIMIT[dtype]
        return
    plain = answer(problem, name, backend=backend)
    assert distance(plain.pair, problem.dense()) > 0.05
    if name == "krum":
        one = answer(problem, "multi_krum", backend=backend, q=1)
        assert torch.equal(one.outcome.B, plain.outcome.B)
        assert sum(w != 0.0 for w in plain.behind.weight) == 1


# 15: two levels, and the split of a client


@over(chosen(levels=True))
def test_15_two_levels_are_one(name, backend, dtype):
    wide = {"ranks": (9,) * 5} if TRAITS[name].cuts else {}
    problem = cut(standard(m=9, n=31, scale=SCALE, **wide), dtype) if wide else typical(name, dtype)
    parts = [answer(part, name, backend=backend, dtype=F64) for part, _ in halves(problem)]
    masses = [mass for _, mass in halves(problem)]
    tops = [stacked(part.outcome) for part in parts]
    widest = max(b.shape[1] for b, _ in tops) if TRAITS[name].clients == "equal" else 0
    tops = [(widened(b, widest), widened(a.T, widest).T) for b, a in tops]
    top = Problem([b for b, _ in tops], [a for _, a in tops], [1.0, 1.0], masses)
    whole = answer(problem, name, backend=backend, dtype=F64).updates[0]
    assert distance(answer(top, name, backend=backend).updates[0], whole) < 1e-12


def halves(problem: Problem) -> list[tuple[Problem, float]]:
    """Clients 0 and 4, and the other three, each of weights of sum 1; and what they weigh together."""
    found = []
    for keep in ([0, 4], [1, 2, 3]):
        mass = sum(problem.weight[k] for k in keep)
        part = problem.permuted(keep)
        found.append((replace(part, weight=[w / mass for w in part.weight]), mass))
    return found


def stacked(outcome) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair and residual as one pair."""
    B, A = outcome.B[0, :, : int(outcome.rank[0])], outcome.A[0, : int(outcome.rank[0])]
    if outcome.residual is not None:
        p = int(outcome.residual.rank[0])
        B, A = torch.cat([B, outcome.residual.B[0, :, :p]], 1), torch.cat([A, outcome.residual.A[0, :p]])
    return B, A


def widened(x: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, max(0, rank - x.shape[1])))


@over(chosen(split="same"))
def test_15_splitting_a_client_changes_nothing(name, backend, dtype):
    problem = typical(name, dtype)
    before = previous() if name == "fedrot" else None
    plain = answer(problem, name, backend=backend, previous=before)
    for k in (0, 4):
        made = answer(split(problem, k), name, backend=backend, previous=before)
        wanted = sorted([*range(5), k])
        limit = GAP[dtype] if name == "geometric_median" else LIMIT[dtype]
        assert furthest(made.updates, [plain.updates[j] for j in wanted]) < limit


@pytest.mark.parametrize("name", chosen(split="counts"))
def test_15_splitting_a_client_is_seen_by_methods_that_count_clients(name):
    """A guard: were these unmoved, the test above would test nothing."""
    moved = []
    for seed in range(5):
        problem = typical(name, seed=seed)
        plain = answer(problem, name).updates
        for k in range(5):
            made = answer(split(problem, k), name).updates
            moved.append(furthest(made, [plain[j] for j in sorted([*range(5), k])]))
        if max(moved) > 1e-3:
            return
    raise AssertionError(max(moved))


# 16 to 18: gauges, rotations, scales


@over(chosen(gauge="same"))
def test_16_a_gauge_of_each_client_changes_nothing(name, backend, dtype):
    problem = typical(name, dtype)
    plain, moved = (answer(p, name, backend=backend) for p in (problem, monomial(problem)))
    limit = GAP[dtype] if name == "geometric_median" else LIMIT[dtype]
    assert furthest(moved.updates, plain.updates) < limit
    if name == "fedex":
        assert distance(moved.pair, plain.pair) > 0.05


@over(chosen(gauge="same"), [F64])
def test_16_any_invertible_gauge_changes_nothing(name, backend, dtype):
    problem = typical(name, dtype)
    plain, moved = (answer(p, name, backend=backend) for p in (problem, problem.gauged()))
    # the factors of the gauge have condition numbers of some hundreds
    assert furthest(moved.updates, plain.updates) < (GAP[dtype] if name == "geometric_median" else 1e-11)


@over(chosen(gauge="changes"))
def test_16_a_gauge_of_each_client_must_change_means_of_factors(name, backend, dtype):
    """A guard: were these unmoved, the tests above would test nothing."""
    problem = typical(name, dtype)
    plain, moved = (answer(p, name, backend=backend) for p in (problem, monomial(problem)))
    assert furthest(moved.updates, plain.updates) > 0.05


@pytest.mark.parametrize("name", chosen(gauge="refused"))
def test_16_a_gauge_of_one_client_is_refused_where_a_factor_is_frozen(name):
    with pytest.raises(MismatchError, match="client"):
        aggregate(clients_of(monomial(typical(name))), name)


@over(["fedtree"])
def test_16_the_tree_of_products_feels_no_gauge(name, backend, dtype):
    problem = typical(name, dtype)
    labels = []
    for p in (problem, monomial(problem)):
        plan = answer(p, name, backend=backend, metric="product", min_silhouette=-1.0).plan
        assert plan.labels.max() > 0
        labels.append(plan.labels.tolist())
    assert labels[0] == labels[1]


@over(chosen(exact=True, clients=("mixed", "equal")))
def test_17_rotated_copies_are_combined_right_by_exact_methods(name, backend, dtype):
    problem = rotated_copies(dtype=dtype)
    assert distance(answer(problem, name, backend=backend).updates[0], problem.dense()) < LIMIT[dtype]
    assert distance(answer(problem, "fedit", backend=backend).pair, problem.dense()) > 0.3


@over(["fedrot"])
@pytest.mark.parametrize("number", [0, 1])
def test_17_rotated_copies_are_combined_right_by_fedrot(name, backend, dtype, number):
    problem = rotated_copies(dtype=dtype)
    made = answer(problem, name, backend=backend, lam=1.0, previous=previous(number=number))
    assert distance(made.pair, problem.dense()) < LIMIT[dtype]


@over(chosen(linear=True))
def test_18_scaling_every_update_scales_every_output(name, backend, dtype):
    c = 7.0
    problem = typical(name, dtype)
    before = previous() if name == "fedrot" else None
    plain, scaled = (
        answer(p, name, backend=backend, previous=before)
        for p in (problem, replace(problem, scale=[c * s for s in problem.scale]))
    )
    limit = GAP[dtype] if name == "geometric_median" else LIMIT[dtype]
    assert furthest(scaled.updates, [c * d for d in plain.updates]) < limit


@over(chosen(linear=False))
def test_18_a_published_objective_does_not_scale(name, backend, dtype):
    problem = typical(name, dtype)
    plain, scaled = (
        answer(p, name, backend=backend, steps=100)
        for p in (problem, replace(problem, scale=[7.0 * s for s in problem.scale]))
    )
    assert distance(scaled.pair, 7.0 * plain.pair) > 1e-6
