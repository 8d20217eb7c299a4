"""`product_svd` of the CUDA library: both passes on the device, by the limits of every backend, whatever else the call holds."""

import ctypes
import functools

import pytest
import simulated
import torch
from guards import DTYPES, LAYOUTS, SCHEDULES, dtype_id, same_answer
from products import ALL, energy, factors, is_blank, row

from fedlora_kernels.backends import reference
from fedlora_kernels.backends.contract import Factors, Info, Note, RawProduct, RuleCode, RuleSpec
from fedlora_kernels.backends.cuda import BACKEND, CudaBackend
from fedlora_kernels.backends.cuda import product as of_cuda
from fedlora_kernels.backends.native.library import counts, table
from fedlora_kernels.testing import FAMILIES, LoRAProblem, check_product, exact_svd
from fedlora_kernels.testing.factors import cancelling, gaussian, identical_clients

REFERENCE = reference.BACKEND
CPU = torch.device("cpu")
OUTPUTS = ("usv", "left", "balanced")
RULES = {
    "all": ALL,
    "energy": energy(0.9),
    "capped": energy(0.99, 3),
    "rank": RuleSpec(RuleCode.RANK, 4.0),
    "ratio": RuleSpec(RuleCode.SV_RATIO, 3.0),
    "absolute": RuleSpec(RuleCode.ABSOLUTE, 2.0),
    "sum": RuleSpec(RuleCode.SV_SUM, 0.8),
    "whole sum": RuleSpec(RuleCode.SV_SUM, 1.0),
}
SHAPES = {  # m, n, ranks
    "one": (1, 1, (1,)),
    "vector": (1, 23, (1,)),
    "five": (19, 43, (2, 3)),
    "over q": (13, 47, (9, 8)),
    "a warp": (61, 70, (20, 12)),
    "33": (41, 50, (20, 0, 13)),
    "70": (150, 83, (40, 30)),
}
SECOND_PASS = 9
"""Launches that follow the first pass: tables, counters, QR, cores, their SVD, rank, Q, factors and signs."""


