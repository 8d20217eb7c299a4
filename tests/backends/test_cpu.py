"""The cpu library itself: what it serves, how it is found and refused, its C ABI, forks and threads."""

import ctypes
import subprocess
import sys

import pytest
import torch

from fedlora_kernels.backends import cpu
from fedlora_kernels.backends.contract import OPS
from fedlora_kernels.backends.native import library as native
from fedlora_kernels.errors import BackendError, InputError

needs_library = pytest.mark.skipif(not cpu.BACKEND.available()[0], reason=cpu.BACKEND.available()[1])
CPU = torch.device("cpu")


@needs_library
def test_available_names_the_instruction_set():
    ok, reason = cpu.BACKEND.available()
    assert ok
    assert any(isa in reason for isa in ("x86-64-v4", "x86-64-v3", "portable"))
    assert cpu.BACKEND.name == "cpu"
    served = {op for op in OPS if hasattr(cpu.BACKEND, op)}
    assert (cpu.BACKEND.name, served - cpu.BACKEND.bitwise) == ("cpu", {"update_gram"})


@needs_library
@pytest.mark.parametrize(
    ("op", "dtype", "device", "sizes", "words"),
    [
        ("core_svd", torch.float32, CPU, {"p": 32, "q": 32, "N": 5}, None),
        ("core_svd", torch.bfloat16, CPU, {"p": 1, "q": 0, "N": 0}, None),
        ("core_svd", torch.float64, CPU, {"p": 512, "q": 512, "N": 5}, None),
        ("core_svd", torch.float64, CPU, {"p": 513, "q": 2, "N": 5}, "513"),
        ("core_svd", torch.float64, CPU, {"p": 2, "q": 600, "N": 5}, "600"),
        ("core_svd", torch.int32, CPU, {"p": 2, "q": 2, "N": 5}, "int32"),
        ("core_svd", torch.float32, torch.device("meta"), {"p": 2, "q": 2, "N": 5}, "meta"),
        ("product_svd", torch.float32, CPU, {"m": 2, "n": 2, "R": 1}, None),
        ("product_svd", torch.float64, CPU, {"m": 5000, "n": 4000, "R": 3000}, None),
        ("product_svd", torch.float32, torch.device("meta"), {"m": 2, "n": 2, "R": 1}, "meta"),
        ("update_gram", torch.bfloat16, CPU, {"m": 2, "n": 2, "R": 1}, None),
        ("update_gram", torch.int32, CPU, {"m": 2, "n": 2, "R": 1}, "int32"),
        ("stacked_qr", torch.float32, CPU, {"m": 50000, "R": 1024}, None),
        ("stacked_qr", torch.float16, CPU, {"m": 2, "R": 1025}, "1025"),
        ("align_factors", torch.bfloat16, CPU, {"m": 5000, "n": 4096, "r": 32, "N": 5}, None),
        ("align_factors", torch.float64, CPU, {"m": 50, "n": 40, "r": 513, "N": 5}, "513"),
        ("align_factors", torch.float32, torch.device("meta"), {"m": 2, "n": 2, "r": 1, "N": 1}, "meta"),
        ("procrustes_rotation", torch.float64, CPU, {"m": 500, "r": 32, "N": 5}, None),
        ("procrustes_rotation", torch.float64, CPU, {"m": 900, "r": 600, "N": 5}, "600"),
        ("rotate_factors", torch.float64, CPU, {"m": 50, "n": 40, "r": 1000, "N": 5}, None),
    ],
)
def test_serves(op, dtype, device, sizes, words):
    ok, reason = cpu.BACKEND.serves(op, dtype, device, sizes)
    assert ok == (words is None)
    assert words is None or words in reason


@needs_library
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 513, 4),
        torch.zeros(3, 3),
        torch.zeros(1, 2, 2, dtype=torch.int64),
        torch.zeros(1, 2, 2, device="meta"),
    ],
)
def test_what_is_not_served_is_refused(tensor):
    with pytest.raises(BackendError, match="core_svd"):
        cpu.BACKEND.core_svd([tensor])


def test_a_missing_library_is_a_reason(tmp_path):
    backend = cpu.CpuBackend(tmp_path / "libfedlora_cpu.so")
    ok, reason = backend.available()
    assert not ok
    assert "missing" in reason
    assert "build_ext --inplace" in reason
    assert backend.serves("core_svd", torch.float32, CPU, {"p": 2, "q": 2}) == (False, reason)
    with pytest.raises(BackendError, match="missing"):
        backend.core_svd([torch.zeros(1, 2, 2)])


def test_a_broken_library_is_a_reason(tmp_path):
    library = tmp_path / "libfedlora_cpu.so"
    library.write_bytes(b"not a library")
    ok, reason = cpu.CpuBackend(library).available()
    assert not ok
    assert "cannot be loaded" in reason


@needs_library
def test_another_abi_is_refused(tmp_path):
    header = tmp_path / "fedlora.h"
    header.write_bytes(native.HEADERS[1].read_bytes() + b"\n")
    backend = cpu.CpuBackend(headers=[tmp_path / "absent.h", header])
    ok, reason = backend.available()
    assert not ok
    assert f"{native.abi_stamp(header):016x}" in reason
    assert "rebuild" in reason
    with pytest.raises(BackendError, match="rebuild"):
        backend.core_svd([torch.zeros(1, 2, 2)])


