"""The check of factors that clients have not trained."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.engine import frozen
from fedlora_kernels.engine.frozen import check_frozen
from fedlora_kernels.errors import MismatchError, NonFiniteError
from fedlora_kernels.methods.contract import Group

M, N = 17, 13
NAMES = ("ann", "bob", "cat", "dan")
KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def made(factor="A", ranks=(3, 5, 5, 2), count=3, scale=(1.0, 2.0, 0.5, 4.0), dtype=torch.float32) -> Group:
    """Modules whose clients hold one A, nested, or one ``s_k B_k``; the other factor is each client's own."""
    made = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(count, *shape, generator=made).to(torch.bfloat16).to(dtype)

    widest = draw(max(ranks), N) if factor == "A" else draw(M, max(ranks))
    if factor == "A":
        A = tuple(widest[:, :r].clone() for r in ranks)
        B = tuple(draw(M, r) for r in ranks)
    else:
        A = tuple(draw(r, N) for r in ranks)
        B = tuple(widest[:, :, :r] / s for r, s in zip(ranks, scale, strict=True))
    return Group(
        modules=tuple(f"layers.{i}.q" for i in range(count)),
        kind="linear",
        m=M,
        n=N,
        B=B,
        A=A,
        scale=torch.tensor([scale] * count, dtype=torch.float64),
        weight=torch.full((count, len(ranks)), 1 / len(ranks), dtype=torch.float64),
        clients=tuple(range(len(ranks))),
        dtype=torch.float32,
    )


def held(group, factor):
    return group.A if factor == "A" else group.B


BOTH = pytest.mark.parametrize("factor", ["A", "B"])


@BOTH
@pytest.mark.parametrize("ranks", [(3, 5, 5, 2), (4, 4, 4, 4), (1, 2, 3, 4), (5, 0, 2, 0), (0, 0, 0, 0), (0, 0, 6, 0)])
def test_one_common_factor_passes(factor, ranks):
    group = made(factor, ranks)
    check_frozen(group, factor, NAMES)
    # the other factor is nobody's business
    if sorted(ranks)[-2]:
        with pytest.raises(MismatchError):
            check_frozen(group, "B" if factor == "A" else "A", NAMES)


@BOTH
@pytest.mark.parametrize("k", [0, 2, 3])
def test_the_smallest_difference_names_both_clients_module_and_place(factor, k):
    group = made(factor)
    x = held(group, factor)[k]
    place = (2, 1, 4) if factor == "A" else (2, 4, 1)
    x[place] = torch.nextafter(x[place], torch.tensor(9.0))
    what = r"row 1 of lora_A" if factor == "A" else r"column 1 of lora_B times its scale"
    pair = " and ".join(repr(NAMES[i]) for i in sorted((k, 1)))
    with pytest.raises(MismatchError, match=rf"clients {pair}, module 'layers\.2\.q': {what} differs; .*lora_{factor}"):
        check_frozen(group, factor, NAMES)


@BOTH
def test_a_changed_leader_differs_from_the_first_other_client(factor):
    group = made(factor)
    held(group, factor)[1][0, 0, 0] += 1.0
    with pytest.raises(MismatchError, match=r"'ann' and 'bob', module 'layers\.0\.q'"):
        check_frozen(group, factor, NAMES)


@BOTH
def test_what_only_the_largest_rank_has_may_be_anything(factor):
    group = made(factor, ranks=(3, 5, 3, 2))
    x = held(group, factor)[1]
    (x[:, 3:] if factor == "A" else x[:, :, 3:]).fill_(7.0)
    check_frozen(group, factor, NAMES)


@BOTH
def test_the_first_module_and_then_the_first_client_is_named(factor):
    group = made(factor)
    for i, k in ((1, 3), (1, 2), (2, 0)):
        held(group, factor)[k][i] += 1.0
    with pytest.raises(MismatchError, match=r"'bob' and 'cat', module 'layers\.1\.q'"):
        check_frozen(group, factor, NAMES)


@BOTH
def test_weight_zero_is_absent(factor):
    group = made(factor)
    held(group, factor)[2][1] = float("nan")
    weight = group.weight.clone()
    weight[1, 2] = 0.0
    check_frozen(replace(group, weight=weight), factor, NAMES)
    held(group, factor)[2][0] += 1.0
    with pytest.raises(MismatchError, match=r"layers\.0"):
        check_frozen(replace(group, weight=weight), factor, NAMES)


@BOTH
def test_negative_weights_are_present(factor):
    group = made(factor)
    held(group, factor)[2][1] += 1.0
    with pytest.raises(MismatchError):
        check_frozen(replace(group, weight=-group.weight), factor, NAMES)


@BOTH
def test_leaders_may_differ_from_module_to_module(factor):
    group = made(factor, ranks=(3, 5, 4, 2))
    weight = group.weight.clone()
    for i, k in ((1, 1), (0, 2)):
        weight[i, k] = 0.0
        held(group, factor)[k][i] += 1.0
    group = replace(group, weight=weight)
    check_frozen(group, factor, NAMES)
    held(group, factor)[0][1] += 1.0
    with pytest.raises(MismatchError, match=r"'ann' and 'cat', module 'layers\.1\.q'"):
        check_frozen(group, factor, NAMES)


