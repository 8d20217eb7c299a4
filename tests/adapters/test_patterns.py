"""rank_pattern and alpha_pattern: PEFT's rule, in bounded time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from fedlora_kernels.adapters.patterns import PatternTable
from fedlora_kernels.errors import FormatError, LimitError


def hits(key, name):
    return list(PatternTable({key: 1}, "rank_pattern").hits(name)) == [key]


@pytest.mark.parametrize(
    ("key", "name", "applies"),
    [
        ("q_proj", "layers.3.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "layers.3.q_proj", False),
        ("layers.1.q_proj", "model.layers.1.q_proj", True),
        ("layers.1.q_proj", "enc.layers.1.q_proj", True),
        ("layers.1.q_proj", "layers.11.q_proj", False),
        ("^layers.1.q_proj", "layers.1.q_proj", True),
        ("^layers.1.q_proj", "enc.layers.1.q_proj", False),
        ("q_proj|v_proj", "layers.0.v_proj", True),
        ("q_proj|v_proj", "layers.0.k_proj", False),
        (r"layers\.[0-3]\.q_proj", "m.layers.2.q_proj", True),
        (r"layers\.[0-3]\.q_proj", "m.layers.4.q_proj", False),
        (r"layers\.\d+\.q_proj", "layers.12.q_proj", True),
        ("a.c", "abc", True),
        (r"a\.c", "abc", False),
        (r"^a\.c", "a.c", True),
        (r"x\+y", "m.x+y", True),
        ("base_model.model.q", "q", False),
        (".*q_proj", "layers.0.q_proj", True),
    ],
)
def test_a_key_matches_the_end_of_a_name_from_a_dot_on(key, name, applies):
    assert hits(key, name) == applies
    assert (get_pattern_key([key], name) == key) == applies


def test_the_first_entry_that_applies_wins_and_a_general_one_hides_a_special_one():
    name = "layers.1.q_proj"
    assert PatternTable({"q_proj": 4, "layers.1.q_proj": 8}, "rank_pattern").resolve(name, 1) == 4
    assert PatternTable({"layers.1.q_proj": 8, "q_proj": 4}, "rank_pattern").resolve(name, 1) == 8
    assert PatternTable({"k_proj": 8}, "rank_pattern").resolve(name, 1) == 1


def test_contradicting_entries_are_named_once_and_equal_ones_are_not():
    table = PatternTable({"q_proj": 16, "layers.1.q_proj": 64, ".*q_proj": 16, "v": 1}, "alpha_pattern")
    for layer in range(5):
        table.resolve(f"layers.{layer}.q_proj", 8)
    (text,) = table.warnings()
    assert "'q_proj'" in text
    assert "'layers.1.q_proj'" in text
    assert "16 and 64" in text
    assert table.notes() == ["alpha_pattern: 'v' matches no module"]


names = st.from_regex(r"\A[ab1_]{1,3}(\.[ab1_]{1,3}){0,3}\Z")


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    key=st.one_of(names, names.map(lambda k: f"^{k}"), names.map(re.escape), st.from_regex(r"\A[ab.]{1,4}\Z")),
    name=names,
)
def test_direct_comparison_equals_the_regular_expression(key, name):
    assert hits(key, name) == bool(re.fullmatch(rf"(?:.*\.)?(?:{key})", name))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("(a+)+b", "repeats a group"),
        ("(?:a|b)*", "repeats a group"),
        ("(ab){2}", "repeats a group"),
        ("((a))?", "repeats a group"),
        (".*a.*b.*c.*d", "4 unbounded quantifiers"),
        ("a+b+c+d{2,}", "4 unbounded quantifiers"),
        ("a{0,900}b{1,800}c{7,700}d*", "4 unbounded quantifiers"),
        ("a?" * 20 + "a" * 20, "more than 4096 ways"),
        ("(a|a)" * 20 + "b", "more than 4096 ways"),
        ("a{1,9}" * 6, "more than 4096 ways"),
        (r"(a*)\1", "back reference"),
        ("(?#[)(a+)+b", "special group"),
        ("(?x:#[\n(a+)+)", "special group"),
        ("(?=a)", "special group"),
        ("(?P<n>a)", "special group"),
        ("a" * 257 + "*", "258 characters"),
        ("[]a]+[^]a]+[\\]]+b+", "4 unbounded quantifiers"),
    ],
)
def test_expressions_that_may_run_for_ever_are_refused_by_name(key, text):
    with pytest.raises(LimitError, match=text) as caught:
        PatternTable({key: 1}, "client 'c': rank_pattern")
    assert str(caught.value).startswith("client 'c': rank_pattern: entry '")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["a(b", "[a", "*a", "a**", "a\\", "a)", "{2,1}+", "[b-a]"])
def test_invalid_expressions_are_format_errors(key):
    with pytest.raises(FormatError, match="is not a regular expression"):
        PatternTable({key: 1}, "rank_pattern")


def test_the_number_of_expressions_is_capped_but_not_of_plain_names():
    PatternTable({f"layers.{i}.q": 1 for i in range(5000)}, "rank_pattern")
    with pytest.raises(LimitError, match="4097 regular expressions; at most 4096"):
        PatternTable({f"layers.{i}.q+": 1 for i in range(4097)}, "rank_pattern")


def test_the_worst_accepted_expression_is_fast_on_a_long_name():
    table = PatternTable({".*a.*a.*a": 1, "(a|a|a|a)" * 6 + "c": 2}, "rank_pattern")
    start = time.perf_counter()
    table.resolve("a" * 150 + "b", 0)
    assert time.perf_counter() - start < 5


def test_thousands_of_full_names_resolve_quickly():
    names = [f"model.layers.{i}.{kind}_proj" for i in range(300) for kind in "qkvo"]
    table = PatternTable({name: i for i, name in enumerate(names)}, "rank_pattern")
    start = time.perf_counter()
    assert [table.resolve(name, -1) for name in names] == list(range(len(names)))
    assert time.perf_counter() - start < 10


def test_no_python_warning_leaves_the_compiler():
    assert hits("[[a]b", "x.[b")
