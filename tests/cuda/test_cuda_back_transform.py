"""The back-transform of truncated SVDs: both factors, their signs by the rule, and nothing beyond the rank."""

import ctypes
from pathlib import Path

import pytest
import simulated
import torch
from guards import DTYPES, LAYOUTS, SCHEDULES, dtype_id, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.backends.contract import U64, Info, Note
from fedlora_kernels.backends.native.library import rows, table

SOURCE = Path(__file__).with_name("back_transform_check.cpp")
WINDOW = 1 - 2.0**-20
UNTOUCHED = 7.0


@pytest.fixture(scope="session")
def transform():
    """The back-transform of one batch: factors, their mixers and scales in; left, right^T, info and notes out."""
    if reason := simulated.missing():
        pytest.skip(reason)
    library = ctypes.CDLL(str(simulated.build(sources=[SOURCE])))
    library.fedlora_message.restype = ctypes.c_char_p

    def run(B, A, mixers, dtype, ranks, p, scales=(None, None), layout=lambda x: x):
        N = len(B[0])
        left, right = (torch.full((N, x[0].shape[1], p), UNTOUCHED, dtype=dtype) for x in (B, A))
        right = LAYOUTS["turned"](right)  # as rows of the answer
        info, notes = torch.zeros(N, dtype=torch.int32), torch.full((N,), int(Note.RANK_DEFICIENT), dtype=torch.int32)
        ranks = torch.tensor(ranks, dtype=torch.int32)
        blocks, given_scales = (
            [layout(x) for x in (*B, *A)],
            [rows(x) if x is not None else torch.empty(N, 0, 0).double() for x in scales],
        )
        outs = table([left, right])
        status = library.check_back_transform(
            table(blocks), table([*mixers[0], *mixers[1]]), table(given_scales), outs, ctypes.c_int64(len(B)),
            ctypes.c_void_p(ranks.data_ptr()), table([rows(info)]), table([rows(notes)]),
        )  # fmt: skip
        assert status == 0, library.fedlora_message()
        return left, right, info, notes

    return run


def draw(m, n, widths, p, dtype=torch.float32, batch=2, seed=0):
    """Factors and mixers of a batch, columns of both sums of every size."""
    made = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(batch, *sizes, generator=made, dtype=torch.float64)

    B, A = ([normal(rows_, r).to(dtype) for r in widths] for rows_ in (m, n))
    sizes = 2.0 ** (torch.arange(p) % 9 - 4)
    mixers = [[normal(r, p) * sizes for r in widths] for _ in range(2)]
    return B, A, mixers


def exact(blocks, mixers, scale=None):
    X = torch.cat([block.double() for block in blocks], -1)
    return (X if scale is None else X * scale[:, None]) @ torch.cat(list(mixers), 1)


def signs_of(left):
    """Per column -1 where the rule turns it; magnitudes in 24 bits, as torch rounds them to float32."""
    size = left.abs().float().double()
    bar = WINDOW * size.amax(1, keepdim=True)
    first = (size >= bar).int().argmax(1, keepdim=True)
    return torch.where(left.gather(1, first) < 0, -1.0, 1.0)


