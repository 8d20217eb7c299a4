"""Recycled host memory: never under a tensor that somebody still holds, and never more than allowed."""

import gc

import pytest
import torch

from fedlora_kernels.engine.buffers import LEAST, Buffers

BIG = 2 * LEAST


def take(buffers, nbytes=BIG):
    return buffers.empty((nbytes // 4,), torch.float32)


def test_memory_of_a_tensor_that_is_gone_is_used_again():
    buffers = Buffers(10 * BIG)
    first = take(buffers)
    place = first.data_ptr()
    del first
    assert take(buffers).data_ptr() == place


@pytest.mark.parametrize(
    "hold",
    [lambda x: x, lambda x: x[3:5], lambda x: x.view(-1, 2).T, lambda x: x.numpy(), lambda x: x.untyped_storage()],
)
def test_memory_that_somebody_holds_is_left_alone(hold):
    buffers = Buffers(10 * BIG)
    first = take(buffers).fill_(7.0)
    held = hold(first)
    del first
    gc.collect()
    second = take(buffers).fill_(3.0)
    values = torch.tensor(held) if isinstance(held, torch.UntypedStorage) else torch.as_tensor(held)
    if not isinstance(held, torch.UntypedStorage):
        assert bool((values == 7.0).all())
    assert second.data_ptr() != (held.data_ptr() if hasattr(held, "data_ptr") else held.ctypes.data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 70001, 1), (1, 1), (0, 5), (2, 0, 3), (5, 1000, 33)])
def test_shapes_and_dtypes(shape, dtype):
    made = Buffers(1 << 30).empty(shape, dtype)
    assert tuple(made.shape) == shape
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert bool((made.fill_(2) == 2).all())


def test_the_pool_holds_no_more_than_its_limit():
    buffers = Buffers(3 * BIG)
    alive = [take(buffers) for _ in range(5)]
    assert sum(array.nbytes for array in buffers._arrays) <= 3 * BIG
    assert len({x.data_ptr() for x in alive}) == 5
    del alive
    larger = take(buffers, 3 * BIG)
    assert [array.nbytes for array in buffers._arrays] == [larger.numel() * 4]


def test_a_small_tensor_does_not_occupy_a_large_buffer():
    buffers = Buffers(100 * BIG)
    large = take(buffers, 20 * BIG)
    place = large.data_ptr()
    del large
    assert take(buffers).data_ptr() != place
