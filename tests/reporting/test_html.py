"""The page of a report, as text: complete in itself, strict, safe, the same every time, and written whole or not at all."""

import base64
import gzip
import hashlib
import importlib.util
import json
import math
import os
import re
from html.parser import HTMLParser

import pytest
from adapter_problems import clients
from make_adapters import make_clients, poison
from page_problems import HOSTILE, hostile, plainest, sizeable, zero
from plotly.offline import get_plotlyjs
from test_schemas import CASES

import fedlora_kernels as fk
from fedlora_kernels.cli import main
from fedlora_kernels.inspection import inspect_adapters
from fedlora_kernels.reporting import files
from fedlora_kernels.reporting.html import html_page
from fedlora_kernels.reporting.json import plain
from fedlora_kernels.text import harmless

FORBIDDEN = ("src", "href", "action", "srcset", "data", "poster", "background", "formaction", "ping", "style")
VOID = ("meta",)


class Page(HTMLParser):
    """Elements and attributes of a page, and what its scripts and style hold, by id or name."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.raw, self.words, self.key = [], [], {}, [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.key = dict(attrs).get("id", tag) if tag in ("script", "style") else None
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.key = None

    def handle_data(self, data):
        if self.key:
            self.raw[self.key] = self.raw.get(self.key, "") + data
        else:
            self.words.append(data)

    @property
    def data(self):
        def refuse(constant):
            raise AssertionError(constant)

        return json.loads(self.raw["data"], parse_constant=refuse)


def test_a_page_is_complete_in_itself():
    page = Page(html_page(sizeable(2)))
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        links = {key: value for key, value in attributes.items() if key in FORBIDDEN or key.startswith("on")}
        assert links in ({}, {"href": "#report"})
    assert "url(" not in page.raw["style"]
    assert "@import" not in page.raw["style"]
    assert "http" not in page.raw["script"] + page.raw["style"]
    assert [tag for tag, _ in page.elements if tag == "script"] == ["script"] * 3


def test_the_policy_allows_the_two_scripts_and_nothing_else():
    page = Page(html_page(plainest()))
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    library = gzip.decompress(base64.b64decode(page.raw["plotly"])).decode()
    assert library == get_plotlyjs()
    digests = (hashlib.sha256(code.encode()).digest() for code in (library, page.raw["script"]))
    hashes = {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}
    assert set(rules.pop("script-src").split()) == hashes
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data: blob:",
                     "base-uri": "'none'", "form-action": "'none'"}  # fmt: skip


def test_hostile_names_are_texts_everywhere():
    with pytest.warns(UserWarning, match="dropped"):
        report = hostile()
    page = Page(html_page(report))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "b", "a "}
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert [tag for tag, _ in page.elements].count("a") == 1
    words = "".join(page.words)
    for name in HOSTILE:
        assert harmless(name) in words
        assert harmless(name) in page.data["clients"]
    assert not {"\x1b", "\x00", "\u202e", "\u2066", "\u2028"} & set(html_page(report))
    assert "dropped <img" in words


def test_a_page_is_the_same_every_time():
    report = sizeable(1)
    assert html_page(report) == html_page(report)


@pytest.mark.parametrize("make", [plainest, zero, sizeable])
def test_pages_of_all_reports(make):
    report = make()
    page = Page(html_page(report))
    assert page.data["modules"]
    places = {attributes["id"] for _, attributes in page.elements if attributes.get("class") == "chart"}
    assert {"map"} <= places
    assert ("norms" in places) == (report["comparison"] is not None)
    # every chart and select can be named by a screen reader
    for tag, attributes in page.elements:
        if attributes.get("class") == "chart":
            assert attributes["aria-label"]
        if tag == "select":
            assert any(t == "label" and a.get("for") == attributes["id"] for t, a in page.elements)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pages_of_every_option(case):
    make, options = CASES[case]
    options = dict(options)
    report = fk.aggregate(make(), options.pop("method", "florist"), **options).report
    assert Page(html_page(report)).data["modules"]
    # and of a report read back from its file
    assert Page(html_page(json.loads(json.dumps(plain(report))))).data["modules"]


def test_headline_facts_are_those_of_the_report():
    report = sizeable(2)
    words = "".join(Page(html_page(report)).words)
    totals = report["totals"]
    kept = 100 * (1 - totals["error"] ** 2)
    for text in (f"{kept:.3g} %", f"{totals['rank']:,}", "florist, Energy(0.9)", "scaled by", "Policy clip", "3 of 3"):
        assert text in words


def test_charts_are_drawn_from_the_numbers_of_the_report():
    report = sizeable(3)
    data = Page(html_page(report)).data
    rows = {module["name"]: module for module in report["modules"]}
    assert sorted(data["modules"]) == sorted(rows)
    assert data["modules"][:3] == [f"model.layers.{i}.q_proj" for i in range(3)]
    assert data["ranks"] == [rows[name]["rank"] for name in data["modules"]]
    assert data["lost"] == pytest.approx([rows[name]["error"] ** 2 for name in data["modules"]], rel=1e-5)
    (rank,) = (grid["values"] for grid in data["map"]["grids"] if grid["label"] == "Rank")
    assert rank[0] == [rows[f"model.layers.{i}.q_proj"]["rank"] for i in range(3)]
    whole = report["comparison"]["modules"]
    for name, spectrum in zip(data["modules"], data["spectra"][0]["values"], strict=True):
        assert spectrum == pytest.approx(whole[name]["singular_values"], rel=1e-5)
    assert data["cosines"][0] == pytest.approx(report["comparison"]["cosines"][0], rel=1e-5)


def test_inspections(tmp_path):
    paths = make_clients(tmp_path)
    page = Page(html_page(inspect_adapters(paths)))
    assert [series["name"] for series in page.data["spectra"]] == ["c0", "c1", "c2", "weighted sum"]
    assert "Nothing looks wrong." in "".join(page.words)
    (tmp_path / "x").mkdir()
    broken = make_clients(tmp_path / "x", 1, change=poison(value=math.inf))
    page = Page(html_page(inspect_adapters([*paths, *broken])))
    assert "NaN or Inf" in "".join(page.words)
    alone = Page(html_page(inspect_adapters(paths[:1])))
    assert [series["name"] for series in alone.data["spectra"]] == ["c0"]
    assert "norms" not in {attributes.get("id") for _, attributes in alone.elements}


def test_the_command_writes_pages(tmp_path, capsys):
    paths = make_clients(tmp_path)
    page, more, inspection = tmp_path / "r.html", tmp_path / "r.json", tmp_path / "i.HTML"
    command = ["aggregate", *paths, "-o", str(tmp_path / "out"), "--report", str(page), "--report", str(more)]
    assert main(command) == 0
    assert main(["inspect", *paths, "--report", str(inspection)]) == 0
    assert "Clients and their weighted sum" in capsys.readouterr().out
    assert Page(page.read_text()).data["cosines"]
    assert json.loads(more.read_text())["comparison"]["cosines"]
    assert Page(inspection.read_text()).data["cosines"]
    assert page.stat().st_size < 2_500_000
    # a page of the same name is replaced
    assert main([*command, "--overwrite", "--quiet"]) == 0


def test_without_plotly_nothing_is_read(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "plotly" else find(name, *rest)
    )
    for command in (["aggregate", "absent", "-o", str(tmp_path / "out")], ["inspect", "absent"]):
        assert main([*command, "--report", str(tmp_path / "r.html")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "pip install 'fedlora-kernels[report]'" in error
        assert "absent" not in error
    assert os.listdir(tmp_path) == []


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("before")

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        files.write_report(path, fk.aggregate(clients()).report)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["r.html"]


def test_colours_are_named_once_for_light_and_dark():
    style = Page(html_page(plainest())).raw["style"]
    light, dark = (
        set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", style, flags=re.S)[:2]
    )
    assert light == dark


@pytest.mark.parametrize("count", [1, 3])
def test_resized_adapters(tmp_path, count):
    paths, path = make_clients(tmp_path, count), tmp_path / "r.html"
    command = ["resize", *paths, "-o", str(tmp_path / "out"), "--energy", "0.5", "--quiet", "--report", str(path)]
    assert main(command) == 0
    page = Page(path.read_text())
    words = "".join(page.words)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    if count == 1:
        assert "c0, resized" in words
        assert "from 4.1 KiB" in words
        # the whole spectrum, and where it is cut
        (values,) = (series["values"] for series in page.data["spectra"])
        assert [len(spectrum) for spectrum in values] == [4, 4, 4, 4]
        ranks = {module["name"]: module["rank"] for module in report["modules"]}
        assert page.data["ranks"] == [ranks[name] for name in page.data["modules"]]
        assert max(page.data["ranks"]) < 4
    else:
        assert page.data["sizes"] == [
            [adapter[key] for adapter in report["adapters"]] for key in ("name", "bytes_in", "bytes")
        ]
        for adapter in report["adapters"]:
            assert f"{100 * adapter['energy_kept']:.3g} %" in words
