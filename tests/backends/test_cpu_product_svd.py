"""The one pass of `product_svd` in the cpu library: its C entry, its bits, and that it decides as the torch backend does."""

import ctypes

import pytest
import torch
from frames import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from products import ALL, energy, factors, matrix, row

from fedlora_kernels.backends import cpu
from fedlora_kernels.backends.contract import Factors, Info, Note, RuleCode, RuleSpec
from fedlora_kernels.backends.cpu import product
from fedlora_kernels.backends.native.library import counts, table
from fedlora_kernels.backends.torch import TorchBackend
from fedlora_kernels.testing import FAMILIES
from fedlora_kernels.testing.factors import cancelling, gaussian, identical_clients

BACKEND, TORCH = cpu.BACKEND, TorchBackend()
pytestmark = pytest.mark.skipif(not BACKEND.available()[0], reason=BACKEND.available()[1])

OUTPUTS = ("usv", "left", "balanced")
RULES = {
    "all": ALL,
    "energy": energy(0.9),
    "frobenius": energy(0.99**2),
    "capped": energy(0.99, 3),
    "rank": RuleSpec(RuleCode.RANK, 4.0),
    "ratio": RuleSpec(RuleCode.SV_RATIO, 3.0),
    "absolute": RuleSpec(RuleCode.ABSOLUTE, 2.0),
    "sum": RuleSpec(RuleCode.SV_SUM, 0.8),
    "whole sum": RuleSpec(RuleCode.SV_SUM, 1.0),
}
SHAPES = {  # m, n, ranks: lanes, the large SVD, stacks wider than the matrix, several chunks of rows
    "one": (1, 1, (1,)),
    "lanes": (57, 41, (5, 3)),
    "all lanes": (61, 70, (20, 12)),
    "large": (90, 130, (20, 0, 33)),
    "over q": (29, 90, (16, 25)),
    "chunks": (4100, 60, (9, 2)),
    "large chunks": (70, 6300, (30, 4)),
}


