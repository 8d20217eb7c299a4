"""Weighted sums of client blocks: the same bits on every backend, whatever the layout, the neighbours and the threads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import Blocks, Info, Note

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = [
    name for name in backends.names() if backends.status()[name][0] and hasattr(backends.get(name), "weighted_sum")
]
SHAPES = {
    "equal": [(37, 5)] * 4,
    "columns": [(37, 3), (37, 16), (37, 1), (37, 7)],
    "rows": [(3, 41), (11, 41), (1, 41)],
    "corners": [(2, 7), (5, 3)],
    "one": [(1, 1)],
    "an empty block": [(5, 0), (5, 3)],
    "nothing": [(0, 3)],
    "longer than a tile": [(3, 2049), (3, 2049)],
    "longer than a chunk": [(70001, 2), (70001, 2)],
}


def draw(shapes, dtypes, batch=3, seed=0):
    """Numbers over twelve orders of magnitude, subnormal in float16."""
    made = torch.Generator().manual_seed(seed)
    blocks = []
    for k, shape in enumerate(shapes):
        size = 10.0 ** (12 * torch.rand(batch, *shape, generator=made, dtype=torch.float64) - 8)
        x = torch.randn(batch, *shape, generator=made, dtype=torch.float64) * size
        blocks.append(x.to(dtypes[k % len(dtypes)]))
    weights = torch.randn(batch, len(shapes), generator=made, dtype=torch.float64)
    return group(blocks, weights)


def group(blocks, weights):
    p, q = (max(block.shape[axis] for block in blocks) for axis in (1, 2))
    return Blocks(tuple(blocks), weights, p, q)


def model(given):
    """The definition, one number at a time in Python's own float64."""
    total = torch.zeros(given.batch, given.p, given.q, dtype=torch.float64)
    for n in range(given.batch):
        for i in range(given.p):
            for j in range(given.q):
                value = 0.0
                for k, block in enumerate(given.blocks):
                    if i < block.shape[1] and j < block.shape[2]:
                        value += float(given.weights[n, k]) * float(block[n, i, j])
                total[n, i, j] = value
    return total


def run(name, given, dtype=torch.float64):
    (raw,) = backends.get(name).weighted_sum([given], dtype)
    return raw


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shapes", ["columns", "rows", "corners", "one", "an empty block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_definition(name, shapes, dtype):
    given = draw(SHAPES[shapes], [dtype])
    raw = run(name, given)
    wanted = model(given)
    assert torch.equal(raw.sum, wanted)
    assert torch.allclose(raw.norm, wanted.flatten(1).norm(dim=1), rtol=1e-14)
    assert not raw.rounding.any()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_backends_agree_bit_for_bit(name, shapes, out):
    given = draw(SHAPES[shapes], DTYPES)
    ours, wanted = run(name, given, out), run("reference", given, out)
    assert torch.equal(ours.sum, wanted.sum)
    assert ours.sum.dtype == out
    assert torch.equal(ours.info, wanted.info)
    assert torch.equal(ours.notes, wanted.notes)
    assert torch.allclose(ours.norm, wanted.norm, rtol=1e-13)
    assert torch.allclose(ours.rounding, wanted.rounding, rtol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("out", DTYPES[2:], ids=str)
def test_every_half_is_rounded_as_torch_rounds_it(name, out):
    """All 2^16 halves, the numbers half way between neighbours, and those next to them in float32."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(out).double()
    halves = halves[halves.isfinite()]
    ordered = halves.unique()
    middle = (ordered[1:] + ordered[:-1]) / 2
    near = torch.cat([torch.nextafter(middle.float(), torch.tensor(x)).double() for x in (math.inf, -math.inf)])
    values = torch.cat([halves, middle, near, torch.tensor([65519.0, 65520.0, 3.4e38, 1e-46, -1e-46]).double()])
    given = group([values[None, None, :]], torch.ones(1, 1, dtype=torch.float64))
    rounded = run(name, given, out).sum[0, 0]
    # a sum begins with +0, so -0 is not among its answers
    assert torch.equal(rounded.view(torch.int16), (values + 0.0).to(out).view(torch.int16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_every_half_is_read_exactly(name, dtype):
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    given = group([halves[None, None, :]], torch.ones(1, 1, dtype=torch.float64))
    raw = run(name, given)
    finite = halves.isfinite()
    assert torch.equal(raw.sum[0, 0][finite], halves[finite].double())
    assert torch.equal(raw.sum[0, 0].isnan(), halves.isnan())
    assert int(raw.info[0]) == Info.NONFINITE


@pytest.mark.parametrize("name", NAMES)
def test_layouts_change_nothing(name):
    given = draw([(6, 5), (6, 9)], [torch.float32])
    wanted = run(name, given)
    strided = [torch.stack([block, block], -1)[..., 0] for block in given.blocks]
    turned = [block.mT.contiguous().mT for block in given.blocks]
    for blocks in (strided, turned):
        assert not blocks[0].is_contiguous()
        assert torch.equal(run(name, group(blocks, given.weights)).sum, wanted.sum)
    expanded = given.blocks[1][:1].expand(3, -1, -1)
    same = run(name, group([expanded], given.weights[:, :1].contiguous()))
    assert torch.equal(same.sum[2], expanded[2].double() * given.weights[2, 0])


@pytest.mark.parametrize("name", NAMES)
def test_trouble_stays_with_its_matrix(name):
    given = draw([(4, 3), (2, 3)], [torch.float32], batch=5)
    clean = run(name, given, torch.float16)
    given.blocks[0][1, 0, 0] = float("nan")
    given.blocks[1][2, 1, 2] = float("inf")
    given.blocks[0][3, 2, 1] = 1e30
    for block in given.blocks:
        block[4] = 0.0
    raw = run(name, given, torch.float16)
    assert raw.info.tolist() == [clean.info[0], Info.NONFINITE, Info.NONFINITE, Info.OVERFLOW, 0]
    assert raw.notes.tolist() == [0, 0, 0, 0, Note.ZERO]
    assert torch.equal(raw.sum[0], clean.sum[0])


@pytest.mark.parametrize("name", [name for name in NAMES if "weighted_sum" in backends.get(name).bitwise])
def test_a_sum_does_not_depend_on_batch_slot_or_threads(name, monkeypatch):
    given = draw([(71, 64), (71, 33)], [torch.float32, torch.bfloat16], batch=6)
    whole = run(name, given, torch.float32)
    alone = [
        run(name, group([b[i : i + 1] for b in given.blocks], given.weights[i : i + 1]), torch.float32)
        for i in range(6)
    ]
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "3")
    threads = run(name, given, torch.float32)
    for field in range(len(whole)):
        assert torch.equal(whole[field], torch.cat([raw[field] for raw in alone]))
        assert torch.equal(whole[field], threads[field])


@pytest.mark.parametrize("name", NAMES)
def test_every_element_is_written(name, poisoned_empty):
    raw = run(name, draw([(5, 2), (3, 4)], [torch.float32]), torch.float32)
    for field in raw:
        assert not field.isnan().any()
    assert not raw.sum[:, 3:, 2:].any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=5),
    batch=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_any_shapes_agree(sizes, batch, seed):
    given_group = draw(sizes, DTYPES, batch, seed)
    wanted = run("reference", given_group, torch.float32)
    for name in NAMES:
        assert torch.equal(run(name, given_group, torch.float32).sum, wanted.sum)
