"""QR of tall stacks on the device: leaves, tree and the way back, wherever numbers lie; bits, the C entry point."""

import ctypes

import pytest
import torch
from frames import DTYPES, dtype_id, normal, same_bits, with_kappa

from fedlora_kernels.backends.native.library import counts, rows, table
from fedlora_kernels.backends.native.qr import tall_qr
from fedlora_kernels.testing import CLASSICS, U64

NAN = float("nan")


def qr(cuda, blocks, scale=None, e=None):
    backend, device = cuda
    width = sum(block.shape[-1] for block in blocks)
    scale = torch.ones(len(blocks[0]), width, dtype=torch.float64) if scale is None else scale
    e = None if e is None else e.to(device)
    Q, R = tall_qr(backend.library, [on(device, block) for block in blocks], e, scale.to(device))
    return Q.cpu(), R.cpu()


def on(device, block):
    """The block there, with the strides that it has."""
    return block if device.type == "cpu" else torch.empty_like(block, device=device).copy_(block)


def check(Q, R, X):
    """Column-wise backward error, and Q^T Q = I in every direction, used or not."""
    norm = torch.linalg.vector_norm(X, dim=1)
    error = torch.linalg.vector_norm((X - Q @ R).mT.contiguous(), dim=-1)
    assert (error <= 64 * U64 * norm).all()
    QQ = torch.stack([part.mT @ part for part in Q.split(256, dim=1)]).sum(0)
    assert ((QQ - torch.eye(Q.shape[-1])).abs() <= 64 * U64).all()
    assert (R.tril(-1) == 0).all()


# one leaf, with fewer rows than columns, as many, one more than twice; then two leaves, three, five and eight
SIZES = [
    (1, (1,)), (70, (3, 0, 9)), (13, (20, 12)), (3, (17,)), (17, (17,)), (67, (33,)), (133, (66,)), (300, (2, 33)),
    (2050, (1,)), (3100, (3,)), (1600, (17,)), (900, (30, 33)), (4500, (8, 17)),
]  # fmt: skip
sizes = pytest.mark.parametrize(("m", "ranks"), SIZES, ids=str)


@sizes
@pytest.mark.parametrize("turned", [False, True], ids=["by rows", "by columns"])
def test_factors_the_scaled_stack(cuda, m, ranks, turned):
    blocks = [normal(2, m, r, seed=k).to(DTYPES[(m + k) % 4]) for k, r in enumerate(ranks)]
    blocks = [block.mT.contiguous().mT if turned else block for block in blocks]
    scale = normal(2, sum(ranks), seed=7)
    check(*qr(cuda, blocks, scale), torch.cat([block.double() for block in blocks], -1) * scale[:, None, :])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_blocks_of_any_strides(cuda, dtype):
    X = normal(2, 1100, 24, seed=3).to(dtype)
    wide = torch.full((2, 2203, 70), NAN, dtype=dtype)
    wide[:, 1:2201:2, 1:49:2] = X
    once = X[:1].expand(2, 1100, 24)
    flat = torch.arange(1.0, 1101.0, dtype=torch.float64).to(dtype)[None, :, None].expand(2, 1100, 24)
    plain = qr(cuda, [X])
    same(qr(cuda, [wide[:, 1:2201:2, 1:49:2]]), plain)
    same(qr(cuda, [X.mT.contiguous().mT]), plain)
    same(qr(cuda, [X[:, :, :5], X[:, :, 5:]]), plain)
    same((each[1:] for each in qr(cuda, [once])), (each[:1] for each in plain))
    check(*qr(cuda, [flat]), flat.double())


