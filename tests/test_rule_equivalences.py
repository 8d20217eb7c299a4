"""The table of equivalences: each rank rule against what other tools' users know, each written here from its definition.

Theirs are exact (fractions) or called: PEFT's `convert_to_lora` runs on a model. Ours run as a user meets them: `resize` of an
adapter whose spectrum is prescribed, or `select_rank` on the spectrum itself.
"""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from adapter_problems import PREFIX, config, products
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fedlora_kernels as fk

M, N = 23, 17


def kohya_sv_fro(S, f):
    """resize_lora: smallest rank whose Frobenius norm is at least the fraction f of the whole."""
    squares = [Fraction(s) ** 2 for s in S]
    return first_at_least(squares, Fraction(f) ** 2 * sum(squares))


def kohya_sv_cumulative(S, t):
    """resize_lora: smallest rank whose sum of singular values is at least the fraction t of the whole."""
    return first_at_least([Fraction(s) for s in S], Fraction(t) * sum(map(Fraction, S)))


def kohya_sv_ratio(S, x):
    """resize_lora: singular values above the largest one over the ratio; at least one."""
    return max(1, sum(Fraction(s) * Fraction(x) > Fraction(S[0]) for s in S))


def kohya_older(S, f):
    """The same of older scripts: one rank more, but never all."""
    return max(1, min(kohya_sv_fro(S, f) + 1, len(S) - 1))


def florist(S, threshold):
    """The paper: smallest p with sigma_1^2 + ... + sigma_p^2 at least the threshold of the whole."""
    squares = [Fraction(s) ** 2 for s in S]
    return first_at_least(squares, Fraction(threshold) * sum(squares))


def mergekit(S, epsilon=0.0, most=None):
    """extract-lora: singular values above epsilon, at most max-rank."""
    kept = sum(s > epsilon for s in S)
    return kept if most is None else min(kept, most)


def spn_lora(S, thr):
    """resize_lora by elias-gaeros, spn_lora=1: scores log10(s_i / s_1) of at least thr; ties are kept there."""
    return sum(math.log10(s / S[0]) >= thr for s in S)


def first_at_least(terms, goal):
    return next(p for p, total in enumerate(itertools.accumulate(terms), 1) if total >= goal)


def chosen(S, rule):
    return int(fk.select_rank(torch.tensor(S, dtype=torch.float64), rule))


spectra = st.lists(st.floats(min_value=0.01, max_value=100.0), min_size=1, max_size=12).map(
    lambda values: sorted(values, reverse=True)
)
shares = st.floats(min_value=0.01, max_value=0.999)
EXACT = [4.0, 2.0, 2.0, 1.0]  # squares 16 20 24 25 of 25, sums 4 6 8 9 of 9


def clear(values, goal, slack=1e-9):
    """Whether no running sum is so near the goal that rounding, or our slack of 1e-12, decides."""
    sums = list(itertools.accumulate(values))
    return all(abs(total / sums[-1] - goal) > slack for total in sums)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(spectra, shares)
def test_energy_is_florists_threshold_and_frobenius_kohyas_sv_fro(S, t):
    if clear([s * s for s in S], t):
        assert chosen(S, fk.Energy(t)) == florist(S, t)
    if clear([s * s for s in S], t * t):
        assert chosen(S, fk.Frobenius(t)) == kohya_sv_fro(S, t) == florist(S, t * t) == chosen(S, fk.Energy(t * t))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(spectra, shares)
def test_singular_value_sum_is_kohyas_sv_cumulative(S, t):
    if clear(S, t):
        assert chosen(S, fk.SingularValueSum(t)) == kohya_sv_cumulative(S, t)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(spectra, st.sampled_from([1.0, 2.0, 4.0, 1.5, 3.0, 10.0]))
@example(EXACT, 2.0)
@example([3.0, 3.0, 1.0], 1.0)
def test_singular_value_ratio_is_kohyas_sv_ratio(S, x):
    nearest = min(abs(s * x / S[0] - 1.0) for s in S)
    if nearest > 1e-12 or x in (1.0, 2.0, 4.0):  # powers of two divide exactly
        assert chosen(S, fk.SingularValueRatio(x)) == kohya_sv_ratio(S, x)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(spectra, st.floats(min_value=1.001, max_value=100.0))