@needs_library
def test_no_header_no_trust(tmp_path):
    ok, reason = cpu.CpuBackend(headers=[tmp_path / "fedlora.h"]).available()
    assert not ok
    assert "fedlora.h is missing" in reason


@needs_library
@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5", "99999"])
def test_thread_setting_is_checked(threads, monkeypatch):
    monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
    with pytest.raises(InputError, match="FEDLORA_NUM_THREADS"):
        cpu.BACKEND.core_svd([torch.zeros(1, 2, 2)])


class Call:
    """One direct call of the C op on a 3 x 5 x 4 batch; outputs sit in wide buffers full of canaries."""

    CANARY = -77.0

    def __init__(self):
        self.library = cpu.BACKEND.library.functions("core_svd")
        self.C = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.buffers = {
            "U": torch.full((3, 9, 13), self.CANARY, dtype=torch.float64),
            "S": torch.full((3, 3, 11), self.CANARY, dtype=torch.float64),
            "Vh": torch.full((3, 9, 13), self.CANARY, dtype=torch.float64),
            "info": torch.full((3, 3, 3), -77, dtype=torch.int32),
            "notes": torch.full((3, 3, 3), -77, dtype=torch.int32),
        }
        self.views = {
            "U": self.buffers["U"][:, 2:7, 1:9:2],
            "S": self.buffers["S"][:, 1:2, 2:10:2],
            "Vh": self.buffers["Vh"].mT[:, 1:5, 2:6],
            "info": self.buffers["info"][:, 1:2, 1:2],
            "notes": self.buffers["notes"][:, 1:2, 1:2],
        }
        self.workspace = torch.full((1 << 16,), 255, dtype=torch.uint8)
        self.bytes = self.workspace.numel()
        self.groups, self.sweeps, self.threads = 1, 0, 1
        self.tables = [native.table([t]) for t in (self.C, *self.views.values())]

    def __call__(self):
        return self.library.fedlora_core_svd(
            *self.tables, self.groups, self.sweeps, self.workspace.data_ptr(), self.bytes, self.threads, None
        )


@needs_library
def test_strided_outputs_and_canaries():
    call = Call()
    assert call() == 0
    expected = cpu.BACKEND.core_svd([call.C])[0]
    for name, view in call.views.items():
        assert torch.equal(view.reshape(getattr(expected, name).shape), getattr(expected, name))
        view.fill_(-77)
        assert (call.buffers[name] == -77).all(), f"{name}: written outside its bounds"


@needs_library
def test_poisoned_workspace_and_its_end():
    results = []
    needed = ctypes.c_int64()
    for poison in (0, 255, 127):
        call = Call()
        assert call.library.fedlora_core_svd_workspace(call.tables[0], 1, 1, ctypes.byref(needed)) == 0
        call.workspace.fill_(poison)
        call.bytes = needed.value
        assert call() == 0
        assert (call.workspace[needed.value :] == poison).all()
        results.append({name: view.clone() for name, view in call.views.items()})
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], results[2][name])


def _change(**fields):
    def change(call):
        for name, value in fields.items():
            setattr(call, name, value)

    return change


def _describe(table, **fields):
    def change(call):
        for name, value in fields.items():
            setattr(call.tables[table][0], name, value)

    return change


@needs_library
@pytest.mark.parametrize(
    ("change", "status"),
    [
        (_describe(0, rows=33), 1),
        (_describe(0, rows=-1), 1),
        (_describe(0, batch=-1), 1),
        (_describe(1, rows=4), 1),
        (_describe(2, cols=5), 1),
        (_describe(3, batch=2), 1),
        (_describe(4, rows=0), 1),
        (_describe(0, dtype=2), 2),
        (_describe(0, dtype=9), 2),
        (_describe(1, dtype=0), 2),
        (_describe(5, dtype=0), 2),
        (_change(bytes=64), 3),
        (_change(groups=-1), 4),
        (_change(threads=0), 4),
        (_change(sweeps=-1), 4),
    ],
)
def test_wrong_calls_are_refused_and_write_nothing(change, status):
    call = Call()
    change(call)
    assert call() == status
    assert all((buffer == -77).all() for buffer in call.buffers.values())


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


PREPARE = """
import os, torch
os.environ["FEDLORA_NUM_THREADS"] = "2"
from fedlora_kernels.backends.cpu import BACKEND
C = torch.randn(300, 8, 7, generator=torch.Generator().manual_seed(0))
first = BACKEND.core_svd([C])[0]
def same(other):
    return all(torch.equal(a, b) for a, b in zip(first, other))
"""


@needs_library
def test_fork_after_use():
    code = """
child = os.fork()
if child == 0:
    os._exit(0 if same(BACKEND.core_svd([C])[0]) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same(BACKEND.core_svd([C])[0]))
"""
    assert run_python(PREPARE + code).split() == ["0", "True"]


@needs_library
def test_threads_calling_at_once():
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    print(all(pool.map(lambda _: same(BACKEND.core_svd([C])[0]), range(24))))
"""
    assert run_python(PREPARE + code).split() == ["True"]


def test_import_loads_nothing():
    code = "import fedlora_kernels.backends.cpu as c; print(c.BACKEND.library.is_loaded())"
    assert run_python(code).split() == ["False"]
