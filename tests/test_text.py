"""Text from strangers made harmless."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.text import harmless


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.text(max_size=400))
def test_one_line_of_the_same_length(name):
    shown = harmless(name)
    assert len(shown) == len(name)
    assert len(shown.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202e\u200b\ud800-\udfff\u2028\u2029]", shown)
    assert harmless(shown) == shown


@pytest.mark.parametrize("name", ["plain é 名", "Klinik Süd/3 – 東京", "a b[bold]:smile:", "x" * 900])
def test_harmless_text_stays(name):
    assert harmless(name) == name


def test_each_harmful_character_is_a_question_mark():
    assert harmless("c\x1b[31m\x07\u202e\u2028\x9b2J\ud800\n") == "c?[31m????2J??"
    assert harmless(7) == "7"
