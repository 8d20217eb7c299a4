"""`stacked_qr` of every backend: row-echelon QR, column-wise errors, rank, weights, metamorphic laws."""

import pytest
import torch
from frames import DTYPES, LargestTensor, Served, dtype_id, every_backend, normal, orthogonal, same_bits, with_kappa
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels import backends as registry
from fedlora_kernels.backends.contract import Info, Note, Stack
from fedlora_kernels.testing import CLASSICS, U64, roundoff, tolerance

backends = every_backend("stacked_qr")


def make_stack(blocks, weights=None):
    """Stack of blocks (N, m, r_k) or (m, r_k)."""
    blocks = tuple(block if block.ndim == 3 else block[None] for block in blocks)
    N, m, _ = blocks[0].shape
    if weights is None:
        weights = torch.ones(N, len(blocks), dtype=torch.float64)
    return Stack(blocks, torch.as_tensor(weights, dtype=torch.float64).expand(N, len(blocks)), m)


def stacked(stack):
    """The matrix that a stack stands for, float64 (N, m, R)."""
    parts = [block.double() * stack.weights[:, k, None, None] for k, block in enumerate(stack.blocks)]
    return torch.cat(parts, dim=-1)


def qr(backend, stack, want_q=True):
    dtype = stack.blocks[0].dtype
    sizes = {"m": stack.m, "R": stack.width, "K": len(stack.blocks), "N": stack.batch}
    (raw,) = backend([stack], want_q, dtype=dtype, **sizes)
    return raw


def column_norms(X):
    # along contiguous memory: over strided columns torch sums one by one and is itself 50 units off at 20000 rows
    return X.mT.contiguous().square().sum(-1).sqrt()


def gram(Q):
    # in row chunks, because one long accumulation of 20000 rows is itself 50 units off
    return torch.stack([rows.mT @ rows for rows in Q.split(256, dim=1)]).sum(0)


def check_echelon(R, rank):
    for matrix, r in zip(R, rank.tolist(), strict=True):
        assert not torch.signbit(matrix[matrix == 0]).any(), "-0 in R"
        lead = -1
        for i, row in enumerate(matrix):
            filled = torch.nonzero(row).flatten()
            assert (len(filled) > 0) == (i < r), f"row {i} of rank {r}"
            if i < r:
                assert filled[0] > lead
                assert row[filled[0]] > 0
                lead = int(filled[0])


def skipped_columns(raw):
    """Columns (N, R) that were found dependent: what is left of them, at most ``32 R u64`` of their norm, is dropped."""
    N, k, R = raw.R.shape
    pivot = torch.zeros(N, R, dtype=torch.bool)
    for i in range(N if R else 0):
        pivot[i, (raw.R[i, : raw.rank[i]] != 0).int().argmax(dim=1)] = True
    return ~pivot & (pivot.cumsum(1) < k)


def check_qr(raw, stack):
    """The limits of docs/numerics.md, Stacked QR, for finite stacks with Q."""
    X, Q, R = stacked(stack), raw.Q.double(), raw.R.double()
    limit = tolerance("qr", dtype=raw.R.dtype)
    dropped = 32 * stack.width * U64 * skipped_columns(raw)
    norm = column_norms(X)
    assert (raw.info == 0).all()
    assert (column_norms(X - Q @ R) <= (limit + dropped) * norm).all(), "backward error"
    assert ((column_norms(R) - norm).abs() <= (limit + dropped) * norm).all(), "column norms"
    ones = torch.arange(R.shape[1]) < raw.rank[:, None]
    assert ((gram(Q) - torch.diag_embed(ones.double())).abs() <= limit).all(), "orthogonality"
    assert (Q * ~ones[:, None, :] == 0).all()
    assert (R.tril(-1) == 0).all()
    check_echelon(raw.R, raw.rank)
    assert torch.equal(raw.notes & Note.RANK_DEFICIENT != 0, raw.rank < stack.width)
    assert torch.equal(raw.notes & Note.ZERO != 0, raw.rank == 0)


def graded(m, r):
    return normal(m, r, seed=3) * torch.logspace(4, -4, r, dtype=torch.float64)


