"""Host memory that is used again: never while a tensor lies in it, and never more of it than allowed."""

import threading

import pytest
import torch

from fedlora_kernels.memory import Reserve

KIB = 1024


def test_memory_comes_back_with_its_last_tensor():
    reserve = Reserve(smallest=0)
    first = reserve.empty((64, 1024), torch.float32)
    place, view = first.data_ptr(), first[3:5].mT
    del first
    other = reserve.empty((64, 1024), torch.float32)
    assert other.data_ptr() != place  # a view still lies there
    del view
    assert reserve.empty((64, 1024), torch.float32).data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_storage_has_its_own_size(dtype):
    reserve = Reserve(smallest=0)
    large = reserve.empty((100, 1000), torch.float64)
    del large  # its memory serves a smaller answer
    t = reserve.empty((90, 1000), torch.float64)
    assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
    t = reserve.empty((7, 13, 5), dtype)
    assert (t.shape, t.dtype, t.is_contiguous()) == ((7, 13, 5), dtype, True)
    assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
    assert t.data_ptr() % 64 == 0


def test_no_more_belongs_to_it_than_the_limit():
    reserve = Reserve(limit=300 * KIB, smallest=0)
    tensors = [reserve.empty((100, KIB), torch.uint8) for _ in range(5)]
    assert len({t.data_ptr() for t in tensors}) == 5
    assert reserve.held() == 300 * KIB
    tensors.clear()
    assert reserve.held() == 300 * KIB
    large = reserve.empty((250, KIB), torch.uint8)  # unused ones make way
    assert reserve.held() == 250 * KIB
    assert len(large) == 250


def test_memory_much_larger_than_asked_for_stays():
    reserve = Reserve(smallest=0)
    large = reserve.empty((1000, KIB), torch.uint8)
    place = large.data_ptr()
    del large
    assert reserve.empty((500, KIB), torch.uint8).data_ptr() != place
    assert reserve.empty((900, KIB), torch.uint8).data_ptr() == place


def test_small_answers_are_not_from_here():
    reserve = Reserve(smallest=KIB)
    t = reserve.empty((KIB - 1,), torch.uint8)
    del t
    assert reserve.held() == 0


def test_threads_never_share_memory():
    reserve, wrong = Reserve(smallest=0), []

    def work(value: int) -> None:
        for _ in range(300):
            t = reserve.empty((8, 512), torch.int32).fill_(value)
            if not bool((t == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
