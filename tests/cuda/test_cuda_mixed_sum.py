"""Mixed sums of the CUDA library: those of the reference, rounded once, whatever lies around them in memory or in the batch."""

import math

import pytest
import torch
from guards import DTYPES, LAYOUTS, SCHEDULES, Guards, dtype_id, home, same_answer, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import U64, Info, Mixed, Note, RawSum
from fedlora_kernels.backends.native import sums

SHAPES = {
    "equal": (37, (5, 5, 5, 5), 5),
    "ranks": (37, (3, 16, 1, 7), 11),
    "one": (1, (1,), 1),
    "an empty block": (5, (0, 3), 2),
    "no columns at all": (5, (0,), 2),
    "an empty sum": (5, (3,), 0),
    "no rows": (0, (3,), 2),
    "a strip and a column": (130, (16, 16), 33),
    "tiles": (257, (40, 17, 8), 97),
    "more quads than a warp": (9, (1,) * 70, 3),
}
orders = pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])


def draw(shape, dtypes, batch=3, seed=0, by_columns=False):
    """Numbers over six orders of magnitude."""
    p, ranks, q = shape
    made = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        size = 10.0 ** (6 * torch.rand(batch, *sizes, generator=made, dtype=torch.float64) - 5)
        return torch.randn(batch, *sizes, generator=made, dtype=torch.float64) * size

    blocks = [normal(p, r).to(dtypes[k % len(dtypes)]) for k, r in enumerate(ranks)]
    mixers = tuple(normal(r, q) for r in ranks)
    return Mixed(tuple(LAYOUTS["turned"](block) if by_columns else block for block in blocks), mixers)


def changed(group, blocks=lambda x: x, mixers=lambda x: x):
    return Mixed(tuple(blocks(block) for block in group.blocks), tuple(mixers(mixer) for mixer in group.mixers))


def run(cuda, group, dtype=torch.float64):
    backend, device = cuda
    (raw,) = backend.mixed_sum([changed(group, lambda x: x.to(device), lambda x: x.to(device))], dtype)
    return home(raw)


def check(raw, group, dtype=torch.float64):
    """Within what two orders of addition may differ by, then rounded once."""
    (wanted,) = backends.get("reference").mixed_sum([group], torch.float64)
    sizes = changed(group, lambda x: x.double().abs(), lambda x: x.abs())
    (size,) = backends.get("reference").mixed_sum([sizes], torch.float64)
    limit = 2 * (sum(block.shape[-1] for block in group.blocks) + 1) * U64 * size.sum
    low, high = ((wanted.sum + sign * limit).to(dtype).double() for sign in (-1, 1))
    assert raw.sum.dtype == dtype
    assert bool(((raw.sum.double() >= low) & (raw.sum.double() <= high)).all())
    assert torch.allclose(raw.norm, wanted.sum.flatten(1).norm(dim=1), rtol=1e-12)
    lost = (wanted.sum - raw.sum.double()).flatten(1).norm(dim=1)
    assert torch.allclose(raw.rounding, lost, rtol=1e-6, atol=1e-13 * float(wanted.norm.amax() if len(lost) else 0))
    assert not raw.info.any()
    assert torch.equal(raw.notes, wanted.notes)


@pytest.mark.parametrize("shape", SHAPES)
@orders
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
def test_sum_is_that_of_the_reference(cuda, poisoned_empty, shape, by_columns, dtype):
    group = draw(SHAPES[shape], DTYPES, by_columns=by_columns)
    check(run(cuda, group, dtype), group, dtype)


