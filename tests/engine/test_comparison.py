"""What a report says of clients beside each other: every figure against dense float64 updates."""

import math

import pytest
import torch
from adapter_problems import FIRST, SHAPES, changed, client, clients, updates, without

import fedlora_kernels as fk
from fedlora_kernels.engine import comparison
from fedlora_kernels.engine.comparison import effective_rank, stable_rank

WEIGHTS = [120.0, 80.0, 200.0]


def compared(pairs, method="fedit", **options):
    return fk.aggregate(pairs, method, compare=True, **options).report["comparison"]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm())) if a.norm() and b.norm() else 0.0


def expected(vectors, weights):
    """The figures of one module, or of the whole model, from flat dense updates."""
    total = sum(w * v for w, v in zip(weights, vectors, strict=True))
    rests = [total - w * v for w, v in zip(weights, vectors, strict=True)]
    terms = [abs(w) * float(v.norm()) for w, v in zip(weights, vectors, strict=True)]
    return {
        "norm": float(total.norm()),
        "norms": [float(v.norm()) for v in vectors],
        "with_sum": [cosine(v, total) for v in vectors],
        "with_rest": [cosine(v, rest) for v, rest in zip(vectors, rests, strict=True)],
        "without": [float(rest.norm()) for rest in rests],
        "cancellation": float(total.norm()) ** 2 / sum(terms) ** 2,
        "orthogonal": sum(t * t for t in terms) / sum(terms) ** 2,
        "cosines": [[cosine(a, b) for b in vectors] for a in vectors],
    }


