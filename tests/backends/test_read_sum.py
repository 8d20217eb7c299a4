"""Sums of matrices in files have the bits of `weighted_sum`; whether matrices in files are the same."""

import os

import pytest
import torch

from fedlora_kernels import backends
from fedlora_kernels.backends.cpu.ranges import Ranges
from fedlora_kernels.linalg import mixed_sum, procrustes_rotation, weighted_sum

AVAILABLE, REASON = backends.status()["cpu"]
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"no cpu backend: {REASON}")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "equal": [(37, 5)] * 4,
    "columns": [(37, 3), (37, 16), (37, 1), (37, 7)],
    "rows": [(3, 41), (11, 41), (1, 41)],
    "corners": [(2, 7), (5, 3)],
    "an empty block": [(5, 0), (5, 3)],
    "many": [(9, 2)] * 70,
    "longer than a tile": [(3, 2049), (3, 2049)],
    "wider than a span": [(2, 17001), (3, 16500)],
    "longer than a chunk": [(70001, 2), (70001, 2)],
    "more than the buffer": [(9000, 16)] * 9,
}


@pytest.fixture
def stored(tmp_path):
    """Writes blocks (N, p, q) of several clients into one file each, at odd places, and says where they lie."""
    opened = []

    def write(blocks, first=3):
        files = []
        for block in blocks:
            path = tmp_path / f"file_{len(opened)}"
            size = block[0].nbytes
            content = b"".join(b"?" * 5 + x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in block)
            path.write_bytes(b"!" * first + content)
            opened.append(os.open(path, os.O_RDONLY))
            files.append([(opened[-1], first + 5 + i * (size + 5)) for i in range(len(block))])
        shapes, dtypes = [tuple(block.shape[1:]) for block in blocks], [block.dtype for block in blocks]
        return Ranges.of(files, shapes, dtypes)

    yield write
    for fd in opened:
        os.close(fd)


def draw(shapes, dtypes, batch=2, seed=0):
    made = torch.Generator().manual_seed(seed)
    blocks = [
        (torch.randn(batch, *shape, generator=made, dtype=torch.float64) * 10.0 ** (3 - k % 7)).to(
            dtypes[k % len(dtypes)]
        )
        for k, shape in enumerate(shapes)
    ]
    return blocks, torch.randn(batch, len(shapes), generator=made, dtype=torch.float64)


def read(groups, dtype):
    corners = [tuple(max(block.shape[axis] for block in blocks) for axis in (1, 2)) for _, blocks, _ in groups]
    return backends.get("cpu").read_sum([(ranges, w) for ranges, _, w in groups], corners, dtype)