def pair(N, m, n, ranks, dtype=torch.float32, seed=0):
    """N updates with falling spectra."""
    make = torch.Generator().manual_seed(1000 * seed + m + n + sum(ranks))

    def draw(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    B = tuple((draw(N, m, r) * torch.logspace(0, -1, r, dtype=torch.float64)).to(dtype) for r in ranks)
    A = tuple(draw(N, r, n).to(dtype) for r in ranks)
    return Factors(B, A, draw(N, len(ranks)).abs() + 0.1, m, n, min(m, n, sum(ranks)))


def changed(group, change):
    """The group with every factor put through a function."""
    B, A = (tuple(change(block) for block in side) for side in (group.B, group.A))
    return Factors(B, A, group.weights, group.m, group.n, group.p_max)


def part(group, some):
    some = list(some)
    one = changed(group, lambda block: block[some])
    return Factors(one.B, one.A, group.weights[some], group.m, group.n, group.p_max)


def solved(cuda, groups, rule=ALL, output="usv", dtype=torch.float32):
    """Answers of one call, brought home."""
    backend, device = cuda
    there = [changed(group, lambda block: block.to(device)) if device.type == "cuda" else group for group in groups]
    return [RawProduct(*(field.cpu() for field in raw)) for raw in backend.product_svd(there, rule, output, dtype)]


def failed(result, problem, rule, output, exact=None):
    return [
        c for c in check_product(result, exact or exact_svd(problem), rule, output, sum(problem.ranks)) if not c.passed
    ]


@functools.cache
def known(family, dtype):
    """A problem of a family, and its SVD in extended precision; nothing where it leaves the range of the dtype."""
    ranks = (4,) * 4 if "cancelling" in family or "identical" in family else (5, 3, 8)
    problem = FAMILIES[family](53, 37, ranks, 1).to(dtype)
    whole = all(torch.isfinite(block).all() for block in problem.B + problem.A)
    return (problem, exact_svd(problem)) if whole else None


def families():
    """Every family, with two of the dtypes by turns; the others in the full form."""
    for f, family in enumerate(FAMILIES):
        for d, dtype in enumerate(DTYPES):
            marks = [] if (f + d) % 2 else [pytest.mark.full]
            yield pytest.param(family, dtype, id=f"{family}-{dtype_id(dtype)}", marks=marks)


@pytest.mark.parametrize(("family", "dtype"), list(families()))
def test_the_limits_of_every_metric(cuda, family, dtype):
    found = known(family, dtype)
    if found is None:
        pytest.skip(f"{family} leaves the range of {dtype}")
    problem, exact = found
    at = list(FAMILIES).index(family) + DTYPES.index(dtype)
    for rule, output in ((ALL, OUTPUTS[at % 3]), (energy(0.9), OUTPUTS[(at + 1) % 3])):
        result = row(solved(cuda, [factors(problem)], rule, output, dtype)[0])
        assert not failed(result, problem, rule, output, exact)


def decisions():
    """Every shape with every rule; large ones with a few, and all in the full form."""
    for shape in SHAPES:
        for rule in RULES:
            large = shape == "70" and rule not in ("energy", "sum")
            yield pytest.param(shape, rule, id=f"{shape}-{rule}", marks=[pytest.mark.full] if large else [])


@pytest.mark.parametrize(("shape", "rule"), list(decisions()))
def test_it_decides_as_the_reference_does(cuda, shape, rule):
    group = pair(2, *SHAPES[shape])
    at = list(SHAPES).index(shape) + list(RULES).index(rule)
    output = OUTPUTS[at % 3]
    (ours,), (theirs,) = (
        solved(cuda, [group], RULES[rule], output),
        REFERENCE.product_svd([group], RULES[rule], output, torch.float32),
    )
    for name in ("rank", "numerical_rank", "info"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.notes & ~Note.TWO_PASS, theirs.notes)
    for i in range(2):
        a, b = row(ours, i), row(theirs, i)
        p = int(a.rank)
        assert ((a.S - b.S).abs()[:p] / b.S[:p] <= a.sigma_err + b.sigma_err).all()
        assert not a.S[p:].any()
        assert not a.left[:, p:].any()
        assert not a.right[p:].any()
        assert float(a.rho) == pytest.approx(float(b.rho), rel=1e-6)
        for name in ("energy", "energy_abs"):
            assert float(getattr(a, name)) == pytest.approx(float(getattr(b, name)), rel=1e-9), name
        assert float(a.error) == pytest.approx(float(b.error), rel=1e-6, abs=1e-7)
        scale = (a.S if output == "usv" else torch.ones_like(a.S)).double()
        one, other = ((x.left.double() * scale) @ x.right.double() for x in (a, b))
        torch.testing.assert_close(one, other, rtol=0, atol=4e-6 * float(b.S[0] if p else 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("exponent", [1, 3, 5, 7])
def test_cancellation_is_certified(cuda, dtype, exponent):
    """Pairs that cancel down to 1e-7: the second pass keeps every value within its certificate."""
    problem = cancelling(47, 31, (6, 6), 3, delta=10.0**-exponent).to(dtype)
    exact = exact_svd(problem)
    result = row(solved(cuda, [factors(problem)], dtype=dtype)[0])
    assert result.rank == 6
    assert result.passes == 2 or result.rho <= (16 if dtype == torch.float64 else 1e4)
    assert bool(result.notes & Note.TWO_PASS) == (result.passes == 2)
    assert ((result.S[:6] - exact.s[:6]).abs() / exact.s[:6]).max() <= result.sigma_err
    assert not failed(result, problem, ALL, "usv", exact)


def test_what_cancels_exactly_is_zero(cuda):
    base = gaussian(29, 23, (4,), 1)
    problem = LoRAProblem(base.B * 2, base.A * 2, torch.tensor([1.0, -1.0], dtype=torch.float64))
    result = row(solved(cuda, [factors(problem)], dtype=torch.float64)[0])
    assert (result.rank, result.passes) == (0, 2)
    assert result.notes & Note.ZERO
    assert result.info == 0
    assert is_blank(result)


def test_what_no_rule_asks_for_needs_no_second_pass(cuda):
    problem = identical_clients(29, 23, (3, 3), 1).to(torch.float32)
    for rule, passes in ((ALL, 2), (energy(0.9), 1), (energy(1.0, 3), 1), (RuleSpec(RuleCode.RANK, 3.0), 1)):
        result = row(solved(cuda, [factors(problem)], rule)[0])
        assert (result.passes, result.rank) == (passes, min(3, int(result.rank)))


@pytest.mark.parametrize("sizes", [(1e150, 1.0), (1e-150, 1.0), (-1e150, 1e150), (1e-150, -1e-150), (1e150, 1e-150)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_weights_at_the_ends_of_the_range(cuda, dtype, sizes):
    base = gaussian(29, 23, (4, 3), 1)
    problem = LoRAProblem(base.B, base.A, torch.tensor(sizes, dtype=torch.float64)).to(dtype)
    for output in ("usv", "balanced"):
        result = row(solved(cuda, [factors(problem)], energy(0.99), output, torch.float64)[0])
        assert not failed(result, problem, energy(0.99), output)


@pytest.mark.parametrize("up", [1e200, 1e-200, 1e300])
def test_gauges_at_the_ends_of_float64(cuda, up):
    """B u and A / u: squares leave the range, the update does not."""
    base = gaussian(29, 23, (4, 3), 1)
    for turn in (False, True):
        B = (base.B[0] * up, base.B[1] / up) if turn else tuple(b * up for b in base.B)
        A = (base.A[0] / up, base.A[1] * up) if turn else tuple(a / up for a in base.A)
        problem = LoRAProblem(B, A, base.weights)
        result = row(solved(cuda, [factors(problem)], dtype=torch.float64)[0])
        plain = row(solved(cuda, [factors(base)], dtype=torch.float64)[0])
        assert (result.rank, result.info) == (7, 0)
        torch.testing.assert_close(result.S, plain.S, rtol=1e-13, atol=0)
        torch.testing.assert_close(result.left, plain.left, rtol=0, atol=1e-12)


def test_values_beyond_float64_are_told(cuda):
    base = gaussian(17, 13, (4, 3), 1)
    huge = LoRAProblem(tuple(b * 1e200 for b in base.B), tuple(a * 1e200 for a in base.A), base.weights)
    result = row(solved(cuda, [factors(huge)], RuleSpec(RuleCode.ABSOLUTE, 1.0), dtype=torch.float64)[0])
    assert (result.rank, result.info) == (7, Info.OVERFLOW)
    assert torch.isinf(result.S).all()


def test_halves_that_overflow_are_told(cuda):
    base = gaussian(29, 23, (4, 3), 1).to(torch.float16)
    problem = LoRAProblem(base.B, base.A, base.weights * 1e7)
    told = {output: row(solved(cuda, [factors(problem)], ALL, output, torch.float16)[0]) for output in OUTPUTS}
    assert [int(told[output].info) for output in OUTPUTS] == [0, Info.OVERFLOW, 0]
    assert told["left"].notes == 0


def test_clients_that_are_zero_leave_no_trace(cuda):
    group = pair(3, 57, 41, (5, 3))
    group.A[0][1, 1:3], group.B[-1][2, :, :2] = 0, 0
    group.B[0][0], group.B[1][0] = 0, 0
    (ours,) = solved(cuda, [group])
    (theirs,) = REFERENCE.product_svd([group], ALL, "usv", torch.float32)
    assert ours.rank.tolist() == theirs.rank.tolist() == [0, 6, 6]
    assert ours.notes.tolist() == theirs.notes.tolist() == [Note.ZERO, Note.RANK_DEFICIENT, Note.RANK_DEFICIENT]
    torch.testing.assert_close(ours.S, theirs.S, rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", ["B", "A"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_matrix(cuda, side, value):
    for dtype in (torch.float32, torch.float64):
        group = pair(5, 57, 41, (5, 3), dtype)
        (clean,) = solved(cuda, [group], energy(0.9), "left", dtype)
        for i in (0, 3):
            getattr(group, side)[0][i, -1, -1] = value
        (raw,) = solved(cuda, [group], energy(0.9), "left", dtype)
        for i in range(5):
            found = row(raw, i)
            if i not in (0, 3):
                assert same_answer(found, row(clean, i))
                continue
            assert (found.info, found.rank, found.numerical_rank, found.passes, found.notes) == (1, 0, 0, 0, 0)
            assert all(x.isnan().all() for x in found if x.dtype.is_floating_point)


def mixed_batch(dtype=torch.float32):
    """Three updates, of which the second needs a second pass."""
    problems = [gaussian(47, 31, (6, 6), 1), cancelling(47, 31, (6, 6), 3, delta=1e-6), gaussian(47, 31, (6, 6), 2)]
    weights = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return factors(*(LoRAProblem(x.B, x.A, weights).to(dtype) for x in problems))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_a_second_pass_among_others(cuda, dtype):
    group = mixed_batch(dtype)
    (raw,) = solved(cuda, [group], energy(0.9), "usv", dtype)
    assert raw.passes.tolist() == [1, 2, 1]
    for i in range(3):
        assert same_answer(row(raw, i), row(solved(cuda, [part(group, [i])], energy(0.9), "usv", dtype)[0]))
    (theirs,) = REFERENCE.product_svd([group], energy(0.9), "usv", dtype)
    assert torch.equal(raw.rank, theirs.rank)
    torch.testing.assert_close(raw.S, theirs.S, rtol=1e-9, atol=0)


def test_bits_know_neither_batch_nor_slot_nor_groups(cuda):
    """Ragged groups of every size in one call, matrices backwards, each by itself."""
    groups = [pair(N, *SHAPES[shape]) for N, shape in ((2, "five"), (1, "one"), (2, "over q"), (2, "a warp"))]
    groups.append(mixed_batch())
    together = solved(cuda, groups, energy(0.9), "balanced")
    backwards = solved(cuda, [part(g, reversed(range(g.batch))) for g in reversed(groups)], energy(0.9), "balanced")
    for group, one, other in zip(groups, together, reversed(backwards), strict=True):
        for i in range(group.batch):
            assert same_answer(row(one, i), row(other, group.batch - 1 - i))
            (alone,) = solved(cuda, [part(group, [i])], energy(0.9), "balanced")
            assert same_answer(row(one, i), row(alone))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(simt, layout):
    group = mixed_batch()
    (plain,) = solved((simt, CPU), [group])
    (laid,) = solved((simt, CPU), [changed(group, LAYOUTS[layout])])
    assert same_answer(plain, laid)


def test_inputs_are_left_alone(simt):
    group = mixed_batch()
    kept = changed(group, torch.clone)
    solved((simt, CPU), [group])
    assert all(torch.equal(a, b) for a, b in zip(group.B + group.A, kept.B + kept.A, strict=True))


def test_columns_of_several_dtypes(cuda):
    base = gaussian(53, 37, (4, 3, 2), 1)
    dtypes = (torch.float64, torch.bfloat16, torch.float32)
    B, A = (tuple(x.to(t) for x, t in zip(side, dtypes, strict=True)) for side in (base.B, base.A))
    problem = LoRAProblem(B, A, base.weights)
    assert not failed(row(solved(cuda, [factors(problem)])[0]), problem, ALL, "usv")


def test_powers_of_four_scale_exactly(cuda):
    base = gaussian(43, 31, (5, 3, 4), 1)
    for dtype in (torch.float64, torch.float32):
        problem = base.to(dtype)
        scaled = LoRAProblem(tuple(b * 4.0**9 for b in problem.B), problem.A, problem.weights)
        one, other = (row(solved(cuda, [factors(x)], dtype=dtype)[0]) for x in (problem, scaled))
        assert same_answer((one.left, one.right, one.S * 4.0**9), (other.left, other.right, other.S))


def test_calls_are_cut_where_memory_ends(simt, monkeypatch):
    """The bits of one call, in as many as the memory asks for: one matrix at a time, and some."""
    groups = [mixed_batch(), pair(3, *SHAPES["five"])]
    whole = solved((simt, CPU), groups)
    for room in (1, 1 << 17, 1 << 18):
        monkeypatch.setattr(of_cuda, "_SCRATCH", room)
        assert all(same_answer(a, b) for a, b in zip(solved((simt, CPU), groups), whole, strict=True))


def test_where_numbers_lie_changes_no_bit(simt, monkeypatch):
    """A Gram of 95 columns does not fit 80 KiB."""
    groups = [pair(1, 104, 99, (60, 35)), mixed_batch()]
    wanted = solved((simt, CPU), groups, energy(0.5))
    monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", str(80 << 10))
    assert all(same_answer(a, b) for a, b in zip(solved((simt, CPU), groups, energy(0.5)), wanted, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_order_of_threads_changes_no_bit(simt, monkeypatch, schedule):
    wanted = solved((simt, CPU), [mixed_batch()])
    monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
    assert same_answer(solved((simt, CPU), [mixed_batch()])[0], wanted[0])


@pytest.fixture(scope="module")
def counted():
    """The backend over a library that counts its launches, and how many there were."""
    if reason := simulated.missing():
        pytest.skip(reason)
    path = simulated.build(sources=[simulated.ROOT / "tests" / "cuda" / "launches_check.cpp"])
    launches = ctypes.CDLL(str(path)).check_launches
    launches.restype = ctypes.c_int64
    return CudaBackend(path, [simulated.HEADER], device="cpu"), launches


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_one_pass_is_ten_launches_at_most(counted, dtype):
    """For all groups of a call whose cores are of one size class, however many of them there are."""
    backend, launches = counted
    for shapes in (["five"], ["a warp", "over q"], ["a warp"] * 5):
        groups = [pair(3, *SHAPES[shape], dtype) for shape in shapes]
        before = launches()
        backend.product_svd(groups, energy(0.9), "usv", dtype)
        assert launches() - before <= 10 + SECOND_PASS


class Call:
    """One direct call on 3 x 70 x 50 x (3 + 6); what it writes lies in wide buffers full of canaries."""

    CANARY = -77

    def __init__(self, library):
        self.library = library.functions("product_svd")
        self.group = pair(3, 70, 50, (3, 6))
        shapes = {
            "left": ((3, 74, 24), torch.float32, (slice(2, 72), slice(1, 19, 2))),
            "right": ((3, 13, 108), torch.float32, (slice(2, 11), slice(3, 103, 2))),
            "S": ((3, 2, 12), torch.float64, (slice(1, 2), slice(2, 11))),
            "values": ((3, 11, 2), torch.float64, (slice(1, 10), slice(1, 2))),
            "codes": ((3, 8, 2), torch.int32, (slice(1, 7), slice(1, 2))),
            "balance": ((3, 2, 20), torch.float64, (slice(1, 2), slice(1, 19, 2))),
        }
        self.buffers = {k: torch.full(shape, self.CANARY, dtype=dtype) for k, (shape, dtype, _) in shapes.items()}
        self.views = {k: self.buffers[k][(slice(None), *where)] for k, (_, _, where) in shapes.items()}
        for name in ("left", "right"):
            self.views[name].zero_()
        self.tables = {name: table([view]) for name, view in self.views.items()}
        self.B, self.A = table(self.group.B), table(self.group.A)
        self.weights, self.counts = table([self.group.weights[None]]), counts([2])
        self.rule, self.value, self.cap, self.output = 0, 0.9, 0, 0
        self.bytes = self.asked()[1]

    def asked(self):
        needed, t = ctypes.c_int64(), self.tables
        query = self.library.fedlora_product_svd_workspace
        status = query(self.B, self.A, self.counts, t["left"], t["right"], 1, 1, ctypes.byref(needed))
        return status, needed.value

    def __call__(self, poison=255):
        memory, t = torch.full((self.bytes + 64,), poison, dtype=torch.uint8), self.tables
        status = self.library.fedlora_product_svd(
            self.B, self.A, self.counts, self.weights, t["left"], t["S"], t["right"], t["values"], t["codes"], t["balance"],
            1, self.rule, self.value, self.cap, self.output, None, memory.data_ptr() + 1, self.bytes, 1, None,
        )  # fmt: skip
        assert (memory[self.bytes + 1 :] == poison).all()
        return status

    def is_untouched(self, *but):
        """Everything outside the views, and inside but for those named."""
        for name, buffer in self.buffers.items():
            seen = buffer.clone()
            view = seen.as_strided(self.views[name].shape, self.views[name].stride(), self.views[name].storage_offset())
            if name in but or name in ("left", "right"):
                view.fill_(self.CANARY)
            assert (seen == self.CANARY).all(), name
        return True


def test_it_writes_nothing_outside_and_needs_no_clean_workspace(simt):
    answers = []
    for poison in (0, 255, 127):
        call = Call(simt.library)
        assert call(poison) == 0
        assert call.is_untouched(*call.views)
        answers.append([view.clone() for view in call.views.values()])
    assert same_answer(answers[0], answers[1])
    assert same_answer(answers[0], answers[2])
    assert (answers[0][4][:, 5] == 0).all()  # nothing is left in doubt


def test_what_is_refused(simt):
    def status(**changes):
        call = Call(simt.library)
        for name, value in changes.items():
            setattr(call, name, value)
        found = call()
        assert found == 0 or call.is_untouched()
        return found

    def with_table(name, view):
        call = Call(simt.library)
        call.tables[name] = table([view])
        return call()

    assert status() == 0
    assert status(bytes=2000) == 3
    assert status(rule=5) == status(value=-1.0) == status(cap=-1) == status(output=3) == status(weights=None) == 4
    assert status(value=float("nan")) == 4
    assert with_table("S", torch.empty(3, 1, 8).double()) == with_table("codes", torch.empty(3, 5, 1).int()) == 1
    assert with_table("left", torch.empty(3, 70, 9).half()) == with_table("balance", torch.empty(3, 1, 9)) == 2
    assert with_table("left", torch.empty(2, 70, 9)) == 1


@pytest.mark.parametrize(("m", "n", "ranks"), [(9, 30, (10, 8)), (600, 700, (300, 213))], ids=["dense", "wide"])
def test_the_library_refuses_what_is_better_formed_or_too_wide(simt, m, n, ranks):
    group = pair(1, m, n, ranks)
    left, right = torch.zeros(1, m, 3), torch.zeros(1, 3, n)
    needed, tables = ctypes.c_int64(), (table(group.B), table(group.A), counts([2]), table([left]), table([right]))
    query = simt.library.functions("product_svd").fedlora_product_svd_workspace
    assert query(*tables, 1, 1, ctypes.byref(needed)) == 1


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_dense_route(cuda, output):
    problem = gaussian(11, 31, (12, 13), 1).to(torch.float32)
    result = row(solved(cuda, [factors(problem)], energy(0.9), output)[0])
    assert result.notes & Note.DENSE
    assert not failed(result, problem, energy(0.9), output)


def test_nothing_to_do(cuda):
    backend, device = cuda
    group = Factors((), (), torch.ones(3, 0, dtype=torch.float64), 5, 4, 0)
    (raw,) = backend.product_svd([group], ALL, "usv", torch.float32)
    assert (raw.left.shape, raw.right.shape) == ((3, 5, 0), (3, 0, 4))
    assert backend.product_svd([], ALL, "usv", torch.float32) == []
    empty = changed(part(pair(1, 9, 8, (2,)), []), lambda block: block.to(device))
    assert backend.product_svd([empty], ALL, "usv", torch.float32)[0].left.shape == (0, 9, 2)


@pytest.fixture
def gpu():
    """The backend of a real device."""
    ok, reason = BACKEND.available()
    assert ok, reason
    return BACKEND, torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_it_does_not_wait_for_the_device(gpu):
    backend, device = gpu
    group = changed(mixed_batch(), lambda block: block.to(device))
    backend.product_svd([group], energy(0.9), "usv", torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (raw,) = backend.product_svd([group], energy(0.9), "usv", torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert raw.passes.tolist() == [1, 2, 1]


@pytest.mark.gpu
def test_a_captured_graph_answers_for_new_inputs(gpu):
    backend, device = gpu
    group = changed(mixed_batch(), lambda block: block.to(device))
    graph = torch.cuda.CUDAGraph()
    backend.product_svd([group], energy(0.9), "usv", torch.float32)
    with torch.cuda.graph(graph):
        (raw,) = backend.product_svd([group], energy(0.9), "usv", torch.float32)
    for block in group.B + group.A:
        block.copy_(block.flip(0))
    group.weights.copy_(group.weights.flip(0))  # those of the capture stay: they are alike here
    graph.replay()
    (again,) = backend.product_svd([group], energy(0.9), "usv", torch.float32)
    assert raw.passes.tolist() == [1, 2, 1]
    assert same_answer(raw, again)


@pytest.mark.gpu
def test_two_streams_at_once(gpu):
    backend, device = gpu
    groups = [changed(pair(20, 900, 700, (20, 12), seed=k), lambda block: block.to(device)) for k in range(2)]
    wanted = [backend.product_svd([group], energy(0.9), "usv", torch.float32)[0] for group in groups]
    torch.cuda.synchronize()
    found = []
    for group in groups * 3:
        with torch.cuda.stream(torch.cuda.Stream()):
            found += backend.product_svd([group], energy(0.9), "usv", torch.float32)
    torch.cuda.synchronize()
    assert all(same_answer(raw, wanted[k % 2]) for k, raw in enumerate(found))
