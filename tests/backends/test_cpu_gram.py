"""Kernels of the cpu library behind `product_svd` and `update_gram`: Grams of stacks, products written into views, signs."""

import ctypes

import pytest
import torch

from fedlora_kernels.backends import cpu
from fedlora_kernels.backends.contract import Factors, RuleCode, RuleSpec
from fedlora_kernels.backends.native import product
from fedlora_kernels.backends.native.gram import gram as native_gram
from fedlora_kernels.backends.native.library import counts, table
from fedlora_kernels.backends.torch import TorchBackend, backtransform
from fedlora_kernels.backends.torch.chunks import pow2
from fedlora_kernels.backends.torch.gram import gram
from fedlora_kernels.backends.torch.svd import column_signs

BACKEND = cpu.BACKEND
pytestmark = pytest.mark.skipif(not BACKEND.available()[0], reason=BACKEND.available()[1])

U64 = 2.0**-53
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RANKS = [(1,), (4, 4), (3, 0, 9), (16, 5, 20), (60, 71), (0,)]
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other column": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "one matrix for all": lambda x: x[:1].expand(x.shape),
}


def normal(*shape, dtype=torch.float32, seed=0):
    made = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)


def blocks(N, m, ranks, dtype=torch.float32, layout="rows"):
    return [LAYOUTS[layout](normal(N, m, r, dtype=dtype, seed=k)) for k, r in enumerate(ranks)]


