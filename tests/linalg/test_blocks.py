"""From arguments to the groups a backend gets: shapes, zero weights, ragged batches."""

import numpy as np
import pytest
import torch

from fedlora_kernels.errors import InputError, MismatchError, WeightError
from fedlora_kernels.linalg.arrays import Caller
from fedlora_kernels.linalg.blocks import (
    factor_problems,
    largest,
    matrix_problems,
    merge,
    solve,
    stack_problems,
    unflatten,
)
from fedlora_kernels.linalg.ragged import Ragged, each_problem

M, N = 7, 11


def pair(ranks=(2, 3), batch=(), dtype=torch.float64):
    g = torch.Generator().manual_seed(sum(ranks))
    B = [torch.randn(*batch, M, r, generator=g, dtype=torch.float64).to(dtype) for r in ranks]
    A = [torch.randn(*batch, r, N, generator=g, dtype=torch.float64).to(dtype) for r in ranks]
    return B, A


def factors(B, A, weights=None, cap=None):
    return factor_problems(Caller("f"), B, A, weights, cap)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,), (2, 0, 3), (1, 1, 1)])
def test_leading_dimensions_become_one(batch):
    B, A = pair(batch=batch)
    (problem,) = factors(B, A)
    (part,) = problem.parts
    count = int(np.prod(batch))
    assert problem.batch == batch
    assert problem.ranks == (2, 3)
    assert [tuple(b.shape) for b in part.group.B] == [(count, M, 2), (count, M, 3)]
    assert [tuple(a.shape) for a in part.group.A] == [(count, 2, N), (count, 3, N)]
    assert part.group.weights.shape == (count, 2)
    assert part.group.batch == count
    assert part.group.width == 5
    assert dict(problem.sizes) == {"m": M, "n": N, "R": 5, "K": 2, "N": count}
    assert unflatten(part.group.B[0], batch).equal(B[0])


def test_a_dense_pair_is_one_block():
    B, A = pair(ranks=(5,))
    (problem,) = factors(B[0], A[0], weights=-0.5)
    assert problem.parts[0].group.B[0].data_ptr() == B[0].data_ptr()
    assert problem.parts[0].group.weights.tolist() == [[-0.5]]


@pytest.mark.parametrize(
    ("ranks", "cap", "p_max"),
    [((2, 3), None, 5), ((2, 3), 4, 4), ((2, 3), 9, 5), ((6, 6), None, 7), ((6, 6), 3, 3), ((0,), None, 0)],
)
def test_padded_columns(ranks, cap, p_max):
    (problem,) = factors(*pair(ranks=ranks), cap=cap)
    assert problem.parts[0].group.p_max == p_max


def test_clients_of_weight_zero_are_gone_and_still_count_for_the_padding():
    B, A = pair(ranks=(2, 3, 1), batch=(2,))
    (problem,) = factors(B, A, weights=[0.5, 0.0, -2.0])
    (part,) = problem.parts
    assert part.rows is None
    assert part.clients == (0, 2)
    assert part.group.width == 3
    assert part.group.p_max == 6
    assert part.group.weights.tolist() == [[0.5, -2.0]] * 2
    assert all(b.data_ptr() == given.data_ptr() for b, given in zip(part.group.B, (B[0], B[2]), strict=True))


def test_zero_patterns_split_a_batch():
    B, A = pair(ranks=(2, 3), batch=(2, 3))
    weights = torch.tensor([[[1, 2], [0, 3], [4, 5]], [[0, 0], [6, 0], [0, 7]]], dtype=torch.float64)
    (problem,) = factors(B, A, weights=weights)
    found = {part.clients: part for part in problem.parts}
    assert set(found) == {(), (0,), (1,), (0, 1)}
    assert found[(0, 1)].rows.tolist() == [0, 2]
    assert found[(1,)].rows.tolist() == [1, 5]
    assert found[(1,)].group.weights.tolist() == [[3.0], [7.0]]
    assert found[(1,)].group.B[0].equal(B[1].reshape(6, M, 3)[[1, 5]])
    assert found[()].group.width == 0
    assert found[()].group.weights.shape == (1, 1)
    assert all(part.group.p_max == 5 for part in problem.parts)


