"""Choosing a backend: the order, fallbacks and their log, explicit names."""

import logging
import sys
import threading
import types

import pytest
import torch

from fedlora_kernels import backends
from fedlora_kernels.backends import Choice, Fallback, choose, fallbacks, get, names, record, status
from fedlora_kernels.errors import BackendError, InputError

CPU = torch.device("cpu")


class Fake:
    """A backend that says what it is told to say and remembers what it was asked."""

    bitwise = frozenset()

    def __init__(self, name, available=True, serves=True):
        self.name = name
        self.is_available = available
        self.does_serve = serves
        self.asked = []

    def available(self):
        return self.is_available, "here" if self.is_available else f"{self.name} has no device"

    def serves(self, op, dtype, device, sizes):
        self.asked.append((op, dtype, device, dict(sizes)))
        return self.does_serve, "fits" if self.does_serve else f"{self.name} stops at R = 4"


@pytest.fixture
def registry(monkeypatch):
    """Install backends under their names, in order, as the only ones."""

    def install(*fakes):
        for fake in fakes:
            module = types.ModuleType(f"fedlora_kernels.backends.{fake.name}")
            module.BACKEND = fake
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(backends, "NAMES", tuple(fake.name for fake in fakes))
        return fakes

    monkeypatch.delenv("FEDLORA_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_FALLBACKS", {})
    backends._load.cache_clear()
    yield install
    backends._load.cache_clear()


def pick(requested="auto", op="product_svd", **sizes):
    return choose(op, requested, torch.float32, CPU, sizes).name


def test_auto_takes_the_first_that_serves(registry):
    first, second = registry(Fake("fast"), Fake("slow"))
    assert pick(R=8) == "fast"
    assert first.asked == [("product_svd", torch.float32, CPU, {"R": 8})]
    assert second.asked == []
    assert fallbacks() == []


def test_auto_passes_by_what_is_not_available_or_does_not_serve(registry):
    registry(Fake("gone", available=False), Fake("small", serves=False), Fake("slow"))
    assert pick() == "slow"
    assert fallbacks() == [
        Fallback("product_svd", "gone", "gone has no device"),
        Fallback("product_svd", "small", "small stops at R = 4"),
    ]


def test_fallbacks_are_logged_once_per_operation_and_reason(registry, caplog):
    registry(Fake("small", serves=False), Fake("slow"))
    with caplog.at_level(logging.INFO, logger="fedlora_kernels"):
        for _ in range(3):
            pick()
        pick(op="core_svd")
    assert [r.getMessage() for r in caplog.records] == [
        "product_svd: backend small passed by: small stops at R = 4",
        "core_svd: backend small passed by: small stops at R = 4",
    ]


def test_a_record_holds_what_happened_inside_it_and_nothing_else(registry):
    registry(Fake("small", serves=False), Fake("slow"))
    pick()
    with record() as seen:
        pick()
        pick()
        pick(op="core_svd")
        other = threading.Thread(target=pick, kwargs={"op": "update_gram"})
        other.start()
        other.join()
    pick(op="stacked_qr")
    assert list(seen) == [
        Fallback("product_svd", "small", "small stops at R = 4"),
        Choice("product_svd", "slow"),
        Fallback("core_svd", "small", "small stops at R = 4"),
        Choice("core_svd", "slow"),
    ]


def test_a_named_backend_runs_or_raises(registry):
    registry(Fake("gone", available=False), Fake("small", serves=False), Fake("slow"))
    assert pick("slow") == "slow"
    with pytest.raises(BackendError, match="backend 'gone' cannot run here: gone has no device"):
        pick("gone")
    with pytest.raises(BackendError, match="backend 'small' does not serve this product_svd: small stops at R = 4"):
        pick("small")
    assert fallbacks() == []


def test_nobody_serves(registry):
    registry(Fake("gone", available=False), Fake("small", serves=False))
    with pytest.raises(
        BackendError, match=r"no backend serves this product_svd \(gone: .* no device; small: .* R = 4\)"
    ):
        pick()


def test_unknown_names_list_the_known(registry):
    registry(Fake("fast"), Fake("slow"))
    for attempt in (lambda: pick("gpu"), lambda: get("gpu")):
        with pytest.raises(InputError, match="unknown backend 'gpu'; known backends: auto, fast, slow"):
            attempt()
    with pytest.raises(ValueError, match="unknown operation"):
        pick(op="svd")


def test_the_environment_names_one_for_auto_only(registry, monkeypatch):
    registry(Fake("fast"), Fake("slow"))
    monkeypatch.setenv("FEDLORA_BACKEND", "slow")
    assert pick() == "slow"
    assert pick("fast") == "fast"
    monkeypatch.setenv("FEDLORA_BACKEND", "auto")
    assert pick() == "fast"
    monkeypatch.setenv("FEDLORA_BACKEND", "")
    assert pick() == "fast"
    monkeypatch.setenv("FEDLORA_BACKEND", "gpu")
    with pytest.raises(InputError, match="unknown backend 'gpu'"):
        pick()


def test_a_backend_that_cannot_be_loaded_says_why(registry, monkeypatch):
    registry(Fake("slow"))
    monkeypatch.setattr(backends, "NAMES", ("missing", "slow"))
    assert status()["missing"][0] is False
    assert "cannot be loaded: No module named 'fedlora_kernels.backends.missing'" in status()["missing"][1]
    assert pick() == "slow"
    with pytest.raises(BackendError, match="cannot be loaded"):
        get("missing")


def test_modules_are_loaded_when_first_asked_for(registry):
    _, slow = registry(Fake("fast"), Fake("slow"))
    slow.available = lambda: pytest.fail("asked without need")
    assert pick() == "fast"


def test_the_real_order_and_status():
    assert names() == ("cuda", "cpu", "torch", "reference")
    found = status()
    assert list(found) == list(names())
    assert all(isinstance(ok, bool) and reason for ok, reason in found.values())
    assert found["torch"][0]
    assert found["reference"][0]
    assert get("torch").bitwise == frozenset()
    assert get("reference").bitwise == frozenset(backends.OPS)


def test_a_backend_of_another_type_of_device_is_no_fallback(registry):
    gpu, _ = registry(Fake("cuda"), Fake("slow"))
    assert pick() == "slow"
    assert gpu.asked == []
    assert fallbacks() == []
    gpu.does_serve = False
    with pytest.raises(BackendError, match="does not serve"):
        pick("cuda")


def test_auto_never_takes_the_reference_while_torch_serves(monkeypatch):
    monkeypatch.delenv("FEDLORA_BACKEND", raising=False)
    for op in backends.OPS:
        sizes = dict.fromkeys("mnpqrRKN", 5000)
        assert choose(op, "auto", torch.float64, CPU, sizes).name != "reference"
