"""Pages in a real browser: nothing logged, nothing asked for, no sideways scrolling, every chart drawn and every choice working."""

import pytest
from browser import CHROMIUM, browser
from make_adapters import make_clients
from page_problems import HOSTILE, hostile, plainest, sizeable, zero

from fedlora_kernels.cli import main
from fedlora_kernels.inspection import inspect_adapters
from fedlora_kernels.reporting.html import html_page
from fedlora_kernels.text import harmless

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (chromium, google-chrome)")

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def page():
    with browser() as made:
        yield made


@pytest.fixture
def saved(tmp_path):
    """Write the page of a report, or a text as it is, and return its path."""

    def save(report):
        path = tmp_path / "page.html"
        path.write_text(report if isinstance(report, str) else html_page(report), encoding="utf-8")
        return path

    return save


def look(page, path, *, dark=False):
    """Open a page at every width; nothing may be wrong with it."""
    for width in WIDTHS:
        page.open(path, width, dark=dark)
        assert page.complaints() == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        drawn = page.evaluate(
            "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.main-svg').length > 0)"
        )
        assert drawn
        assert all(drawn)


@pytest.mark.full
@pytest.mark.parametrize("make", [sizeable, plainest, zero])
def test_a_page_of_an_aggregation(page, saved, make):
    look(page, saved(make()))


@pytest.mark.full
def test_a_page_of_an_inspection_in_the_dark(page, saved, tmp_path):
    look(page, saved(inspect_adapters(make_clients(tmp_path))), dark=True)
    light, dark = "rgb(246, 245, 241)", "rgb(16, 20, 24)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.open(tmp_path / "page.html")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light


@pytest.mark.filterwarnings("ignore:.*dropped")
def test_hostile_names_run_nothing_and_are_shown_as_they_are(page, saved):
    look(page, saved(hostile()))
    page.open(page.own[0].removeprefix("file://"))
    shown = page.evaluate("[...document.querySelectorAll('#norms .ytick text')].map(t => t.textContent)")
    expected = [harmless(name) for name in HOSTILE]
    assert [text.removeprefix("\u2026") for text in shown] == [
        name if len(name) <= 26 else name[-25:] for name in expected
    ]
    assert page.evaluate("document.querySelectorAll('img, #norms a, #norms b').length") == 0
    choices = page.evaluate("[...document.querySelectorAll('#spectrum-of option')].map(o => o.text)")
    assert len(choices) == len(HOSTILE)
    assert page.evaluate("document.scripts.length") == 4


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 3])
def test_pages_of_resized_adapters(page, tmp_path, count):
    paths, path = make_clients(tmp_path, count), tmp_path / "r.html"
    assert main(["resize", *paths, "-o", str(tmp_path / "out"), "--rank", "2", "--quiet", "--report", str(path)]) == 0
    look(page, path)
    assert page.evaluate("document.querySelectorAll('#sizes .bars .point').length") == (0 if count == 1 else 2 * count)


@pytest.mark.full
def test_choices_redraw_their_charts(page, saved):
    page.open(saved(sizeable()))
    for name in ("map", "spectrum", "cosines"):
        before = page.evaluate(f"document.getElementById('{name}').data[0].{'y' if name == 'spectrum' else 'z'}")
        script = f"const s = document.getElementById('{name}-of'); s.selectedIndex = 1; s.dispatchEvent(new Event('change'));"
        page.evaluate(f"{{ {script} }}")
        after = page.evaluate(f"document.getElementById('{name}').data[0].{'y' if name == 'spectrum' else 'z'}")
        assert before != after
    page.evaluate("document.querySelector('button[data-step=\"1\"]').click()")
    assert page.evaluate("document.getElementById('spectrum-of').selectedIndex") == 2
    # 224 modules and more keep their names readable: one for each kind
    assert len(page.evaluate("document.getElementById('spectra').layout.yaxis.ticktext")) == 7
    assert page.complaints() == []


@pytest.mark.full
def test_the_judge_sees_what_it_is_there_for(page, saved):
    """A page that logs, throws, or asks for something, and one that breaks its own policy."""
    head = "<!doctype html><meta charset=utf-8>"
    for body, word in (
        ("<script>console.error('oh')</script>", "oh"),
        ("<script>throw new Error('thrown on purpose')</script>", "on purpose"),
        ("<img src='http://127.0.0.1:9/x.png'>", "request: http://127.0.0.1:9/x.png"),
        ("<script>fetch('file:///etc/hostname').catch(() => 0)</script>", "file:///etc/hostname"),
    ):
        page.open(saved(head + body), drawn=False)
        assert any(word in complaint for complaint in page.complaints()), (body, page.complaints())
    broken = html_page(plainest()).replace("</main>", "<script>1</script></main>")
    page.open(saved(broken))
    assert any("Content Security Policy" in complaint for complaint in page.complaints())
