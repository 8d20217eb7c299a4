"""Results: derived values, trimming, texts, and how trouble is raised."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch

from fedlora_kernels.errors import ConvergenceError, NonFiniteError, OutputOverflowError
from fedlora_kernels.linalg.results import (
    Certificate,
    Info,
    Note,
    ProductSVD,
    info_text,
    note_text,
    place,
    raise_for_info,
)


def product(make, ranks=(2, 0, 3), errors=(0.5, 0.0, 0.0)):
    """A batch of three with p_max = 4: singular values rank..1, in torch or NumPy."""
    S = torch.zeros(3, 4, dtype=torch.float64)
    for row, rank in enumerate(ranks):
        S[row, :rank] = torch.arange(rank, 0, -1)
    left = torch.ones(3, 7, 4) * (S != 0)[:, None]
    right = torch.ones(3, 4, 5) * (S != 0)[:, :, None]
    zero = torch.zeros(3)
    certificate = Certificate(*(make(zero) for _ in range(5)))
    fields = (left, S, right, torch.tensor(ranks), zero, torch.tensor(errors, dtype=torch.float64), zero)
    return ProductSVD(*(make(field) for field in fields), certificate, make(zero.int()), make(zero.int()))


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.numpy()], ids=["torch", "numpy"])
def test_kept_is_a_share_of_the_energy_and_one_for_zero(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert product(make).kept.tolist() == [0.75, 1.0, 1.0]
    assert np.isnan(product(make, errors=(float("nan"), 0.0, 0.0)).kept.tolist()[0])


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.numpy()], ids=["torch", "numpy"])
def test_trim_cuts_to_the_largest_rank(make):
    full = product(make)
    cut = full.trim()
    assert cut.left.shape == (3, 7, 3)
    assert cut.S.shape == (3, 3)
    assert cut.right.shape == (3, 3, 5)
    assert cut.rank is full.rank
    assert cut.S.tolist() == full.S[:, :3].tolist()
    assert product(make, ranks=(0, 0, 0)).trim().left.shape == (3, 7, 0)


def test_trim_of_an_empty_batch():
    empty = product(lambda t: t[:0])
    assert empty.trim().left.shape == (0, 7, 0)


def test_texts():
    assert info_text(0) == []
    assert len(info_text(int(Info.NONFINITE | Info.OVERFLOW))) == 2
    assert "balanced" in info_text(np.int32(4))[0]
    assert note_text(torch.tensor(int(Note.CAPPED), dtype=torch.int32)) == [
        "a cap cut the rank that the rule asked for"
    ]
    assert len(note_text(127)) == len(Note)
    assert len(info_text(7)) == len(Info)


@pytest.mark.parametrize(
    ("batches", "ragged", "flat", "text"),
    [
        ([()], False, 0, "f: "),
        ([(4,)], False, 3, "f: matrix (3): "),
        ([(2, 3)], False, 5, "f: matrix (1, 2): "),
        ([(), (2,), (2, 3)], True, 0, "f: problem 0: "),
        ([(), (2,), (2, 3)], True, 2, "f: problem 1: matrix (1): "),
        ([(0,), (2, 0), (2, 3)], True, 4, "f: problem 2: matrix (1, 1): "),
    ],
)
def test_place(batches, ragged, flat, text):
    assert place("f", batches, ragged, flat) == text


def codes(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("info", "kind"),
    [(Info.NONFINITE, NonFiniteError), (Info.NOT_CONVERGED, ConvergenceError), (Info.OVERFLOW, OutputOverflowError)],
)
def test_trouble_names_the_matrix(info, kind):
    with pytest.raises(kind, match=r"^f: matrix \(1, 0\): .*(Remove|Use) ") as caught:
        raise_for_info(partial(place, "f", [(2, 2)], False), [codes(0, 0, int(info), 0)])
    assert "affected" not in str(caught.value)


def test_bad_input_comes_first_and_the_others_are_counted():
    with pytest.raises(NonFiniteError, match=r"problem 1: matrix \(1\).*\(2 matrices of 5 are affected\)"):
        raise_for_info(partial(place, "f", [(2,), (3,)], True), [codes(4, 2), codes(0, 1, 1)])


def test_no_trouble():
    raise_for_info(partial(place, "f", [(2,)], False), [codes(0, 0)])
    raise_for_info(partial(place, "f", [(0,)], False), [codes()])
    raise_for_info(partial(place, "f", [], True), [])
