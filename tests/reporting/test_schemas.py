"""Every report that is written satisfies its published schema, and the schemas leave no room for anything else."""

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from adapter_problems import FIRST, SHAPES, changed, client, clients, without
from jsonschema import Draft202012Validator
from make_adapters import make_adapter, make_clients, poison

import fedlora_kernels as fk
from fedlora_kernels.cli import main
from fedlora_kernels.errors import InputError
from fedlora_kernels.inspection import inspect_adapters
from fedlora_kernels.methods.contract import method_class, method_names
from fedlora_kernels.reporting import schema
from fedlora_kernels.reporting.json import plain
from fedlora_kernels.reporting.schemas import REPORTS

OPTIONS = {"krum": {"f": 1}, "multi_krum": {"f": 1}}
POLICIES = ("strict", "drop", "clip")


def refuse(constant):
    raise AssertionError(f"{constant} in JSON")


def require(name, report):
    """The report as it is written satisfies the schema of that name."""
    content = json.loads(json.dumps(report, allow_nan=False), parse_constant=refuse)
    errors = sorted(Draft202012Validator(schema(name)).iter_errors(content), key=lambda error: list(error.path))
    assert not errors, [f"{list(error.path)}: {error.message[:300]}" for error in errors[:5]]


def of_one_A(count=5):
    """Clients that every method takes: one rank, one A."""
    made = [client(seed=k, rank=3, alpha=6 + k) for k in range(count)]
    first = made[0][0]
    return [({key: first[key] if ".lora_A." in key else x for key, x in state.items()}, c) for state, c in made]


@pytest.mark.parametrize("name", REPORTS)
def test_schemas_are_schemas_and_leave_no_object_open_by_accident(name):
    found = schema(name)
    Draft202012Validator.check_schema(found)
    assert found["properties"]["schema"]["const"] == 1
    free = []

    def walk(node, path):
        if isinstance(node, dict):
            if node.get("type") in ("object", ["object", "null"]) and node.get("additionalProperties") is None:
                free.append(path)
            for key, value in node.items():
                walk(value, f"{path}.{key}".lstrip("."))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                walk(value, f"{path}.{index}")

    walk(found, "")
    # what methods, rules and suites name themselves
    assert {path.rsplit(".", 1)[-1] for path in free} <= {"options", "decision", "case"}


def test_an_unknown_schema_is_named():
    with pytest.raises(InputError, match="aggregate, resize, inspect, validate, bench"):
        schema("../json")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", sorted(method_names()))
@pytest.mark.filterwarnings("ignore:.*was dropped|.*uses no weights|.*farther")
def test_reports_of_every_method_and_policy(method, policy):
    pairs = of_one_A(6)
    if policy != "strict":
        pairs[1] = changed(pairs[1], "B", lambda x: x.fill_(math.nan))
    options = {**OPTIONS.get(method, {}), "policy": policy, "compare": True}
    first = fk.aggregate(pairs, method, weights=[3, 1, 1, 1, 1, 2], **options)
    require("aggregate", first.report)
    if takes_round_1(method):
        require("aggregate", fk.aggregate(pairs, method, measure=False, previous=first, **options).report)


def takes_round_1(method):
    """Whether a second round can follow with clients of one A: those that freeze in turn hold B in common then."""
    cls = method_class(method)
    return cls.reads_previous is not None and cls.frozen != "alternating"


RULES = (fk.Rank(2), fk.Energy(1.0), fk.Frobenius(0.5), fk.SingularValueSum(0.5), fk.SingularValueRatio(2.0),
         fk.Absolute(0.1), fk.Energy(0.9).capped(2), fk.Budget(5000))  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_reports_of_every_rank_rule(rule):
    result = fk.aggregate(clients(), rule=rule)
    require("aggregate", result.report)
    if rule == fk.Energy(1.0):
        require("aggregate", result.at(fk.Energy(0.5)).report)
        require("aggregate", result.at(fk.Budget(5000)).report)


def zero_first(pairs):
    return [changed(pair, "B", torch.zeros_like) for pair in pairs]


def lacking(pairs):
    return [without(pairs[0], FIRST), *pairs[1:]]


