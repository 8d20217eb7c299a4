"""fedlora validate: what it runs, how it reports, and that no wrong answer of any kernel passes it."""

import functools
import itertools
import json
import math

import pytest
import torch

from fedlora_kernels import backends, validate
from fedlora_kernels.backends.contract import OPS
from fedlora_kernels.cli import main
from fedlora_kernels.errors import BackendError, InputError

DTYPES = {"float64", "float32", "bfloat16", "float16"}


class Spoilt:
    """A backend with one operation whose answers go through a function."""

    def __init__(self, inner, op, spoil):
        self._inner, self._op, self._spoil = inner, op, spoil

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        return (lambda *args: self._spoil(found(*args))) if name == self._op else found


CALLS = validate.OPS


@functools.cache
def first_calls(op, form):
    """The first float64 calls that are no single numbers: enough to see an error. Kept, as are the exact answers in them."""
    wanted = (call for call in CALLS[op](form) if call.dtype == torch.float64 and max(call.sizes.values()) > 8)
    return list(itertools.islice(wanted, 3))


@pytest.fixture
def few(monkeypatch):
    """A few calls of each operation."""
    monkeypatch.setattr(validate, "OPS", {op: functools.partial(first_calls, op) for op in CALLS})


def spoil_backend(monkeypatch, op, spoil, name="torch"):
    real = backends.get
    monkeypatch.setattr(backends, "get", lambda asked: Spoilt(real(asked), op, spoil) if asked == name else real(asked))


def nudged(X, i=0):
    """Largest entry of matrix i a millionth larger."""
    X = X.clone()
    flat = X[i].view(-1) if X[i].is_contiguous() else None
    matrix = X[i].flatten() if flat is None else flat
    at = int(matrix.abs().argmax())
    matrix[at] *= 1 + 1e-6
    X[i] = matrix.view(X[i].shape)
    return X


def swapped(X, i=0):
    """First two columns of matrix i exchanged."""
    X = X.clone()
    X[i, :, [0, 1]] = X[i, :, [1, 0]]
    return X


def negated(X, i=0):
    """First column of matrix i with the other sign."""
    X = X.clone()
    X[i, :, 0] *= -1
    return X


def field(name, change, i=0, where=0):
    """The change, applied to one field of the records of an answer (``where`` of a tuple of them)."""

    def spoil(raws):
        out = []
        for raw in raws:
            record = raw[where] if where else raw
            changed = record._replace(**{name: change(getattr(record, name), i)})
            out.append((*raw[:where], changed, *raw[where + 1 :]) if where else changed)
        return out

    return spoil


def part(number, change, i=0):
    """The change, applied to one part of plain tuples."""
    return lambda raws: [(*raw[:number], change(raw[number], i), *raw[number + 1 :]) for raw in raws]


def both_signs(raws):
    return [raw._replace(U=negated(raw.U, 1), Vh=negated(raw.Vh.mT, 1).mT) for raw in raws]


def both_rows(raws):
    return [raw._replace(left=negated(raw.left), right=negated(raw.right.mT).mT) for raw in raws]


def flipped_qr(raws):
    return [
        raw._replace(R=negated(raw.R.mT).mT, Q=None if raw.Q is None else negated(raw.Q))
        for raw in raws
    ]  # fmt: skip


def next_number(X, i):
    X = X.clone()
    X[i] = torch.nextafter(X[i], torch.tensor(math.inf, dtype=X.dtype))
    return X


def asymmetric(grams):
    out = [G.clone() for G in grams]
    for G in out:
        G[0, 0, 1] *= 1 + 1e-12
    return out


def is_nan(X, i):
    X = X.clone()
    X[i] = math.nan
    return X


def one_more(X, i):
    X = X.clone()
    X[i] += 1
    return X