def test_singular_value_ratio_is_spn_lora_but_for_ties(S, x):
    if min(abs(s * x / S[0] - 1.0) for s in S) > 1e-9:
        assert chosen(S, fk.SingularValueRatio(x)) == spn_lora(S, -math.log10(x))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(spectra, st.floats(min_value=0.0, max_value=150.0), st.integers(1, 14))
@example(EXACT, 2.0, 4)
@example(EXACT, 0.0, 9)
def test_absolute_is_mergekits_epsilon_and_rank_its_max_rank(S, e, k):
    assert chosen(S, fk.Absolute(e)) == mergekit(S, e)
    assert chosen(S, fk.Absolute(e).capped(k)) == mergekit(S, e, k)
    assert chosen(S, fk.Rank(k)) == mergekit(S, 0.0, k) == min(k, len(S))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(spectra, shares, st.integers(1, 14))
def test_a_cap_is_kohyas_new_rank_beside_a_dynamic_method(S, t, k):
    if clear([s * s for s in S], t * t):
        assert chosen(S, fk.Frobenius(t).capped(k)) == min(kohya_sv_fro(S, t), k)


def exact_pair(S, scale=2.0, seed=0):
    """A pair whose update has exactly these singular values: single numbers in rows and columns of their own."""
    made = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(M, generator=made)[: len(S)], torch.randperm(N, generator=made)[: len(S)]
    B, A = torch.zeros(M, len(S), dtype=torch.float64), torch.zeros(len(S), N, dtype=torch.float64)
    for i, s in enumerate(S):
        B[rows[i], i], A[i, columns[i]] = s / scale, 1.0
    state = {f"{PREFIX}q_proj.lora_A.weight": A, f"{PREFIX}q_proj.lora_B.weight": B}
    return state, config(len(S), scale * len(S), target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (fk.Energy(16 / 25), florist(EXACT, Fraction(16, 25))),  # an exact hit counts
        (fk.Energy(0.8), florist(EXACT, Fraction(4, 5))),
        (fk.Energy(0.96), florist(EXACT, Fraction(24, 25))),
        (fk.Energy(0.961), 4),
        (fk.Energy(1.0), florist(EXACT, 1)),
        (fk.Frobenius(0.8), kohya_sv_fro(EXACT, Fraction(4, 5))),
        (fk.Frobenius(1.0), kohya_sv_fro(EXACT, 1)),
        (fk.SingularValueSum(4 / 9), kohya_sv_cumulative(EXACT, Fraction(4, 9))),
        (fk.SingularValueSum(2 / 3), kohya_sv_cumulative(EXACT, Fraction(2, 3))),
        (fk.SingularValueSum(8 / 9), kohya_sv_cumulative(EXACT, Fraction(8, 9))),
        (fk.SingularValueSum(1.0), kohya_sv_cumulative(EXACT, 1)),
        (fk.SingularValueRatio(1.0), kohya_sv_ratio(EXACT, 1)),
        (fk.SingularValueRatio(2.0), kohya_sv_ratio(EXACT, 2)),  # the ties with s_1 / 2 are dropped
        (fk.SingularValueRatio(2.001), 3),
        (fk.SingularValueRatio(4.0), kohya_sv_ratio(EXACT, 4)),
        (fk.Absolute(2.0), mergekit(EXACT, 2.0)),
        (fk.Absolute(1.999), 3),
        (fk.Absolute(0.0), mergekit(EXACT)),
        (fk.Rank(3), mergekit(EXACT, 0.0, 3)),
        (fk.Rank(99), mergekit(EXACT, 0.0, 99)),
        (fk.Energy(1.0).capped(2), min(kohya_sv_fro(EXACT, 1), 2)),
    ],
    ids=str,
)
def test_boundaries_as_a_user_meets_them(rule, theirs):
    result = fk.resize(exact_pair(EXACT), rule=rule)
    assert result.report["modules"][0]["rank"] == theirs
    full = fk.resize(exact_pair(EXACT), rule=fk.Energy(1.0))
    assert full.at(rule).report["modules"][0]["rank"] == theirs


