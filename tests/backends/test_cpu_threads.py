"""How many threads the library takes."""

import threading

import pytest
import torch

from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.backends.native import threads
from fedlora_kernels.backends.native.threads import spare_threads, thread_count


@pytest.mark.parametrize(("asked", "spared", "left"), [("8", 0, 8), ("8", 1, 7), ("2", 1, 1), ("1", 1, 1), ("3", 9, 1)])
def test_spared_threads_are_taken_off_what_was_asked_for(monkeypatch, asked, spared, left):
    monkeypatch.setenv("FEDLORA_NUM_THREADS", asked)
    with spare_threads(spared):
        assert thread_count() == left
    assert thread_count() == int(asked)


def test_threads_are_spared_by_this_thread_alone_and_given_back_after_an_error(monkeypatch):
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "4")
    seen = []
    other = threading.Thread(target=lambda: seen.append(thread_count()))
    with spare_threads(2):
        other.start()
        other.join()
    with pytest.raises(ValueError, match="stop"), spare_threads(2):
        raise ValueError("stop")
    assert seen == [4]
    assert thread_count() == 4


@pytest.mark.parametrize(
    ("method", "measure", "taken"), [("fedit", False, 3), ("fedit", True, 4), ("florist", False, 4)]
)
def test_only_work_that_streams_leaves_a_processor_to_the_reader(monkeypatch, method, measure, taken):
    monkeypatch.setenv("FEDLORA_NUM_THREADS", "4")
    asked = []
    plain = threads._asked

    def watched():
        asked.append(plain() - threads._SPARED.get())
        return plain()

    monkeypatch.setattr(threads, "_asked", watched)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    state = {
        "base_model.model.q_proj.lora_A.weight": torch.ones(2, 5),
        "base_model.model.q_proj.lora_B.weight": torch.ones(7, 2),
    }
    aggregate([(state, config), (state, config)], method, measure=measure)
    assert set(asked) == {taken}
