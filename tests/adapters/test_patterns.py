"""rank_pattern and alpha_pattern: PEFT's rule, in bounded time."""

import re
import time

import pytest
from hypothesis import given, reject, settings
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


ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[]a]", r"\x61", "1", "_", r"[\d_]"])
TIMES = st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,3}", "{,2}", "{0}"])
PIECES = st.tuples(ATOMS, TIMES).map("".join)
TEXTS = st.lists(PIECES, max_size=4).map("".join)
GROUPS = st.lists(TEXTS, min_size=1, max_size=3).map(lambda texts: f"({'|'.join(texts)})")
EXPRESSIONS = st.tuples(
    st.sampled_from(["", "", "^", r"\A"]),
    st.lists(st.one_of(PIECES, TEXTS, GROUPS), max_size=3).map("".join),
    st.sampled_from(["", "", "$", r"\Z"]),
).map("".join)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(keys=st.lists(EXPRESSIONS, min_size=1, max_size=3, unique=True), name=names)
def test_the_automaton_equals_the_regular_expressions(keys, name):
    try:
        table = PatternTable(dict.fromkeys(keys, 1), "rank_pattern")
    except LimitError:
        reject()
    wanted = [key for key in keys if re.fullmatch(rf"(?:.*\.)?(?:{key})", name)]
    assert table.hits(name) == wanted
    assert table.hits(name) == wanted  # by what it remembers


@pytest.mark.parametrize(
    ("key", "name", "applies"),
    [
        ("^q|v", "m.q", False),
        ("^q|v", "m.v", True),
        ("(^q|v)", "q", True),
        ("(^|k)q", "q", True),
        ("a{}", "a{}", True),
        ("a{}+", "m.a{}}}", True),
        (r"q\Z", "m.q", True),
        (r"layers\.(\d|1\d)\.(q|v)_proj", "model.layers.17.v_proj", True),
        (r"layers\.(\d|1\d)\.(q|v)_proj", "model.layers.27.v_proj", False),
        ("", "m.q", False),
    ],
)
def test_anchors_and_braces_mean_what_python_says(key, name, applies):
    assert hits(key, name) == applies
    assert bool(re.fullmatch(rf"(?:.*\.)?(?:{key})", name)) == applies


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("a^b+", "uses ^ within"),
        ("a$b+", "uses $ within"),
        (r"\bq+", r"uses \b"),
        ("a*+b", "uses *+"),
        ("a{2,3}+b", "uses {2,3}+"),
    ],
)
def test_what_the_automaton_does_not_read_is_refused_by_name(key, text):
    with pytest.raises((LimitError, FormatError)) as caught:  # FormatError: before Python 3.11 the last two are invalid
        PatternTable({key: 1}, "rank_pattern")
    assert isinstance(caught.value, FormatError) or text in str(caught.value)


def names_of(count, length=60):
    return [f"model.layers.{i}.{'a' * (length - 24)}.q_proj" for i in range(count)]


HOSTILE = {
    "backtracking": ([".*a.*a.*a", "(a|a|a|a)" * 6 + "c", "[^c]*[^d]*[^e]*x"], ["a" * 1000 + "b", ".a" * 500 + "b"]),
    "many expressions": ([f".*a.*{i}.*b" for i in range(4096)], names_of(65536)),
    "many alternatives": ([f"(a|b|{i})(c|d)(a|b)" + ".*" for i in range(900)], names_of(65536)),
    "much text": ([f"{i:05}" + "a?" * 5 + "[a-z]" * 40 + "+" for i in range(4000)], names_of(65536)),
    "many sets": (
        [f"[ab{chr(0x4E00 + i)}]+q" for i in range(2300)],
        [f"m.{chr(97 + i % 2) * 9}.{chr(48 + i % 64)}q" for i in range(65536)],
    ),
    "long repeats": ([f"a{{0,60000}}b{{{i}}}" for i in range(9)], names_of(65536)),
    "shapes": (
        ["".join("." if i >> k & 1 else "a" for k in range(16)) for i in range(1 << 15)],
        ["m." + "b" * 16] * 65536,
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_patterns_end_soon_whatever_the_modules(case):
    keys, modules = HOSTILE[case]
    start = time.process_time()
    try:
        table = PatternTable(dict.fromkeys(keys, 1), "client 'c': rank_pattern")
        for name in modules:
            table.resolve(name, 0)
    except LimitError as error:
        assert str(error).startswith("client 'c': rank_pattern: ")  # noqa: PT017 - to be fast is enough
    assert time.process_time() - start < 4  # a second of a processor that nobody shares


def test_hundreds_of_honest_expressions_on_thousands_of_modules_are_within_the_limit():
    keys = [rf"layers\.{i}\.(self_attn|mlp)\.(q|k|v|down|up)_proj" for i in range(100)] + [
        r".*\.lm_head",
        r"encoder\..*",
    ]
    table = PatternTable({key: i for i, key in enumerate(keys)}, "rank_pattern")
    for i in range(100):
        for kind in ("self_attn.q", "self_attn.o", "mlp.down"):
            assert table.resolve(f"model.layers.{i}.{kind}_proj", -1) == (-1 if "o" in kind[-1] else i)


def test_thousands_of_full_names_resolve_quickly():
    names = [f"model.layers.{i}.{kind}_proj" for i in range(300) for kind in "qkvo"]
    table = PatternTable({name: i for i, name in enumerate(names)}, "rank_pattern")
    start = time.process_time()
    assert [table.resolve(name, -1) for name in names] == list(range(len(names)))
    assert time.process_time() - start < 3


def test_no_python_warning_leaves_the_compiler():
    assert hits("[[a]b", "x.[b")
