"""Weighted sums of the CUDA library: the bits of the reference, whatever lies around them in memory or in the batch."""

import math

import pytest
import torch
from guards import DTYPES, LAYOUTS, SCHEDULES, Guards, dtype_id, home, same_answer, same_bits, same_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import Blocks, Info, Note, RawSum

SHAPES = {
    "equal": [(37, 5)] * 4,
    "columns": [(37, 3), (37, 16), (37, 1), (37, 7)],
    "rows": [(3, 41), (11, 41), (1, 41)],
    "corners": [(2, 7), (5, 3)],
    "one": [(1, 1)],
    "an empty block": [(5, 0), (5, 3)],
    "nothing": [(0, 3)],
    "longer than a tile": [(3, 2051), (3, 2051), (1, 2051)],
    "many": [(9, 8)] * 21,
}


def draw(shapes, dtypes, batch=3, seed=0):
    """Numbers over twelve orders of magnitude, subnormal in float16."""
    made = torch.Generator().manual_seed(seed)
    blocks = []
    for k, shape in enumerate(shapes):
        size = 10.0 ** (12 * torch.rand(batch, *shape, generator=made, dtype=torch.float64) - 8)
        x = torch.randn(batch, *shape, generator=made, dtype=torch.float64) * size
        blocks.append(x.to(dtypes[k % len(dtypes)]))
    return group(blocks, torch.randn(batch, len(shapes), generator=made, dtype=torch.float64))


def group(blocks, weights):
    p, q = (max(block.shape[axis] for block in blocks) for axis in (1, 2))
    return Blocks(tuple(blocks), weights, p, q)


def run(cuda, given, dtype=torch.float64):
    backend, device = cuda
    (raw,) = backend.weighted_sum([group([x.to(device) for x in given.blocks], given.weights)], dtype)
    return home(raw)


def check(raw, given, dtype):
    (wanted,) = backends.get("reference").weighted_sum([given], dtype)
    assert same_numbers(raw.sum, wanted.sum)
    assert torch.equal(raw.info, wanted.info)
    assert torch.equal(raw.notes, wanted.notes)
    assert torch.allclose(raw.norm, wanted.norm, rtol=1e-13, equal_nan=True)
    assert torch.allclose(raw.rounding, wanted.rounding, rtol=1e-12, equal_nan=True)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("out", DTYPES, ids=dtype_id)
def test_bits_are_those_of_the_reference(cuda, poisoned_empty, shapes, out):
    given = draw(SHAPES[shapes], DTYPES)
    check(run(cuda, given, out), given, out)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_dtype_is_read_exactly(cuda, dtype, shapes):
    given = draw(SHAPES[shapes], [dtype])
    check(run(cuda, given), given, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=dtype_id)
def test_all_halves_and_what_lies_between(cuda, dtype):
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    given = group([halves[None, None, :]], torch.ones(1, 1, dtype=torch.float64))
    raw = run(cuda, given)
    finite = halves.isfinite()
    assert torch.equal(raw.sum[0, 0][finite], halves[finite].double())
    assert torch.equal(raw.sum[0, 0].isnan(), halves.isnan())
    ordered = halves[finite].double().unique()
    middle = (ordered[1:] + ordered[:-1]) / 2
    near = torch.cat([torch.nextafter(middle.float(), torch.tensor(x)).double() for x in (math.inf, -math.inf)])
    values = torch.cat([ordered, middle, near, torch.tensor([65519.0, 65520.0, 3.4e38, 1e-46, -1e-46]).double()])
    given = group([values[None, None, :]], torch.ones(1, 1, dtype=torch.float64))
    # a sum begins with +0, so -0 is not among its answers
    assert same_bits(run(cuda, given, dtype).sum[0, 0], (values + 0.0).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_layouts_change_no_bit(cuda, dtype, layout):
    given = draw([(61, 5), (61, 9), (7, 8)], [dtype])
    changed = group([LAYOUTS[layout](block) for block in given.blocks], given.weights)
    check(run(cuda, changed, torch.float32), given, torch.float32)


def test_one_block_for_all_matrices(cuda):
    given = draw([(61, 5)], [torch.float32])
    expanded = given.blocks[0][:1].expand(3, -1, -1)
    shared, copied = group([expanded], given.weights), group([expanded.contiguous()], given.weights)
    assert same_bits(run(cuda, shared).sum, run(cuda, copied).sum)


def test_a_sum_does_not_depend_on_batch_slot_or_neighbours(cuda):
    given = draw([(71, 64), (71, 33)], [torch.float32, torch.bfloat16], batch=6)
    whole = run(cuda, given, torch.float32)
    for i in range(6):
        alone = run(cuda, group([b[i : i + 1] for b in given.blocks], given.weights[i : i + 1]), torch.float32)
        assert same_answer(alone, RawSum(*(field[i : i + 1] for field in whole)))


def test_groups_of_one_call(cuda):
    backend, device = cuda
    groups = [draw(SHAPES[shapes], DTYPES) for shapes in ("rows", "nothing", "longer than a tile")]
    there = [Blocks(tuple(x.to(device) for x in each.blocks), each.weights, each.p, each.q) for each in groups]
    for each, raw in zip(groups, backend.weighted_sum(there, torch.bfloat16), strict=True):
        assert same_answer(home(raw), run(cuda, each, torch.bfloat16))
    assert backend.weighted_sum([], torch.float32) == []


def test_no_order_of_threads_shows(simt, monkeypatch):
    given, answers = draw([(71, 64), (71, 33), (5, 64)], DTYPES, batch=2), []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(run((simt, torch.device("cpu")), given, torch.float16))
    assert all(same_answer(answer, answers[0]) for answer in answers[1:])


def test_trouble_stays_with_its_matrix(cuda):
    given = draw([(4, 3), (2, 3)], [torch.float32], batch=5)
    clean = run(cuda, given, torch.float16)
    given.blocks[0][1, 0, 0] = math.nan
    given.blocks[1][2, 1, 2] = math.inf
    given.blocks[0][3, 2, 1] = 1e30
    for block in given.blocks:
        block[4] = 0.0
    raw = run(cuda, given, torch.float16)
    assert raw.info.tolist() == [clean.info[0], Info.NONFINITE, Info.NONFINITE, Info.OVERFLOW, 0]
    assert raw.notes.tolist() == [0, 0, 0, 0, Note.ZERO]
    assert same_bits(raw.sum[0], clean.sum[0])


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_reaches_its_own_block_alone(cuda, weight):
    given = draw([(4, 3), (5, 7)], [torch.float32])
    given.weights[1, 0] = weight
    check(run(cuda, given), given, torch.float64)
    assert not run(cuda, given).sum[1, :, 3:].isnan().any()


@pytest.mark.parametrize("out", DTYPES, ids=dtype_id)
def test_nothing_beside_the_answers_is_written_and_inputs_stay(cuda, monkeypatch, out):
    backend, device = cuda
    given = draw([(13, 7), (13, 9)], DTYPES)
    there = group([x.to(device) for x in given.blocks], given.weights)
    before = [x.clone() for x in there.blocks]
    guards = Guards(monkeypatch, backend.library)
    (raw,) = backend.weighted_sum([there], out)
    check(home(raw), given, out)
    assert guards.hold()
    assert all(same_bits(x, y) for x, y in zip(there.blocks, before, strict=True))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=6),
    batch=st.integers(0, 4),
    out=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shapes_agree(simt, sizes, batch, out, seed):
    given_group = draw(sizes, DTYPES, batch, seed)
    check(run((simt, torch.device("cpu")), given_group, out), given_group, out)
