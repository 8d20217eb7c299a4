"""HTML from strangers' texts: nothing of theirs becomes markup, ends a script, or turns a line around."""

import html
import json
import math
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.reporting.markup import Markup, element, embedded, join, table
from fedlora_kernels.text import harmless

EVIL = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<!--<script>",
    "]]>",
    "&lt;b&gt;",
    "\u202eevil\u2066",
    "a\x00b\x1b[31m\x07\r\n\t",
    "\u2028\u2029",
    "\ud800",
    "{{x}}${x}%{x}",
    "javascript:alert(1)",
]


class Seen(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("text", EVIL)
def test_texts_and_attributes_stay_texts_and_attributes(text):
    seen = Seen(element("p", text, title=text, class_="x", hidden=True, lang=None))
    assert seen.tags == ["p"]
    shown = "".join(seen.texts)
    assert dict(seen.attributes)["title"] == shown
    assert [key for key, _ in seen.attributes] == ["title", "class", "hidden"]
    assert shown.isprintable()
    assert len(shown) == len(text)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_text_is_one_text(text):
    seen = Seen(element("td", text))
    assert seen.tags == ["td"]
    assert "".join(seen.texts) == harmless(text)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    )
)
def test_embedded_data_is_strict_and_cannot_end_its_element(data):
    text = embedded(data)
    assert text.isascii()
    assert not set(text) & set("<>&")

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(text, parse_constant=refuse)


def test_embedded_data_is_the_same_but_for_rounding():
    data = {"a": [1 / 3, math.nan, True, None, 7], "</script>": "<\u202e>"}
    assert json.loads(embedded(data)) == {"a": [0.333333, None, True, None, 7], "</script>": "<?>"}


def test_markup_is_left_as_it_is():
    inner = element("b", "x < y")
    assert join(["a & b", None, inner]) == "a &amp; b<b>x &lt; y</b>"
    assert isinstance(inner, Markup)
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_tables_have_heads_for_rows_and_columns_and_a_caption():
    seen = Seen(table("Clients", ("client", ">norm"), [(EVIL[0], 1.5), ("b", None)]))
    assert seen.tags == [
        "div",
        "table",
        "caption",
        "thead",
        "tr",
        "th",
        "th",
        "tbody",
        "tr",
        "th",
        "td",
        "tr",
        "th",
        "td",
    ]
    assert html.unescape(EVIL[0]) in "".join(seen.texts)
    assert ("scope", "row") in seen.attributes
    assert ("tabindex", "0") in seen.attributes
