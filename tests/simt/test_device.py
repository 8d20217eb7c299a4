"""The simulated device against what CUDA promises."""

import ctypes
import threading

import numpy as np
import pytest

LANES = np.arange(32)


def at(array):
    """The address of an array."""
    return array.ctypes.data_as(ctypes.c_void_p)


def source_lane(kind, lane, delta, width):
    """Which lane a shuffle reads, by the programming guide."""
    first = lane // width * width
    if kind == 0:
        return first + delta % width
    if kind == 1:
        return lane - delta if lane - delta >= first else lane
    if kind == 2:
        return lane + delta if lane + delta < first + width else lane
    return lane ^ delta if lane ^ delta < first + width else lane


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_shuffles_read_the_lane_that_the_guide_names(kernels, schedule, dtype):
    calls = [(k, d, 1 << w) for k in range(4) for d in (0, 1, 2, 5, 16, 31) for w in range(6)]
    kind, delta, width = (np.array(column, np.int32) for column in zip(*calls, strict=True))
    values = (np.arange(96) * 37 % 113 - 50).astype(dtype)
    out = np.zeros((len(calls), 96), dtype)
    code = [np.int8, np.uint16, np.int32, np.int64, np.float32, np.float64].index(dtype)
    assert kernels.run_shuffles(code, at(values), at(kind), at(delta), at(width), at(out), len(calls), 96) == 0
    for row, call in zip(out, calls, strict=True):
        expected = [values[t - t % 32 + source_lane(call[0], t % 32, *call[1:])] for t in range(96)]
        assert row.tolist() == [v.item() for v in expected], call


def test_parts_of_a_warp_shuffle_among_themselves(kernels, schedule):
    values = np.linspace(-1.0, 3.0, 32) * 1024 // 1
    out = np.zeros(32)
    assert kernels.run_parts(at(values), at(out)) == 0
    expected = np.concatenate(
        [np.full(8, values[:8].sum()), np.full(4, values[8:12].sum()), np.full(20, values[12:].sum())]
    )
    np.testing.assert_array_equal(out, expected)


def test_votes_matches_and_reductions(kernels, schedule):
    values = (LANES * 7 % 11 - 4).astype(np.int32)
    out = np.zeros((32, 12), np.uint32)
    assert kernels.run_votes(at(values), at(out)) == 0

    def bits(which):
        return int(np.sum(np.where(which, 1 << LANES.astype(np.int64), 0)))

    odd = LANES % 2 == 1
    for t in range(32):
        half = odd if t % 2 else ~odd
        expected = [
            bits(half & (values > 3)),
            int((values[half] > 3).any()) if t % 2 else 0,
            1 if t % 2 else int((values[half] > 3).all()),
            bits(values == values[t]),
            0,
            values.sum(),
            values.min(),
            values.max(),
            np.bitwise_and.reduce(values),
            np.bitwise_or.reduce(values),
            np.bitwise_xor.reduce(values),
            0xFFFFFFFF,
        ]
        assert out[t].tolist() == [int(v) & 0xFFFFFFFF for v in expected]


@pytest.mark.parametrize(
    ("shape", "gone"), [((96, 1, 1), 0), ((50, 1, 1), 0), ((7, 5, 3), 0), ((96, 1, 1), 40), ((33, 2, 1), 65)]
)
def test_barriers_count_those_who_have_not_returned(kernels, schedule, shape, gone):
    threads = int(np.prod(shape))
    values = (np.arange(threads) * 5 % 13 - 5).astype(np.int32)
    out = np.full((threads, 3), -7, np.int32)
    assert kernels.run_barriers(*shape, gone, at(values), at(out)) == 0
    assert (out[:gone] == -7).all()
    assert (out[gone:] == [(values[gone:] > 3).sum(), 0, 1]).all()


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize(("grid", "block"), [((1, 1, 1), (1, 1, 1)), ((5, 3, 2), (3, 5, 7)), ((97, 1, 1), (64, 1, 1))])
def test_every_thread_of_every_block_runs_once(kernels, schedule, grid, block, threads, monkeypatch):
    monkeypatch.setenv("FEDLORA_SIMT_THREADS", threads)
    blocks, size = int(np.prod(grid)), int(np.prod(block))
    out = np.zeros((blocks, size), np.uint32)
    assert kernels.run_indices((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), at(out)) == 0
    np.testing.assert_array_equal(out, 1 + np.arange(size) + 1000 * np.arange(blocks)[:, None])