def test_the_pinned_ranks_are_the_intended_ones():
    """The functions above could be wrong in the same way as the rules: by hand."""
    assert [florist(EXACT, Fraction(k, 25)) for k in (16, 17, 20, 21, 24, 25)] == [1, 2, 2, 3, 3, 4]
    assert [kohya_sv_cumulative(EXACT, Fraction(k, 9)) for k in (4, 5, 6, 7, 8, 9)] == [1, 2, 2, 3, 3, 4]
    assert [kohya_sv_ratio(EXACT, x) for x in (1, 2, 3, 4, 5)] == [1, 1, 3, 3, 4]
    assert [mergekit(EXACT, e) for e in (0, 1, 2, 3.9, 4)] == [4, 3, 1, 1, 0]
    assert [spn_lora(EXACT, -math.log10(x)) for x in (1, 3, 5)] == [1, 3, 4]


@pytest.mark.parametrize(("f", "ours", "older"), [(0.5, 1, 2), (0.79, 1, 2), (0.9, 3, 3), (0.97, 3, 3), (1.0, 4, 3)])
def test_where_older_scripts_differ(f, ours, older):
    """One rank more, and never all of them: what a user who compares will find."""
    assert chosen(EXACT, fk.Frobenius(f)) == ours
    assert kohya_older(EXACT, f) == older


def test_budget_keeps_what_a_threshold_of_the_same_size_keeps():
    """A size target elsewhere is a threshold on all scores at once, the lowest one whose components fit."""
    made = np.random.default_rng(0)
    shapes = {"a.q_proj": (31, 17), "b.q_proj": (13, 29), "c.q_proj": (23, 23), "d.q_proj": (7, 41)}
    state = {}
    for name, (m, n) in shapes.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = torch.from_numpy(made.standard_normal((6, n)))
        state[f"{PREFIX}{name}.lora_B.weight"] = torch.from_numpy(made.standard_normal((m, 6)) * 0.7 ** np.arange(6))
    pair = state, config(6, 12, target_modules=["q_proj"])
    full = fk.resize(pair, rule=fk.Energy(1.0)).report["modules"]
    scores = {row["name"]: [s * s / (row["m"] + row["n"]) for s in row["singular_values"]] for row in full}
    for size in (4000, 5000, 7000, 9000):
        fitting = []
        for threshold in sorted(itertools.chain(*scores.values()), reverse=True):
            ranks = {name: max(1, sum(score >= threshold for score in own)) for name, own in scores.items()}
            if sum(8 * rank * sum(shapes[name]) for name, rank in ranks.items()) <= size:
                fitting.append(ranks)
        result = fk.resize(pair, rule=fk.Budget(size))
        found = {row["name"]: row["rank"] for row in result.report["modules"]}
        assert all(found[name] >= rank for name, rank in fitting[-1].items())
        assert result.report["totals"]["bytes"] <= size
        # less than the dearest component is left
        assert size - result.report["totals"]["bytes"] < 8 * max(map(sum, shapes.values()))


def test_units_of_sizes():
    assert fk.Budget("10MB").nbytes == 10**7
    assert fk.Budget("10MiB").nbytes == 10 * 2**20


@pytest.fixture(scope="module")
def peft_model():
    """A small model with a trained LoRA, and the same adapter as a pair for us."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(0)
    base = torch.nn.ModuleDict(
        {"q_proj": torch.nn.Linear(N, M, bias=False), "o_proj": torch.nn.Linear(M, 11, bias=False)}
    )
    settings = LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "o_proj"])
    model = get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            decay = 0.6 ** torch.arange(6.0)
            parameter.data = torch.randn(parameter.shape) * (decay if "lora_B" in name else decay[:, None])
    return model, (get_peft_model_state_dict(model), settings.to_dict())


@pytest.mark.parametrize("rank", [1, 3, 6, 0.5, 0.9, 0.95, 0.99, 0.999])
def test_energy_and_rank_are_pefts_convert_to_lora(peft_model, rank):
    from peft import convert_to_lora

    model, pair = peft_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a LoRA already
        settings, state = convert_to_lora(model, rank=rank)
    rule = fk.Rank(rank) if isinstance(rank, int) else fk.Energy(rank)
    result = fk.resize(pair, rule=rule)
    theirs = fk.open_adapter((state, settings.to_dict()))
    assert {name: spec.rank for name, spec in theirs.modules.items()} == {
        row["name"]: row["rank"] for row in result.report["modules"]
    }
    found, wanted = products(result.adapter), products(theirs)
    for name in wanted:
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < 1e-5
    if isinstance(rank, float):
        root = fk.resize(pair, rule=fk.Frobenius(math.sqrt(rank))).report["modules"]
        assert [row["rank"] for row in root] == [row["rank"] for row in result.report["modules"]]