def pair(N, m, n, ranks, dtype=torch.float32):
    B = tuple(normal(N, m, r, dtype=dtype, seed=k) for k, r in enumerate(ranks))
    A = tuple(normal(N, r, n, dtype=dtype, seed=20 + k) for k, r in enumerate(ranks))
    weights = torch.linspace(0.5, 2.0, N * len(ranks), dtype=torch.float64).reshape(N, len(ranks))
    return Factors(B, A, weights, m, n, min(m, n, sum(ranks)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("m", [0, 1, 33, 130])
def test_gram_is_that_of_the_stack(dtype, layout, ranks, m):
    X = blocks(3, m, ranks, dtype, layout)
    stack = torch.cat([block.double() for block in X], -1)
    G = native_gram(BACKEND.library, X, None)
    assert G.dtype == torch.float64
    assert ((G - stack.mT @ stack).abs() <= 4 * (m + 1) * U64 * (stack.abs().mT @ stack.abs())).all()
    assert torch.equal(G, G.mT)


@pytest.mark.parametrize("m", [2048, 2049, 6200])
def test_gram_of_many_rows_is_exact_for_small_integers(m):
    X = [(3 * block).round() for block in blocks(2, m, (5, 12))]
    stack = torch.cat(X, -1).double()
    assert torch.equal(native_gram(BACKEND.library, X, None), stack.mT @ stack)


def test_gram_of_blocks_of_several_dtypes_and_layouts():
    X = [normal(2, 70, 5), normal(2, 9, 70, dtype=torch.bfloat16).mT, normal(2, 70, 4, dtype=torch.float16)]
    stack = torch.cat([block.double() for block in X], -1)
    torch.testing.assert_close(native_gram(BACKEND.library, X, None), stack.mT @ stack, rtol=0, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_gram_keeps_its_bits_in_any_batch_slot_and_number_of_threads(monkeypatch, turned):
    X = [block.mT.contiguous().mT if turned else block for block in blocks(5, 4100, (7, 16, 3))]
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "1")
    alone = [native_gram(BACKEND.library, [block[i : i + 1] for block in X], None)[0] for i in range(5)]
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
        assert torch.equal(native_gram(BACKEND.library, X, None), torch.stack(alone))
        assert torch.equal(native_gram(BACKEND.library, [block.flip(0) for block in X], None), torch.stack(alone[::-1]))


@pytest.mark.parametrize("trouble", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_own_row_and_column(trouble):
    X = blocks(2, 50, (4, 13))
    clean = native_gram(BACKEND.library, X, None)
    X[1][1, 49, 12] = trouble
    G = native_gram(BACKEND.library, X, None)
    assert not G[1, 16, 16].isfinite()
    assert torch.equal(G[0], clean[0])
    assert torch.equal(G[1, :16, :16], clean[1, :16, :16])


@pytest.mark.parametrize("ranks", [(192,), (193,), (100, 99, 5), (390,), (700, 400)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gram_of_a_wide_stack_is_exact_for_small_integers(ranks, layout):
    X = [(3 * block).round() for block in blocks(2, 2100, ranks, layout=layout)]
    stack = torch.cat(X, -1).double()
    assert torch.equal(native_gram(BACKEND.library, X, None), stack.mT @ stack)


@pytest.mark.parametrize("ranks", [(3, 4), (20, 0, 13), (150, 60)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_are_scaled_exactly(ranks, layout):
    X = [(3 * block).round() for block in blocks(2, 140, ranks, torch.float64, layout)]
    stack = torch.cat(X, -1)
    e = (torch.arange(stack.shape[-1] * 2).reshape(2, -1) * 977) % 1990 - 980
    if layout == "one matrix for all":
        e = e[:1].expand(e.shape)
    far = [LAYOUTS[layout](block.contiguous()) for block in torch.split(stack * pow2(e)[:, None], ranks, -1)]
    assert torch.equal(native_gram(BACKEND.library, far, e), stack.mT @ stack)
    assert torch.equal(native_gram(BACKEND.library, far, e), gram(far, e))
    near = torch.full((2, 1), 3)
    assert torch.equal(native_gram(BACKEND.library, X, near), stack.mT @ stack / 64)


def test_every_number_of_a_wide_stack_is_seen():
    X = blocks(1, 130, (150, 60))
    for row, column in ((0, 0), (129, 149), (128, 47), (64, 30)):
        X[column % 2][0, row, column % 60] = float("nan")
    bad = torch.cat(X, -1).isnan().any(1)
    G = native_gram(BACKEND.library, X, None)
    assert torch.equal(G.diagonal(dim1=1, dim2=2).isnan(), bad)
    assert torch.equal(G.isnan(), bad[:, :, None] | bad[:, None, :])


class Call:
    """One direct call of fedlora_gram on 2 x 40 x (3 + 6); the Gram lies in a wide buffer full of canaries."""

    CANARY = -77.0

    def __init__(self):
        self.library = BACKEND.library.functions("update_gram")
        self.X = blocks(2, 40, (3, 6))
        self.buffer = torch.full((2, 13, 22), self.CANARY, dtype=torch.float64)
        self.G = self.buffer[:, 2:11, 1:19:2]
        self.blocks, self.out = table(self.X), table([self.G])
        self.factors = torch.ones(2, 1, 9, dtype=torch.float64)
        self.scale = table([self.factors])
        self.counts, self.threads = counts([2]), 2
        needed = ctypes.c_int64()
        assert self.library.fedlora_gram_workspace(self.blocks, self.counts, self.out, 1, 2, ctypes.byref(needed)) == 0
        self.bytes = needed.value
        self.workspace = torch.empty(self.bytes + 64, dtype=torch.uint8)

    def __call__(self, poison=255):
        self.workspace.fill_(poison)
        return self.library.fedlora_gram(
            self.blocks,
            self.counts,
            self.scale,
            self.out,
            1,
            self.workspace.data_ptr(),
            self.bytes,
            self.threads,
            None,
        )


def test_gram_writes_nothing_outside_and_needs_no_clean_workspace():
    call = Call()
    expected = native_gram(BACKEND.library, call.X, None)
    for poison in (0, 127, 255):
        assert call(poison) == 0
        assert (call.workspace[call.bytes :] == poison).all()
        assert torch.equal(call.G, expected)
        call.G.fill_(Call.CANARY)
        assert (call.buffer == Call.CANARY).all()


@pytest.mark.parametrize(("R", "most"), [(16, 1 << 18), (120, 1 << 20), (1000, 6 << 20), (16000, 6 << 20)])
def test_scratch_does_not_grow_with_rows_batch_or_width(R, most):
    library, needed = BACKEND.library.functions("update_gram"), ctypes.c_int64()
    X, G = torch.empty(1, 1, R), torch.empty(1, 1, 1, dtype=torch.float64)
    blocks, out = table([X.expand(60, 50000, R)]), table([G.expand(60, R, R)])
    assert library.fedlora_gram_workspace(blocks, counts([1]), out, 1, 2, ctypes.byref(needed)) == 0
    assert needed.value <= most


@pytest.mark.parametrize(
    ("table", "field", "value", "status"),
    [
        ("blocks", "rows", 39, 1),
        ("blocks", "cols", 4, 1),
        ("blocks", "batch", 3, 1),
        ("blocks", "dtype", 2, 2),
        ("out", "rows", 8, 1),
        ("out", "batch", 1, 1),
        ("out", "dtype", 0, 2),
        ("scale", "rows", 2, 1),
        ("scale", "cols", 8, 1),
        ("scale", "batch", 1, 1),
        ("scale", "dtype", 0, 2),
        (None, "bytes", 100, 3),
        (None, "threads", 0, 4),
    ],
)
def test_wrong_calls_are_refused_and_write_nothing(table, field, value, status):
    call = Call()
    setattr(getattr(call, table)[0] if table else call, field, value)
    assert call() == status
    assert (call.buffer == Call.CANARY).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("p", [0, 1, 5, 70])
def test_products_are_written_into_the_first_columns_and_rows_alone(dtype, turned, p):
    N, m, ranks, room = 3, 90, (4, 0, 70), 75
    X = blocks(N, m, ranks, torch.bfloat16, "columns" if turned else "rows")
    K = normal(N, sum(ranks), p, dtype=torch.float64)
    left, right = torch.full((N, m, room), -7.0, dtype=dtype), torch.full((N, room, m), -7.0, dtype=dtype)
    expected_left, expected_right = left.clone(), right.clone()
    signs = product.write_left(BACKEND.library, X, None, K, left)
    product.write_right(BACKEND.library, X, None, K * signs[:, None, :], right)
    assert torch.equal(signs, backtransform.write_left(X, None, K, expected_left))
    backtransform.write_right(X, None, K * signs[:, None, :], expected_right)
    # A sum that lies between two numbers of the dtype may fall to either side; float64 differs by its own rounding.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(left, expected_left, rtol=step, atol=1e-13)
    torch.testing.assert_close(right, expected_right, rtol=step, atol=1e-13)
    assert (left[..., p:] == -7).all()
    assert (right[:, p:] == -7).all()
    torch.testing.assert_close(left[..., :p], right[:, :p].mT, rtol=step, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "columns", "every other row", "every other column"])
@pytest.mark.parametrize(("m", "p"), [(1, 1), (50, 24), (7, 130), (50, 0)])
def test_columns_are_turned_by_the_sign_rule(dtype, layout, m, p):
    X = normal(3, m, p, dtype=dtype)
    X[0, m // 2 :] = -X[0, : m - m // 2]  # exact ties: the first decides
    X[1, -1] = -X[1].abs().amax(0) * (1 + 2.0**-21)  # within the window: whichever comes first
    X[2, :, : p // 2] = 0
    signs = column_signs(X)
    turned, found = LAYOUTS[layout](X.clone()), torch.empty(3, 1, p, dtype=torch.float64)
    assert BACKEND.library.functions("update_gram").fedlora_orient(table([turned]), table([found]), 1, 2, None) == 0
    assert torch.equal(found[:, 0], signs.double())
    assert torch.equal(turned, X * signs[:, None, :])


@pytest.mark.parametrize(("dtype", "status"), [(torch.bfloat16, 2), (torch.float32, 1)])
def test_orient_refuses_what_it_does_not_take(dtype, status):
    X, signs = normal(2, 5, 3, dtype=dtype), torch.empty(2, 1, 2, dtype=torch.float64)
    assert BACKEND.library.functions("update_gram").fedlora_orient(table([X]), table([signs]), 1, 1, None) == status


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", ["usv", "left", "balanced"])
def test_product_svd_agrees_with_torch(dtype, output):
    group = pair(3, 130, 90, (4, 8, 20), dtype)
    rule = RuleSpec(RuleCode.ENERGY, 0.9)
    (ours,), (theirs,) = (b.product_svd([group], rule, output, dtype) for b in (BACKEND, TorchBackend()))
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.S, theirs.S, rtol=1e-13, atol=0)
    assert torch.equal(ours.rank, theirs.rank)
    torch.testing.assert_close(ours.left, theirs.left, rtol=step, atol=1e-12)
    torch.testing.assert_close(ours.right, theirs.right, rtol=step, atol=1e-12)


def test_product_svd_that_overflows_is_marked_where_it_does():
    group = pair(2, 40, 30, (4,), torch.float32)
    for block in group.B:
        block[1] *= 1e4
    (raw,) = BACKEND.product_svd([group], RuleSpec(RuleCode.ENERGY, 1.0), "left", torch.float16)
    assert raw.info.tolist() == [0, 4]


@pytest.mark.parametrize(("largest", "info"), [(65504.0, 0), (65536.0, 4), (1e9, 4)])
def test_a_single_element_overflows_where_its_singular_value_does(largest, info):
    B, A = torch.zeros(1, 9, 1), torch.zeros(1, 1, 8)
    B[0, 3], A[0, 0, 5] = largest, 1
    group = Factors((B,), (A,), torch.ones(1, 1, dtype=torch.float64), 9, 8, 1)
    (raw,) = BACKEND.product_svd([group], RuleSpec(RuleCode.ENERGY, 1.0), "left", torch.float16)
    assert raw.info.tolist() == [info]


def test_update_gram_agrees_with_torch_and_marks_clients_that_are_not_finite():
    group = pair(2, 60, 45, (3, 0, 9, 5))
    (ours,), (theirs,) = (b.update_gram([group]) for b in (BACKEND, TorchBackend()))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-10)
    group.A[2][1, 8, 44] = float("inf")
    (ours,) = BACKEND.update_gram([group])
    hit = torch.zeros(2, 4, 4, dtype=torch.bool)
    hit[1, 2], hit[1, :, 2] = True, True
    assert torch.equal(ours.isnan(), hit)
