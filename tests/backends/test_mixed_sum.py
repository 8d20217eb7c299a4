"""Mixed sums of client blocks: close to the exact sum on every backend, rounded once, whatever the layout and the neighbours."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import U64, Info, Mixed, Note

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = [name for name in backends.names() if backends.status()[name][0] and hasattr(backends.get(name), "mixed_sum")]
BITWISE = [name for name in NAMES if "mixed_sum" in backends.get(name).bitwise]
SHAPES = {
    "equal": (37, (5, 5, 5, 5), 5),
    "ranks": (37, (3, 16, 1, 7), 11),
    "one": (1, (1,), 1),
    "one column": (70, (4, 9), 1),
    "an empty block": (5, (0, 3), 2),
    "no columns at all": (5, (0,), 2),
    "an empty sum": (5, (3,), 0),
    "no rows": (0, (3,), 2),
    "a whole strip": (64, (16, 16), 16),
    "wide": (66, (40, 17), 33),
    "a chunk and a row": (2049, (2, 3), 4),
}


def draw(shape, dtypes, batch=3, seed=0, by_columns=False):
    """Numbers over six orders of magnitude."""
    p, ranks, q = shape
    made = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        size = 10.0 ** (6 * torch.rand(batch, *sizes, generator=made, dtype=torch.float64) - 5)
        return torch.randn(batch, *sizes, generator=made, dtype=torch.float64) * size

    blocks = [normal(p, r).to(dtypes[k % len(dtypes)]) for k, r in enumerate(ranks)]
    mixers = tuple(normal(r, q) for r in ranks)
    return Mixed(tuple(turned(block) if by_columns else block for block in blocks), mixers)


def turned(block):
    """The same numbers, by columns in memory."""
    return block.mT.contiguous().mT


def exact(given):
    """The sum and the sum of magnitudes; torch's own float64 products, each much better than the limit."""
    N, p, q = given.shape
    total, size = torch.zeros(N, p, q, dtype=torch.float64), torch.zeros(N, p, q, dtype=torch.float64)
    for block, mixer in zip(given.blocks, given.mixers, strict=True):
        x = block.double()
        for j in range(x.shape[-1]):
            term = x[:, :, j : j + 1] * mixer[:, j : j + 1]
            total, size = total + term, size + term.abs()
    return total, size


def limit(given, size):
    """Of two sums of so many products in float64, in any order."""
    return 2 * (sum(block.shape[-1] for block in given.blocks) + 1) * U64 * size


def run(name, given, dtype=torch.float64):
    (raw,) = backends.get(name).mixed_sum([given], dtype)
    return raw


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_the_sum_is_that_of_the_definition(name, shape, by_columns):
    given = draw(SHAPES[shape], DTYPES, by_columns=by_columns)
    raw, (wanted, size) = run(name, given), exact(given)
    assert raw.sum.shape == given.shape
    assert bool(((raw.sum - wanted).abs() <= limit(given, size)).all())
    assert torch.allclose(raw.norm, raw.sum.flatten(1).norm(dim=1), rtol=1e-13)
    assert not raw.rounding.any()
    assert not raw.info.any()


@pytest.mark.parametrize("name", NAMES)
def test_against_rational_numbers(name):
    given = draw((5, (3, 4), 2), [torch.float32], batch=1)
    raw = run(name, given)
    for i in range(5):
        for j in range(2):
            terms = [
                Fraction(float(x[0, i, d])) * Fraction(float(m[0, d, j]))
                for x, m in zip(given.blocks, given.mixers, strict=True)
                for d in range(x.shape[-1])
            ]
            gap = abs(Fraction(float(raw.sum[0, i, j])) - sum(terms))
            assert gap <= 8 * Fraction(U64) * sum(map(abs, terms))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding_to_the_dtype(name, out, dtype):
    given = draw((71, (16, 7), 12), [dtype])
    wide, raw = run(name, given), run(name, given, out)
    assert raw.sum.dtype == out
    assert torch.equal(raw.sum, wide.sum.to(out))
    kept = raw.sum.double()
    assert torch.allclose(raw.rounding, (wide.sum - kept).flatten(1).norm(dim=1), rtol=1e-10)
    assert torch.allclose(raw.norm, wide.norm, rtol=1e-13)


@pytest.mark.parametrize("name", BITWISE)
def test_layouts_change_nothing(name):
    given = draw((71, (6, 9), 5), [torch.float32])
    wanted = run(name, given).sum
    for change in (lambda x: torch.stack([x, x], -1)[..., 0], turned):
        blocks = tuple(change(block) for block in given.blocks)
        assert not blocks[0].is_contiguous()
        assert_near(name, run(name, Mixed(blocks, given.mixers)).sum, wanted, given)
        mixers = tuple(change(mixer) for mixer in given.mixers)
        assert_near(name, run(name, Mixed(given.blocks, mixers)).sum, wanted, given)
    same = Mixed((given.blocks[0][:1].expand(3, -1, -1),), given.mixers[:1])
    copied = Mixed((same.blocks[0].contiguous(),), same.mixers)
    assert_near(name, run(name, same).sum, run(name, copied).sum, given)


