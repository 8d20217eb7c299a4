"""Stacked QR on the device: by Grams and by reflections, wherever numbers lie; bits, waves, the C entry point."""

import ctypes
from dataclasses import replace

import pytest
import torch
from frames import DTYPES, dtype_id, normal, orthogonal, same_bits, with_kappa
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stacked_qr import FAMILIES, RANKS, check_qr, column_norms, make_stack

from fedlora_kernels.backends import get
from fedlora_kernels.backends.contract import Info, Note, Stack
from fedlora_kernels.backends.native.library import counts, rows, table
from fedlora_kernels.testing import U64, roundoff

FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)


def qr(cuda, stack, want_q=True):
    (raw,) = raws(cuda, [stack], want_q)
    return raw


def raws(cuda, stacks, want_q=True):
    backend, device = cuda
    there = [replace(stack, blocks=tuple(block.to(device) for block in stack.blocks)) for stack in stacks]
    found = backend.stacked_qr(there, want_q)
    return [type(raw)(*(None if field is None else field.cpu() for field in raw)) for raw in found]


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


@pytest.mark.parametrize(
    "dtype", [pytest.param(t, id=dtype_id(t), marks=[pytest.mark.full] * (t.itemsize < 4)) for t in DTYPES]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_meets_the_limits(cuda, dtype, family):
    blocks, rank = FAMILIES[family]
    stack = make_stack([block.to(dtype) for block in blocks])
    raw = qr(cuda, stack)
    assert raw.Q.dtype == raw.R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_qr(raw, stack)
    if rank is None and dtype == torch.float64:
        rank = RANKS.get(family)
    if rank is not None and (dtype == torch.float64 or FAMILIES[family][1] is not None):
        assert raw.rank.tolist() == [rank]
    assert same(qr(cuda, stack, want_q=False)._replace(Q=raw.Q), raw)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("R", [1, 3, 17, 33, 66])
@pytest.mark.parametrize("m", ["below", "equal", "twice and one", "ten times"])
def test_awkward_sizes_against_the_reference(cuda, dtype, m, R):
    m = {"below": (R + 1) // 2, "equal": R, "twice and one": 2 * R + 1, "ten times": 10 * R + 1}[m]
    X = normal(3, m, R).to(dtype)
    X[1] = with_kappa(m, R, 1e12).to(dtype)
    X[2, :, R // 2] = X[2, :, 0]
    weights = [[1.0, -0.25, 3.0]] * 3
    cut = (R + 2) // 3
    stack = make_stack([X[:, :, :cut], X[:, :, cut:cut], X[:, :, cut:]], weights)
    raw, (exact,) = qr(cuda, stack), get("reference").stacked_qr([stack], True)
    check_qr(raw, stack)
    if dtype == torch.float64:
        assert torch.equal(raw.rank, exact.rank)
        assert torch.equal(raw.notes, exact.notes)
    unit = 512 * U64 if dtype == torch.float64 else 8 * roundoff(torch.float32)
    for ours, theirs in ((raw.R[0], exact.R[0]), (raw.Q[0], exact.Q[0])):
        kappa = torch.linalg.cond(X[0].double()) if m >= R else torch.linalg.cond(X[0, :, :m].double())
        assert (ours - theirs).abs().max() <= unit * max(kappa, 1) * theirs.abs().max()


@FLOATS
@pytest.mark.parametrize(("m", "R"), [(2100, 17), (1290, 66), (4097, 9)])
@pytest.mark.parametrize("turned", [False, True], ids=["by rows", "by columns"])
def test_several_leaves_whole_and_deficient(cuda, dtype, m, R, turned):
    X = normal(2, m, R).to(dtype)
    X[1, :, R // 2] = X[1, :, 0] - 2 * X[1, :, 1]
    X[1, :, 3] = 0
    stack = make_stack([X.mT.contiguous().mT if turned else X])
    raw = qr(cuda, stack)
    check_qr(raw, stack)
    assert raw.rank.tolist() == [R, R - (2 if dtype == torch.float64 else 1)]


def test_both_ways_agree(cuda):
    X = normal(3, 700, 40).float()
    X[1, :, 7] = 0
    gram, reflections = qr(cuda, make_stack([X])), qr(cuda, make_stack([X.double()]))
    assert torch.equal(gram.rank, reflections.rank)
    assert torch.equal(gram.notes, reflections.notes)
    for ours, exact in ((gram.R, reflections.R), (gram.Q, reflections.Q)):
        assert ((ours - exact).abs() <= 2 * roundoff(torch.float32) * exact.abs() + 1e-12 * exact.abs().max()).all()


def test_one_pass_up_to_its_limit_and_no_further(cuda):
    """Below kappa 1e3 a float32 stack loses 1e-10 of orthogonality; where the loss would show, reflections lose none."""
    for kappa in (1e1, 1e3, 3e3, 1e4, 1e5):
        stack = make_stack([with_kappa(300, 12, kappa).float()])
        raw = qr(cuda, stack)
        check_qr(raw, stack)
        assert (raw.R[0].double() - get("reference").stacked_qr([stack], False)[0].R[0]).abs().max() <= 1e-6


def test_zero_columns_and_zero_matrices_need_no_reflections(cuda):
    X = normal(3, 90, 30).float()
    X[0, :, 4:20] = 0
    X[2] = 0
    stack = make_stack([X])
    raw = qr(cuda, stack)
    check_qr(raw, stack)
    assert raw.rank.tolist() == [14, 30, 0]
    assert raw.notes.tolist() == [Note.RANK_DEFICIENT, 0, Note.ZERO | Note.RANK_DEFICIENT]


@FLOATS
def test_weights_scale_columns_and_their_sign_keeps_r_positive(cuda, dtype):
    blocks = [normal(2, 43, r, seed=k).to(dtype) for k, r in enumerate((5, 4, 6))]
    weights = torch.tensor([[-2.5, 0.3, -1e-7], [1.0, -1.0, 1e4]], dtype=torch.float64)
    stack = make_stack(blocks, weights)
    check_qr(qr(cuda, stack), stack)


@FLOATS
@pytest.mark.parametrize("family", ["tall", "duplicates", "zero columns inside", "kappa 1e14", "wide"])
def test_powers_of_two_are_exact(cuda, dtype, family):
    X = torch.cat(FAMILIES[family][0], dim=1).to(dtype)
    scale = 2.0 ** torch.randint(-20, 21, (X.shape[1],), generator=torch.Generator().manual_seed(1)).to(dtype)
    plain, scaled = qr(cuda, make_stack([X])), qr(cuda, make_stack([X * scale]))
    assert same_bits(scaled.R, plain.R * scale + 0.0)
    assert same_bits(scaled.Q, plain.Q)


@pytest.mark.parametrize("shift", [-1060, -800, 500, 1000])
def test_columns_out_of_range_are_those_in_range_scaled(cuda, shift):
    X = (8 * normal(3, 1100, 11)).round()  # of few enough digits to be subnormal
    X[0, :, 6] = X[0, :, 2]
    half = torch.ones(11, dtype=torch.float64)
    half[2::3] = 2.0 ** (shift // 2)
    weights = [[1.0, -1.0]]
    plain, raw = (qr(cuda, make_stack([x[:, :, :5], x[:, :, 5:]], weights)) for x in (X, X * half * half))
    assert raw.info.tolist() == [0, 0, 0]
    assert torch.equal(raw.rank, plain.rank)
    assert same_bits(raw.Q, plain.Q)
    assert same_bits(raw.R, plain.R * half * half)


@pytest.mark.parametrize("family", ["duplicates", "half rank", "dependent first columns", "zero columns inside"])
def test_deficient_r_survives_an_orthogonal_map_of_the_rows(cuda, family):
    blocks = FAMILIES[family][0]
    turn = orthogonal(blocks[0].shape[0], seed=4)
    before, after = (qr(cuda, make_stack(given)) for given in (blocks, [turn @ block for block in blocks]))
    assert torch.equal(before.rank, after.rank)
    assert (before.R - after.R).abs().max() <= 1e-12 * before.R.abs().max()


def test_mixed_dtypes_and_strides(cuda):
    X = normal(2, 137, 19)
    wide = torch.full((2, 137, 40), float("nan"))
    wide[:, :, 1:21:2] = X[:, :, 9:].float()
    stack = make_stack([X[:, :, :4].half(), X[:, :, 4:9].bfloat16().mT.contiguous().mT, wide[:, :, 1:21:2]])
    raw = qr(cuda, stack)
    assert raw.R.dtype == torch.float32
    check_qr(raw, stack)
    stack = make_stack([X[:, :, :4].half(), X[:1, :, 4:9].expand(2, 137, 5), wide[:, :, 1:21:2]])
    raw = qr(cuda, stack)
    assert raw.R.dtype == torch.float64
    check_qr(raw, stack)


@FLOATS
@pytest.mark.parametrize(("m", "R"), [(300, 21), (2500, 12)])
def test_bits_depend_on_the_matrix_alone(cuda, dtype, m, R):
    X = motley(m, R, dtype)
    for want_q in (True, False):
        alone = [qr(cuda, make_stack([X[i, :, :5], X[i, :, 5:]]), want_q) for i in range(7)]
        for order in (range(7), (6, 3, 5, 1), [2, 4, 5, 1, 0, 3, 6] * 2):
            batch = X[list(order)]
            raw = qr(cuda, make_stack([batch[:, :, :5], batch[:, :, 5:]]), want_q)
            for slot, i in enumerate(order):
                assert same(one(raw, slot), alone[i]), (slot, i)


def test_groups_of_a_call_are_independent(cuda):
    stacks = [make_stack([normal(N, m, r).to(dtype)]) for N, m, r, dtype in (
        (3, 200, 17, torch.float32), (1, 2500, 40, torch.float64), (5, 9, 30, torch.bfloat16), (2, 600, 5, torch.float16),
        (2, 1, 3, torch.float32), (1, 40, 1, torch.float64),
    )]  # fmt: skip
    empty = [
        Stack((torch.zeros(2, 0, 3),), torch.ones(2, 1, dtype=torch.float64), 0),
        make_stack([torch.zeros(0, 5, 2)]),
    ]
    alone = [qr(cuda, stack) for stack in stacks]
    together = raws(cuda, [*empty, *stacks])
    assert all(same(a, b) for a, b in zip(together[2:], alone, strict=True))
    assert together[0].notes.tolist() == [Note.ZERO | Note.RANK_DEFICIENT] * 2
    for stack, raw in zip(stacks, alone, strict=True):
        check_qr(raw, stack)


# the Gram's factor in shared memory and not; panels, leaves and columns of Q there, or nothing
@FLOATS
@pytest.mark.parametrize(("m", "R"), [(700, 40), (90, 97)])
def test_bits_do_not_depend_on_where_numbers_lie(simt, monkeypatch, dtype, m, R):
    cuda, stack = (simt, torch.device("cpu")), make_stack([motley(m, R, dtype)])
    expected = qr(cuda, stack)
    for shared in (90_000, 101_376, 166_912):
        monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", str(shared))
        assert same(qr(cuda, stack), expected)


@pytest.mark.parametrize("schedule", ["reverse", "1", "2"])
@FLOATS
def test_bits_do_not_depend_on_who_runs_first(simt, monkeypatch, schedule, dtype):
    cuda, stack = (simt, torch.device("cpu")), make_stack([motley(430, 75, dtype)])
    expected = qr(cuda, stack)
    monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
    monkeypatch.setenv("FEDLORA_SIMT_THREADS", "3")
    assert same(qr(cuda, stack), expected)


@FLOATS
def test_waves_change_nothing(cuda, dtype):
    """Scratch is bounded: what takes more is done bit by bit."""
    backend, device = cuda
    X = normal(2, 2048, 24).to(dtype)
    alone = qr(cuda, make_stack([X]))
    many = X[:1].expand(1200, 2048, 24).clone()
    many[[0, 700, 1199]] = X[1]
    if device.type == "cpu":  # the layout alone, for the simulated device is slow
        library, needed = backend.library.functions("stacked_qr"), [ctypes.c_int64(), ctypes.c_int64()]
        for N, answer in zip((700, 60_000), needed, strict=True):
            call = Call(cuda, dtype, normal(1, 2048, 9).to(dtype).expand(N, 2048, 9))
            assert library.fedlora_stacked_qr_workspace(*call.tables(), 1, 1, ctypes.byref(answer)) == 0
        assert needed[1].value <= (1 << 30) + (1 << 20)
        assert needed[0].value > 1 << 27
        return
    raw = qr(cuda, make_stack([many]))
    for i in (0, 1, 699, 700, 1198, 1199):
        assert same(one(raw, i), one(alone, int(i in (0, 700, 1199))))


@pytest.mark.parametrize("name", ["NaN", "Inf", "NaN among zeros", "overflow"])
@pytest.mark.parametrize(("m", "R"), [(5, 9), (2100, 9)])
def test_float64_that_is_not_finite_or_hard_to_square(cuda, name, m, R):
    X = normal(2, m, R)
    if name == "NaN among zeros":
        X[1] = 0
    X[1, m - 1, R - 1] = {"Inf": torch.inf, "overflow": 1e308}.get(name, torch.nan)
    raw = qr(cuda, make_stack([X]))
    assert raw.info.tolist() == [0, 0 if name == "overflow" else Info.NONFINITE]
    assert bool(raw.R[1].isnan().all()) == bool(raw.Q[1].isnan().all()) == (name != "overflow")
    assert raw.R[0].isfinite().all()
    if name == "overflow":
        assert raw.R[1].isfinite().all()
        assert ((raw.Q[1].T @ raw.Q[1] - torch.eye(raw.Q.shape[2])).abs() <= 64 * U64).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_non_finite_matrix_is_marked_and_alone(cuda, dtype, bad):
    X = normal(4, 31, 7).to(dtype)
    X[3, :, 2] = X[3, :, 1]
    poisoned = X.clone()
    poisoned[1, 30, 6] = bad
    clean, raw = (qr(cuda, make_stack([x[:, :, :3], x[:, :, 3:]])) for x in (X, poisoned))
    assert raw.info.tolist() == [0, Info.NONFINITE, 0, 0]
    assert raw.Q[1].isnan().all()
    assert raw.R[1].isnan().all()
    assert raw.rank.tolist() == [7, 0, 7, 6]
    assert raw.notes.tolist() == [0, 0, 0, Note.RANK_DEFICIENT]
    assert all(same(one(raw, i), one(clean, i)) for i in (0, 2, 3))


def test_overflow_of_r_is_marked(cuda):
    raw = qr(cuda, make_stack([normal(2, 17, 3).float()], [[1.0], [1e39]]))
    assert raw.info.tolist() == [0, Info.OVERFLOW]
    assert raw.R[0].isfinite().all()


def test_errors_do_not_depend_on_the_number_of_rows(cuda):
    X = normal(1, 30_001, 19)
    X[0, :, -1] = 3 * X[0, :, 0]
    stack = make_stack([X])
    raw = qr(cuda, stack)
    check_qr(raw, stack)
    assert raw.rank.tolist() == [18]
    assert (column_norms(raw.R) > 0).all()


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    N=st.integers(1, 3),
    m=st.integers(1, 150),
    ranks=st.lists(st.integers(0, 25), min_size=1, max_size=4).filter(any),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
    dependent=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_stack_meets_the_limits(simt, N, m, ranks, dtypes, dependent, seed):
    X = normal(N, m, sum(ranks), seed=seed)
    if dependent:
        X[:, :, -1] = X[:, :, 0]
    parts = [part.to(dtype) for part, dtype in zip(X.split(ranks, dim=-1), dtypes, strict=False)]
    weights = normal(N, len(ranks), seed=seed + 1)
    stack = make_stack(parts, weights)
    check_qr(qr((simt, torch.device("cpu")), stack), stack)


@pytest.mark.full
@FLOATS
@pytest.mark.parametrize(("m", "R"), [(700, 300), (1100, 520), (40, 1024), (1030, 1024)])
def test_wide_stacks(cuda, dtype, m, R):
    X = normal(1, m, R).to(dtype)
    X[0, :, 7] = X[0, :, 3]
    stack = make_stack([X])
    raw = qr(cuda, stack)
    check_qr(raw, stack)
    assert raw.rank.tolist() == [min(m, R - 1)]


class Call:
    """One direct call on 2 x 40 x (3 + 6), the second matrix dependent; Q and R lie in wide buffers full of canaries."""

    CANARY = -77.0

    def __init__(self, cuda, dtype, X=None, want_q=True):
        backend, self.device = cuda
        self.library = backend.library.functions("stacked_qr")
        if X is None:
            X = normal(2, 40, 9).to(dtype)
            X[1, :, 7] = X[1, :, 2]
            X = X.to(self.device)
        N, m, _ = X.shape
        self.blocks_given = [X[:, :, :3], X[:, :, 3:]]
        self.buffers = [
            torch.full((min(N, 2), rows, 22), self.CANARY, dtype=dtype, device=self.device) for rows in (m + 3, 13)
        ]
        outs = [self.buffers[0][:, 2 : m + 2, 1:19:2], self.buffers[1][:, 2:11, 1:19:2]]
        self.Q, self.R = outs if N == 2 else [out[:1].expand(N, *out.shape[1:]) for out in outs]
        codes = torch.full((3, min(N, 2)), 85, dtype=torch.int32, device=self.device)
        self.codes = codes if N == 2 else codes[:, :1].expand(3, N)
        self.blocks, self.out_Q, self.out_R = table(self.blocks_given), table([self.Q]), table([self.R])
        self.factors = torch.tensor([[[1.0, -2.0]] * N], dtype=torch.float64)
        self.weights = table([self.factors])
        self.want_q, self.threads = want_q, 2
        self.small = [table([rows(code)]) for code in self.codes]
        if N == 2:
            needed = ctypes.c_int64()
            assert self.library.fedlora_stacked_qr_workspace(*self.tables(), 1, 2, ctypes.byref(needed)) == 0
            self.bytes = needed.value
            self.workspace = torch.empty(self.bytes + 64, dtype=torch.uint8, device=self.device)

    def tables(self):
        out_Q = self.out_Q if self.want_q else None
        return self.blocks, counts([2]), self.weights, out_Q, self.out_R, *self.small

    def __call__(self, poison=255):
        self.workspace.fill_(poison)
        address = self.workspace.data_ptr()
        return self.library.fedlora_stacked_qr(*self.tables(), 1, address, self.bytes, self.threads, None)


@FLOATS
@pytest.mark.parametrize("want_q", [False, True])
def test_writes_nothing_outside_and_needs_no_clean_workspace(cuda, dtype, want_q):
    call = Call(cuda, dtype, want_q=want_q)
    before = [block.clone() for block in call.blocks_given]
    expected = qr(cuda, make_stack(call.blocks_given, [[1.0, -2.0]]), want_q)
    for poison in (0, 127, 255):
        assert call(poison) == 0
        assert (call.workspace[call.bytes :] == poison).all()
        assert same_bits(call.R.cpu(), expected.R)
        assert call.codes.tolist() == [[9, 8], [0, 0], [0, Note.RANK_DEFICIENT]]
        call.R.fill_(Call.CANARY)
        if want_q:
            assert same_bits(call.Q.cpu(), expected.Q)
            call.Q.fill_(Call.CANARY)
        assert all((buffer == Call.CANARY).all() for buffer in call.buffers)
    assert all(same_bits(a, b) for a, b in zip(call.blocks_given, before, strict=True))


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
def test_wrong_calls_are_refused_and_write_nothing(cuda, table, field, value, status):
    call = Call(cuda, torch.float32)
    setattr(getattr(call, table)[0] if table else call, field, value)
    assert call() == status
    assert all((buffer == Call.CANARY).all() for buffer in call.buffers)
    assert (call.codes == 85).all()