def pair(N, m, n, ranks, dtype=torch.float32, seed=0):
    """N updates with falling spectra."""
    make = torch.Generator().manual_seed(1000 * seed + m + n + sum(ranks))

    def draw(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    B = tuple((draw(N, m, r) * torch.logspace(0, -1, r, dtype=torch.float64)).to(dtype) for r in ranks)
    A = tuple(draw(N, r, n).to(dtype) for r in ranks)
    return Factors(B, A, draw(N, len(ranks)).abs() + 0.1, m, n, min(m, n, sum(ranks)))


def part(group, rows):
    rows = list(rows)
    return Factors(
        tuple(b[rows] for b in group.B),
        tuple(a[rows] for a in group.A),
        group.weights[rows],
        group.m,
        group.n,
        group.p_max,
    )


def same(one, other):
    return all(same_bits(x, y) for x, y in zip(one, other, strict=True))


def agree(ours, theirs, dtype):
    """What must be equal is; numbers to rounding; the kept part as a matrix, whatever the vectors of equal values."""
    for name in ("rank", "numerical_rank", "passes", "info", "notes"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    limit = 16 * 2.0**-53
    for i in range(len(ours.rank)):
        # errors are those of one pass, which both are allowed
        a, b = row(ours, i), row(theirs, i)
        rho = float(b.rho) if b.rank else 0.0
        assert float((a.S - b.S).abs().max()) <= (64 + rho**2) * limit * float(b.S[0])
        assert float(a.rho) == pytest.approx(float(b.rho), rel=1e-9)
        assert float(a.sigma_err) == pytest.approx(float(b.sigma_err), rel=1e-9)
        assert float(a.energy) == pytest.approx(float(b.energy), rel=1e-9)
        assert float(a.energy_abs) == pytest.approx(float(b.energy_abs), rel=1e-12)
        assert float(a.error) == pytest.approx(float(b.error), rel=1e-6, abs=1e-9)
        assert float(a.error_bound) == pytest.approx(float(b.error_bound), rel=1e-6, abs=1e-9)
    step = float(torch.finfo(dtype).eps)
    scale = theirs.S[:, :1, None]
    assert ((matrix_of(ours) - matrix_of(theirs)).abs() <= (4 * step + 1e-10) * scale).all()


def matrix_of(raw):
    return raw.left.double() * raw.S[:, None, :] @ raw.right.double()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_decides_as_torch_does(shape, rule):
    group = pair(3, *SHAPES[shape])
    (ours,), (theirs,) = (b.product_svd([group], RULES[rule], "usv", torch.float32) for b in (BACKEND, TORCH))
    agree(ours, theirs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_decides_as_torch_does_for_every_family(family, dtype):
    ranks = (4,) * 4 if "cancelling" in family or "identical" in family else (5, 3, 8)
    problem = FAMILIES[family](53, 37, ranks, 1).to(dtype)
    if not all(torch.isfinite(block).all() for block in problem.B + problem.A):
        pytest.skip(f"{family} leaves the range of {dtype}")
    for rule in ("energy", "rank"):
        group = factors(problem, cap=RULES[rule].cap)
        (ours,), (theirs,) = (b.product_svd([group], RULES[rule], "usv", dtype) for b in (BACKEND, TORCH))
        for name in ("rank", "passes", "info", "notes"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (name, rule)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    ranks=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    rule=st.sampled_from(sorted(RULES)),
    output=st.sampled_from(OUTPUTS),
    seed=st.integers(0, 99),
)
def test_any_shape_rule_and_output(m, n, ranks, rule, output, seed):
    group = pair(2, m, n, ranks, seed=seed)
    (ours,), (theirs,) = (b.product_svd([group], RULES[rule], output, torch.float32) for b in (BACKEND, TORCH))
    assert torch.equal(ours.rank, theirs.rank)
    assert torch.equal(ours.notes, theirs.notes)
    for i in range(2):
        torch.testing.assert_close(
            matrix(row(ours, i), output),
            matrix(row(theirs, i), output),
            rtol=0,
            atol=1e-5 * float(theirs.S[i].sum() + 1),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_know_neither_batch_nor_slot_nor_threads(monkeypatch, shape, dtype):
    """One thread takes whole waves, several share what is left: every way of cutting a batch up."""
    group = pair(19 if shape in ("lanes", "all lanes") else 5, *SHAPES[shape], dtype)
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "1")
    N, rule = group.batch, energy(0.9)
    alone = [row(BACKEND.product_svd([part(group, [i])], rule, "left", dtype)[0]) for i in range(N)]
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
        for order in ([*range(N)], [*reversed(range(N))], [*range(1, N)]):
            (raw,) = BACKEND.product_svd([part(group, order)], rule, "left", dtype)
            for place, i in enumerate(order):
                assert same(row(raw, place), alone[i]), (threads, place, i)


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_groups_of_one_call_do_not_know_each_other(monkeypatch, threads):
    groups = [pair(N, *shape) for N, shape in zip((3, 9, 1, 2, 5), list(SHAPES.values())[:5], strict=True)]
    expected = [BACKEND.product_svd([group], energy(0.9), "balanced", torch.float32)[0] for group in groups]
    monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
    for found, raw in zip(BACKEND.product_svd(groups, energy(0.9), "balanced", torch.float32), expected, strict=True):
        assert same(found, raw)


@pytest.mark.parametrize("shape", ["lanes", "large"])
@pytest.mark.parametrize("side", ["B", "A"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_matrix(shape, side, value):
    group = pair(11, *SHAPES[shape])
    (clean,) = BACKEND.product_svd([group], energy(0.9), "left", torch.float32)
    for i in (0, 6):
        getattr(group, side)[0][i, -1, -1] = value
    (raw,) = BACKEND.product_svd([group], energy(0.9), "left", torch.float32)
    for i in range(11):
        if i not in (0, 6):
            assert same(row(raw, i), row(clean, i))
            continue
        bad = row(raw, i)
        assert (bad.info, bad.rank, bad.numerical_rank, bad.passes, bad.notes) == (Info.NONFINITE, 0, 0, 0, 0)
        assert all(x.isnan().all() for x in bad if x.dtype.is_floating_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_that_need_a_second_pass_among_those_that_do_not(dtype):
    problems = [gaussian(47, 31, (6, 6), 1), cancelling(47, 31, (6, 6), 3, delta=1e-6), gaussian(47, 31, (6, 6), 2)]
    problems = [type(x)(x.B, x.A, torch.tensor([1.0, -1.0]).double()).to(dtype) for x in problems]
    group = factors(*problems)
    (raw,) = BACKEND.product_svd([group], energy(0.9), "usv", dtype)
    assert raw.passes.tolist() == [1, 2, 1]
    assert (raw.notes & Note.TWO_PASS).tolist() == [0, 4, 0]
    for i in range(3):
        assert same(row(raw, i), row(BACKEND.product_svd([part(group, [i])], energy(0.9), "usv", dtype)[0]))
    (theirs,) = TORCH.product_svd([group], energy(0.9), "usv", dtype)
    assert torch.equal(raw.rank, theirs.rank)
    torch.testing.assert_close(raw.S, theirs.S, rtol=1e-9, atol=0)
    torch.testing.assert_close(raw.energy_abs, theirs.energy_abs, rtol=1e-12, atol=0)


def test_what_no_rule_asks_for_needs_no_second_pass():
    problem = identical_clients(29, 23, (3, 3), 1).to(torch.float32)
    for rule, passes in ((ALL, 2), (energy(0.9), 1), (energy(1.0, 3), 1), (RuleSpec(RuleCode.RANK, 3.0), 1)):
        (raw,) = BACKEND.product_svd([factors(problem)], rule, "usv", torch.float32)
        assert (raw.passes, raw.rank) == (passes, min(3, int(raw.rank)))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", ["lanes", "large"])
def test_columns_that_are_zero_in_one_factor_leave_no_trace(shape):
    group = pair(3, *SHAPES[shape])
    group.A[0][1, 1:3], group.B[-1][2, :, :2] = 0, 0
    (ours,), (theirs,) = (b.product_svd([group], energy(0.9), "usv", torch.float32) for b in (BACKEND, TORCH))
    agree(ours, theirs, torch.float32)


def test_stacks_wider_than_the_library_takes_do_not_know_their_batch():
    group = pair(3, 400, 300, (300, 230))
    (raw,) = BACKEND.product_svd([group], energy(0.9), "usv", torch.float32)
    for i in range(3):
        assert same(row(raw, i), row(BACKEND.product_svd([part(group, [i])], energy(0.9), "usv", torch.float32)[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_fall_to_the_first_across_chunks(dtype):
    """The largest elements of a column stand in different chunks: exactly equal, and within the window."""
    m = 3 * 2048 + 5
    for sizes, first in (((1.0, -1.0, 1.0), 1.0), ((-1.0, 1.0, 1.0), -1.0), ((-0.999, -1.0, 1.0), -1.0)):
        B = torch.zeros(1, m, 1)
        for place, size in zip((7, 2048, m - 1), sizes, strict=True):
            B[0, place, 0] = size
        A = torch.ones(1, 1, 9)
        group = Factors((B.to(dtype),), (A.to(dtype),), torch.ones(1, 1, dtype=torch.float64), m, 9, 1)
        (raw,) = BACKEND.product_svd([group], ALL, "left", dtype)
        assert raw.left[0, m - 1, 0] * first > 0
        torch.testing.assert_close(raw.left[0].float() @ raw.right[0].float(), (B @ A)[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("exponent", [19, 20, 21, 22])
def test_the_window_of_the_sign_rule(exponent):
    """In float64, to the last bit: an element decides if it is within 2^-20 of the largest, wherever that stands."""
    m, early = 5000, -(1 - 2.0**-exponent)
    B = torch.zeros(1, m, 1, dtype=torch.float64)
    B[0, 3, 0], B[0, 17, 0], B[0, 4000, 0] = early, 0.9, 1.0
    group = Factors((B,), (torch.ones(1, 1, 3).double(),), torch.ones(1, 1, dtype=torch.float64), m, 3, 1)
    (raw,) = BACKEND.product_svd([group], ALL, "usv", torch.float64)
    assert (raw.left[0, 3, 0] > 0) == (exponent >= 20)


def test_seconds_are_told_by_stage():
    seconds = torch.zeros(len(product.STAGES), dtype=torch.float64)
    product.product_svd(
        BACKEND.library, [pair(4, 500, 400, (20, 20))], energy(0.9), "usv", torch.float32, seconds=seconds
    )
    assert (seconds > 0).all()
    assert seconds.sum() < 10


class Call:
    """One direct call on 3 x 70 x 50 x (3 + 6); factors, values and codes lie in wide buffers full of canaries."""

    CANARY = -77.0

    def __init__(self):
        self.library = BACKEND.library.functions("product_svd")
        self.group = pair(3, 70, 50, (3, 6))
        self.buffers = {
            "left": torch.full((3, 74, 24), self.CANARY),
            "right": torch.full((3, 13, 108), self.CANARY),
            "S": torch.full((3, 2, 12), self.CANARY, dtype=torch.float64),
            "values": torch.full((3, 11, 2), self.CANARY, dtype=torch.float64),
            "codes": torch.full((3, 8, 2), int(self.CANARY), dtype=torch.int32),
            "balance": torch.full((3, 2, 20), self.CANARY, dtype=torch.float64),
        }
        self.views = {
            "left": self.buffers["left"][:, 2:72, 1:19:2],
            "right": self.buffers["right"][:, 2:11, 3:103:2],
            "S": self.buffers["S"][:, 1:, 2:11],
            "values": self.buffers["values"][:, 1:10, 1:],
            "codes": self.buffers["codes"][:, 1:7, 1:],
            "balance": self.buffers["balance"][:, 1:, 1:19:2],
        }
        for name in ("left", "right"):
            self.views[name].zero_()
        self.tables = {name: table([view]) for name, view in self.views.items()}
        self.B, self.A = table(self.group.B), table(self.group.A)
        self.weights, self.counts = table([self.group.weights[None]]), counts([2])
        self.rule, self.value, self.cap, self.output, self.threads = 0, 0.9, 0, 0, 2
        needed = ctypes.c_int64()
        asked = self.library.fedlora_product_svd_workspace(
            self.B, self.A, self.counts, self.tables["left"], self.tables["right"], 1, 2, ctypes.byref(needed)
        )
        assert asked == 0
        self.bytes = needed.value
        self.workspace = torch.empty(self.bytes + 64, dtype=torch.uint8)

    def __call__(self, poison=255):
        self.workspace.fill_(poison)
        t = self.tables
        return self.library.fedlora_product_svd(
            self.B, self.A, self.counts, self.weights, t["left"], t["S"], t["right"], t["values"], t["codes"], t["balance"],
            1, self.rule, self.value, self.cap, self.output, None, self.workspace.data_ptr(), self.bytes, self.threads, None,
        )  # fmt: skip

    def untouched(self, *but):
        """All buffers outside the views, and inside but for those named."""
        for name, buffer in self.buffers.items():
            seen = buffer.clone()
            view = seen.as_strided(self.views[name].shape, self.views[name].stride(), self.views[name].storage_offset())
            if name in ("left", "right") and name not in but:
                assert not view.any()
            if name in but or name in ("left", "right"):
                view.fill_(self.CANARY)
            assert (seen == self.CANARY).all(), name
        return True


def test_it_writes_nothing_outside_and_needs_no_clean_workspace():
    call = Call()
    (expected,) = BACKEND.product_svd([call.group], energy(0.9), "usv", torch.float32)
    for poison in (0, 127, 255):
        assert call(poison) == 0
        assert (call.workspace[call.bytes :] == poison).all()
        assert same_bits(call.views["left"], expected.left)
        assert same_bits(call.views["right"], expected.right)
        assert same_bits(call.views["S"][:, 0], expected.S)
        assert call.views["codes"][:, 0, 0].tolist() == expected.rank.tolist()
        assert call.untouched("left", "right", "S", "values", "codes", "balance")
        call.views["left"].zero_()
        call.views["right"].zero_()


@pytest.mark.parametrize(
    ("table", "field", "value", "status"),
    [
        ("B", "rows", 69, 1),
        ("B", "cols", 4, 1),
        ("B", "batch", 2, 1),
        ("B", "dtype", 2, 2),
        ("A", "rows", 2, 1),
        ("A", "cols", 49, 1),
        ("A", "dtype", 9, 2),
        ("weights", "cols", 3, 1),
        ("weights", "dtype", 0, 2),
        ("left", "dtype", 1, 2),
        ("left", "cols", 8, 1),
        ("left", "rows", 0, 1),
        ("right", "batch", 4, 1),
        ("S", "cols", 8, 1),
        ("S", "dtype", 0, 2),
        ("values", "rows", 8, 1),
        ("codes", "dtype", 1, 2),
        ("codes", "rows", 5, 1),
        ("balance", "cols", 8, 1),
        (None, "bytes", 100, 3),
        (None, "threads", 0, 4),
        (None, "rule", 5, 4),
        (None, "rule", -1, 4),
        (None, "value", float("nan"), 4),
        (None, "cap", -1, 4),
        (None, "output", 3, 4),
    ],
)
def test_wrong_calls_are_refused_and_write_nothing(table, field, value, status):
    call = Call()
    where = call if table is None else getattr(call, table)[0] if hasattr(call, table) else call.tables[table][0]
    setattr(where, field, value)
    assert call() == status
    assert call.untouched()


def test_a_stack_that_is_too_wide_or_has_no_columns_is_refused():
    for width, status in ((0, 1), (513, 1), (512, 0)):
        B, A = torch.ones(1, 1, 1).expand(1, 9, width), torch.ones(1, 1, 1).expand(1, width, 9)
        needed = ctypes.c_int64()
        out = table([torch.zeros(1, 9, 9)])
        asked = BACKEND.library.functions("product_svd").fedlora_product_svd_workspace(
            table([B]), table([A]), counts([1]), out, out, 1, 2, ctypes.byref(needed)
        )
        assert asked == status


def test_scratch_does_not_grow_with_the_batch_and_hardly_with_rows():
    library, needed, found = BACKEND.library.functions("product_svd"), ctypes.c_int64(), []
    for N, m in ((60, 4096), (6000, 4096), (60, 100_000)):
        B, A = torch.empty(1, 1, 64).expand(N, m, 64), torch.empty(1, 64, 1).expand(N, 64, m)
        left, right = torch.empty(1, 1, 64).expand(N, m, 64), torch.empty(1, 64, 1).expand(N, 64, m)
        args = table([B]), table([A]), counts([1]), table([left]), table([right])
        assert library.fedlora_product_svd_workspace(*args, 1, 2, ctypes.byref(needed)) == 0
        found.append(needed.value)
    assert found[0] == found[1]
    assert found[2] < found[0] + 2 * 64 * 200 * 50
    assert found[0] < 8 << 20