CASES = {
    "dtype": (clients, {"dtype": "bfloat16"}),
    "float64": (lambda: clients(dtype=torch.float64), {}),
    "weights": (clients, {"weights": [1.0, -2.0, 0.5], "normalize": False}),
    "absent": (clients, {"weights": [1, 0, 1]}),
    "zero": (lambda: lacking(zero_first(clients())), {"read": fk.ReadOptions(missing="zero"), "compare": True}),
    "drop_zero": (lambda: zero_first(clients()), {"write": fk.WriteOptions(drop_zero=True), "compare": True}),
    "renormalize": (lambda: lacking(clients()), {"read": fk.ReadOptions(missing="renormalize"), "compare": True}),
    "alpha": (lambda: [client(1, alpha=0), client(2)], {"compare": True}),
    "uniform": (clients, {"write": fk.WriteOptions(uniform_rank=True, fill="random", output="balanced")}),
    "clip": (clients, {"policy": fk.Policy("clip", max_update_norm=0.5, per="module"), "compare": True}),
    "named": (lambda: {"a\x1b</script>": client(1), "b\ud800": client(2)}, {"compare": True}),
    "alone": (lambda: [client(1)], {"compare": True}),
    "robust": (lambda: clients((2, 3, 4, 2, 3)), {"robust": fk.Krum(f=1), "compare": True}),
    "matrix": (lambda: clients((2, 3, 4, 2, 3)), {"robust": fk.Krum(f=1, scope="matrix"), "compare": True}),
    "unbounded": (clients, {"robust": fk.NormClip(max_update_norm=math.inf)}),
    "twins": (lambda: [client(1), client(1), client(2)], {"robust": "geometric_median", "compare": True}),
    "reference": (clients, {"backend": "reference"}),
    "loud": (lambda: [client(1), changed(client(2), "B", lambda x: x.double() * 1e200)], {"method": "fedit"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_reports_of_every_option(case):
    make, options = CASES[case]
    options = dict(options)
    require("aggregate", fk.aggregate(make(), options.pop("method", "florist"), **options).report)


def test_extras_and_folders_of_clients(tmp_path):
    def biased(seed):
        state, settings = client(seed)
        state["base_model.model.score.weight"] = torch.ones(2, 3)
        return state, {**settings, "modules_to_save": ["score"]}

    out = tmp_path / "out"
    report = fk.aggregate([biased(1), biased(2)], "clair", out=out, per_client=True).report
    assert report["extras"]
    assert report["clients"][0]["folder"]
    require("aggregate", report)
    require("aggregate", json.loads((out / "report.json").read_text(), parse_constant=refuse))


@pytest.mark.parametrize("change", [None, poison(), poison(value=math.inf)])
def test_inspections(tmp_path, change):
    paths = make_clients(tmp_path)
    paths.append(str(make_adapter(tmp_path / "x", change=change, shapes={**SHAPES, "extra": (5, 7)})))
    require("inspect", inspect_adapters(paths))
    require("inspect", inspect_adapters(paths[3:]))
    odd = make_adapter(tmp_path / "y", shapes={**SHAPES, FIRST: (11, 7)}, alpha=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require("inspect", inspect_adapters([*paths, str(odd)]))


def test_files_of_the_command_line(tmp_path, capsys):
    paths, files = make_clients(tmp_path), {name: str(tmp_path / f"{name}.json") for name in REPORTS}
    assert main(["aggregate", *paths, "-o", str(tmp_path / "out"), "--compare", "--report", files["aggregate"]]) == 0
    assert main(["resize", *paths, "-o", str(tmp_path / "several"), "--report", files["resize"]]) == 0
    assert main(["inspect", *paths, "--report", files["inspect"]]) == 0
    op = ["--op", "select_rank", "core_svd"]
    assert main(["validate", "--backend", "reference", *op, "--json", files["validate"]]) == 0
    assert main(["bench", "--quick", "small_svd", "--seconds", "0.001", "--json", files["bench"]]) in (0, 1)
    capsys.readouterr()
    for name, file in files.items():
        require(name, json.loads(Path(file).read_text(), parse_constant=refuse))
    assert json.loads(Path(files["aggregate"]).read_text())["comparison"] is not None
    require("resize", json.loads((tmp_path / "several" / "report.json").read_text(), parse_constant=refuse))


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("a new key", lambda r: r.update(more=1)),
        ("a new key of a module", lambda r: r["modules"][0].update(more=1)),
        ("a lost key", lambda r: r["totals"].pop("rank")),
        ("a text for a number", lambda r: r["modules"][0].update(energy="4")),
        ("another status", lambda r: r["clients"][0].update(status="fine")),
        ("a cosine above 1", lambda r: r["comparison"]["cosines"][0].__setitem__(0, 1.5)),
        ("another version", lambda r: r.update(schema=2)),
    ],
)
def test_what_drifts_is_caught(where, change):
    report = copy.deepcopy(plain(fk.aggregate(clients(), compare=True).report))
    require("aggregate", report)
    change(report)
    with pytest.raises(AssertionError):
        require("aggregate", report)
