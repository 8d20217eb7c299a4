"""A report as one page that needs nothing else: charts, tables and the plotting library in a single file (docs/reports.md, HTML).

Nothing is loaded from anywhere, and the page's own policy forbids it. Scripts are allowed by their hashes alone, so no text
of a client can become one.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.util
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fedlora_kernels.errors import InputError
from fedlora_kernels.reporting.aggregate_page import aggregate_sections
from fedlora_kernels.reporting.charts import aggregate_charts, inspect_charts, resize_charts
from fedlora_kernels.reporting.inspect_page import inspect_sections
from fedlora_kernels.reporting.markup import Markup, element, embedded
from fedlora_kernels.reporting.resize_page import resize_sections

__all__ = ["check_plotly", "html_page"]


def check_plotly(flag: str) -> None:
    """Raise InputError, naming the flag, where the plotting library is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise InputError(
            f"{flag}: a page needs the package plotly, which is not installed. pip install 'fedlora-kernels[report]'"
        )


def html_page(report: Mapping[str, Any]) -> str:
    """Return the page of the report of an aggregation, an inspection, or of adapters that were resized."""
    if "clients" in report:
        data = aggregate_charts(report)
        title, body = aggregate_sections(report, data)
    elif "comparison" in report:
        data = inspect_charts(report)
        title, body = inspect_sections(report, data)
    else:
        data = resize_charts(report)
        title, body = resize_sections(report)
    script, look, (packed, digest) = _part("report.js"), _part("report.css"), _plotly()
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content=f"fedlora_kernels {report['tool']['version']}"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(digest, _digest(script))),
        element("title", title),
        element("style", Markup(look)),
    ]
    scripts = [
        element("script", embedded(data), type="application/json", id="data"),
        element("script", Markup(packed), type="text/plain", id="plotly"),
        element("script", Markup(script)),
    ]
    whole = element("html", element("head", *head), element("body", body, *scripts), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _policy(*digests: str) -> str:
    """Nothing from anywhere, no form, no frame; the scripts of these hashes alone."""
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def _part(name: str) -> str:
    return (files("fedlora_kernels.reporting") / "page" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


@functools.lru_cache(maxsize=1)
def _plotly() -> tuple[str, str]:
    """The library, packed to less than half, and its hash; the browser unpacks it."""
    from plotly.offline import get_plotlyjs

    code: str = get_plotlyjs()
    return base64.b64encode(gzip.compress(code.encode(), 9, mtime=0)).decode("ascii"), _digest(code)