SPOILS = [
    ("core_svd", "entry of U", field("U", nudged, 1)),
    ("core_svd", "entry of Vh", field("Vh", nudged, 1)),
    ("core_svd", "value", field("S", nudged, 1)),
    ("core_svd", "columns", field("U", swapped, 1)),
    ("core_svd", "one sign", field("U", negated, 1)),
    ("core_svd", "sign rule", both_signs),
    ("core_svd", "info", field("info", one_more, 1)),
    ("core_svd", "nan", field("S", is_nan, 1)),
    ("product_svd", "entry of left", field("left", nudged)),
    ("product_svd", "entry of right", field("right", nudged)),
    ("product_svd", "value", field("S", nudged)),
    ("product_svd", "columns", field("left", swapped)),
    ("product_svd", "one sign", field("left", negated)),
    ("product_svd", "sign rule", both_rows),
    ("product_svd", "energy", field("energy", nudged)),
    ("product_svd", "nan", field("left", is_nan)),
    ("stacked_qr", "entry of R", field("R", nudged)),
    ("stacked_qr", "columns", field("R", swapped)),
    ("stacked_qr", "sign", flipped_qr),
    ("stacked_qr", "rank", field("rank", one_more)),
    ("stacked_qr", "nan", field("R", is_nan)),
    ("select_rank", "count", lambda ranks: ranks + 1),
    ("update_gram", "entry", lambda grams: [nudged(G) for G in grams]),
    ("update_gram", "symmetry", asymmetric),
    ("update_gram", "nan", lambda grams: [is_nan(G, 0) for G in grams]),
    ("weighted_sum", "last bit", field("sum", next_number)),
    ("weighted_sum", "norm", field("norm", nudged)),
    ("weighted_sum", "nan", field("sum", is_nan)),
    ("mixed_sum", "entry", field("sum", nudged)),
    ("mixed_sum", "columns", field("sum", swapped)),
    ("mixed_sum", "norm", field("norm", nudged)),
    ("mixed_sum", "rounding", field("rounding", one_more)),
    ("procrustes_rotation", "entry", field("Q", nudged)),
    ("procrustes_rotation", "columns", field("Q", swapped)),
    ("procrustes_rotation", "sign", field("Q", negated)),
    ("procrustes_rotation", "values", field("singular_values", nudged)),
    ("procrustes_rotation", "nan", field("Q", is_nan)),
    ("rotate_factors", "entry of left", part(0, nudged)),
    ("rotate_factors", "entry of right", part(1, nudged)),
    ("rotate_factors", "columns", part(0, swapped)),
    ("rotate_factors", "sign", part(0, negated)),
    ("align_factors", "entry of left", part(0, nudged)),
    ("align_factors", "columns of right", part(1, lambda X, i: swapped(X.mT, i).mT)),
    ("align_factors", "rotation", field("Q", nudged, where=2)),
    ("align_factors", "sign of the rotation", field("Q", negated, where=2)),
    ("align_factors", "nan", part(0, is_nan)),
]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("op", "spoil"), [(op, spoil) for op, _, spoil in SPOILS], ids=[f"{s[0]}-{s[1]}" for s in SPOILS]
)
def test_no_wrong_answer_passes(monkeypatch, op, spoil):
    assert validate.run(ops=[op], backend="torch")["passed"]
    spoil_backend(monkeypatch, op, spoil)
    report = validate.run(ops=[op], backend="torch")
    assert not report["passed"]
    worst = max((row["worst"] for row in report["rows"]), key=lambda entry: entry["ratio"])
    assert worst["ratio"] > 1
    assert any(not row["passed"] and row["failed"] for row in report["rows"])


def test_every_operation_of_the_contract_is_validated_and_can_fail():
    assert set(validate.OPS) == set(OPS)
    assert {op for op, _, _ in SPOILS} == set(OPS)


