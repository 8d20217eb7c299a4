"""Slabs and the threads that read ahead and write behind."""

import threading
import time
from itertools import pairwise

import pytest
import torch
from adapter_problems import SHAPES, client

from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.engine.slabs import Drain, Plan, Prefetch, load_block, plan_slabs
from fedlora_kernels.memory import Pool

EVERYTHING = {"limit": 1 << 30, "itemsize": 4}


def adapters(ranks=(4, 2, 5)):
    return [open_adapter(client(k, rank=rank)) for k, rank in enumerate(ranks)]


def always(k, name):
    return True


def test_one_slab_groups_equal_shapes():
    (slab,) = plan_slabs(adapters(), list(SHAPES), always, **EVERYTHING)
    assert [plan.modules for plan in slab] == [tuple(SHAPES)[::2], tuple(SHAPES)[1::2]]
    assert [plan.ranks for plan in slab] == [(4, 2, 5), (4, 2, 5)]
    assert sum(plan.nbytes for plan in slab) == sum(4 * 11 * (m + n) for m, n in SHAPES.values())


def test_a_slab_holds_what_fits_and_at_least_one_module():
    first = 11 * (37 + 23) * 4 * 2  # factors, and an answer of the stacked rank
    second = 11 * (19 + 53) * 4 * 2
    for limit, sizes in (
        (0, [1, 1, 1, 1]),
        (first + second, [2, 2]),
        (first + second - 1, [1, 1, 1, 1]),
        (1 << 20, [4]),
    ):
        slabs = plan_slabs(adapters(), list(SHAPES), always, limit=limit, itemsize=4)
        assert [sum(len(plan.modules) for plan in slab) for slab in slabs] == sizes
        assert sorted(name for slab in slabs for plan in slab for name in plan.modules) == sorted(SHAPES)


def test_a_client_that_is_not_read_has_rank_zero():
    (slab,) = plan_slabs(adapters(), list(SHAPES), lambda k, name: k != 1, **EVERYTHING)
    assert {plan.ranks for plan in slab} == {(4, 0, 5)}


def test_blocks_hold_every_factor_in_its_place(poisoned_empty):
    opened, pool = adapters(), Pool()
    (slab,) = plan_slabs(opened, list(SHAPES), always, **EVERYTHING)
    for used in (False, True):
        if used:
            pool.take(1 << 16).fill_(255)
        for plan in slab:
            block = load_block(plan, opened, pool)
            for i, name in enumerate(plan.modules):
                for k, adapter in enumerate(opened):
                    assert torch.equal(block.B[k][i], adapter[name].B)
                    assert torch.equal(block.A[k][i], adapter[name].A)


def test_stacks_are_aligned_and_apart():
    opened = adapters((1, 3, 1))
    (slab,) = plan_slabs(opened, list(SHAPES), always, **EVERYTHING)
    block = load_block(slab[0], opened, Pool())
    stacks = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in (*block.B, *block.A))
    assert all(begin % 64 == 0 for begin, _ in stacks)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(stacks))


@pytest.mark.parametrize(("limit", "sizes"), [(0, [1] * 7), (30, [2, 2, 3]), (40, [3, 4]), (69, [3, 4]), (70, [7])])
def test_parts_of_a_plan_are_of_equal_size_and_within_the_limit(limit, sizes):
    plan = Plan(
        tuple("abcdefg"), "linear", 2, 3, (2, 0), (torch.bfloat16, torch.bfloat16, torch.float64, torch.float64)
    )
    assert plan.nbytes == 7 * 20
    parts = plan.parts(2 * limit)
    assert [len(part.modules) for part in parts] == sizes
    assert "".join(name for part in parts for name in part.modules) == "abcdefg"
    assert all(part.ranks == plan.ranks for part in parts)


def test_memory_is_used_again_only_when_no_tensor_lies_in_it():
    pool = Pool()
    first = pool.take(1000)
    place, view = first.data_ptr(), first[500:504].view(torch.float32)
    view.fill_(7.0)
    del first
    assert pool.take(1000).data_ptr() != place, "a view still holds it"
    array = view.numpy()
    del view
    other = pool.take(1000)
    other.fill_(0)
    assert array[0] == 7.0
    del array
    one = pool.take(1000)
    two = pool.take(1000)
    assert place in (one.data_ptr(), two.data_ptr())


def test_memory_that_is_too_small_gives_way():
    pool = Pool()
    pool.take(10)
    large = pool.take(1 << 20)
    large.fill_(1)
    assert len(large) >= 1 << 20


def test_prefetch_keeps_order_and_stays_one_ahead():
    loaded = []
    with Prefetch(range(5), lambda item: loaded.append(item) or item) as items:
        for item in items:
            time.sleep(0.02)
            assert len(loaded) <= item + 2
    assert loaded == [0, 1, 2, 3, 4]


def fail_at(number, error):
    def load(item):
        if item == number:
            raise error
        return item

    return load


def consume(load, error=None, count=5):
    """Read ``count`` items, or raise ``error`` after the first; return what arrived."""
    seen = []
    try:
        with Prefetch(range(count), load) as items:
            for item in items:
                seen.append(item)
                if error is not None:
                    raise error
    except BaseException as raised:
        raised.seen = seen
        raise
    return seen


def test_an_error_of_the_reader_surfaces_where_it_is_awaited():
    with pytest.raises(OSError, match="disc") as caught:
        consume(fail_at(2, OSError("disc")))
    assert caught.value.seen == [0, 1]


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_leaving_early_ends_the_reader(error):
    before = threading.active_count()
    with pytest.raises(type(error)):
        consume(lambda item: item, error, 100)
    assert threading.active_count() == before


def test_drain_writes_in_order_one_at_a_time():
    written = []

    def sink(item):
        time.sleep(0.005)
        written.append(item)

    with Drain(sink) as drain:
        for item in range(6):
            drain.put(item)
            assert len(written) >= item
    assert written == list(range(6))


def drain_all(sink, items, error=None):
    with Drain(sink) as drain:
        for item in items:
            drain.put(item)
        if error is not None:
            raise error


@pytest.mark.parametrize("count", [2, 10])
def test_an_error_of_the_writer_surfaces_at_the_next_put_or_at_the_end(count):
    before = threading.active_count()
    with pytest.raises(OSError, match="full"):
        drain_all(fail_at(1, OSError("full")), range(count))
    assert threading.active_count() == before


def test_an_error_of_the_caller_wins_over_the_writers():
    with pytest.raises(ValueError, match="mine"):
        drain_all(fail_at(1, OSError("full")), [1], ValueError("mine"))


@pytest.mark.parametrize("work", [Drain, lambda load: Prefetch([1], load)])
def test_an_interrupt_while_a_thread_is_awaited_still_awaits_it(work, monkeypatch):
    """Its files are closed next: a thread that still wrote would write into a file opened since."""
    thread, calls = work(lambda item: time.sleep(0.3)), []
    join = thread._thread.join

    def interrupted():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join()

    monkeypatch.setattr(thread._thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), thread:
        getattr(thread, "put", id)(1)
    assert not thread._thread.is_alive()


@pytest.mark.parametrize("work", [Drain, lambda load: Prefetch(range(5), load)])
def test_an_interrupt_while_a_thread_starts_ends_it(work, monkeypatch):
    thread = work(lambda item: item)
    start = thread._thread.start

    def interrupted():
        start()
        raise KeyboardInterrupt

    monkeypatch.setattr(thread._thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), thread:
        pass
    thread._thread.join(5)
    assert not thread._thread.is_alive()
