"""Updates too small for float16 are said to be; what is zero, or only rounded, is not."""

import warnings

import pytest
import torch
from adapter_problems import FIRST, SHAPES, changed, client

import fedlora_kernels as fk
from fedlora_kernels.engine.underflow import underflows
from fedlora_kernels.methods.contract import method_class, method_names

METHODS = {
    name: {"f": 1} if "krum" in name else {}
    for name in method_names()
    if method_class(name).__module__.startswith("fedlora_kernels.")
}
BALANCED = ("fedmomentum", "raflora")
"""Both factors hold the root of the singular values."""


def trained(factor):
    """Five clients of one A whose B is ``factor`` times as large as usual."""
    _, settings = client(0)
    common, _ = client(100)
    states = [client(k)[0] for k in range(5)]
    return [
        ({key: factor * value if ".lora_B." in key else common[key] for key, value in state.items()}, settings)
        for state in states
    ]


def combined(pairs, method="florist", dtype=torch.float16, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fk.aggregate(pairs, method, dtype=dtype, **options)
    marked = [row["name"] for row in result.report["modules"] if "UNDERFLOW" in row["notes"]]
    return result, marked, [note for note in result.report["notes"] if note.startswith("float16 has no numbers")]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_modules_that_a_half_cannot_hold(method):
    small = trained(1e-12 if method in BALANCED else 1e-7)
    _, marked, said = combined(small, method, **METHODS[method])
    assert marked == list(SHAPES)
    assert said == [
        f"float16 has no numbers small enough for {len(SHAPES)} modules, {FIRST!r} first: more than 1 % of their update may be lost. "
        "Use bfloat16 or a wider dtype"
    ]
    for pairs, dtype in (
        (trained(1e-2), torch.float16),
        (small, torch.bfloat16),
        (trained(0.0), torch.float16),
    ):
        assert combined(pairs, method, dtype, **METHODS[method])[1:] == ([], [])


@pytest.mark.parametrize("method", ["florist", "fedit", "flora", "fedsa", "fedtree"])
def test_what_is_lost_altogether_is_named_too(method):
    result, marked, _ = combined(trained(1e-12), method)
    adapter = result.adapter or result.for_client(0, scale=1.0)
    assert not any(bool(adapter[name].B.any()) for name in SHAPES)
    assert marked == list(SHAPES)


def test_one_module_alone():
    pairs = [changed(pair, "B", lambda B: 1e-7 * B) for pair in trained(1.0)]
    assert combined(pairs)[1] == [FIRST]


def test_what_a_rule_or_a_client_leaves_at_zero_has_not_gone_under():
    assert combined(trained(1.0), rule=fk.Absolute(1e6))[1] == []
    fresh = [trained(0.0)[0], *trained(1.0)[1:]]
    for method in ("fedsa", "clair", "fedtree"):
        assert combined(fresh, method)[1] == []


@pytest.mark.parametrize(("factor", "lost"), [(1.0, False), (1e-4, False), (1e-6, True), (1e-9, True)])
def test_the_limit_is_a_hundredth_of_the_update(factor, lost):
    made = torch.Generator().manual_seed(1)
    B, A = torch.randn(50, 4, generator=made).double() * factor, torch.randn(4, 70, generator=made).double()
    half = B.half(), A.half()
    assert underflows([half]) is lost
    missed = torch.linalg.norm(half[0].double() @ half[1].double() - B @ A) / torch.linalg.norm(B @ A)
    assert bool(missed > 0.01) is lost
    # the other factor as small, or beside what matters
    assert underflows([(A.mT.half().contiguous(), B.mT.half().contiguous())]) is lost
    assert (
        underflows([half, (torch.randn(50, 1, generator=made).half(), torch.randn(1, 70, generator=made).half())])
        is False
    )
