"""What hardware would hang on or leave undefined is an error, and what a schedule may change shows under another."""

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

LAUNCH_FAILURE, INVALID_CONFIGURATION = 719, 9
FAULTS = {"barrier": 1, "read": 2, "write": 3, "shared": 4}


def at(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def row_sums(library, fault=0, rows=5, n=130):
    values = np.random.default_rng(3).integers(-99, 99, (rows, n)).astype(np.float64)
    out = np.full(rows + 1, np.nan)[:rows]  # the fault in the write goes one too far
    assert library.run_row_sums(fault, at(values), rows, n, at(out)) == 0
    return out, values.sum(axis=1)


@pytest.mark.parametrize(
    ("which", "threads", "message"),
    [
        (0, 64, r"waits at __syncthreads \(kernels.cpp:\d+\) while others wait at __syncthreads \(kernels.cpp:\d+\)"),
        (
            1,
            64,
            r"thread 0 waits at __syncthreads .*; thread 48 waits at __shfl_sync \(kernels.cpp:\d+\) with mask 0xffffffff",
        ),
        (2, 32, r"__shfl_sync .* by lane \d+, which is not in its own mask 0x0000fffe"),
        (
            3,
            32,
            r"__syncwarp .* with mask 0xffffffff, but lane 5 returns|__syncwarp .* but lanes 0x00000020 have returned",
        ),
        (4, 32, r"__shfl_sync .* of lane 0 reads lane 20, which is not in mask 0x0000ffff"),
        (5, 32, r"lanes 0 and 16 of mask 0xffffffff meet at __shfl_sync \(kernels.cpp:\d+\) and __shfl_sync"),
        (6, 32, r"thread 0 waits at __syncwarp .* with mask 0xffffffff; thread 1 waits at .* with mask 0xfffffffe"),
        (7, 32, r"block \(\d, 0, 0\) writes behind its 256 bytes of dynamic shared memory"),
        (8, 64, r"waits at __syncthreads(_or)? .* while others wait at __syncthreads"),
    ],
)
def test_a_wrong_kernel_is_an_error_with_its_place(kernels, schedule, which, threads, message):
    out = np.zeros(1024)
    assert kernels.run_wrong(which, 3, threads, ctypes.c_int64(256), at(out)) == LAUNCH_FAILURE
    told = kernels.message().decode()
    assert told.startswith("block (")
    assert re.search(message, told), told
    # The next launch knows nothing of it.
    assert kernels.run_wrong(9, 3, 64, ctypes.c_int64(256), at(out)) == 0
    right, expected = row_sums(kernels)
    np.testing.assert_array_equal(right, expected)


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes", "message"),
    [
        (1, 1025, 0, "a block of 1025 x 1 x 1 threads"),
        (1, 0, 0, "a block of 0 x 1 x 1 threads"),
        (0, 32, 0, "a grid of 0 x 1 x 1 blocks"),
        (1, 32, 232449, "232449 bytes of shared memory, but a block has 232448"),
    ],
)
def test_a_launch_that_no_device_takes_is_refused(kernels, blocks, threads, shared_bytes, message):
    assert (
        kernels.run_wrong(9, blocks, threads, ctypes.c_int64(shared_bytes), at(np.zeros(64))) == INVALID_CONFIGURATION
    )
    assert kernels.message().decode() == f"launch refused: {message}"


def test_an_unknown_schedule_is_refused(kernels, monkeypatch):
    monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", "backwards")
    assert kernels.run_wrong(9, 1, 32, ctypes.c_int64(0), at(np.zeros(64))) == LAUNCH_FAILURE
    assert kernels.message() == b"FEDLORA_SIMT_SCHEDULE=backwards: forward, reverse or a number"


def test_the_first_block_that_goes_wrong_is_told_whatever_the_threads(kernels, monkeypatch):
    monkeypatch.setenv("FEDLORA_SIMT_THREADS", "3")
    for _ in range(5):
        assert kernels.run_wrong(2, 40, 32, ctypes.c_int64(0), at(np.zeros(64))) == LAUNCH_FAILURE
        assert kernels.message().startswith(b"block (")


def test_a_right_kernel_gives_the_same_under_every_schedule(kernels, schedule):
    sums, expected = row_sums(kernels)
    np.testing.assert_array_equal(sums, expected)


def test_a_removed_barrier_is_caught(kernels, monkeypatch):
    wrong = []
    for name in ("forward", "reverse", "1", "2"):
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", name)
        sums, expected = row_sums(kernels, FAULTS["barrier"])
        wrong.append(not np.array_equal(sums, expected, equal_nan=True))
    assert any(wrong), "every schedule gives the right sums without the barrier"


@pytest.mark.parametrize("fault", ["read", "write", "shared"])
def test_a_shifted_index_is_caught(kernels, fault, schedule):
    sums, expected = row_sums(kernels, FAULTS[fault])
    assert not np.array_equal(sums, expected)


# The same under the sanitizers, which name the line: global arrays by ASan, static shared ones by UBSan.
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DMAIN")


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, ""),
        (
            "read",
            r"ERROR: AddressSanitizer: heap-buffer-overflow (.*\n)*?READ of size 8 .*\n.* in .*row_sums.*kernels.cpp:\d+",
        ),
        (
            "write",
            r"ERROR: AddressSanitizer: heap-buffer-overflow (.*\n)*?WRITE of size 8 .*\n.* in .*row_sums.*kernels.cpp:\d+",
        ),
        ("shared", r"kernels.cpp:\d+:\d+: runtime error: index 64 out of bounds for type 'double \[64\]'"),
    ],
    ids=["no fault", "read", "write", "shared"],
)
def test_sanitizers_name_the_line_of_a_shifted_index(build, fault, message):
    program = build(Path(__file__).with_name("kernels.cpp"), *SANITIZERS, link=())
    done = subprocess.run([program, str(FAULTS.get(fault, 0))], capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    assert (done.returncode == 0) == (fault is None), told
    assert re.search(message, told), told