# name: (blocks, rank whatever the dtype, or None where rounding the input changes it)
FAMILIES = {
    "tall": ([normal(83, 5, seed=1), normal(83, 7, seed=2), normal(83, 1, seed=3)], 13),
    "one column": ([normal(29, 1)], 1),
    "one row": ([normal(1, 3), normal(1, 2)], 1),
    "square": ([normal(19, 7), normal(19, 12, seed=1)], 19),
    "wide": ([normal(11, 9), normal(11, 14, seed=1)], 11),
    "duplicates": ([normal(61, 7), normal(61, 7), normal(61, 3, seed=5), normal(61, 7)], 10),
    "wide duplicates": ([normal(13, 7), normal(13, 7), normal(13, 3, seed=5), normal(13, 7)], 10),
    "zero client first": ([torch.zeros(47, 5, dtype=torch.float64), normal(47, 6)], 6),
    "zero columns inside": ([normal(47, 6) * torch.tensor([1, 0, 1, 1, 0, 1.0])], 4),
    "zero columns, wide": ([normal(5, 7) * torch.tensor([1, 0, 1, 0, 0, 1.0, 0])], 3),
    "all zero": ([torch.zeros(17, 4, dtype=torch.float64)], 0),
    "dependent first columns": ([normal(31, 1).expand(31, 4), normal(31, 3, seed=1)], 4),
    "graded 1e8": ([graded(53, 11)], 11),
    "half rank": ([normal(41, 6, seed=8) @ normal(6, 12, seed=9)], None),
    **{f"{name}, tall": ([make(37, 10)], None) for name, make in CLASSICS.items()},
    **{f"{name}, wide": ([make(7, 11)], None) for name, make in CLASSICS.items()},
    **{f"kappa 1e{e}": ([with_kappa(67, 12, 10.0**e, seed=e)], None) for e in (0, 2, 4, 6, 8, 10, 12, 14)},
    **{f"rank at the threshold, {m} rows": ([with_kappa(m, 37, 1e16, seed=m)], None) for m in (23, 83)},
}
RANKS = {
    "half rank": 6, "kappa 1e12": 12,
    "zeros, tall": 0, "ones, tall": 1, "identity, tall": 10, "diagonal, tall": 10, "jordan, tall": 10, "laeuchli, tall": 10,
    "kahan, tall": 10, "vandermonde, tall": 10, "negative_zeros, tall": 1, "hadamard, tall": 10, "hadamard, wide": 7,
    "kahan, wide": 7, "jordan, wide": 7, "laeuchli, wide": 7, "ones, wide": 1,
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@backends
@dtypes
@families
def test_meets_the_limits(backend, dtype, family):
    blocks, rank = FAMILIES[family]
    stack = make_stack([block.to(dtype) for block in blocks])
    raw = qr(backend, stack)
    assert raw.Q.dtype == raw.R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert raw.rank.dtype == torch.int64
    assert raw.info.dtype == raw.notes.dtype == torch.int32
    check_qr(raw, stack)
    if rank is not None:
        assert raw.rank.tolist() == [rank]


@backends
@pytest.mark.parametrize(("family", "rank"), RANKS.items())
def test_rank_of_float64_stacks(backend, family, rank):
    raw = qr(backend, make_stack(FAMILIES[family][0]))
    assert raw.rank.tolist() == [rank]


@backends
@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_r_alone_is_the_r_of_both(backend, dtype, family):
    stack = make_stack([block.to(dtype) for block in FAMILIES[family][0]])
    alone, both = qr(backend, stack, want_q=False), qr(backend, stack)
    assert alone.Q is None
    torch.testing.assert_close(alone.R, both.R, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(alone.rank, both.rank)


@backends
@pytest.mark.parametrize("kappa", [1e0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_agrees_with_lapack_where_r_is_determined(backend, kappa, dtype):
    X = with_kappa(97, 13, kappa).to(dtype)
    raw = qr(backend, make_stack([X[:, :4], X[:, 4:]]))
    Q, R = torch.linalg.qr(X.double())
    signs = R.diagonal().sign()
    limit = 256 * kappa * U64 + (4 * roundoff(dtype) if dtype == torch.float32 else 0)
    assert torch.linalg.norm(raw.R[0].double() - signs[:, None] * R) <= limit * torch.linalg.norm(R)
    assert torch.linalg.norm(raw.Q[0].double() - Q * signs) <= limit * 13**0.5


@backends
def test_weights_scale_columns_and_their_sign_keeps_r_positive(backend):
    blocks = [normal(43, 5), normal(43, 4, seed=1), normal(43, 6, seed=2)]
    weights = torch.tensor([-2.5, 0.3, -1e-7], dtype=torch.float64)
    stack = make_stack(blocks, weights)
    raw = qr(backend, stack)
    check_qr(raw, stack)
    plain = qr(backend, make_stack(blocks))
    columns = weights.repeat_interleave(torch.tensor([5, 4, 6]))
    rows = columns.sign()
    expected = rows[:, None] * plain.R[0] * columns
    assert (raw.R[0] - expected).abs().max() <= 1e-13 * plain.R.abs().max()
    assert (raw.Q[0] - plain.Q[0] * rows).abs().max() <= 1e-13


@backends
def test_weights_differ_between_matrices(backend):
    blocks = [normal(3, 31, 4), normal(3, 31, 5, seed=1)]
    weights = torch.tensor([[1, -1], [0.25, 3], [-7, 1e-3]], dtype=torch.float64)
    stack = make_stack(blocks, weights)
    check_qr(qr(backend, stack), stack)


@backends
@pytest.mark.parametrize("family", ["tall", "duplicates", "zero columns inside", "kappa 1e14", "wide"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_power_of_two_column_scaling_is_exact(backend, family, dtype):
    X = torch.cat(FAMILIES[family][0], dim=1).to(dtype)
    scale = 2.0 ** torch.randint(-20, 21, (X.shape[1],), generator=torch.Generator().manual_seed(1)).to(dtype)
    plain, scaled = qr(backend, make_stack([X])), qr(backend, make_stack([X * scale]))
    assert same_bits(scaled.R, plain.R * scale + 0.0)
    assert same_bits(scaled.Q, plain.Q)


@backends
def test_permuted_columns_keep_the_gram(backend):
    X = FAMILIES["kappa 1e10"][0][0]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    R, P = qr(backend, make_stack([X])).R[0], qr(backend, make_stack([X[:, order]])).R[0]
    norm = torch.linalg.vector_norm(X, dim=0)
    assert ((P.T @ P - (R.T @ R)[order][:, order]).abs() <= 128 * U64 * torch.outer(norm, norm)[order][:, order]).all()


@backends
@pytest.mark.parametrize("family", ["tall", "duplicates", "zero client first", "wide"])
def test_appended_zero_rows_keep_r(backend, family):
    blocks = FAMILIES[family][0]
    R = qr(backend, make_stack(blocks))
    padded = qr(backend, make_stack([torch.nn.functional.pad(block, (0, 0, 0, 7)) for block in blocks]))
    k = R.R.shape[1]
    assert (padded.R[0, :k] - R.R[0]).abs().max() <= 1e-13 * R.R.abs().max()
    assert (padded.R[0, k:] == 0).all()
    assert (padded.Q[0, -7:].abs() <= 64 * U64).all()


@backends
@pytest.mark.parametrize("family", ["duplicates", "half rank", "dependent first columns", "zero columns inside"])
def test_deficient_r_survives_an_orthogonal_map_of_the_rows(backend, family):
    blocks = FAMILIES[family][0]
    turn = orthogonal(blocks[0].shape[0], seed=4)
    before, after = qr(backend, make_stack(blocks)), qr(backend, make_stack([turn @ block for block in blocks]))
    assert torch.equal(before.rank, after.rank)
    assert (before.R - after.R).abs().max() <= 1e-12 * before.R.abs().max()


@backends
def test_blocks_are_one_matrix(backend):
    X = normal(2, 37, 11)
    whole, split = qr(backend, make_stack([X])), qr(backend, make_stack([X[:, :, :2], X[:, :, 2:3], X[:, :, 3:]]))
    assert (whole.R - split.R).abs().max() <= 1e-13
    assert (whole.Q - split.Q).abs().max() <= 1e-13


@backends
def test_mixed_dtypes_answer_in_the_widest(backend):
    X = normal(1, 37, 9)
    stack = make_stack([X[:, :, :3].half(), X[:, :, 3:5].bfloat16(), X[:, :, 5:]])
    (raw,) = backend([stack], True, dtype=torch.float64, m=37, R=9, K=3, N=1)
    assert raw.R.dtype == torch.float64
    check_qr(raw, stack)
    stack = make_stack([X[:, :, :3].half(), X[:, :, 3:].bfloat16()])
    assert qr(backend, stack).R.dtype == torch.float32


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_groups_of_a_ragged_call_are_independent(backend, dtype):
    stacks = [make_stack([normal(2, m, r, seed=m).to(dtype)]) for m, r in ((29, 5), (7, 11), (53, 13))]
    raws = backend(stacks, True, dtype=dtype, m=53, R=13, K=1, N=2)
    assert len(raws) == 3
    for stack, raw in zip(stacks, raws, strict=True):
        check_qr(raw, stack)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize(("N", "m", "R"), [(1, 20011, 97), (41, 131, 89)])
def test_more_than_one_tile(backend, dtype, N, m, R):
    X = normal(N, m, R).to(dtype)
    X[-1, :, 5] = X[-1, :, 3]
    stack = make_stack([X[:, :, :40], X[:, :, 40:]])
    raw = qr(backend, stack)
    check_qr(raw, stack)
    assert raw.rank.tolist() == [R] * (N - 1) + [R - 1]


@backends
@pytest.mark.parametrize(("m", "R"), [(70001, 19), (200003, 3)])
def test_errors_and_rank_do_not_depend_on_the_number_of_rows(backend, m, R):
    X = normal(1, m, R)
    X[0, :, -1] = 3 * X[0, :, 0]
    stack = make_stack([X])
    raw = qr(backend, stack)
    check_qr(raw, stack)
    assert raw.rank.tolist() == [R - 1]


@pytest.mark.parametrize(("N", "m", "R"), [(1, 400_009, 16), (97, 2003, 37)])
def test_grams_take_bounded_memory(N, m, R):
    X = torch.ones(1, m, R).expand(N, m, R) + torch.eye(R).repeat(m // R + 1, 1)[:m]
    with LargestTensor() as largest:
        raw = qr(Served(registry.get("torch"), "stacked_qr"), make_stack([X]), want_q=False)
    assert raw.rank.tolist() == [R] * N
    assert X.numel() * X.element_size() > 24 << 20
    assert largest.bytes <= 12 << 20


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_repeats_and_does_not_see_the_batch(backend, dtype):
    X = normal(7, 53, 11).to(dtype)
    X[2, :, 4] = X[2, :, 1]
    X[3] = 0
    whole, again = qr(backend, make_stack([X])), qr(backend, make_stack([X]))
    for field in ("Q", "R"):
        assert same_bits(getattr(whole, field), getattr(again, field))
        for i in range(7):
            alone = getattr(qr(backend, make_stack([X[i]])), field)
            if backend.bitwise:
                assert same_bits(alone[0], getattr(whole, field)[i])
            else:
                torch.testing.assert_close(
                    alone[0], getattr(whole, field)[i], rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6
                )


@backends
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_matrix_is_marked_and_alone(backend, dtype, bad):
    X = normal(4, 31, 7).to(dtype)
    X[3, :, 2] = X[3, :, 1]
    poisoned = X.clone()
    poisoned[1, 30, 6] = bad
    clean, raw = (
        qr(backend, make_stack([X[:, :, :3], X[:, :, 3:]])),
        qr(backend, make_stack([poisoned[:, :, :3], poisoned[:, :, 3:]])),
    )
    assert raw.info.tolist() == [0, Info.NONFINITE, 0, 0]
    assert raw.Q[1].isnan().all()
    assert raw.R[1].isnan().all()
    assert raw.rank.tolist() == [7, 0, 7, 6]
    assert raw.notes.tolist() == [0, 0, 0, Note.RANK_DEFICIENT]
    others = [0, 2, 3]
    atol = 0 if backend.bitwise else 1e-6 if raw.R.dtype == torch.float32 else 1e-12
    for field in ("Q", "R"):
        torch.testing.assert_close(getattr(raw, field)[others], getattr(clean, field)[others], rtol=0, atol=atol)


@backends
def test_all_non_finite(backend):
    raw = qr(backend, make_stack([torch.full((2, 13, 3), torch.nan)]))
    assert raw.R.isnan().all()
    assert raw.info.tolist() == [Info.NONFINITE] * 2


@backends
@pytest.mark.parametrize(("N", "m", "ranks"), [(0, 7, (3, 2)), (2, 0, (3, 2)), (2, 7, (0,)), (2, 7, ()), (0, 0, ())])
def test_empty(backend, N, m, ranks):
    stack = Stack(tuple(torch.zeros(N, m, r) for r in ranks), torch.ones(N, len(ranks), dtype=torch.float64), m)
    R = sum(ranks)
    (raw,) = backend([stack], True, dtype=torch.float32, m=m, R=R, K=len(ranks), N=N)
    k = min(m, R)
    assert raw.Q.shape == (N, m, k)
    assert raw.R.shape == (N, k, R)
    assert raw.rank.tolist() == [0] * N
    assert raw.info.tolist() == [0] * N


@backends
def test_no_groups(backend):
    assert backend([], True) == []


@backends
@pytest.mark.parametrize("scale", [1e300, 1e-300, 1e-320])
def test_float64_over_its_whole_range(backend, scale):
    X = normal(31, 5)
    X[:, 2] *= scale
    X[:, 4] *= scale
    stack = make_stack([X])
    raw = qr(backend, stack)
    assert raw.info.tolist() == [0]
    assert raw.rank.tolist() == [5]
    # metrics are formed on columns brought back to ordinary size, in two steps because 1e320 is no number
    back = torch.ones(5, dtype=torch.float64)
    back[[2, 4]] = (1 / scale) ** 0.5 if scale > 1e-310 else 1e160
    X, R = X * back * back, raw.R[0] * back * back
    unit = 64 * U64 if scale > 1e-310 else 1e-2
    assert (torch.linalg.vector_norm(X - raw.Q[0] @ R, dim=0) <= unit * torch.linalg.vector_norm(X, dim=0)).all()
    assert (raw.Q[0].T @ raw.Q[0] - torch.eye(5)).abs().max() <= 64 * U64


@backends
@pytest.mark.parametrize("scale", [1e37, 1e-37, 1e-44])
def test_float32_over_its_whole_range(backend, scale):
    X = normal(31, 5) * torch.tensor([1, scale, 1, scale, 1])
    stack = make_stack([X.float()])
    raw = qr(backend, stack)
    assert raw.rank.tolist() == [5]
    if scale > 1e-40:
        check_qr(raw, stack)


@backends
def test_overflow_of_r_is_marked(backend):
    raw = qr(backend, make_stack([normal(2, 17, 3).float()], [[1.0], [1e39]]))
    assert raw.info.tolist() == [0, Info.OVERFLOW]
    assert raw.R[0].isfinite().all()


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("view", ["transposed", "strided", "offset", "expanded"])
def test_any_strides_and_inputs_untouched(backend, dtype, view):
    base = normal(3, 62, 10).to(dtype)
    X = {
        "transposed": base.mT.contiguous().mT[:, :31, :5],
        "strided": base[:, ::2, ::2],
        "offset": base.flatten()[1 : 1 + 3 * 31 * 5].view(3, 31, 5),
        "expanded": base[:1, :31, :5].expand(3, 31, 5),
    }[view]
    before = base.clone()
    raw, dense = qr(backend, make_stack([X])), qr(backend, make_stack([X.contiguous()]))
    assert same_bits(base, before)
    atol = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(raw.R, dense.R, rtol=0, atol=atol)
    torch.testing.assert_close(raw.Q, dense.Q, rtol=0, atol=atol)


@backends
@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_writes_every_element(backend, poisoned_empty, dtype, family):
    raw = qr(backend, make_stack([block.to(dtype) for block in FAMILIES[family][0]]))
    assert raw.Q.isfinite().all()
    assert raw.R.isfinite().all()


@backends
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_stack(backend, data):
    m = data.draw(st.integers(1, 23), "m")
    ranks = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4), "ranks")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    seed = data.draw(st.integers(0, 1000), "seed")
    weights = data.draw(st.lists(st.sampled_from([1.0, -1.0, 0.3, -4.0]), min_size=len(ranks), max_size=len(ranks)))
    blocks = [normal(2, m, r, seed=seed + k).to(dtype) for k, r in enumerate(ranks)]
    columns = [(k, j) for k, r in enumerate(ranks) for j in range(r)]
    distinct = set(columns)
    for _ in range(data.draw(st.integers(0, 4 if columns else 0), "changes")):
        k, j = data.draw(st.sampled_from(columns), "column")
        source = data.draw(st.sampled_from([None, *columns]), "copy of")
        if source is None or source in distinct:
            blocks[k][:, :, j] = (
                0 if source is None else blocks[source[0]][:, :, source[1]] * (1 if source == (k, j) else 2)
            )
            if source != (k, j):
                distinct.discard((k, j))
    stack = make_stack(blocks, weights)
    raw = qr(backend, stack)
    check_qr(raw, stack)
    if m >= len(distinct):
        assert raw.rank.tolist() == torch.linalg.matrix_rank(stacked(stack).double(), rtol=1e-9).tolist()


@backends
@pytest.mark.parametrize(
    "family", ["tall", "duplicates", "wide duplicates", "zero columns, wide", "all zero", "graded 1e8", "kahan, wide"]
)
def test_agrees_with_the_reference(backend, family):
    stack = make_stack(FAMILIES[family][0])
    ours, theirs = qr(backend, stack), qr(Served(registry.get("reference"), "stacked_qr"), stack)
    assert (ours.R - theirs.R).abs().max() <= 1e-12 * theirs.R.abs().max()
    for field in ("rank", "info", "notes"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
