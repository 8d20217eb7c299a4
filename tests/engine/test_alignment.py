"""Who points elsewhere than the others: named in the notes of any run, from exact inner products, and nobody by mistake."""

import itertools
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
from adapter_problems import FIRST, SHAPES, changed, client, clients, updates, without

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.cli import main
from fedlora_kernels.engine.alignment import Alignment, aloof, looked_at
from fedlora_kernels.engine.comparison import Comparison
from fedlora_kernels.inspection import inspect_adapters
from fedlora_kernels.methods.contract import method_class, method_names

ELSEWHERE = "its cosine with the sum of the others is"
LAYERS = {f"model.layers.{i}.self_attn.{name}_proj": (11, 17) for i in range(10) for name in ("q", "v")}


def agreeing(count, shapes=SHAPES, noise=0.3, **options):
    """Clients that agree but for noise; A is the same in all."""
    common, _ = client(100, shapes=shapes, **options)
    made = []
    for k in range(count):
        own, settings = client(k, shapes=shapes, **options)
        state = {key: common[key] + (noise * own[key] if ".lora_B." in key else 0.0) for key in own}
        made.append((state, settings))
    return made


def stranger(shapes=SHAPES, seed=50, **options):
    """A client that shares their A and nothing else."""
    common, settings = client(100, shapes=shapes, **options)
    own, _ = client(seed, shapes=shapes, **options)
    return {key: own[key] if ".lora_B." in key else common[key] for key in own}, settings


