"""Every call answers on the device of its arrays, and what it answers there agrees with the reference on the host."""

import pytest
import torch

import fedlora_kernels as fk
from fedlora_kernels.testing import assert_close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LIMIT = 1e-11  # float64 problems of condition below 1e3 and sizes below 100


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


B = [draw(2, 53, r, seed=r) for r in (5, 3, 7)]
A = [draw(2, r, 41, seed=10 + r) for r in (5, 3, 7)]
MIXERS = [draw(2, r, 4, seed=20 + r) for r in (5, 3, 7)]
WEIGHTS = [0.5, -0.3, 0.2]
SQUARE, SOURCE, TARGET, TURN = (
    draw(3, 23, 17, seed=1),
    draw(2, 41, 6, seed=2),
    draw(2, 41, 6, seed=3),
    draw(2, 6, 6, seed=4),
)


def moved(arrays, device):
    return [array.to(device) for array in arrays] if isinstance(arrays, list) else arrays.to(device)


def product(b, a, **options):
    found = fk.product_svd(b, a, weights=WEIGHTS, output="left", rule=fk.Rank(4), **options)
    return found.left @ found.right, found.S, found.rank, found.energy, found.error


def rotated(b, a, reference, **options):
    left, right, rotation = fk.align_factors(b, a, reference, **options)
    return left, right, rotation.Q


CALLS = {
    "stacked_qr": (lambda b, **o: (fk.stacked_qr(b, weights=WEIGHTS, **o).R,), (B,)),
    "core_svd": (lambda c, **o: (fk.core_svd(c, **o).S,), (SQUARE,)),
    "product_svd": (product, (B, A)),
    "product_svd, dense": (lambda b, a, **o: (fk.product_svd(b, a, **o).S,), (draw(2, 9, 30), draw(2, 30, 11))),
    "update_gram": (lambda b, a, **o: (fk.update_gram(b, a, weights=WEIGHTS, **o),), (B, A)),
    "select_rank": (lambda s, **o: (fk.select_rank(s, fk.Energy(0.8), **o),), (torch.linalg.svdvals(SQUARE),)),
    "mixed_sum": (lambda x, m, **o: (fk.mixed_sum(x, m, **o).sum,), (B, MIXERS)),
    "procrustes_rotation": (lambda x, y, **o: (fk.procrustes_rotation(x, y, **o).Q,), (SOURCE, TARGET)),
    "rotate_factors": (fk.rotate_factors, (SOURCE, TARGET.mT, TURN)),
    "align_factors": (rotated, (SOURCE, TARGET.mT, draw(2, 6, 41, seed=5))),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CALLS)
def test_answers_are_on_the_device_and_agree_with_the_reference(name, device):
    call, arrays = CALLS[name]
    answers = call(*(moved(array, device) for array in arrays))
    expected = call(*arrays, backend="reference")
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.device.type == device
        assert answer.dtype == wanted.dtype
        assert_close(answer.cpu().double(), wanted.double(), LIMIT)
