"""Untrusted names in messages and paths."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.adapters.names import path_name, printable


@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=st.text(max_size=400))
def test_printable_is_one_short_line_and_path_name_is_one_safe_component(name):
    shown, path = printable(name), path_name(name)
    assert len(shown.splitlines()) <= 1
    assert len(shown) <= 200
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202e\u200b\ud800-\udfff]", shown)
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,128}", path)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("c3", "c3"),
        ("../../etc", "_.._.._etc"),
        ("..", "_.."),
        ("", "_"),
        (".hidden", "_.hidden"),
        ("ü/b c", "__b_c"),
        (7, "7"),
    ],
)
def test_path_names(name, path):
    assert path_name(name) == path


def test_harmless_names_are_shown_as_they_are():
    assert printable("Klinik Süd/3 – 東京") == "Klinik Süd/3 – 東京"
