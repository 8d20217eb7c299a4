"""Policy: what is accepted, and that a name is enough."""

import pytest

from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.errors import InputError


def test_a_string_means_the_kind():
    assert Policy.of("drop") == Policy("drop")
    assert Policy.of(Policy("clip", "median")).max_update_norm == "median"
    for bad in (None, 3, ["drop"]):
        with pytest.raises(InputError, match="a name or Policy"):
            Policy.of(bad)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "lenient"}, "kind is 'lenient'; strict, drop or clip needed"),
        ({"max_update_norm": 0}, "max_update_norm is '0'; a positive number or 'median' needed"),
        ({"max_update_norm": -1.0}, "max_update_norm"),
        ({"max_update_norm": float("nan")}, "max_update_norm"),
        ({"max_update_norm": float("inf")}, "max_update_norm"),
        ({"max_update_norm": "mean"}, "max_update_norm"),
        ({"max_update_norm": True}, "max_update_norm"),
        ({"per": "layer"}, "per is 'layer'; model or module needed"),
        ({"min_clients": 0}, "min_clients is '0'; an integer of at least 1 needed"),
        ({"min_clients": 1.5}, "min_clients"),
        ({"min_weight": -0.1}, "min_weight is '-0.1'; a number from 0 to 1 needed"),
        ({"min_weight": 1.1}, "min_weight"),
        ({"min_weight": float("nan")}, "min_weight"),
        ({"min_weight": "half"}, "min_weight"),
    ],
)
def test_fields_are_checked_on_creation(fields, text):
    with pytest.raises(InputError, match=text):
        Policy(**fields)


def test_the_edges_are_accepted():
    Policy("clip", 1e-300, "module", 1, 0)
    Policy("drop", None, "model", 10**6, 1)