def test_merge_puts_every_matrix_at_its_place():
    B, A = pair(ranks=(2, 3), batch=(5,))
    weights = torch.tensor([[1, 2], [0, 3], [4, 5], [0, 6], [0, 0]], dtype=torch.float64)
    problems = factors(B, A, weights=weights)
    raws = solve(problems, lambda groups: [(g.weights.sum(-1), (g.weights > 4).any(-1), None) for g in groups])
    sums, flags, nothing = raws[0]
    assert sums.tolist() == [3.0, 3.0, 9.0, 6.0, 1.0]  # the stand-in without columns has weight 1
    assert flags.tolist() == [False, False, True, True, False]
    assert nothing is None


def test_one_group_per_problem_in_order():
    shapes = [(2, 3), (1,), (4, 4, 4)]
    given = [pair(ranks=ranks, batch=(i,)) for i, ranks in enumerate(shapes, 1)]
    seen = []

    def call(groups):
        seen.extend(groups)
        return [(g.weights,) for g in groups]

    problems = factors(Ragged([B for B, _ in given]), Ragged([A for _, A in given]))
    solve(problems, call)
    assert [group.width for group in seen] == [5, 1, 12]
    assert [problem.batch for problem in problems] == [(1,), (2,), (3,)]
    assert largest(problems) == {"m": M, "n": N, "R": 12, "K": 3, "N": 3}


def test_ragged_weights_are_ragged_or_shared():
    given = [pair(), pair(ranks=(1, 1))]
    B, A = Ragged([B for B, _ in given]), Ragged([A for _, A in given])
    shared = factors(B, A, weights=[1, 2])
    assert [p.parts[0].group.weights.tolist() for p in shared] == [[[1.0, 2.0]]] * 2
    own = factors(B, A, weights=Ragged([[1, 2], None]))
    assert [p.parts[0].group.weights.tolist() for p in own] == [[[1.0, 2.0]], [[1.0, 1.0]]]


def test_dtypes_may_differ_between_blocks():
    B, A = pair()
    (problem,) = factors([B[0].half(), B[1].bfloat16()], [A[0].half(), A[1].bfloat16()])
    assert problem.dtype == torch.float32
    assert problem.parts[0].group.B[1].dtype == torch.bfloat16


def test_stack_keeps_its_rows_where_no_client_is_left():
    B, _ = pair(batch=(2,), dtype=torch.float32)
    (problem,) = stack_problems(Caller("f"), B, [0, 0])
    (part,) = problem.parts
    assert part.clients == ()
    assert part.group.m == M
    assert part.group.blocks[0].shape == (2, M, 0)
    assert part.group.blocks[0].dtype == torch.float32


def error(kind, B, A, weights=None):
    with pytest.raises(kind) as caught:
        factors(B, A, weights)
    return str(caught.value)


def test_wrong_shapes_name_the_block_and_what_is_needed():
    B, A = pair(ranks=(2, 3, 1))
    assert error(MismatchError, [B[0], B[1][:6], B[2]], A) == "f: B[1] has shape (6, 3); (7, 3) is needed to fit B[0]"
    assert (
        error(MismatchError, B, [A[0], A[1], A[2][:, :9]]) == "f: A[2] has shape (1, 9); (1, 11) is needed to fit A[0]"
    )
    assert error(MismatchError, B, [A[0], A[0], A[2]]) == "f: A[1] has shape (2, 11); (3, 11) is needed to fit B[1]"
    assert "B has 3 client blocks and A has 2" in error(MismatchError, B, A[:2])
    assert error(MismatchError, B[0], A[1]) == "f: A has shape (3, 11); (2, 11) is needed to fit B"
    assert "B[1] has shape (3,); at least two" in error(MismatchError, [B[0], B[1][0], B[2]], A)
    assert "one of B and A is a list" in error(TypeError, B, A[0])


def test_rank_one_blocks_are_never_broadcast():
    B, A = pair(ranks=(8, 1))
    assert "A[0] has shape (1, 11); (8, 11) is needed" in error(MismatchError, [B[0], B[1]], [A[1], A[1]])