def check(answer, B, A, mixers, dtype, ranks, scales=(None, None)):
    left, right, info, notes = answer
    wanted = [exact(blocks, each, scale) for blocks, each, scale in zip((B, A), mixers, scales, strict=True)]
    signs = signs_of(wanted[0])
    for found, raw, blocks, each, scale in zip((left, right), wanted, (B, A), mixers, scales, strict=True):
        size = exact([block.abs() for block in blocks], [mixer.abs() for mixer in each], scale)
        limit = 2 * (sum(block.shape[-1] for block in blocks) + 1) * U64 * size
        for i, rank in enumerate(ranks):
            ours, theirs, by = found[i], (raw * signs)[i], limit[i]
            assert bool((ours[:, max(rank, 0) :] == UNTOUCHED).all() if rank >= 0 else ours.isnan().all())
            if rank > 0:
                low, high = ((theirs + sign * by)[:, :rank].to(dtype).double() for sign in (-1, 1))
                assert bool(((ours[:, :rank].double() >= low) & (ours[:, :rank].double() <= high)).all())
    assert not info.any()
    assert notes.tolist() == [Note.RANK_DEFICIENT] * len(ranks)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("m", "n", "widths", "p", "ranks"),
    [
        (37, 23, (5, 5), 7, [7, 3]),
        (300, 1100, (16, 7, 9), 30, [30, 1]),
        (1, 1, (1,), 1, [1, 1]),
        (700, 130, (33, 40), 70, [65, 32]),
        (129, 513, (8,), 8, [0, -1]),
    ],
)
def test_factors_and_signs(transform, dtype, m, n, widths, p, ranks):
    B, A, mixers = draw(m, n, widths, p, dtype)
    check(transform(B, A, mixers, dtype, ranks, p), B, A, mixers, dtype, ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(transform, layout):
    B, A, mixers = draw(140, 70, (5, 8), 9)
    wanted = transform(B, A, mixers, torch.bfloat16, [9, 6], 9)
    found = transform(B, A, mixers, torch.bfloat16, [9, 6], 9, layout=LAYOUTS[layout])
    assert all(same_bits(x, y) for x, y in zip(found, wanted, strict=True))


def test_columns_are_scaled_first(transform):
    B, A, mixers = draw(140, 70, (5, 8), 9, torch.float64)
    scales = [
        2.0 ** torch.randint(-9, 9, (2, 13), generator=torch.Generator().manual_seed(1)).double() for _ in range(2)
    ]
    check(transform(B, A, mixers, torch.float64, [9, 4], 9, scales), B, A, mixers, torch.float64, [9, 4], scales)
    big = [[block * 2.0**600 for block in part] for part in (B, A)]
    down = [torch.full((2, 13), 2.0**-600, dtype=torch.float64)] * 2
    plain, scaled = (
        transform(B, A, mixers, torch.float64, [9, 9], 9),
        transform(*big, mixers, torch.float64, [9, 9], 9, down),
    )
    assert all(same_bits(x, y) for x, y in zip(plain, scaled, strict=True))


def column(values, dtype=torch.float64):
    """A pair whose left factor is just these numbers."""
    x = torch.tensor(values, dtype=torch.float64)[None, :, None]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return [x.to(dtype)], [torch.ones(1, 3, 1, dtype=dtype)], [[one], [one]]


near, far = 1 - 2.0**-21, 1 - 2.0**-19


@pytest.mark.parametrize(
    ("values", "turned"),
    [
        ([0.5, -1.0, 1.0], True),
        ([0.5, 1.0, -1.0], False),
        ([-near, 1.0], True),
        ([-far, 1.0], False),
        ([1.0, -near], False),
        ([*[0.0] * 130, -near, *[0.0] * 300, 1.0], True),
        ([*[0.0] * 130, -far, *[0.0] * 300, 1.0], False),
        ([*[0.0] * 130, near, -1.0, *[0.0] * 300, 1.0], False),
        ([-WINDOW, 1.0], True),
        ([-WINDOW, *[0.0] * 50, 1.0], True),
        ([-WINDOW, *[0.0] * 150, 1.0], True),
        ([-WINDOW + 2.0**-24, 1.0], False),
        ([-WINDOW + 2.0**-24, *[0.0] * 50, 1.0], False),
        ([-1.0 + 2.0**-23, *[0.0] * 200, *[1.0] * 200], True),
        ([-far, near, *[0.0] * 200, -1.0], False),
        ([far, -near, *[0.0] * 200, 1.0], True),
        ([0.0] * 200, False),
        ([-0.0, 0.0], False),
        ([-1.0] * 200, True),
        ([2.0 * near * -1.0, 2.0], True),
        ([-2.0 + 2.0**-19 + 2.0**-20, 2.0], False),
    ],
)
def test_the_first_of_the_nearly_largest_decides(transform, values, turned):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        left, right, _, _ = transform(*column(values), dtype, [1], 1)
        sign = -1.0 if turned else 1.0
        assert torch.equal(left[0, :, 0], (sign * torch.tensor(values, dtype=torch.float64)).to(dtype))
        assert torch.equal(right[0, :, 0], torch.full((3,), sign, dtype=dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_ties_within_and_between_tiles(transform, data):
    steps = st.tuples(st.integers(0, 40), st.sampled_from([-1.0, 1.0]))
    picked = data.draw(st.lists(steps, min_size=1, max_size=12))
    places = data.draw(st.lists(st.integers(0, 600), min_size=len(picked), max_size=len(picked), unique=True))
    top = data.draw(st.sampled_from([1.0, 1.0 + 2.0**-23 * 5, 1.5, 2.0 - 2.0**-23, 2.0**-130]))
    values = [0.0] * 601
    for place, (step, sign) in zip(places, picked, strict=True):
        values[place] = sign * top * (1 - step * 2.0**-24)
    x = torch.tensor(values, dtype=torch.float64)[None, :, None]
    left, _, _, _ = transform(*column(values), torch.float64, [1], 1)
    size = x.abs() * 2.0**200  # out of the subnormal numbers of float32, for the test's own rounding
    size = (size / 2.0**200 / top).float().double() if top >= 1 else size
    first = int((size >= WINDOW * size.max()).int().flatten().argmax())
    assert torch.equal(left, x * (-1.0 if values[first] < 0 else 1.0))


def test_overflow_joins_the_info(transform):
    B, A, mixers = draw(140, 70, (5, 8), 40, torch.float32)
    mixers[1][0][1] *= 1e6
    left, right, info, notes = transform(B, A, mixers, torch.float16, [40, 40], 40)
    over = [not bool(left[i].isfinite().all() and right[i].isfinite().all()) for i in range(2)]
    assert over[1]
    assert info.tolist() == [Info.OVERFLOW * x for x in over]
    assert notes.tolist() == [0 if x else Note.RANK_DEFICIENT for x in over]


def test_a_pair_does_not_depend_on_its_neighbours(transform):
    B, A, mixers = draw(300, 150, (9, 8), 35, batch=3)
    whole = transform(B, A, mixers, torch.float32, [35, 12, -1], 35)
    for i, rank in enumerate([35, 12, -1]):
        own = slice(i, i + 1)
        alone = transform(
            [x[own] for x in B],
            [x[own] for x in A],
            [[x[own] for x in part] for part in mixers],
            torch.float32,
            [rank],
            35,
        )
        assert all(same_bits(x, y[own]) for x, y in zip(alone, whole, strict=True))


def test_no_order_of_threads_shows(transform, monkeypatch):
    B, A, mixers = draw(300, 150, (9, 8), 35, torch.bfloat16)
    answers = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(transform(B, A, mixers, torch.bfloat16, [35, 20], 35))
    for answer in answers[1:]:
        assert all(same_bits(x, y) for x, y in zip(answer, answers[0], strict=True))
