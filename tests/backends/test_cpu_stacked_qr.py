"""Stacked QR of the cpu library: both its ways, the edges of strips and chains, bits, and the C entry point."""

import ctypes

import pytest
import torch
from frames import dtype_id, normal, same_bits, with_kappa
from test_stacked_qr import check_qr, make_stack

from fedlora_kernels.backends import cpu
from fedlora_kernels.backends.contract import Info, Note, Stack
from fedlora_kernels.backends.native.library import counts, rows, table
from fedlora_kernels.testing import U64, roundoff

BACKEND = cpu.BACKEND
pytestmark = pytest.mark.skipif(not BACKEND.available()[0], reason=BACKEND.available()[1])

FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)


def qr(stack, want_q=True):
    (raw,) = BACKEND.stacked_qr([stack], want_q)
    return raw


def same(a, b):
    """Records of equal bits."""
    return all(
        (x is None and y is None) or (same_bits(x, y) if x.is_floating_point() else torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def one(raw, i):
    return type(raw)(*(None if field is None else field[i : i + 1] for field in raw))


def motley(m, R, dtype):
    """Seven matrices: ordinary, dependent, zero columns, ill conditioned, zero, not finite, ordinary."""
    X = normal(7, m, R, seed=5)
    X[1, :, R // 2] = X[1, :, 0] - 2 * X[1, :, 1]
    X[2, :, ::3] = 0
    X[3] = with_kappa(m, R, 1e9)
    X[4] = 0
    X[5, m - 1, R - 1] = torch.inf
    return X.to(dtype)


@FLOATS
@pytest.mark.parametrize("R", [1, 7, 8, 9, 24, 25, 33, 70])
@pytest.mark.parametrize("m", [8, 70, 256, 257, 300, 513])
def test_sizes_around_panels_groups_and_strips(dtype, m, R):
    X = normal(2, m, R).to(dtype)
    X[1] = with_kappa(m, R, 1e12).to(dtype)  # by reflections in float32 too
    stack = make_stack([X])
    raw = qr(stack)
    check_qr(raw, stack)
    assert same(qr(stack, want_q=False)._replace(Q=raw.Q), raw)


@FLOATS
@pytest.mark.parametrize(("m", "R"), [(4095, 17), (4096, 9), (4097, 65), (6145, 40)])
@pytest.mark.parametrize("turned", [False, True])
def test_several_chains_whole_and_deficient(dtype, m, R, turned):
    X = normal(2, m, R).to(dtype)
    X[1, :, R // 2] = X[1, :, 0] - 2 * X[1, :, 1]
    X[1, :, 3] = 0
    stack = make_stack([X.mT.contiguous().mT if turned else X])
    raw = qr(stack)
    check_qr(raw, stack)
    assert raw.rank.tolist() == [R, R - (2 if dtype == torch.float64 else 1)]
    assert same(qr(stack, want_q=False)._replace(Q=raw.Q), raw)


def test_both_ways_agree():
    X = normal(3, 700, 40).float()
    X[1, :, 7] = 0
    gram, reflections = qr(make_stack([X])), qr(make_stack([X.double()]))
    assert torch.equal(gram.rank, reflections.rank)
    assert torch.equal(gram.notes, reflections.notes)
    for ours, exact in ((gram.R, reflections.R), (gram.Q, reflections.Q)):
        assert ((ours - exact).abs() <= 2 * roundoff(torch.float32) * exact.abs() + 1e-12 * exact.abs().max()).all()


def test_zero_columns_and_zero_matrices_need_no_reflections():
    X = normal(3, 90, 30).float()
    X[0, :, 4:20] = 0
    X[2] = 0
    stack = make_stack([X])
    raw = qr(stack)
    check_qr(raw, stack)
    assert raw.rank.tolist() == [14, 30, 0]
    assert raw.notes.tolist() == [Note.RANK_DEFICIENT, 0, Note.ZERO | Note.RANK_DEFICIENT]


@pytest.mark.parametrize("shift", [-1060, -800, 500, 1000])
def test_columns_out_of_range_are_those_in_range_scaled(shift):
    X = (8 * normal(3, 2500, 11)).round()  # of few enough digits to be subnormal
    X[0, :, 6] = X[0, :, 2]
    half = torch.ones(11, dtype=torch.float64)
    half[2::3] = 2.0 ** (shift // 2)
    weights = [[1.0, -1.0]]
    plain, raw = (qr(make_stack([x[:, :, :5], x[:, :, 5:]], weights)) for x in (X, X * half * half))
    assert raw.info.tolist() == [0, 0, 0]
    assert torch.equal(raw.rank, plain.rank)
    assert same_bits(raw.Q, plain.Q)
    assert same_bits(raw.R, plain.R * half * half)


@FLOATS
@pytest.mark.parametrize(("m", "R"), [(300, 21), (4500, 12)])
def test_bits_depend_on_the_matrix_alone(monkeypatch, dtype, m, R):
    X = motley(m, R, dtype)
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "1")
    for want_q in (True, False):
        alone = [qr(make_stack([X[i, :, :5], X[i, :, 5:]]), want_q) for i in range(7)]
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
            for order in (range(7), (6, 3, 5, 1), [2, 4, 5, 1, 0, 3, 6] * 2):
                batch = X[list(order)]
                raw = qr(make_stack([batch[:, :, :5], batch[:, :, 5:]]), want_q)
                for slot, i in enumerate(order):
                    assert same(one(raw, slot), alone[i]), (threads, slot, i)


def test_history_leaves_no_trace():
    stacks = [make_stack([normal(N, m, r).to(dtype)]) for N, m, r, dtype in (
        (3, 200, 17, torch.float32), (1, 4500, 40, torch.float64), (5, 9, 30, torch.bfloat16), (2, 600, 5, torch.float16),
    )]  # fmt: skip
    first = [qr(stack) for stack in stacks]
    for i in (3, 1, 0, 2, 1, 3, 0, 2):
        assert same(qr(stacks[i]), first[i])
    together = BACKEND.stacked_qr(stacks, True)
    assert all(same(a, b) for a, b in zip(together, first, strict=True))


@pytest.mark.parametrize("name", ["NaN", "Inf", "NaN among zeros", "overflow"])
@pytest.mark.parametrize(("m", "R"), [(5, 9), (2100, 9), (4500, 9)])
def test_float64_that_is_not_finite_or_hard_to_square(name, m, R):
    X = normal(2, m, R)
    if name == "NaN among zeros":
        X[1] = 0
    X[1, m - 1, R - 1] = {"Inf": torch.inf, "overflow": 1e308}.get(name, torch.nan)
    raw = qr(make_stack([X]))
    assert raw.info.tolist() == [0, 0 if name == "overflow" else Info.NONFINITE]
    assert bool(raw.R[1].isnan().all()) == (name != "overflow")
    assert raw.R[0].isfinite().all()
    if name == "overflow":
        assert raw.R[1].isfinite().all()
        assert ((raw.Q[1].T @ raw.Q[1] - torch.eye(raw.Q.shape[2])).abs() <= 64 * U64).all()


def test_no_blocks():
    raw = qr(Stack((), torch.ones(2, 0, dtype=torch.float64), 7))
    assert raw.Q.shape == (2, 7, 0)
    assert raw.notes.tolist() == [Note.ZERO] * 2


class Call:
    """One direct call on 2 x 40 x (3 + 6), the second matrix dependent; Q and R lie in wide buffers full of canaries."""

    CANARY = -77.0

    def __init__(self, dtype, want_q=True):
        self.library = BACKEND.library.functions("stacked_qr")
        X = normal(2, 40, 9).to(dtype)
        X[1, :, 7] = X[1, :, 2]
        self.stack = make_stack([X[:, :, :3], X[:, :, 3:]], [[1.0, -2.0]])
        self.buffers = [torch.full(shape, self.CANARY, dtype=dtype) for shape in ((2, 43, 22), (2, 13, 22))]
        self.Q, self.R = self.buffers[0][:, 2:42, 1:19:2], self.buffers[1][:, 2:11, 1:19:2]
        self.codes = [torch.full((2,), 85, dtype=torch.int32) for _ in range(3)]
        self.blocks, self.out_Q, self.out_R = table(self.stack.blocks), table([self.Q]), table([self.R])
        self.factors = torch.tensor([[[1.0, -2.0]] * 2], dtype=torch.float64)
        self.weights = table([self.factors])
        self.want_q, self.threads = want_q, 2
        self.small = [table([rows(code)]) for code in self.codes]
        needed = ctypes.c_int64()
        assert self.library.fedlora_stacked_qr_workspace(*self.tables(), 1, 2, ctypes.byref(needed)) == 0
        self.bytes = needed.value
        self.workspace = torch.empty(self.bytes + 64, dtype=torch.uint8)

    def tables(self):
        out_Q = self.out_Q if self.want_q else None
        return self.blocks, counts([2]), self.weights, out_Q, self.out_R, *self.small

    def __call__(self, poison=255):
        self.workspace.fill_(poison)
        address = self.workspace.data_ptr()
        return self.library.fedlora_stacked_qr(*self.tables(), 1, address, self.bytes, self.threads, None)


@FLOATS
@pytest.mark.parametrize("want_q", [False, True])
def test_writes_nothing_outside_and_needs_no_clean_workspace(dtype, want_q):
    call = Call(dtype, want_q)
    before = [block.clone() for block in call.stack.blocks]
    expected = qr(call.stack, want_q)
    for poison in (0, 127, 255):
        assert call(poison) == 0
        assert (call.workspace[call.bytes :] == poison).all()
        assert same_bits(call.R, expected.R)
        assert call.codes[0].tolist() == expected.rank.tolist() == [9, 8]
        assert call.codes[1].tolist() == [0, 0]
        assert call.codes[2].tolist() == [0, Note.RANK_DEFICIENT]
        call.R.fill_(Call.CANARY)
        if want_q:
            assert same_bits(call.Q, expected.Q)
            call.Q.fill_(Call.CANARY)
        assert all((buffer == Call.CANARY).all() for buffer in call.buffers)
    assert all(same_bits(a, b) for a, b in zip(call.stack.blocks, before, strict=True))


@pytest.mark.parametrize(
    ("table", "field", "value", "status"),
    [
        ("blocks", "rows", 39, 1),
        ("blocks", "cols", 4, 1),
        ("blocks", "batch", 3, 1),
        ("blocks", "dtype", 2, 2),
        ("blocks", "dtype", 1, 2),
        ("weights", "rows", 1, 1),
        ("weights", "cols", 3, 1),
        ("weights", "dtype", 0, 2),
        ("out_R", "rows", 8, 1),
        ("out_R", "dtype", 1, 2),
        ("out_Q", "rows", 41, 1),
        ("out_Q", "cols", 8, 1),
        ("out_Q", "dtype", 1, 2),
        (None, "bytes", 100, 3),
        (None, "threads", 0, 4),
    ],
)
def test_wrong_calls_are_refused_and_write_nothing(table, field, value, status):
    call = Call(torch.float32)
    setattr(getattr(call, table)[0] if table else call, field, value)
    assert call() == status
    assert all((buffer == Call.CANARY).all() for buffer in call.buffers)
    assert all((code == 85).all() for code in call.codes)


def test_scratch_does_not_grow_with_the_batch():
    library, needed = BACKEND.library.functions("stacked_qr"), [ctypes.c_int64(), ctypes.c_int64()]
    for N, answer in zip((10, 1000), needed, strict=True):
        X, R = torch.empty(1, 1, 1).expand(N, 5000, 60), torch.empty(1, 1, 1).expand(N, 60, 60)
        codes = table([torch.empty(1, dtype=torch.int32).expand(N)[:, None, None]])
        weights = table([torch.ones(1, N, 1, dtype=torch.float64)])
        tables = table([X]), counts([1]), weights, None, table([R]), codes, codes, codes
        assert library.fedlora_stacked_qr_workspace(*tables, 1, 2, ctypes.byref(answer)) == 0
    assert needed[1].value - needed[0].value <= 16 * 1000