@pytest.mark.parametrize("threads", ["1", "4"])
def test_atomics_lose_nothing(kernels, threads, monkeypatch):
    monkeypatch.setenv("FEDLORA_SIMT_THREADS", threads)
    integer, wide, real, least, won = (np.zeros(1, t) for t in (np.int32, np.uint64, np.float64, np.int32, np.int32))
    assert kernels.run_counts(300, 70, *map(at, (integer, wide, real, least, won))) == 0
    assert (integer[0], int(wide[0]), real[0], least[0]) == (21000 + 1000000, 21000 << 33, 10500.0, -299)


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("wide", [0, 1])
def test_no_block_sees_shared_memory_of_the_one_before(kernels, wide, threads, monkeypatch):
    monkeypatch.setenv("FEDLORA_SIMT_THREADS", threads)
    out = np.zeros((9, 14, 8 if wide else 2), np.uint8)
    assert kernels.run_look(wide, 9, at(out)) == 0
    assert (out == 0xFF).all()


def test_thread_local_data_of_the_host_is_left_alone(kernels):
    found = []

    def look():
        out = np.zeros((3, 14, 8), np.uint8)
        found.append((kernels.note(), kernels.run_look(1, 3, at(out)), kernels.note()))

    look()
    other = threading.Thread(target=look)
    other.start()
    other.join()
    note = b"not touched by any block, and too long to be kept in place"
    assert found == [(note, 0, note)] * 2


def test_halves_round_to_nearest_even(kernels):
    every = np.arange(65536, dtype=np.uint16)
    wide = np.empty(65536, np.float32)
    kernels.half_to_float(at(every), at(wide), ctypes.c_int64(65536))
    np.testing.assert_array_equal(wide, every.view(np.float16).astype(np.float32))
    values = wide[np.isfinite(wide)]
    between = (values.astype(np.float64) + np.roll(values, 1).astype(np.float64)) / 2
    probe = np.concatenate([values, between, np.nextafter(between.astype(np.float32), np.float32(9e9))]).astype(
        np.float32
    )
    probe = np.concatenate(
        [probe, np.float32([65519.996, 65520.0, 1e38, np.inf, -np.inf, 2.0**-25, 2.0**-25 * 1.0001, -0.0])]
    )
    halves = np.empty(probe.size, np.uint16)
    kernels.float_to_half(at(probe), at(halves), ctypes.c_int64(probe.size))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(halves, probe.astype(np.float16).view(np.uint16))
    kernels.float_to_half(at(np.float32([np.nan])), at(halves), ctypes.c_int64(1))
    assert np.isnan(halves[:1].view(np.float16))


def test_small_functions(kernels):
    x = np.float32([1.5, np.nan, 3.0, -0.0, -2.0, 1e-30, np.inf])
    y = np.float32([2.5, 4.0, np.nan, 1.0, -7.0, 1e30, 3.0])
    out = np.empty((7, 8), np.float32)
    assert kernels.run_small_functions(at(x), at(y), at(out), 7) == 0
    np.testing.assert_array_equal(out[:, 0], np.fmin(x, y))
    np.testing.assert_array_equal(out[:, 1], np.fmax(x, y))
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(out[:, 2], np.float32(1) / np.sqrt(np.abs(x)))
    np.testing.assert_array_equal(out[:, 3], (x.astype(np.float64) * y + x).astype(np.float32))
    for column in (4, 5, 6):
        np.testing.assert_array_equal(out[:, column], x)
    i = np.arange(7)
    expected = [
        bin(k).count("1") + 100 * (32 - int(k).bit_length()) + 10000 * ((k & -k).bit_length()) for k in i.tolist()
    ]
    np.testing.assert_array_equal(out[:, 7], np.float32(expected))


def test_attributes_of_the_device(kernels, monkeypatch):
    assert [kernels.attribute(which) for which in (97, 75, 76)] == [232448, 9, 0]
    monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", "101376")
    assert kernels.attribute(97) == 101376
    assert kernels.attribute(12345) == -1
