"""Rules that hold for the whole tree: environment variables documented, README examples run, no machine paths."""

import re
from pathlib import Path

import pytest

import fedlora_kernels as fk
from fedlora_kernels.reporting.methods import method_table

REPO = Path(__file__).parent.parent
SOURCES = [*REPO.glob("fedlora_kernels/**/*.py"), *REPO.glob("csrc/**/*"), REPO / "setup.py"]


def test_environment_variables_are_documented():
    # macros of the C side (FEDLORA_API and the like) are no environment variables: take what Python reads
    used = set()
    for path in SOURCES:
        if path.is_file() and path.suffix == ".py":
            used |= set(re.findall(r"[\"'](FEDLORA_[A-Z_]+)[\"']", path.read_text()))
    documented = set(re.findall(r"`(FEDLORA_[A-Z_]+)`", (REPO / "docs/environment.md").read_text()))
    assert used, "no environment variable found: the pattern of this test is wrong"
    assert used == documented


@pytest.mark.parametrize("path", ["README.md", *sorted(f"docs/{p.name}" for p in REPO.glob("docs/*.md"))])
def test_python_examples_in_documents_run(path, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (REPO / path).read_text(), flags=re.S)
    if path == "README.md":
        assert blocks, "the README has lost its example"
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(compile(block, path, "exec"), namespace)


def test_public_names_are_documented():
    api = (REPO / "docs/api.md").read_text()
    public = [
        name for name in vars(fk) if not name.startswith("_") and getattr(fk, name).__class__.__name__ != "module"
    ]
    missing = [name for name in public if f"`{name}" not in api]
    assert not missing, f"docs/api.md does not mention {missing}"
    listed = set(re.findall(r"^\| `([A-Za-z_]+)", api, flags=re.M))
    assert listed == set(public), f"docs/api.md and __init__ disagree on {sorted(listed ^ set(public))}"


@pytest.mark.parametrize("path", ["README.md", "docs/algorithms.md"])
def test_table_of_methods_is_that_of_the_registry(path):
    assert method_table() in (REPO / path).read_text(), f"replace the table in {path} by:\n{method_table()}"