def same(raw, wanted):
    for field in ("sum", "norm", "rounding", "info", "notes"):
        assert torch.equal(getattr(raw, field), getattr(wanted, field)), field


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64], DTYPES], ids=["single", "double", "mixed"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_sums_have_the_bits_of_weighted_sum(shapes, dtypes, stored, poisoned_empty):
    blocks, weights = draw(shapes, dtypes)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        (raw,) = read([(stored(blocks), blocks, weights)], dtype)
        same(raw, weighted_sum(blocks, weights=weights, dtype=dtype, check=False, backend="cpu"))


def test_what_has_weight_zero_is_not_read(stored):
    blocks, weights = draw(SHAPES["columns"], [torch.float32])
    weights[0, 1] = weights[1, 0] = weights[1, 2] = 0.0
    ranges = stored(blocks)
    for i, k in ((0, 1), (1, 0), (1, 2)):
        ranges.places[i, k, 1] = 1 << 40  # behind the end
    (raw,) = read([(ranges, blocks, weights)], torch.float32)
    same(raw, weighted_sum(blocks, weights=weights, check=False, backend="cpu"))
    ranges.places[1, 1, 1] = 1 << 40
    assert read([(ranges, blocks, weights)], torch.float32) is None


def test_groups_of_any_shape_stand_side_by_side_and_threads_change_nothing(stored, monkeypatch):
    groups = []
    for number, shapes in enumerate(SHAPES.values()):
        blocks, weights = draw(shapes, [torch.float32], batch=1 + number % 3, seed=number)
        groups.append((stored(blocks), blocks, weights))
    for threads in ("1", "3"):
        monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
        for raw, (_, blocks, weights) in zip(read(groups, torch.float32), groups, strict=True):
            same(raw, weighted_sum(blocks, weights=weights, check=False, backend="cpu"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_trouble_stands_in_info(bad, stored):
    blocks, weights = draw(SHAPES["equal"], [torch.float32])
    weights.abs_().add_(1.0)
    blocks[2][1, 5, 3] = bad
    (raw,) = read([(stored(blocks), blocks, weights)], torch.float32)
    assert raw.info.tolist() == [0, 4 if bad == 3e38 else 1]


def test_a_file_that_ends_early_or_is_closed_is_no_sum(stored, tmp_path):
    blocks, weights = draw(SHAPES["equal"], [torch.float32])
    ranges = stored(blocks)
    os.truncate(tmp_path / "file_2", os.path.getsize(tmp_path / "file_2") - 1)
    assert read([(ranges, blocks, weights)], torch.float32) is None
    ranges = stored(blocks)
    ranges.places[0, 0, 0] = 1 << 20
    assert read([(ranges, blocks, weights)], torch.float32) is None


def test_sizes_that_do_not_fit_are_refused(stored):
    blocks, weights = draw(SHAPES["equal"], [torch.float32])
    ranges = stored(blocks)
    for shape in ((36, 5), (37, 4)):
        with pytest.raises(backends.BackendError, match="do not fit"):
            backends.get("cpu").read_sum([(ranges, weights)], [shape], torch.float32)


@pytest.mark.parametrize(("offset", "shape"), [(0, (1 << 40, 1 << 40)), (0, (1 << 61, 1)), ((1 << 63) - 4, (2, 2))])
def test_sizes_beyond_64_bits_are_refused(offset, shape, stored):
    blocks, _ = draw(SHAPES["equal"], [torch.float32])
    ranges = stored(blocks)
    ranges.places[:, :, 1:4] = (offset, *shape)
    with pytest.raises(backends.BackendError, match="do not fit"):
        backends.get("cpu").read_alike([ranges])


def alike(stored, blocks):
    return backends.get("cpu").read_alike([stored(blocks)])


@pytest.mark.parametrize("shape", [(5, 7), (70001, 2)])
def test_alike_are_matrices_with_the_same_first_rows(shape, stored):
    whole = torch.randn(3, *shape)
    part = whole[:, : shape[0] - 2].contiguous()
    assert alike(stored, [whole, part, whole])
    for i, row in ((0, 0), (2, shape[0] - 3), (1, shape[0] // 2)):
        other = part.clone()
        other[i, row, 1] = other[i, row, 1].nextafter(torch.tensor(9.0))
        assert not alike(stored, [whole, part, other])
    assert not alike(stored, [part, whole])
    assert not alike(stored, [whole, whole.double()])
    assert not alike(stored, [whole, whole[:, :, :1].contiguous()])
    assert alike(stored, [whole])


def test_a_file_that_ends_early_is_like_no_other(stored, tmp_path):
    whole = torch.randn(1, 9, 4)
    ranges = stored([whole, whole])
    assert backends.get("cpu").read_alike([ranges])
    os.truncate(tmp_path / "file_1", 20)
    assert not backends.get("cpu").read_alike([ranges])


def turn(stored, B, A, reference, side="A", **options):
    """Both sums of pairs in files, and the same step by step in memory."""
    weights = torch.tensor([[0.5, -0.25, 1.5]], dtype=torch.float64).expand(len(B[0]), -1).contiguous()
    options = {"special": True, "blend": 0.5, **options}
    found = backends.get("cpu").read_turned(
        (stored(B), stored(A)), (2.0 * weights, weights), stored([reference]), side, dtype=torch.float32, **options
    )
    pairs = [(a.mT, reference.mT) if side == "A" else (b, reference) for b, a in zip(B, A, strict=True)]
    turns = [procrustes_rotation(x, y, check=False, backend="cpu", **options).Q for x, y in pairs]
    calls = {"dtype": torch.float32, "check": False, "backend": "cpu"}
    own = [weights[:, k, None, None] for k in range(3)]
    left = mixed_sum(B, [2.0 * w * Q for w, Q in zip(own, turns, strict=True)], **calls)
    right = mixed_sum(A, [w * Q.mT for w, Q in zip(own, turns, strict=True)], side="left", **calls)
    return found, (left, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize(("m", "n", "r"), [(37, 23, 4), (2049, 5000, 3), (41, 2500, 40), (7, 9, 2)])
def test_turned_sums_have_the_bits_of_their_steps(m, n, r, side, dtype, stored, poisoned_empty):
    B, A = ([torch.randn(3, *shape).to(dtype) for _ in range(3)] for shape in ((m, r), (r, n)))
    reference = torch.randn(3, r, n) if side == "A" else torch.randn(3, m, r)
    for options in ({}, {"special": False, "blend": 1.0}):
        found, wanted = turn(stored, B, A, reference.to(dtype), side, **options)
        for raw, each in zip(found, wanted, strict=True):
            same(raw, each)


def test_turned_sums_that_cannot_be_read_or_where_nobody_turns_are_none(stored, tmp_path):
    B, A = ([torch.randn(2, *shape) for _ in range(3)] for shape in ((37, 4), (4, 23)))
    assert turn(stored, B, A, torch.zeros(2, 4, 23))[0] is None
    half = torch.randn(2, 4, 23)
    half[1] = 0.0
    assert turn(stored, B, A, half)[0] is None
    broken = [*A[:2], A[2].clone()]
    broken[2][1, 2, 3] = float("nan")
    assert turn(stored, B, broken, torch.randn(2, 4, 23))[0] is None
    ranges = stored(B), stored(A), stored([torch.randn(2, 4, 23)])
    os.truncate(tmp_path / f"file_{len(list(tmp_path.iterdir())) - 1}", 100)
    weights = torch.ones(2, 3, dtype=torch.float64)
    options = {"special": True, "blend": 0.5, "dtype": torch.float32}
    assert backends.get("cpu").read_turned(ranges[:2], (weights, weights), ranges[2], "A", **options) is None


@pytest.mark.parametrize("client", [0, 1])
def test_turned_pairs_leave_overflowing_rotations_to_who_names_them(client, stored):
    """Singular values beyond float64 are in the product of both scales: neither factor's alone is out of range."""
    B, _ = draw([(9, 2), (9, 2)], [torch.float64], batch=1)
    A, _ = draw([(2, 7), (2, 7)], [torch.float64], batch=1, seed=1)
    (reference,), _ = draw([(9, 2)], [torch.float64], batch=1, seed=2)
    B[client] *= 1e200
    weights = torch.ones(1, 2, dtype=torch.float64)

    def turned(scale):
        towards = stored([reference * scale])
        pairs = stored(B), stored(A)
        return backends.get("cpu").read_turned(pairs, (weights, weights), towards, "B", False, 1.0, torch.float64)

    assert turned(1.0) is not None
    assert turned(1e200) is None
