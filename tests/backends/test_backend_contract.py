"""Every backend keeps the contract for every operation that it serves: lists, shapes, dtypes, devices, ownership."""

import inspect

import pytest
import torch

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import (
    OPS,
    Backend,
    Factors,
    RawProduct,
    RawQR,
    RawRotation,
    RawSVD,
    RuleCode,
    RuleSpec,
    Stack,
)

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = backends.names()
EXACT = RuleSpec(RuleCode.ENERGY, 1.0)


def having(op):
    """Parametrise over the backends that run here and have this operation."""
    found = [name for name in NAMES if backends.status()[name][0] and hasattr(backends.get(name), op)]
    return pytest.mark.parametrize("name", found)


def served(name, op, dtype, **sizes):
    """The backend, or a skip that says why it does not serve."""
    backend = backends.get(name)
    serves, reason = backend.serves(op, dtype, CPU, sizes)
    if not serves:
        pytest.skip(f"{name}: {reason}")
    return backend


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def half_in_float32(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect(tensor, shape, dtype):
    assert tuple(tensor.shape) == shape
    assert tensor.dtype == dtype
    assert tensor.device == CPU
    assert not tensor.requires_grad


def expect_codes(raw, N):
    expect(raw.info, (N,), torch.int32)
    expect(raw.notes, (N,), torch.int32)
    assert not raw.info.any()


def disjoint(outputs, inputs):
    """No output lies in the memory of an input."""
    taken = {x.untyped_storage().data_ptr() for x in inputs if x.numel()}
    return not taken & {x.untyped_storage().data_ptr() for x in outputs if x is not None and x.numel()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", OPS)
def test_signatures(name, op):
    available, reason = backends.status()[name]
    if not available:
        pytest.skip(f"{name}: {reason}")
    method = getattr(backends.get(name), op, None)
    if method is None:
        for dtype in DTYPES:
            assert not backends.get(name).serves(op, dtype, CPU, dict.fromkeys("mnpqrRKN", 1))[0]
        return
    wanted = list(inspect.signature(getattr(Backend, op)).parameters)[1:]
    found = list(inspect.signature(method).parameters.values())
    assert [parameter.name for parameter in found[: len(wanted)]] == wanted
    assert all(parameter.default is not parameter.empty for parameter in found[len(wanted) :])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", OPS)
def test_reasons_are_given(name, op):
    available, reason = backends.status()[name]
    assert reason
    if available:
        for dtype in [*DTYPES, torch.int8]:
            serves, reason = backends.get(name).serves(op, dtype, CPU, dict.fromkeys("mnpqrRKN", 3))
            assert isinstance(serves, bool)
            assert reason
            assert not (serves and dtype == torch.int8)


def factors(N, m, n, ranks, dtype, p_max=None):
    B = tuple(draw(N, m, r, dtype=dtype, seed=k) for k, r in enumerate(ranks))
    A = tuple(draw(N, r, n, dtype=dtype, seed=10 + k) for k, r in enumerate(ranks))
    weights = torch.linspace(-1.0, 2.0, N * len(ranks), dtype=torch.float64).reshape(N, len(ranks)) + 3.0
    return Factors(B, A, weights, m, n, min(m, n, sum(ranks)) if p_max is None else p_max)


GROUPS = [
    (3, 7, 11, (2, 3)),
    (0, 7, 11, (2,)),
    (1, 13, 5, (4, 4)),
    (2, 7, 11, (0,)),
    (2, 7, 11, (0, 3)),
    (2, 0, 11, (2,)),
    (1, 5, 7, (9, 8)),
]


@having("product_svd")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", ["usv", "left", "balanced"])
def test_product_svd(name, dtype, output):
    backend = served(name, "product_svd", dtype, m=13, n=11, R=17, K=2, N=3)
    groups = [factors(*group, dtype) for group in GROUPS]
    raws = backend.product_svd(groups, EXACT, output, dtype)
    assert len(raws) == len(groups)
    for group, raw in zip(groups, raws, strict=True):
        N, p = group.batch, group.p_max
        assert isinstance(raw, RawProduct)
        expect(raw.left, (N, group.m, p), dtype)
        expect(raw.right, (N, p, group.n), dtype)
        expect(raw.S, (N, p), torch.float64)
        for field in (raw.rank, raw.numerical_rank):
            expect(field, (N,), torch.int64)
        for field in (raw.energy, raw.error, raw.error_bound, raw.rho, raw.sigma_err, raw.energy_abs):
            expect(field, (N,), torch.float64)
        expect(raw.passes, (N,), torch.int32)
        expect_codes(raw, N)
        assert disjoint(raw, (*group.B, *group.A, group.weights))
        assert (raw.rank == min(group.m, group.n, group.width)).all()
    assert backend.product_svd([], EXACT, output, dtype) == []


@having("product_svd")
def test_product_svd_pads_to_p_max_and_answers_in_the_dtype_asked(name):
    backend = served(name, "product_svd", torch.float16, m=7, n=11, R=5, K=2, N=2)
    cut = factors(2, 7, 11, (2, 3), torch.float16, p_max=2)
    wide = factors(2, 7, 11, (1, 1), torch.float16, p_max=6)
    first, second = backend.product_svd([cut, wide], RuleSpec(RuleCode.ENERGY, 1.0, 2), "usv", torch.float32)
    expect(first.left, (2, 7, 2), torch.float32)
    expect(second.right, (2, 6, 11), torch.float32)
    assert first.rank.tolist() == second.rank.tolist() == [2, 2]
    assert not second.left[:, :, 2:].any()
    assert not second.right[:, 2:].any()


@having("update_gram")
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_gram(name, dtype):
    backend = served(name, "update_gram", dtype, m=13, n=11, R=17, K=2, N=3)
    groups = [factors(*group, dtype) for group in GROUPS]
    grams = backend.update_gram(groups)
    assert len(grams) == len(groups)
    for group, gram in zip(groups, grams, strict=True):
        expect(gram, (group.batch, len(group.B), len(group.B)), torch.float64)
        assert gram.isfinite().all()
    assert backend.update_gram([]) == []


@having("stacked_qr")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("want_q", [True, False])
def test_stacked_qr(name, dtype, want_q):
    backend = served(name, "stacked_qr", dtype, m=13, R=17, K=2, N=3)
    groups = []
    for N, m, _, ranks in GROUPS:
        blocks = tuple(draw(N, m, r, dtype=dtype, seed=k) for k, r in enumerate(ranks))
        groups.append(Stack(blocks, torch.full((N, len(ranks)), -2.0, dtype=torch.float64), m))
    raws = backend.stacked_qr(groups, want_q)
    assert len(raws) == len(groups)
    for group, raw in zip(groups, raws, strict=True):
        N, k = group.batch, min(group.m, group.width)
        assert isinstance(raw, RawQR)
        expect(raw.R, (N, k, group.width), half_in_float32(dtype))
        if want_q:
            expect(raw.Q, (N, group.m, k), half_in_float32(dtype))
        else:
            assert raw.Q is None
        expect(raw.rank, (N,), torch.int64)
        expect_codes(raw, N)
        assert disjoint((raw.R, raw.Q), group.blocks)
        assert (raw.rank == k).all()
    assert backend.stacked_qr([], want_q) == []


@having("core_svd")
@pytest.mark.parametrize("dtype", DTYPES)
def test_core_svd(name, dtype):
    shapes = [(3, 7, 5), (2, 5, 7), (0, 7, 5), (2, 0, 5), (2, 5, 0), (1, 1, 1), (2, 4, 4)]
    backend = served(name, "core_svd", dtype, p=7, q=7, N=3)
    groups = [draw(*shape, dtype=dtype) for shape in shapes]
    raws = backend.core_svd(groups)
    assert len(raws) == len(groups)
    for (N, p, q), raw in zip(shapes, raws, strict=True):
        k = min(p, q)
        assert isinstance(raw, RawSVD)
        expect(raw.U, (N, p, k), half_in_float32(dtype))
        expect(raw.S, (N, k), half_in_float32(dtype))
        expect(raw.Vh, (N, k, q), half_in_float32(dtype))
        expect_codes(raw, N)
    for group, raw in zip(groups, raws, strict=True):
        assert disjoint(raw, [group])
    assert backend.core_svd([]) == []


@having("select_rank")
@pytest.mark.parametrize("code", list(RuleCode))
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
def test_select_rank(name, code, shape):
    backend = served(name, "select_rank", torch.float64, p=5, N=3)
    S = draw(*shape).abs().sort(-1, descending=True).values
    value = 0.9 if code != RuleCode.RANK else 2.0
    floor = torch.zeros(shape[0], dtype=torch.float64)
    rank = backend.select_rank(
        S, RuleSpec(code, max(value, 1.0) if code == RuleCode.SV_RATIO else value), (S * S).sum(-1), floor
    )
    expect(rank, shape[:1], torch.int64)
    assert ((rank >= 0) & (rank <= shape[1])).all()


@having("select_rank")
def test_select_rank_of_values_that_are_not_finite_is_zero(name):
    backend = served(name, "select_rank", torch.float64, p=3, N=3)
    S = torch.tensor([[3.0, 2, 1], [float("nan"), 2, 1], [float("inf"), 2, 1]], dtype=torch.float64)
    floor = torch.zeros(3, dtype=torch.float64)
    assert backend.select_rank(S, EXACT, (S * S).sum(-1), floor).tolist() == [3, 0, 0]


def expect_rotation(raw, N, r):
    assert isinstance(raw, RawRotation)
    expect(raw.Q, (N, r, r), torch.float64)
    expect(raw.singular_values, (N, r), torch.float64)
    expect(raw.unique, (N,), torch.bool)
    expect(raw.condition, (N,), torch.float64)
    expect_codes(raw, N)


PAIRS = [(3, 7, 11, 3), (0, 7, 11, 3), (2, 5, 7, 1), (1, 13, 3, 4)]


@having("procrustes_rotation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("special", "blend"), [(False, 1.0), (True, 0.5), (False, 0.0)])
def test_procrustes_rotation(name, dtype, special, blend):
    backend = served(name, "procrustes_rotation", dtype, m=13, r=4, N=3)
    source = [draw(N, m, r, dtype=dtype) for N, m, _, r in PAIRS]
    target = [draw(N, m, r, dtype=dtype, seed=1) for N, m, _, r in PAIRS]
    raws = backend.procrustes_rotation(source, target, special, blend)
    assert len(raws) == len(PAIRS)
    for (N, _, _, r), raw in zip(PAIRS, raws, strict=True):
        expect_rotation(raw, N, r)
    assert backend.procrustes_rotation([], [], special, blend) == []


@having("rotate_factors")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_factors(name, dtype):
    backend = served(name, "rotate_factors", dtype, m=13, n=11, r=4, N=3)
    B = [draw(N, m, r, dtype=dtype) for N, m, _, r in PAIRS]
    A = [draw(N, r, n, dtype=torch.float32) for N, _, n, r in PAIRS]
    Q = [torch.linalg.qr(draw(N, r, r))[0] for N, _, _, r in PAIRS]
    pairs = backend.rotate_factors(B, A, Q)
    assert len(pairs) == len(PAIRS)
    for (N, m, n, r), (BQ, QA), inputs in zip(PAIRS, pairs, zip(B, A, Q, strict=True), strict=True):
        expect(BQ, (N, m, r), dtype)
        expect(QA, (N, r, n), torch.float32)
        assert disjoint((BQ, QA), inputs)
    assert backend.rotate_factors([], [], []) == []


@having("align_factors")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("blend", [1.0, 0.0])
def test_align_factors(name, dtype, side, blend):
    backend = served(name, "align_factors", dtype, m=13, n=11, r=4, N=3)
    B = [draw(N, m, r, dtype=dtype) for N, m, _, r in PAIRS]
    A = [draw(N, r, n, dtype=dtype) for N, _, n, r in PAIRS]
    B_ref = [draw(N, m, r, dtype=dtype, seed=1) for N, m, _, r in PAIRS] if side[1] else None
    A_ref = [draw(N, r, n, dtype=dtype, seed=1) for N, _, n, r in PAIRS] if side[0] else None
    triples = backend.align_factors(B, A, B_ref, A_ref, side, True, blend)
    assert len(triples) == len(PAIRS)
    for (N, m, n, r), (BQ, QA, raw), inputs in zip(PAIRS, triples, zip(B, A, strict=True), strict=True):
        expect(BQ, (N, m, r), dtype)
        expect(QA, (N, r, n), dtype)
        expect_rotation(raw, N, r)
        assert disjoint((BQ, QA), inputs)
    assert backend.align_factors([], [], B_ref and [], A_ref and [], side, True, blend) == []