def same(found, expected):
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("m", "R"), [(40, 24), (130, 24), (1100, 24), (2600, 24), (19, 24)])
def test_is_orthonormal_whatever_the_rank(cuda, m, R):
    X = normal(6, m, R)
    X[0, :, 7:20] = X[0, :, :13]
    X[1] = 0
    X[2] = with_kappa(m, R, 1e16)
    X[3, :, ::2] *= 1e-100
    X[4] *= torch.logspace(4, -4, R, dtype=torch.float64)
    X[5, : m // 2] = 0  # leaves of nothing
    check(*qr(cuda, [X]), X)


@pytest.mark.parametrize("name", CLASSICS)
def test_classics(cuda, name):
    X = torch.cat([CLASSICS[name](45, 21), torch.zeros(1300, 21, dtype=torch.float64), CLASSICS[name](45, 21)])
    check(*qr(cuda, [X[None]]), X[None])


def test_agrees_with_lapack_where_r_is_determined(cuda):
    X = with_kappa(1700, 19, 1e3)
    Q, R = qr(cuda, [X[None]])
    exact, triangle = torch.linalg.qr(X)
    signs = R[0].diagonal().sign() * triangle.diagonal().sign()
    assert torch.linalg.norm(R[0] - signs[:, None] * triangle) <= 256e3 * U64 * torch.linalg.norm(triangle)
    assert torch.linalg.norm(Q[0] - exact * signs) <= 256e3 * U64


def test_columns_of_any_length(cuda):
    X = normal(2, 1500, 9)
    exponents = [490, -440, 0, -530, -1000, 300, -300, 2, -1070]
    factors = torch.tensor([2.0**e for e in exponents], dtype=torch.float64).expand(2, 9)
    Q, R = qr(cuda, [X], factors)
    short = factors <= 2.0**-480
    back = torch.where(short, 0, 1 / factors)[:, None, :]
    check(Q, R * back, X * (back != 0))
    assert (R.abs().amax(1)[short] <= 2.0**-450).all()


def test_powers_of_two_are_exact(cuda):
    X, scale = (
        normal(1, 1500, 11),
        2.0 ** torch.randint(-99, 99, (1, 11), generator=torch.Generator().manual_seed(2)).double(),
    )
    Q, R = qr(cuda, [X])
    same(qr(cuda, [X], scale), (Q, R * scale[:, None, :]))


def test_exponents_are_taken_out_first(cuda):
    X, e = normal(2, 50, 6), torch.tensor([[900, -900, 3, 0, 0, 1]] * 2)
    scale = torch.tensor([[2.0**-300, 1.0, -1.0, 0.3, 1.0, 1.0]] * 2, dtype=torch.float64)
    half = 2.0 ** (e // 2).double()[:, None, :]
    huge = X * half * half * 2.0 ** (e % 2)[:, None, :]
    assert same_bits(qr(cuda, [huge], scale, e)[1], qr(cuda, [X], scale)[1])


@pytest.mark.parametrize(("m", "R"), [(300, 21), (2700, 12)])
def test_bits_depend_on_the_matrix_alone(cuda, m, R):
    X = normal(5, m, R).float()
    X[3, :, 2] = NAN
    alone = [qr(cuda, [X[i : i + 1, :, :5], X[i : i + 1, :, 5:]]) for i in (0, 1, 2, 4)]
    for order in ((0, 1, 2, 3, 4), (4, 1), [3, 2, 0] * 5):
        batch = X[list(order)]
        found = qr(cuda, [batch[:, :, :5], batch[:, :, 5:]])
        for slot, i in enumerate(order):
            if i != 3:
                same((a[slot] for a in found), (b[0] for b in alone[min(i, 3)]))


# in shared memory nothing; panels; leaves; the columns of Q but no panel; all
@pytest.mark.parametrize(("m", "ranks"), [(1300, (40, 26)), (2700, (17,)), (90, (70, 30))], ids=str)
def test_bits_do_not_depend_on_where_numbers_lie(simt, monkeypatch, m, ranks):
    cuda = simt, torch.device("cpu")
    blocks = [normal(2, m, r, seed=k) for k, r in enumerate(ranks)]
    expected = qr(cuda, blocks)
    for shared in (16_000, 40_000, 70_000, 101_376, 166_912):
        monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", str(shared))
        same(qr(cuda, blocks), expected)


@pytest.mark.parametrize("schedule", ["reverse", "1", "2", "3"])
@pytest.mark.parametrize("shared", [16_000, 40_000, 232_448])
def test_bits_do_not_depend_on_who_runs_first(simt, monkeypatch, schedule, shared):
    cuda = simt, torch.device("cpu")
    monkeypatch.setenv("FEDLORA_SIMT_SHARED_BYTES", str(shared))
    X = [normal(1, 1300, 41)]
    expected = qr(cuda, X)
    monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
    monkeypatch.setenv("FEDLORA_SIMT_THREADS", "3")
    same(qr(cuda, X), expected)


def test_stacks_that_are_too_wide_are_refused(simt):
    X, wide = torch.empty(1, 1, 1), torch.empty(1, 1, 1, dtype=torch.float64)
    needed = ctypes.c_int64()
    for R, status in ((16384, 0), (16385, 1)):
        tables = table([X.expand(1, 5, R)]), counts([1]), table([wide.expand(1, 1, R)])
        outs = table([wide.expand(1, 5, 5)]), table([wide.expand(1, 5, R)])
        found = simt.library.functions("test").fedlora_tall_qr_workspace(*tables, *outs, 1, 1, ctypes.byref(needed))
        assert found == status


class Call:
    """One direct call on 2 x 40 x (3 + 6) and 1 x 2100 x 5; Q and R of the first lie in wide buffers full of canaries."""

    CANARY = -77.0

    def __init__(self, cuda):
        backend, self.device = cuda
        self.library = backend.library.functions("product_svd")
        X = [normal(2, 40, 3).float(), normal(2, 40, 6), normal(1, 2100, 5)]
        self.X = [block.to(self.device) for block in X]
        self.factors = [torch.ones(*shape, dtype=torch.float64, device=self.device) for shape in ((2, 9), (1, 5))]
        self.buffers = [self.full(*shape) for shape in ((2, 43, 22), (2, 13, 22))]
        self.Q = [self.buffers[0][:, 2:42, 1:19:2], self.full(1, 2100, 5)]
        self.R = [self.buffers[1][:, 2:11, 1:19:2], self.full(1, 5, 5)]
        self.blocks, self.scale, self.counts = table(self.X), table([rows(f) for f in self.factors]), counts([2, 1])
        self.out_Q, self.out_R, self.threads = table(self.Q), table(self.R), 2
        needed = ctypes.c_int64()
        assert self.library.fedlora_tall_qr_workspace(*self.tables(), 2, 2, ctypes.byref(needed)) == 0
        self.bytes = needed.value
        self.workspace = torch.empty(self.bytes + 64, dtype=torch.uint8, device=self.device)

    def full(self, *shape):
        return torch.full(shape, self.CANARY, dtype=torch.float64, device=self.device)

    def tables(self):
        return self.blocks, self.counts, self.scale, self.out_Q, self.out_R

    def __call__(self, poison=255):
        self.workspace.fill_(poison)
        return self.library.fedlora_tall_qr(
            *self.tables(), 2, self.workspace.data_ptr(), self.bytes, self.threads, None
        )


def test_writes_nothing_outside_and_needs_no_clean_workspace(cuda):
    call = Call(cuda)
    expected = qr(cuda, call.X[:2]), qr(cuda, call.X[2:])
    before = [block.clone() for block in call.X]
    for poison in (0, 127, 255):
        assert call(poison) == 0
        assert (call.workspace[call.bytes :] == poison).all()
        for Q, R, exact in zip(call.Q, call.R, expected, strict=True):
            same((Q.cpu(), R.cpu()), exact)
            Q.fill_(Call.CANARY)
            R.fill_(Call.CANARY)
        assert all((buffer == Call.CANARY).all() for buffer in call.buffers)
    same(call.X, before)


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
def test_wrong_calls_are_refused_and_write_nothing(cuda, table, field, value, status):
    call = Call(cuda)
    setattr(getattr(call, table)[0] if table else call, field, value)
    assert call() == status
    assert all((buffer == Call.CANARY).all() for buffer in (*call.buffers, *call.Q, *call.R))