def assert_near(name, found, wanted, given):
    """Equal bits of our own kernel; BLAS may take another way for another layout."""
    if name == "cpu":
        assert torch.equal(found, wanted)
    else:
        assert bool(((found - wanted).abs() <= limit(given, exact(given)[1]).amax()).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_the_sum_lies_in_memory_as_the_blocks_do(name, by_columns):
    total = run(name, draw((6, (3, 4), 5), [torch.float32], by_columns=by_columns)).sum
    assert (total.mT if by_columns else total).is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_a_block_whose_mixer_is_zero_is_not_seen(name):
    given = draw((9, (4, 3), 5), [torch.float32])
    given.mixers[0][1] = 0.0
    given.blocks[0][1] = math.nan
    given.mixers[1][2] = -0.0
    given.blocks[1][2, 3, 1] = math.inf
    raw = run(name, given)
    assert not raw.info.any()
    first, second = (run(name, Mixed(given.blocks[k : k + 1], given.mixers[k : k + 1])).sum for k in (0, 1))
    assert torch.equal(raw.sum[1], second[1])
    assert torch.equal(raw.sum[2], first[2])


@pytest.mark.parametrize("name", NAMES)
def test_trouble_stays_with_its_matrix(name):
    given = draw((9, (4, 3), 5), [torch.float32], batch=6)
    for mixer in given.mixers:
        mixer.clamp_(-1.0, 1.0)
    clean = run(name, given, torch.float16)
    given.blocks[0][1, 0, 0] = math.nan
    given.blocks[1][2, 1, 2] = math.inf
    given.blocks[0][3, 2, 1], given.mixers[0][3, 1] = 1e30, 1.0
    for block in given.blocks:
        block[4] = 0.0
    given.mixers[1][5, 1, 1] = math.nan
    raw = run(name, given, torch.float16)
    assert raw.info.tolist() == [0, Info.NONFINITE, Info.NONFINITE, Info.OVERFLOW, 0, Info.NONFINITE]
    assert raw.notes.tolist() == [0, 0, 0, 0, Note.ZERO, 0]
    assert torch.equal(raw.sum[0], clean.sum[0])


@pytest.mark.parametrize("name", BITWISE)
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_sum_does_not_depend_on_batch_slot_or_threads(name, by_columns, monkeypatch):
    given = draw((2100, (16, 7), 11), [torch.float32, torch.bfloat16], batch=5, by_columns=by_columns)
    whole = run(name, given, torch.float32)
    alone = [
        run(
            name,
            Mixed(tuple(b[i : i + 1] for b in given.blocks), tuple(m[i : i + 1] for m in given.mixers)),
            torch.float32,
        )
        for i in range(5)
    ]
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "3")
    threads = run(name, given, torch.float32)
    for field in range(len(whole)):
        assert torch.equal(whole[field], torch.cat([raw[field] for raw in alone]))
        assert torch.equal(whole[field], threads[field])


@pytest.mark.parametrize("name", [name for name in NAMES if name == "cpu"])
def test_a_row_does_not_depend_on_where_it_stands(name):
    given = draw((200, (16, 7), 11), [torch.float32])
    whole = run(name, given).sum
    for start in (1, 7, 63, 130):
        part = Mixed(tuple(block[:, start:] for block in given.blocks), given.mixers)
        assert torch.equal(run(name, part).sum, whole[:, start:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_every_element_is_written(name, by_columns, poisoned_empty):
    raw = run(name, draw((67, (3, 4), 5), [torch.float32], by_columns=by_columns), torch.float32)
    for field in raw:
        assert not field.isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_several_groups_of_one_call_and_none(name):
    groups = [draw(SHAPES[shape], [torch.float32]) for shape in ("ranks", "no rows", "wide")]
    for group, raw in zip(groups, backends.get(name).mixed_sum(groups, torch.float32), strict=True):
        assert torch.equal(raw.sum, run(name, group, torch.float32).sum)
    assert backends.get(name).mixed_sum([], torch.float32) == []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    p=st.integers(0, 150),
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    q=st.integers(0, 40),
    batch=st.integers(0, 3),
    by_columns=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shapes_agree(p, ranks, q, batch, by_columns, seed):
    given_group = draw((p, ranks, q), DTYPES, batch, seed, by_columns)
    wanted, size = exact(given_group)
    for name in NAMES:
        assert bool(((run(name, given_group).sum - wanted).abs() <= limit(given_group, size)).all())