@BOTH
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_storage_dtypes_are_compared_after_exact_upcast(factor, first, second):
    """Values of bfloat16 that every dtype holds are equal in all; one that only the wider dtype holds is not."""
    group = made(factor, ranks=(3, 3), scale=(1.0, 1.0))
    blocks = (held(group, factor)[0].to(first), held(group, factor)[1].to(second))
    group = replace(group, **{factor: blocks})
    check_frozen(group, factor, NAMES)
    if first != second:
        finer = min(first, second, key=lambda kind: torch.finfo(kind).eps)
        place = 0 if finer == first else 1
        blocks[place][1] *= 1 + 2 * torch.finfo(finer).eps
        with pytest.raises(MismatchError):
            check_frozen(group, factor, NAMES)


def test_B_is_folded_with_the_scale():
    group = made("B")
    check_frozen(group, "B", NAMES)
    with pytest.raises(MismatchError, match="times its scale"):
        check_frozen(replace(group, scale=torch.ones_like(group.scale)), "B", NAMES)
    check_frozen(replace(made("A"), scale=torch.rand(3, 4, dtype=torch.float64)), "A", NAMES)


def test_the_fold_is_made_in_float64():
    """Two products that agree in float32 and not in float64 differ."""
    group = made("B", ranks=(2, 2), scale=(1.0, 1.0))
    scale = group.scale.clone()
    scale[:, 1] += 2.0**-40
    with pytest.raises(MismatchError):
        check_frozen(replace(group, scale=scale), "B", NAMES)


@BOTH
def test_zeros_of_either_sign_are_one_value(factor):
    group = made(factor)
    for k, x in enumerate(held(group, factor)):
        x[1] = -0.0 if k % 2 else 0.0
    check_frozen(group, factor, NAMES)


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [0, 1])
def test_a_bad_number_is_named_as_such(factor, bad, k):
    group = made(factor)
    held(group, factor)[k][1, 0, 1] = bad
    with pytest.raises(NonFiniteError, match=rf"client '{NAMES[k]}', module 'layers\.1\.q', lora_{factor}: {bad} at"):
        check_frozen(group, factor, NAMES)


@BOTH
def test_nan_in_all_clients_is_not_equal(factor):
    group = made(factor)
    for x in held(group, factor):
        x[1, 0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="nan"):
        check_frozen(group, factor, NAMES)


def test_names_are_made_printable():
    group = made()
    group.A[0][0] += 1.0
    with pytest.raises(MismatchError) as caught:
        check_frozen(replace(group, modules=("a\nb", "c", "d")), "A", ("ev\x1bil", *NAMES[1:]))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@BOTH
def test_pieces_find_the_same(monkeypatch, factor):
    monkeypatch.setattr(frozen, "CHUNK", 1)
    group = made(factor, count=5)
    check_frozen(group, factor, NAMES)
    held(group, factor)[3][4, 1, 1] += 1.0
    with pytest.raises(MismatchError, match=r"'bob' and 'dan', module 'layers\.4\.q'"):
        check_frozen(group, factor, NAMES)


def test_transposed_and_strided_storage_passes():
    group = made("A", ranks=(4, 4, 4, 4))
    strided = group.A[0].mT.contiguous().mT
    check_frozen(replace(group, A=(strided, *group.A[1:])), "A", NAMES)


@given(ranks=st.lists(st.integers(0, 5), min_size=2, max_size=5), data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_one_changed_number_is_found_where_another_client_has_it(ranks, data):
    factor = data.draw(st.sampled_from("AB"))
    scale = (1.0, 2.0, 0.5, 4.0, 8.0)[: len(ranks)]
    group = made(factor, ranks, scale=scale, count=2)
    names = [f"c{k}" for k in range(len(ranks))]
    k = data.draw(st.integers(0, len(ranks) - 1))
    if ranks[k] == 0:
        check_frozen(group, factor, names)
        return
    j = data.draw(st.integers(0, ranks[k] - 1))
    i = data.draw(st.integers(0, 1))
    x = held(group, factor)[k][i]
    (x[j] if factor == "A" else x[:, j])[3] += 1.0
    if any(other != k and r > j for other, r in enumerate(ranks)):
        with pytest.raises(MismatchError, match=f"'c{k}'" if ranks[k] < max(ranks) else None):
            check_frozen(group, factor, names)
    else:
        check_frozen(group, factor, names)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_scale_of_zero_hides_no_bad_number_that_all_hold(bad):
    group = made("B", (4, 4, 4, 4), scale=(1.0,) * 4)
    for block in group.B:
        block[1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"module 'layers\.1\.q'"):
        check_frozen(replace(group, scale=torch.zeros_like(group.scale)), "B", NAMES)
