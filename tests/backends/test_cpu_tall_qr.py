"""QR by reflections of the cpu library, behind the second pass: orthonormal whatever the rank, bits, the C entry point."""

import ctypes

import pytest
import torch
from frames import DTYPES, dtype_id, normal, same_bits, with_kappa

from fedlora_kernels.backends import cpu
from fedlora_kernels.backends.contract import Factors, RuleCode, RuleSpec
from fedlora_kernels.backends.native import product
from fedlora_kernels.backends.native.library import counts, rows, table
from fedlora_kernels.backends.native.qr import tall_qr
from fedlora_kernels.backends.torch import householder
from fedlora_kernels.testing import U64

BACKEND = cpu.BACKEND
pytestmark = pytest.mark.skipif(not BACKEND.available()[0], reason=BACKEND.available()[1])


def qr(blocks, scale=None, e=None):
    width = sum(block.shape[-1] for block in blocks)
    scale = torch.ones(len(blocks[0]), width, dtype=torch.float64) if scale is None else scale
    return tall_qr(BACKEND.library, blocks, e, scale)


def check(Q, R, X):
    """Column-wise backward error, and Q^T Q = I in every direction, used or not."""
    norm = torch.linalg.vector_norm(X, dim=1)
    error = torch.linalg.vector_norm((X - Q @ R).mT.contiguous(), dim=-1)
    assert (error <= 64 * U64 * norm).all()
    QQ = torch.stack([part.mT @ part for part in Q.split(256, dim=1)]).sum(0)
    assert ((QQ - torch.eye(Q.shape[-1])).abs() <= 64 * U64).all()
    assert (R.tril(-1) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("m", "ranks"), [(1, (1,)), (70, (3, 0, 9)), (13, (20, 12)), (300, (33,)), (4500, (8, 17))])
@pytest.mark.parametrize("turned", [False, True])
def test_factors_the_scaled_stack(dtype, m, ranks, turned):
    blocks = [normal(2, m, r, seed=k).to(dtype) for k, r in enumerate(ranks)]
    blocks = [block.mT.contiguous().mT if turned else block for block in blocks]
    scale = normal(2, sum(ranks), seed=7)
    check(*qr(blocks, scale), torch.cat([block.double() for block in blocks], -1) * scale[:, None, :])


@pytest.mark.parametrize("m", [40, 300, 4500])
def test_is_orthonormal_whatever_the_rank(m):
    X = normal(4, m, 24)
    X[0, :, 7:20] = X[0, :, :13]
    X[1] = 0
    X[2] = with_kappa(m, 24, 1e16)
    X[3, :, ::2] *= 1e-100
    check(*qr([X]), X)