def require(found, wanted):
    for name, value in wanted.items():
        got = torch.tensor(found[name], dtype=torch.float64)
        assert torch.allclose(got, torch.tensor(value, dtype=torch.float64), rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize(
    ("weights", "normalize"), [(WEIGHTS, True), ([0.5, -1.25, 2.0], False)], ids=["normalised", "negative"]
)
def test_every_figure_is_that_of_the_dense_updates(weights, normalize):
    pairs = clients()
    found = compared(pairs, "florist", weights=weights, normalize=normalize)
    shares = [w / sum(weights) if normalize else w for w in weights]
    dense = [updates(pair) for pair in pairs]
    assert list(found["modules"]) == list(dense[0])
    for name, module in found["modules"].items():
        require(module, expected([d[name].flatten() for d in dense], shares))
        values = torch.linalg.svdvals(sum(w * d[name] for w, d in zip(shares, dense, strict=True)))
        assert module["singular_values"] == pytest.approx(values[: len(module["singular_values"])].tolist(), rel=1e-9)
        assert len(module["singular_values"]) == min(*SHAPES[name], 11)
        energy = values.square() / values.square().sum()
        entropy = -(energy[energy > 1e-20] * energy[energy > 1e-20].log()).sum()
        assert module["effective_rank"] == pytest.approx(float(entropy.exp()), rel=1e-9)
        assert module["stable_rank"] == pytest.approx(float(1 / energy[0]), rel=1e-9)
    require(found, expected([torch.cat([d[name].flatten() for name in SHAPES]) for d in dense], shares))
    assert found["near_twins"] == []


def test_drift_is_the_distance_of_factor_means_from_the_sum():
    pairs = clients((3, 3, 3))
    found = compared(pairs, weights=WEIGHTS)
    shares = [w / sum(WEIGHTS) for w in WEIGHTS]
    missed, energy = 0.0, 0.0
    for name, module in found["modules"].items():
        total = sum(w * updates(pair)[name] for w, pair in zip(shares, pairs, strict=True))
        key = f"base_model.model.{name}.lora_"
        B = sum(
            w * (8 + k) / 3 * pair[0][f"{key}B.weight"].double()
            for k, (w, pair) in enumerate(zip(shares, pairs, strict=True))
        )
        A = sum(w * pair[0][f"{key}A.weight"].double() for w, pair in zip(shares, pairs, strict=True))
        gap = float((total - B @ A).norm())
        assert module["drift"] == pytest.approx(gap / float(total.norm()), rel=1e-9)
        missed, energy = missed + gap**2, energy + float(total.norm()) ** 2
    assert found["drift"] == pytest.approx(math.sqrt(missed / energy), rel=1e-9)
    # what fedit itself reports as its error, in float32
    assert [m["error"] for m in fk.aggregate(pairs, "fedit", weights=WEIGHTS).report["modules"]] == pytest.approx(
        [module["drift"] for module in found["modules"].values()], rel=1e-5
    )


def test_without_being_asked_there_is_no_comparison():
    assert fk.aggregate(clients()).report["comparison"] is None


@pytest.mark.parametrize("method", ["zero_pad", "clair", "flora", "geometric_median"])
def test_the_method_changes_nothing_of_it(method):
    """Where it neither drops clients nor scales them."""
    pairs = clients((4, 2, 5, 3, 3))
    found, plain = compared(pairs, method), compared(pairs, "florist")
    for name in ("norms", "cosines"):
        kept = [plain["clients"].index(client) for client in found["clients"]]
        wanted = torch.tensor(plain[name])[kept] if name == "norms" else torch.tensor(plain[name])[kept][:, kept]
        assert torch.allclose(torch.tensor(found[name]), wanted)


def test_a_client_and_its_negative_cancel_and_no_cosine_is_made_of_rounding():
    state, settings = client(seed=1)
    opposite = ({key: -x if ".lora_B." in key else x for key, x in state.items()}, settings)
    found = compared([(state, settings), opposite])
    assert found["cosines"] == [[pytest.approx(1.0), pytest.approx(-1.0)], [pytest.approx(-1.0), pytest.approx(1.0)]]
    assert found["cancellation"] == pytest.approx(0.0, abs=1e-13)
    assert found["with_sum"] == [0.0, 0.0]
    assert found["with_rest"] == pytest.approx([-1.0, -1.0])
    # the same from other factors: what is left of the sum is rounding, and has no direction
    wide = {key: x.double() for key, x in state.items()}
    gauge = {key: x * -0.1 if ".lora_B." in key else x / 0.1 for key, x in wide.items()}
    found = compared([(wide, settings), (gauge, settings)])
    assert found["norm"] > 0.0
    assert found["with_sum"] == [0.0, 0.0]
    beside = compared([(wide, settings), (gauge, settings), client(seed=2, dtype=torch.float64)])
    assert (beside["with_rest"][2], beside["without"][2]) == (0.0, 0.0)
    third = compared([(state, settings), opposite, client(seed=2)])
    assert third["orthogonal"] == pytest.approx(1 / 3, rel=0.3)


def test_zero_updates_have_cosine_zero_and_a_gauge_is_a_twin():
    state, settings = client(seed=1)
    zero = ({key: 0.0 * x if ".lora_B." in key else x for key, x in state.items()}, settings)
    gauge = ({key: x * (4.0 if ".lora_B." in key else 0.25) for key, x in state.items()}, settings)
    found = compared([(state, settings), zero, gauge])
    assert found["norms"][1] == 0.0
    assert found["cosines"][1] == [0.0, 0.0, 0.0]
    assert found["cosines"][0] == pytest.approx([1.0, 0.0, 1.0])
    assert found["near_twins"] == [["client_0", "client_2"]]
    alone = compared([zero, zero])
    assert (alone["cancellation"], alone["norm"], alone["near_twins"]) == (None, 0.0, [])
    assert alone["modules"][FIRST]["singular_values"] == []


def test_a_missing_module_counts_as_the_engine_counts_it():
    pairs = clients((3, 3, 3))
    pairs[1] = without(pairs[1], FIRST)
    dense = [updates(pair) for pair in pairs]
    for missing, shares in (("zero", [1 / 3, 0.0, 1 / 3]), ("renormalize", [0.5, 0.0, 0.5])):
        module = compared(pairs, "florist", read=fk.ReadOptions(missing=missing))["modules"][FIRST]
        total = sum(w * dense[k][FIRST] for k, w in enumerate(shares) if w)
        assert module["norm"] == pytest.approx(float(total.norm()), rel=1e-9)
        assert module["norms"][1] == 0.0


def test_clipped_clients_are_compared_as_they_count():
    pairs = clients()
    plain = compared(pairs, "florist")["norms"]
    bound = sorted(plain)[1]
    report = fk.aggregate(pairs, compare=True, policy=fk.Policy("clip", max_update_norm=bound)).report
    assert report["comparison"]["norms"] == pytest.approx([min(norm, bound) for norm in plain], rel=1e-9)
    assert [row["norm"] for row in report["clients"]] == pytest.approx(plain, rel=1e-9)


def test_a_dropped_client_is_not_compared():
    pairs = clients()
    pairs[1] = changed(pairs[1], "B", lambda x: x.fill_(math.nan))
    with pytest.warns(UserWarning, match="client_1"):
        found = compared(pairs, "florist", policy="drop")
    assert found["clients"] == ["client_0", "client_2"]


def test_a_half_precision_answer_leaves_the_figures_as_they_are():
    big = clients(dtype=torch.float64)
    loud = [({key: 300.0 * x for key, x in state.items()}, settings) for state, settings in big]
    found = compared(loud, "florist", dtype="bfloat16")
    plain = compared(loud, "florist")["modules"]
    for name, module in found["modules"].items():
        assert module["singular_values"] == pytest.approx(plain[name]["singular_values"], rel=1e-12)
    norm = [float(torch.cat([u.flatten() for u in updates(pair).values()]).norm()) for pair in loud]
    assert found["norms"] == pytest.approx(norm, rel=1e-12)


def test_many_clients_make_no_matrix(monkeypatch):
    monkeypatch.setattr(comparison, "MODULE_CLIENTS", 2)
    found = compared(clients(), "florist")
    assert found["modules"][FIRST]["cosines"] is None
    assert len(found["cosines"]) == 3
    monkeypatch.setattr(comparison, "MODEL_CLIENTS", 2)
    found = compared(clients(), "florist")
    assert found["cosines"] is None
    assert len(found["with_sum"]) == 3


@pytest.mark.parametrize(
    ("values", "effective", "stable"),
    [([2.0, 2.0, 2.0], 3.0, 3.0), ([5.0, 0.0], 1.0, 1.0), ([2e200, 2e200], 2.0, 2.0), ([1e-200], 1.0, 1.0), ([0.0], 0.0, 0.0),
     ([], 0.0, 0.0)],
)  # fmt: skip
def test_effective_and_stable_rank(values, effective, stable):
    S = torch.tensor(values, dtype=torch.float64)
    assert effective_rank(S) == pytest.approx(effective)
    assert stable_rank(S) == pytest.approx(stable)
