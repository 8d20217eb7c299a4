"""The CUDA library itself: how it is found, what it says of itself, what it serves."""

import contextlib
import ctypes

import pytest
import torch

from fedlora_kernels.backends.contract import OPS
from fedlora_kernels.backends.cuda import BACKEND
from fedlora_kernels.backends.native import library
from fedlora_kernels.backends.native.library import abi_stamp
from fedlora_kernels.errors import BackendError

CPU = torch.device("cpu")


def test_the_library_carries_the_stamp_of_the_header(simt):
    assert simt.available() == (True, f"{simt.library.path.name}, simulated")
    stamp = simt.library.functions("test").fedlora_abi()
    assert any(header.is_file() and abi_stamp(header) == stamp for header in simt.library._headers)


def test_the_simulated_device_counts_as_one(simt):
    devices = ctypes.c_int64()
    simt.library.call("test", "fedlora_devices", ctypes.byref(devices))
    assert devices.value == 1


def test_every_operation_with_a_method_is_served_where_its_tensors_lie(simt):
    for op in OPS:
        ok, reason = simt.serves(
            op, torch.float32, CPU, {"m": 9, "n": 5, "p": 9, "q": 5, "r": 3, "R": 6, "K": 2, "N": 1}
        )
        assert ok == hasattr(simt, op), (op, reason)


@pytest.mark.parametrize(
    ("op", "dtype", "device", "sizes", "words"),
    [
        ("core_svd", torch.float64, CPU, {"p": 513, "q": 2}, "513"),
        ("stacked_qr", torch.float64, CPU, {"m": 2, "R": 1025}, "1025"),
        ("procrustes_rotation", torch.float64, CPU, {"m": 900, "r": 600}, "600"),
        ("weighted_sum", torch.int32, CPU, {}, "int32"),
        ("weighted_sum", torch.float32, torch.device("meta"), {}, "meta"),
        ("select_rank", torch.float64, CPU, {}, "no select_rank"),
    ],
)
def test_what_is_not_served_is_said(simt, op, dtype, device, sizes, words):
    ok, reason = simt.serves(op, dtype, device, sizes)
    assert not ok
    assert words in reason


def test_a_function_that_the_library_lacks_is_named(simt):
    with pytest.raises(BackendError, match="has no fedlora_read_sum"):
        simt.library.call("weighted_sum", "fedlora_read_sum")


def test_a_gpu_is_the_current_one_where_the_library_is_asked_for_scratch_and_called(monkeypatch, simt):
    """Limits, and so the layout of scratch memory, are those of the current device; streams belong to theirs."""
    entered = []

    class Current(contextlib.nullcontext):
        def __init__(self, device):
            super().__init__()
            self.device = device

        def __enter__(self):
            entered.append(str(self.device))

        def __exit__(self, *_):
            entered.append("")

    def called(op, function, *arguments):
        asked.append((function, entered[-1] if entered else ""))

    asked, gpu = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(8, dtype=torch.uint8))
    monkeypatch.setattr(library, "stream", lambda device: None)
    monkeypatch.setattr(simt.library, "call", called)
    monkeypatch.setattr(simt.library, "_function", lambda op, function: lambda *_: called(op, function) or 0)
    simt.library.run("test", "fedlora_gram", (), (), gpu)
    assert asked == [("fedlora_gram_workspace", "cuda:1"), ("fedlora_gram", "cuda:1")]


def test_without_a_gpu_the_backend_says_why():
    ok, reason = BACKEND.available()
    assert ok == torch.cuda.is_available() or "libfedlora_cuda.so" in reason