@pytest.mark.usefixtures("few")
def test_a_failure_is_shown_and_ends_with_status_1(monkeypatch, capsys, tmp_path):
    spoil_backend(monkeypatch, "core_svd", field("U", nudged, 1))
    target = tmp_path / "report.json"
    assert main(["validate", "--op", "core_svd", "--json", str(target)]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "FAILED" in captured.out
    (last,) = captured.out.splitlines()[-1:]
    assert last.startswith("FAILED: ")
    report = json.loads(target.read_text())
    assert not report["passed"]
    failed = {row["backend"] for row in report["rows"] if not row["passed"]}
    assert failed == {"torch"}


@pytest.mark.usefixtures("few")
def test_a_crash_is_a_failure_that_names_it(monkeypatch, capsys):
    def crash(_):
        raise OSError("symbol not found")

    spoil_backend(monkeypatch, "update_gram", crash)
    assert main(["validate", "--backend", "torch", "--op", "update_gram"]) == 1
    assert "OSError: symbol not found" in capsys.readouterr().out


@pytest.fixture(scope="module")
def quick():
    """One report of the quick form on cheap operations, all backends."""
    return validate.run(ops=["stacked_qr", "weighted_sum", "mixed_sum"])


def test_everything_here_passes(quick):
    assert quick["passed"]
    assert quick["cases"] == sum(row["cases"] for row in quick["rows"])
    for row in quick["rows"]:
        assert row["failed"] == 0
        assert row["worst"]["error"] <= row["worst"]["limit"]
        assert row["worst"] in row["metrics"].values()


def test_each_backend_has_every_dtype_and_regime_or_a_reason(quick):
    on = [name for name, (available, _) in backends.status().items() if available]
    for op in quick["operations"]:
        asked = {(row["regime"], row["dtype"]) for row in quick["rows"] if row["op"] == op}
        assert {dtype for _, dtype in asked} == DTYPES
        for name in on:
            found = {
                (row["regime"], row["dtype"]) for row in quick["rows"] if (row["backend"], row["op"]) == (name, op)
            }
            refused = [entry for entry in quick["unserved"] if (entry["backend"], entry["op"]) == (name, op)]
            assert found | {(entry["regime"], entry["dtype"]) for entry in refused} == asked
            assert all(entry["reason"] and entry["cases"] for entry in refused)


def test_the_report_says_on_what_it_was_made(quick):
    assert quick["packages"]["torch"]
    assert quick["processor"]["cores"] >= 1
    assert quick["form"] == "quick"
    assert quick["seed"] == 0
    assert {entry["name"] for entry in quick["backends"]} == set(backends.names())
    assert all("reason" in entry and entry["cases"] for entry in quick["left_out"])


@pytest.mark.usefixtures("few")
def test_routes_of_a_product_are_told_by_its_certificate():
    rows = validate.run(ops=["product_svd"], backend="torch")["rows"]
    assert {"one pass", "two passes"} <= {row["regime"].split(",")[0] for row in rows}
    assert {row["variant"] for row in rows} == {"usv", "left", "balanced"}


@pytest.mark.usefixtures("few")
def test_a_backend_that_is_off_is_listed_with_its_reason(monkeypatch, capsys):
    status = {**backends.status(), "cpu": (False, "not built: no compiler")}
    monkeypatch.setattr(backends, "status", lambda: status)
    assert main(["validate", "--op", "select_rank"]) == 0
    out = capsys.readouterr().out
    assert "not built: no compiler" in out
    assert "Backend cpu" not in out
    assert "passed: " in out.splitlines()[-1]


@pytest.mark.usefixtures("few")
def test_another_seed_makes_other_cases():
    first, again, other = (validate.run(ops=["mixed_sum"], backend="torch", seed=seed)["rows"] for seed in (0, 0, 5))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--op", "svd"], ["unknown operation 'svd'", "core_svd"]),
        (["--backend", "bogus"], ["unknown backend 'bogus'"]),
        (["--json", "report.txt"], ["--json report.txt", ".json"]),
        (["--json", "no/such/folder/report.json"], ["no folder"]),
        (["--seed", "-1"], ["--seed"]),
        (["--quick", "--full"], ["not allowed with"]),
        (["--every"], ["--every"]),
    ],
)
def test_wrong_arguments_are_one_line(capsys, argv, named):
    assert main(["validate", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(text in err for text in named)


def test_unknown_operations_and_backends_raise():
    with pytest.raises(InputError, match="known operations: core_svd"):
        validate.run(ops=["svd"])
    with pytest.raises(InputError, match="unknown backend"):
        validate.run(backend="bogus")


@pytest.mark.usefixtures("few")
def test_a_named_backend_that_serves_nothing_does_not_pass(monkeypatch, capsys):
    class Refusing(Spoilt):
        def serves(self, *_):
            return False, "not today"

    real = backends.get
    monkeypatch.setattr(backends, "get", lambda name: Refusing(real(name), "", None))
    with pytest.raises(BackendError, match="core_svd: not today"):
        validate.run(ops=["core_svd"], backend="torch")
    assert main(["validate", "--op", "core_svd", "--backend", "torch"]) == 1
    assert "not today" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_is_validated_beside_the_cpu():
    report = validate.run(ops=["core_svd", "product_svd"], backend="torch")
    assert {row["device"] for row in report["rows"]} == {"cpu", "cuda"}
    assert report["passed"]
