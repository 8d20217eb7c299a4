"""The registry of methods: names, options, errors."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import numpy as np
import pytest

import fedlora_kernels.methods
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods import contract
from fedlora_kernels.methods.contract import Method, make_method, method_class, method_names, register

OURS = ["florist", "fedit", "zero_pad", "flora", "hetlora"]


def test_importing_the_package_registers_its_methods():
    assert set(OURS) <= set(method_names())
    assert fedlora_kernels.methods.florist.Florist is method_class("florist")


@pytest.mark.parametrize("name", OURS)
def test_every_method_describes_itself(name):
    cls = method_class(name)
    assert cls.name == name
    assert all((cls.summary, cls.exact, cls.broadcast, cls.download))
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'florst'.*florist.*zero_pad"):
        method_class("florst")


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'florist'.*'tau'.*rule, output"):
        make_method("florist", {"tau": 0.9})
    with pytest.raises(InputError, match="known options: none"):
        make_method("fedit", {"tau": 0.9})


@pytest.mark.parametrize("name", ["fedit", "zero_pad", "flora", "hetlora"])
def test_a_rule_is_refused_where_the_rank_is_no_choice(name):
    with pytest.raises(InputError, match="rule"):
        make_method(name, {}, Energy(0.9))


@pytest.mark.parametrize("name", sorted(set(method_names()) - {"krum", "multi_krum"}))
def test_numbers_of_numpy_are_as_good_as_plain_ones(name):
    """They reach the methods, and the report, which is JSON, as int and float."""
    kinds = {int: np.int64, float: np.float32}
    defaults = {f.name: f.default for f in dataclasses.fields(method_class(name))}
    given = {option: kinds[type(x)](x) for option, x in defaults.items() if type(x) in kinds}
    made = make_method(name, given)
    json.dumps({**made.options(), "rule": None})
    assert all(type(getattr(made, option)) is type(defaults[option]) for option in given)


def test_numbers_of_numpy_given_to_the_class_are_plain_in_the_report():
    made = method_class("clair")(gap_min=np.float32(0.25), shared_rank=np.int64(2))
    assert json.loads(json.dumps(made.options()))["gap_min"] == 0.25


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setattr(contract, "_REGISTRY", dict(contract._REGISTRY))

    @register
    @dataclass(frozen=True)
    class Mine(Method):
        name: ClassVar[str] = "mine"
        strength: float = 2.0

    assert make_method("mine", {"strength": 3.0}).options() == {"strength": 3.0}
    with pytest.raises(ValueError, match="'mine'"):
        register(Mine)


def test_a_broken_package_of_methods_is_named_and_harms_no_other_name(monkeypatch):
    broken = EntryPoint("theirs", "no_such_package.methods", contract.ENTRY_POINT_GROUP)

    def found(group, name=None):
        assert group == contract.ENTRY_POINT_GROUP
        return [broken] if name in (None, "theirs") else []

    monkeypatch.setattr(contract, "entry_points", found)
    assert "theirs" in method_names()
    with pytest.raises(InputError, match="'theirs' of an unknown package cannot be loaded from no_such_package"):
        method_class("theirs")
    with pytest.raises(InputError, match=r"unknown method 'thiers'; known methods: .*theirs"):
        method_class("thiers")
