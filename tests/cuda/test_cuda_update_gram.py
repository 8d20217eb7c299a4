"""Inner products of updates by the CUDA library, against the reference backend."""

import dataclasses
import math

import pytest
import torch
from guards import DTYPES, SCHEDULES, dtype_id, same_bits

from fedlora_kernels import backends
from fedlora_kernels.backends.contract import U64, Factors
from fedlora_kernels.backends.native import gram

REFERENCE = backends.get("reference")
RANKS = [(4,), (3, 0, 9), (1, 1, 1, 1, 1), (16, 5, 20), (40, 30)]


def draw(m, n, ranks, dtypes, batch=2, seed=0, spread=0):
    """Pairs whose columns of B and rows of A are up to ``10^spread`` apart, the other way round."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    size = [10.0 ** (spread * (2 * torch.rand(r, generator=made, dtype=torch.float64) - 1)) for r in ranks]
    B = [
        (normal(batch, m, r) * s).to(dtypes[k % len(dtypes)]) for k, (r, s) in enumerate(zip(ranks, size, strict=True))
    ]
    A = [
        (normal(batch, r, n) / s[:, None]).to(dtypes[-1 - k % len(dtypes)])
        for k, (r, s) in enumerate(zip(ranks, size, strict=True))
    ]
    weights = normal(batch, len(ranks))
    return Factors(tuple(B), tuple(A), weights, m, n, 1)


def part(group, some):
    return dataclasses.replace(
        group, B=tuple(b[some] for b in group.B), A=tuple(a[some] for a in group.A), weights=group.weights[some]
    )


def run(cuda, *groups):
    backend, device = cuda
    there = [
        dataclasses.replace(g, B=tuple(b.to(device) for b in g.B), A=tuple(a.to(device) for a in g.A)) for g in groups
    ]
    return [inner.cpu() for inner in backend.update_gram(there)]


def length(x, dim):
    """Norms along a dimension, of numbers whose squares may leave the range."""
    if not x.numel():
        return x.sum(dim)
    largest = x.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (x / largest).norm(dim=dim) * largest.squeeze(dim)


def check(found, group):
    """Within a few roundings of ``sum |b_i| |b_j| |a_i| |a_j|``."""
    (wanted,) = REFERENCE.update_gram([group])
    sizes = torch.stack(
        [
            (length(b.double(), 1) * length(a.double(), 2)).sum(-1) * w.abs()
            for b, a, w in zip(group.B, group.A, group.weights.T, strict=True)
        ],
        -1,
    )
    limit = 64 * U64 * sizes[:, :, None] * sizes[:, None, :]
    assert found.dtype == torch.float64
    assert bool(((found - wanted).abs() <= limit).all())
    assert same_bits(found, found.mT.contiguous())


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_products_are_those_of_the_reference(cuda, poisoned_empty, ranks, dtype):
    group = draw(37, 53, ranks, [dtype])
    check(run(cuda, group)[0], group)


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float16)], ids=str
)
def test_blocks_of_several_dtypes(cuda, dtypes):
    group = draw(37, 53, (3, 4, 5, 6), dtypes)
    check(run(cuda, group)[0], group)


def test_tall_factors_and_many_clients(cuda):
    for group in (draw(2200, 300, (3, 8), [torch.float64], spread=3), draw(9, 12, (2,) * 40, [torch.float32])):
        check(run(cuda, group)[0], group)


@pytest.mark.parametrize("spread", [30, 200])
def test_columns_whose_squares_leave_the_range(cuda, spread):
    group = draw(20, 31, (4, 0, 7), [torch.float64], spread=spread)
    check(run(cuda, group)[0], group)


@pytest.mark.parametrize(("big", "small"), [(1e200, 1e-190), (1e-200, 1e180)])
def test_updates_are_in_range_though_factors_are_not(cuda, big, small):
    base = draw(19, 13, (4, 3), [torch.float64])
    group = dataclasses.replace(base, B=tuple(b * big for b in base.B), A=tuple(a * small for a in base.A))
    (found,), (plain,) = run(cuda, group), run(cuda, base)
    torch.testing.assert_close(found / (big * small) ** 2, plain, rtol=1e-13, atol=1e-13 * float(plain.abs().max()))


def test_heavy_and_light_weights(cuda):
    base = draw(19, 13, (4, 3), [torch.float32])
    weights = torch.tensor([[1e200, 1e-200], [-1e-300, 0.0]], dtype=torch.float64)
    (found,) = run(cuda, dataclasses.replace(base, weights=weights))
    (plain,) = run(cuda, dataclasses.replace(base, weights=torch.ones(2, 2, dtype=torch.float64)))
    assert found[0, 0, 0] == math.inf
    torch.testing.assert_close(found[0, 0, 1], plain[0, 0, 1], rtol=1e-13, atol=0.0)
    assert found[0, 1, 1] == 0.0
    assert found[1].tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("where", ["B", "A"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ranks", [(5, 3, 8), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_bad_client_spoils_its_own_row_and_column(cuda, dtype, ranks, value, where):
    group = draw(43, 31, ranks, [dtype], batch=3)
    (clean,) = run(cuda, group)
    getattr(group, where)[1][2, 0, 0] = value
    (found,) = run(cuda, group)
    bad = torch.zeros(3, 3, 3, dtype=torch.bool)
    bad[2, 1] = bad[2, :, 1] = True
    assert torch.equal(found.isnan(), bad)
    assert same_bits(found[~bad], clean[~bad])


def test_a_problem_does_not_depend_on_batch_slot_or_the_rest_of_the_call(cuda):
    groups = [draw(300, 700, (5, 11), [torch.float32], 3), draw(33, 21, (70,), [torch.float64], 2, spread=9)]
    together = run(cuda, *groups)
    for group, found in zip(groups, together, strict=True):
        for i in range(len(found)):
            assert same_bits(run(cuda, part(group, slice(i, i + 1)))[0], found[i : i + 1])
    assert all(same_bits(x, y) for x, y in zip(run(cuda, *groups[::-1])[::-1], together, strict=True))


@pytest.mark.parametrize("most", [0, 200_000])
def test_little_memory_changes_no_bit(cuda, monkeypatch, most):
    groups = [
        draw(30, 40, (5, 20), [torch.float64], 5),
        draw(9, 12, (), [torch.float64]),
        draw(30, 40, (4,), [torch.float16]),
    ]
    wanted = run(cuda, *groups)
    monkeypatch.setattr(gram, "_SCRATCH", most)
    assert all(same_bits(x, y) for x, y in zip(run(cuda, *groups), wanted, strict=True))


def test_no_order_of_threads_shows(simt, monkeypatch):
    groups = [draw(300, 70, (5, 11), [torch.float32]), draw(33, 21, (7, 40), [torch.float64], spread=9)]
    answers = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("FEDLORA_SIMT_SCHEDULE", schedule)
        answers.append(run((simt, torch.device("cpu")), *groups))
    assert all(same_bits(x, y) for answer in answers[1:] for x, y in zip(answer, answers[0], strict=True))


@pytest.mark.parametrize(
    ("m", "n", "ranks", "batch"),
    [(0, 5, (3,), 2), (5, 0, (3, 1), 2), (5, 7, (0, 0), 2), (5, 7, (), 2), (5, 7, (3,), 0)],
)
def test_nothing_to_do(cuda, m, n, ranks, batch):
    group = draw(m, n, ranks, [torch.float64], batch)
    assert torch.equal(run(cuda, group)[0], torch.zeros(batch, len(ranks), len(ranks), dtype=torch.float64))
    assert run(cuda) == []