@pytest.mark.parametrize("out", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@orders
def test_one_rounding_to_the_dtype(cuda, dtype, out, by_columns):
    group = draw((131, (16, 7), 12), [dtype], by_columns=by_columns)
    wide, raw = run(cuda, group), run(cuda, group, out)
    assert same_bits(raw.sum, wide.sum.to(out))
    assert torch.allclose(raw.rounding, (wide.sum - raw.sum.double()).flatten(1).norm(dim=1), rtol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_layouts_change_no_bit(cuda, dtype, layout):
    group, change = draw((133, (6, 9, 8), 37), [dtype]), LAYOUTS[layout]
    wanted = run(cuda, group).sum
    assert same_bits(run(cuda, changed(group, blocks=change)).sum, wanted)
    assert same_bits(run(cuda, changed(group, mixers=change)).sum, wanted)


def test_one_block_for_all_matrices(cuda):
    group = draw((37, (6, 9), 5), [torch.float32])
    shared = Mixed((group.blocks[0][:1].expand(3, -1, -1), group.blocks[1]), group.mixers)
    copied = Mixed((shared.blocks[0].contiguous(), group.blocks[1]), group.mixers)
    assert same_answer(run(cuda, shared), run(cuda, copied))


@orders
@pytest.mark.parametrize("columns", [11, 45])
def test_a_sum_does_not_depend_on_batch_slot_or_neighbours(cuda, by_columns, columns):
    group = draw((300, (16, 7), columns), [torch.float32, torch.bfloat16], batch=5, by_columns=by_columns)
    whole = run(cuda, group, torch.float32)
    for i in range(5):
        alone = run(cuda, changed(group, lambda x, i=i: x[i : i + 1], lambda x, i=i: x[i : i + 1]), torch.float32)
        assert same_answer(alone, RawSum(*(field[i : i + 1] for field in whole)))


def test_a_group_does_not_depend_on_the_others_of_its_call(cuda):
    backend, device = cuda
    groups = [draw(SHAPES[shape], [torch.float32]) for shape in ("ranks", "no rows", "tiles")]
    there = [changed(group, lambda x: x.to(device), lambda x: x.to(device)) for group in groups]
    for group, raw in zip(groups, backend.mixed_sum(there, torch.float32), strict=True):
        assert same_answer(home(raw), run(cuda, group, torch.float32))
    assert backend.mixed_sum([], torch.float32) == []


@orders
def test_no_order_of_threads_shows(simt, monkeypatch, by_columns):
    group = draw((140, (16, 7, 3), 45), DTYPES, batch=2, by_columns=by_columns)
    answers = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(run((simt, torch.device("cpu")), group, torch.float16))
    assert all(same_answer(answer, answers[0]) for answer in answers[1:])


def test_a_block_whose_mixer_is_zero_is_not_seen(cuda):
    group = draw((9, (5, 3), 5), [torch.float32])
    group.mixers[0][1] = 0.0
    group.blocks[0][1] = math.nan
    group.mixers[1][2] = -0.0
    group.blocks[1][2, 3, 1] = math.inf
    raw = run(cuda, group)
    assert not raw.info.any()
    first, second = (run(cuda, Mixed(group.blocks[k : k + 1], group.mixers[k : k + 1])).sum for k in (0, 1))
    assert same_bits(raw.sum[1], second[1])
    assert same_bits(raw.sum[2], first[2])


def test_trouble_stays_with_its_matrix(cuda):
    group = draw((9, (4, 3), 5), [torch.float32], batch=6)
    for mixer in group.mixers:
        mixer.clamp_(-1.0, 1.0)
    clean = run(cuda, group, torch.float16)
    group.blocks[0][1, 0, 0] = math.nan
    group.blocks[1][2, 1, 2] = math.inf
    group.blocks[0][3, 2, 1], group.mixers[0][3, 1] = 1e30, 1.0
    for block in group.blocks:
        block[4] = 0.0
    group.mixers[1][5, 1, 1] = math.nan
    raw = run(cuda, group, torch.float16)
    assert raw.info.tolist() == [0, Info.NONFINITE, Info.NONFINITE, Info.OVERFLOW, 0, Info.NONFINITE]
    assert raw.notes.tolist() == [0, 0, 0, 0, Note.ZERO, 0]
    assert same_bits(raw.sum[0], clean.sum[0])


@orders
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nothing_beside_the_sum_is_written_and_inputs_stay(cuda, dtype, by_columns):
    backend, device = cuda
    group = changed(draw((130, (7, 4), 35), [dtype]), lambda x: x.to(device), lambda x: x.to(device))
    before = [x.clone() for x in (*group.blocks, *group.mixers)]
    shape = (3, 40, 140) if by_columns else (3, 140, 40)
    room = torch.full(shape, 7.0, dtype=dtype, device=device)
    whole = room.mT if by_columns else room
    (raw,) = sums.mix(backend.library, [group], [whole[:, 3:133, 2:37]])
    check(home(raw), home_group(group), dtype)
    raw.sum.fill_(7.0)
    assert bool((room == 7.0).all())
    assert all(same_bits(x, y) for x, y in zip((*group.blocks, *group.mixers), before, strict=True))


def home_group(group):
    return changed(group, lambda x: x.cpu(), lambda x: x.cpu())


def test_guards_notice(cuda, monkeypatch):
    """What the tests of memory rest on: a write beside an answer shows."""
    backend, device = cuda
    guards = Guards(monkeypatch, backend.library)
    room = backend.library.empty((3, 4), torch.float32, device)
    room.fill_(1.0)
    assert guards.hold()
    room.as_strided((1,), (1,), room.storage_offset() + 12).fill_(1.0)
    assert not guards.hold()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    p=st.integers(0, 150),
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    q=st.integers(0, 70),
    batch=st.integers(0, 3),
    by_columns=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shapes_agree(simt, p, ranks, q, batch, by_columns, seed):
    group = draw((p, ranks, q), DTYPES, batch, seed, by_columns)
    check(run((simt, torch.device("cpu")), group), group)