def combined(pairs, method="florist", **options):
    names = [f"c{k}" for k in range(len(pairs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fk.aggregate(dict(zip(names, pairs, strict=True)), method, **options)


def named(result):
    return [note for note in result.report["notes"] if ELSEWHERE in note]


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def expected(pairs, weights, names=SHAPES):
    """Cosine of each client with the others over the modules that it has, from dense float64 updates."""
    dense = [updates(pair) for pair in pairs]
    found = []
    for k, own in enumerate(dense):
        mine = [name for name in names if name in own]
        rest = [
            sum(w * d[n] for j, (w, d) in enumerate(zip(weights, dense, strict=True)) if j != k and n in d)
            for n in mine
        ]
        found.append(cosine(torch.cat([own[n].flatten() for n in mine]), torch.cat([r.flatten() for r in rest])))
    return found


METHODS = {
    name: {"f": 1} if "krum" in name else {}
    for name in method_names()
    if method_class(name).__module__.startswith("fedlora_kernels.")
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_the_client_that_points_elsewhere(method):
    pairs = agreeing(5)
    assert named(combined(pairs, method, **METHODS[method])) == []
    pairs.insert(2, stranger())
    (note,) = named(combined(pairs, method, **METHODS[method]))
    found = expected(pairs, [1 / 6] * 6)
    assert note == (
        f"client 'c2': {ELSEWHERE} {found[2]:.2g}, the median is {np.median(found):.2g}; another task, or bad data?"
    )


def test_a_comparison_an_inspection_and_a_plain_run_say_the_same(tmp_path):
    pairs = [*agreeing(4), stranger()]
    paths = []
    for k, pair in enumerate(pairs):
        fk.open_adapter(pair).save(tmp_path / f"c{k}")
        paths.append(str(tmp_path / f"c{k}"))
    (found,) = (text for text in inspect_adapters(paths)["findings"] if ELSEWHERE in text)
    assert named(combined(pairs)) == named(combined(pairs, compare=True)) == [f"client {found}"]


def test_what_is_noted_is_shown_where_the_run_was_asked_for(tmp_path, capsys):
    for k, pair in enumerate([*agreeing(3), stranger()]):
        fk.open_adapter(pair).save(tmp_path / f"c{k}")
    folders = [str(tmp_path / f"c{k}") for k in range(4)]
    assert main(["aggregate", *folders, "-o", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split("Notes")[1].split())
    assert shown.startswith(f"- client 'c3': {ELSEWHERE}")
    assert main(["aggregate", *folders[:3], "-o", str(tmp_path / "agreed")]) == 0
    assert "Notes" not in capsys.readouterr().out


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [5.0, 1.0, 2.0, 0.5]])
def test_clients_that_are_all_strangers_are_not_named(weights):
    """As under data that is not identically distributed: orthogonal to the others is no suspicion where all are."""
    for seed in range(5):
        pairs = [client(10 * seed + k) for k in range(4)]
        assert named(combined(pairs, weights=weights)) == []


def test_two_camps_of_equal_size_are_not_named_and_neither_is_one_of_two():
    left, right = agreeing(2), [stranger(seed=60), stranger(seed=60)]
    right[1] = changed(right[1], "B", lambda B: B + 0.1)
    assert named(combined([*left, *right])) == []
    assert named(combined([left[0], right[0]])) == []


def test_who_lacks_modules_is_compared_over_those_it_has():
    pairs = agreeing(5)
    for name in list(SHAPES)[1:]:
        pairs[1] = without(pairs[1], name)
    for missing in ("zero", "renormalize"):
        for compare in (False, True):
            result = combined(pairs, read=ReadOptions(missing=missing), compare=compare)
            assert named(result) == []
    found = Alignment("abcde", 4)
    result = [updates(pair) for pair in pairs]
    for name in SHAPES:
        vectors = [
            own[name].flatten() if name in own else torch.zeros(37 * 23 if "q" in name else 19 * 53) for own in result
        ]
        stacked = torch.stack([v.double() for v in vectors])
        found.add((stacked @ stacked.T).numpy(), np.full(5, 0.2))
    assert found.cosines == pytest.approx(expected(pairs, [0.2] * 5), rel=1e-10)
    # yet a module alone is enough to point elsewhere
    pairs[1] = changed(pairs[1], "B", lambda B: torch.randn(B.shape, generator=torch.Generator().manual_seed(7)))
    assert [note[:11] for note in named(combined(pairs, read=ReadOptions(missing="zero")))] == ["client 'c1'"]


def test_weights_of_any_sign_make_the_sum_of_the_others():
    pairs, weights = clients(), [0.5, -1.25, 2.0]
    found = Alignment("abc", 4)
    dense = [updates(pair) for pair in pairs]
    for name in SHAPES:
        stacked = torch.stack([own[name].flatten() for own in dense])
        found.add((stacked @ stacked.T).numpy(), np.array(weights))
    assert found.cosines == pytest.approx(expected(pairs, weights), rel=1e-10)
    assert found.norms == pytest.approx([float(torch.cat([d[n].flatten() for n in SHAPES]).norm()) for d in dense])


@pytest.mark.parametrize("factor", [1e3, 1e8, 1e12, 1e16, 1e30])
def test_a_client_that_makes_up_nearly_all_of_the_sum_is_compared_with_the_others_alone(factor):
    """And is not said to point elsewhere where it does not: what it is subtracted from has no digits of the others left."""
    made = torch.Generator().manual_seed(3)
    vectors = torch.randn(1, 40, generator=made) + 0.3 * torch.randn(5, 40, generator=made)
    vectors, weights = vectors.double().numpy(), np.array([0.5, 1.0, 2.0, 1.0, 0.5])
    vectors[3] *= factor
    found = Alignment("abcde", 1)
    found.add(vectors @ vectors.T, weights)
    compared = Comparison("abcde")
    compared.add("q", vectors @ vectors.T, weights)
    report = compared.report(["q"])
    rest = (np.where(np.arange(5) == 3, 0.0, weights) @ vectors).astype(float)
    true = vectors[3] @ rest / np.linalg.norm(vectors[3]) / np.linalg.norm(rest)
    assert true > 0.9
    for cosine, norm in (
        (found.cosines[3], None),
        *((x["with_rest"][3], x["without"][3]) for x in (report, report["modules"]["q"])),
    ):
        assert cosine == pytest.approx(true, rel=1e-9)
        assert norm is None or norm == pytest.approx(np.linalg.norm(rest), rel=1e-9)
    assert aloof(found) == {}


def test_zeros_and_what_rounding_hides_have_no_direction():
    found = Alignment("abcd", 1)
    a, b = np.eye(2)
    vectors = np.stack([a, -a, 0 * a, 1e-9 * b])
    found.add(vectors @ vectors.T, np.ones(4))
    assert found.cosines[:2] == pytest.approx([-1.0, -1.0])
    assert np.isnan(found.cosines[2])
    assert found.cosines[3] == 0.0  # the others cancel
    near = Alignment("abc", 1)  # and so do these, but for rounding
    near.add(np.array([[1.0, -1.0, 1e-9], [-1.0, 1.0 + 1e-14, 0.0], [1e-9, 0.0, 1e-18]]), np.ones(3))
    assert near.cosines[2] == 0.0
    found.add(np.full((4, 4), np.inf), np.ones(4))
    assert found.norms == pytest.approx([1.0, 1.0, 0.0, 1e-9])


def test_updates_beyond_float64_are_passed_over():
    pairs = [changed(pair, "B", lambda B: B.double() * 1e170) for pair in agreeing(3)]
    pairs.append(stranger())
    with np.errstate(all="raise"):
        (note,) = named(combined(pairs, "flora", dtype=torch.float64))
    assert "(in 3 of 4 modules)" in note


def test_means_without_their_distance_are_read_too_fast_to_be_looked_at(tmp_path):
    folders = []
    for k, pair in enumerate([*agreeing(4), stranger()]):
        fk.open_adapter(pair).save(tmp_path / f"c{k}")
        folders.append(tmp_path / f"c{k}")
    said = {}
    for method, measure in itertools.product(("fedit", "florist"), (True, False)):
        said[method, measure] = len(named(combined(folders, method, measure=measure, backend="cpu")))
    assert said == {("fedit", True): 1, ("fedit", False): 0, ("florist", True): 1, ("florist", False): 1}


def test_a_rule_that_needs_all_inner_products_names_whom_it_rejects():
    pairs = [*agreeing(5), stranger()]
    result = combined(pairs, robust=fk.Krum(f=1))
    assert sum(row["status"] == "rejected" for row in result.report["clients"]) == 5
    assert [note[:11] for note in named(result)] == ["client 'c5'"]
    assert [note[:11] for note in named(combined(pairs, policy=fk.Policy("clip", max_update_norm=1.0)))] == [
        "client 'c5'"
    ]


def test_clients_are_compared_as_they_are_clipped():
    pairs = [*agreeing(9), stranger()]
    pairs[9] = changed(pairs[9], "B", lambda B: 1e3 * B)
    options = {"robust": fk.MultiKrum(f=1, q=5)}
    assert named(combined(pairs, **options)) == []  # nobody agrees with a sum that it makes up alone
    assert [note[:11] for note in named(combined(pairs, policy="clip", **options))] == ["client 'c9'"]


def test_what_is_known_is_not_looked_at_again(monkeypatch):
    looked = []
    monkeypatch.setattr(Alignment, "add_group", lambda self, group, chosen: looked.append(len(chosen)))
    combined(agreeing(9), robust=fk.MultiKrum(f=1, q=5))
    combined(agreeing(5), compare=True)
    combined(agreeing(2))
    assert looked == []
    combined(agreeing(5))
    assert sum(looked) == len(SHAPES)


def test_a_client_far_larger_than_the_others_is_named_in_a_plain_run_too():
    pairs = agreeing(5)
    pairs[3] = ({key: value * (9.0 if ".lora_B." in key else 1.0) for key, value in pairs[3][0].items()}, pairs[3][1])
    text = "client 'c3': the norm of its update is"
    for options in ({}, {"policy": "drop"}, {"compare": True}):
        (note,) = (note for note in combined(pairs, **options).report["notes"] if "the norm of its update" in note)
        assert note.startswith(text)
    # of other modules, other norms
    assert not any(
        "the norm of its update" in note
        for note in combined([without(pairs[0], FIRST), *pairs[1:]], read=ReadOptions(missing="zero")).report["notes"]
    )


def test_factors_that_keep_their_initialisation_are_no_updates():
    pairs = [(state, {**settings, "init_lora_weights": "pissa"}) for state, settings in [*agreeing(4), stranger()]]
    for compare in (False, True):
        assert named(combined(pairs, "fedit", read=ReadOptions(init="keep"), compare=compare)) == []
    assert len(named(combined([*agreeing(4), stranger()], "fedit"))) == 1


def test_of_many_modules_some_are_looked_at_and_the_note_says_of_how_many(tmp_path):
    pairs = [*agreeing(4, LAYERS), stranger(LAYERS)]
    chosen = looked_at([[4] * 5] * len(LAYERS), list(LAYERS.values()))
    assert sum(chosen) == 8
    kept = [name for name, yes in zip(LAYERS, chosen, strict=True) if yes]
    assert {name.split(".")[-1] for name in kept} == {"q_proj", "v_proj"}
    (note,) = named(combined(pairs))
    found = expected(pairs, [0.2] * 5, kept)
    assert note.endswith(
        f"{ELSEWHERE} {found[4]:.2g}, the median is {np.median(found):.2g} (in 8 of 20 modules); another task, or bad data?"
    )
    (whole,) = named(combined(pairs, compare=True))
    assert "modules)" not in whole
    # which ones does not depend on how they are read
    assert named(combined(pairs, memory="64KiB")) == [note]


@pytest.mark.parametrize("kinds", range(1, 5))
def test_the_share_that_is_looked_at_misses_no_kind_of_projection_even_of_one_shape(kinds):
    for layers in (24, 32, 80):
        shapes = [(2048, 512), *[(512, 2048)] * kinds] * layers
        chosen = looked_at([[16] * 8] * len(shapes), shapes)
        assert {i % (kinds + 1) for i, yes in enumerate(chosen) if yes} == set(range(kinds + 1))
        assert sum(chosen) <= max(len(chosen) / 16, 8) + 3


def test_stacks_far_wider_than_the_matrix_are_not_looked_at():
    assert looked_at([[64] * 4, [64] * 5, [64] * 33], [(10, 11), (100, 90), (1056, 2000)]) == [True, False, True]
    assert looked_at([[64] * 34], [(1024, 2000)]) == [False]


def test_the_threshold_is_a_quarter_of_the_median_where_that_is_a_fifth():
    def says(*cosines):
        with patch.object(Alignment, "cosines", np.array(cosines)):
            return list(aloof(Alignment("abcd", 1)))

    assert says(0.8, 0.8, 0.8, 0.21) == []
    assert says(0.8, 0.8, 0.8, 0.19) == ["d"]
    assert says(0.2, 0.2, 0.2, 0.04) == ["d"]
    assert says(0.19, 0.19, 0.19, -0.9) == []
    assert says(0.8, 0.8, float("nan"), 0.1) == ["d"]
    assert says(0.8, float("nan"), float("nan"), 0.1) == []


@pytest.mark.parametrize("compare", [False, True])
def test_a_run_that_went_on_says_the_same(tmp_path, compare):
    pairs = [*agreeing(4, LAYERS), stranger(LAYERS)]
    folders = []
    for k, pair in enumerate(pairs):
        fk.open_adapter(pair).save(tmp_path / f"c{k}")
        folders.append(tmp_path / f"c{k}")

    class Stop(Exception):
        pass

    def progress(stage, done, total):
        if done > total / 2:
            raise Stop

    options = {"memory": "64KiB", "resume": True, "out": tmp_path / "out", "compare": compare}
    with pytest.raises(Stop):
        combined(folders, progress=progress, **options)
    result = combined(folders, **options)
    assert any("resumed: " in note for note in result.report["notes"])
    assert len(named(result)) == 1
    assert named(result) == named(combined(folders, compare=compare))