def test_leading_dimensions_are_never_broadcast():
    B, A = pair(batch=(2,))
    one, _ = pair(batch=(1,))
    assert "B[1] has shape (1, 7, 3); leading dimensions (2,), those of B[0], are needed" in error(
        MismatchError, [B[0], one[1]], A
    )
    assert "no leading dimensions" in error(MismatchError, [b[0] for b in B], A)


def test_no_client_at_all():
    assert "B is an empty list, which leaves the shape unknown" in error(InputError, [], [])
    with pytest.raises(InputError, match="f: problem 1: blocks is an empty list"):
        stack_problems(Caller("f"), Ragged([pair()[0], []]), None)


def test_ragged_errors_name_the_problem():
    B, A = pair()
    text = error(MismatchError, Ragged([B, B]), Ragged([A, [A[1], A[1]]]))
    assert text == "f: problem 1: A[0] has shape (3, 11); (2, 11) is needed to fit B[0]"
    assert "f: problem 1: weights[0] is nan" in error(
        WeightError, Ragged([B, B]), Ragged([A, A]), Ragged([None, [np.nan, 1]])
    )
    assert "B is Ragged and A is not" in error(TypeError, Ragged([B]), A)
    assert "A is Ragged and B is not" in error(TypeError, B, Ragged([A]))
    assert "weights is Ragged and B is not" in error(TypeError, B, A, Ragged([None]))
    assert "B holds 2, A holds 1 problems" in error(MismatchError, Ragged([B, B]), Ragged([A]))
    with pytest.raises(InputError, match=r"f: problem 1: B\[0\] has dtype torch.int64"):
        factors(Ragged([B, [b.long() for b in B]]), Ragged([A, A]))


def test_ragged_is_a_sequence_of_problems():
    ragged = Ragged([1, 2])
    assert len(ragged) == 2
    assert list(ragged) == [1, 2]
    assert repr(ragged) == "Ragged(<2 problems>)"
    for wrong in (torch.ones(2), np.ones(2), {1: 2}, "ab", None):
        with pytest.raises(TypeError, match="a list of problems"):
            Ragged(wrong)
    with pytest.raises(TypeError, match="further Ragged"):
        Ragged([Ragged([])])
    assert list(each_problem("f", x=Ragged([]))) == []


def test_plain_arguments_share_leading_dimensions():
    cores = {"X": "mr", "Y": "nr"}
    (problem,) = matrix_problems(Caller("f"), cores, X=torch.ones(2, 3, 5, 4), Y=torch.ones(2, 3, 1, 4))
    assert [tuple(t.shape) for t in problem.parts[0].group.tensors] == [(6, 5, 4), (6, 1, 4)]
    assert problem.sizes == {"N": 6, "m": 5, "r": 4, "n": 1}
    with pytest.raises(MismatchError, match="Y has shape"):
        matrix_problems(Caller("f"), cores, X=torch.ones(2, 5, 4), Y=torch.ones(3, 5, 4))


def test_equal_letters_are_equal_sizes():
    cores = {"B": "mr", "A": "rn", "reference B": "mr", "reference A": "rn"}
    B, A = torch.ones(2, M, 3), torch.ones(2, 3, N)
    for values, text in (
        ((B, A[:, 1:], B, A), r"f: A has shape \(2, 2, 11\); \(2, 3, 11\) is needed to fit B"),
        ((B, A, B[:, 1:], A), r"f: reference B has shape \(2, 6, 3\); \(2, 7, 3\) is needed to fit B"),
        ((B, A, B, A[..., 1:]), r"f: reference A has shape \(2, 3, 10\); \(2, 3, 11\) is needed to fit A"),
        ((B, A, B, A[:, 1:]), r"f: reference A has shape \(2, 2, 11\); \(2, 3, 11\) is needed to fit A"),
    ):
        with pytest.raises(MismatchError, match=text):
            matrix_problems(Caller("f"), cores, **dict(zip("BAXY", values, strict=True)))


def test_merge_of_a_whole_problem_is_the_record_itself():
    (problem,) = factors(*pair())
    raw = (torch.ones(1),)
    assert merge(problem, [raw]) is raw