def test_exponents_are_taken_out_first():
    X, e = normal(2, 50, 6), torch.tensor([[900, -900, 3, 0, 0, 1]] * 2)
    scale = torch.tensor([[2.0**-300, 1.0, -1.0, 0.3, 1.0, 1.0]] * 2, dtype=torch.float64)
    half = 2.0 ** (e // 2).double()[:, None, :]
    huge = X * half * half * 2.0 ** (e % 2)[:, None, :]
    assert same_bits(qr([huge], scale, e)[1], qr([X], scale)[1])


def test_wider_stacks_are_those_of_torch():
    X = normal(1, 30, 1100)
    ours, theirs = qr([X]), householder.qr([X], None, torch.ones(1, 1100, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("m", "R"), [(300, 21), (4500, 12)])
def test_bits_depend_on_the_matrix_alone(monkeypatch, m, R):
    X = normal(5, m, R).float()
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "1")
    alone = [qr([X[i : i + 1, :, :5], X[i : i + 1, :, 5:]]) for i in range(5)]
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("FEDLORA_NUM_THREADS", threads)
        for order in ((0, 1, 2, 3, 4), (4, 1), [3, 2, 0] * 5):
            batch = X[list(order)]
            found = qr([batch[:, :, :5], batch[:, :, 5:]])
            for slot, i in enumerate(order):
                assert all(same_bits(a[slot], b[0]) for a, b in zip(found, alone[i], strict=True))


def test_the_second_pass_takes_it(monkeypatch):
    taken = []

    def spy(library, blocks, e, scale):
        taken.append(sum(block.shape[-1] for block in blocks))
        return tall_qr(library, blocks, e, scale)

    monkeypatch.setattr(product, "tall_qr", spy)
    B, A = normal(1, 60, 5), normal(1, 5, 50)
    blocks = (B, B + 1e-7 * normal(1, 60, 5, seed=1))
    factors = Factors(blocks, (A, A), torch.tensor([[1.0, -1.0]], dtype=torch.float64), 60, 50, 10)
    (raw,) = BACKEND.product_svd([factors], RuleSpec(RuleCode.ENERGY, 0.99), "usv", torch.float64)
    assert raw.passes.tolist() == [2]
    assert taken == [10, 10]


class Call:
    """One direct call on 2 x 40 x (3 + 6); Q and R lie in wide buffers full of canaries."""

    CANARY = -77.0

    def __init__(self):
        self.library = BACKEND.library.functions("product_svd")
        self.X = [normal(2, 40, 3).float(), normal(2, 40, 6)]
        self.factors = torch.ones(2, 9, dtype=torch.float64)
        self.buffers = [torch.full(shape, self.CANARY, dtype=torch.float64) for shape in ((2, 43, 22), (2, 13, 22))]
        self.Q, self.R = self.buffers[0][:, 2:42, 1:19:2], self.buffers[1][:, 2:11, 1:19:2]
        self.blocks, self.scale, self.counts = table(self.X), table([rows(self.factors)]), counts([2])
        self.out_Q, self.out_R, self.threads = table([self.Q]), table([self.R]), 2
        needed = ctypes.c_int64()
        assert self.library.fedlora_tall_qr_workspace(*self.tables(), 1, 2, ctypes.byref(needed)) == 0
        self.bytes = needed.value
        self.workspace = torch.empty(self.bytes + 64, dtype=torch.uint8)

    def tables(self):
        return self.blocks, self.counts, self.scale, self.out_Q, self.out_R

    def __call__(self, poison=255):
        self.workspace.fill_(poison)
        return self.library.fedlora_tall_qr(
            *self.tables(), 1, self.workspace.data_ptr(), self.bytes, self.threads, None
        )


def test_writes_nothing_outside_and_needs_no_clean_workspace():
    call = Call()
    expected = qr(call.X)
    for poison in (0, 127, 255):
        assert call(poison) == 0
        assert (call.workspace[call.bytes :] == poison).all()
        assert same_bits(call.Q, expected[0])
        assert same_bits(call.R, expected[1])
        call.Q.fill_(Call.CANARY)
        call.R.fill_(Call.CANARY)
        assert all((buffer == Call.CANARY).all() for buffer in call.buffers)


@pytest.mark.parametrize(
    ("table", "field", "value", "status"),
    [
        ("blocks", "rows", 39, 1),
        ("blocks", "cols", 4, 1),
        ("blocks", "dtype", 2, 2),
        ("scale", "rows", 0, 1),
        ("scale", "cols", 8, 1),
        ("scale", "dtype", 0, 2),
        ("out_R", "rows", 8, 1),
        ("out_R", "dtype", 0, 2),
        ("out_Q", "rows", 41, 1),
        ("out_Q", "cols", 8, 1),
        ("out_Q", "dtype", 0, 2),
        (None, "bytes", 100, 3),
        (None, "threads", 0, 4),
    ],
)
def test_wrong_calls_are_refused_and_write_nothing(table, field, value, status):
    call = Call()
    setattr(getattr(call, table)[0] if table else call, field, value)
    assert call() == status
    assert all((buffer == Call.CANARY).all() for buffer in call.buffers)
