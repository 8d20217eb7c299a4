"""Rules that hold for the whole tree: what documents say of names, variables, flags and sections is so; their examples run."""

import contextlib
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest
from make_adapters import make_adapter

import fedlora_kernels as fk
from fedlora_kernels.arguments import parse
from fedlora_kernels.cli import main
from fedlora_kernels.reporting.methods import method_table

REPO = Path(__file__).parent.parent
SOURCES = [*sorted(REPO.glob("fedlora_kernels/**/*.py")), *sorted(REPO.glob("csrc/**/*")), REPO / "setup.py"]
DOCUMENTS = [*sorted(REPO.glob("*.md")), *sorted(REPO.glob("docs/*.md")), *sorted(REPO.glob("bench/*.md"))]


def test_environment_variables_are_documented():
    # macros of the C side (FEDLORA_API and the like) are no environment variables: quoted names are
    used = set()
    for path in SOURCES:
        if path.is_file() and path.suffix in (".py", ".h", ".hpp", ".cuh", ".cpp", ".cu"):
            used |= set(re.findall(r"[\"'](FEDLORA_[A-Z_]+)[\"']", path.read_text()))
    documented = set(re.findall(r"`(FEDLORA_[A-Z_]+)`", (REPO / "docs/environment.md").read_text()))
    assert used, "no environment variable found: the pattern of this test is wrong"
    assert used == documented


@pytest.fixture
def three_clients(tmp_path, monkeypatch):
    """The folders that the README's examples name."""
    for k, rank in enumerate((4, 2, 5)):
        make_adapter(tmp_path / f"client_{k}", rank=rank, seed=k)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("three_clients")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_python_examples_in_documents_run(path):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)
    if path.name == "README.md" and path.parent == REPO:
        assert blocks, "the README has lost its example"
    namespace = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.usefixtures("three_clients")
def test_commands_in_the_readme_run(capsys):
    commands = re.findall(r"^    fedlora (.*?)(?:  +#.*)?$", (REPO / "README.md").read_text(), flags=re.M)
    assert len(commands) >= 3, "the README has lost its commands"
    for command in commands:
        assert main(shlex.split(command)) == 0, f"fedlora {command}: {capsys.readouterr().err}"


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


TEXTS = [path for path in SOURCES if path.suffix in (".py", ".h", ".hpp", ".cpp")] + sorted(REPO.glob("tests/**/*.py"))
NAMED_SECTION = re.compile(r"docs/(\w[\w-]*)\.md(?:, ([^.;)\"`]*))?")


def headings(document):
    return re.findall(r"^#+ (.*)$", (REPO / f"docs/{document}.md").read_text(), flags=re.M)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPO)))
def test_sections_named_in_code_exist(path):
    if path == Path(__file__):
        return
    # a reference may go on in the next line of a docstring or a comment
    text = re.sub(r"\s*\n\s*(?://|#|\*)?\s*", " ", path.read_text())
    for document, section in NAMED_SECTION.findall(text):
        assert (REPO / f"docs/{document}.md").is_file(), f"docs/{document}.md does not exist"
        named = [title for title in headings(document) if re.match(rf"{re.escape(title)}(\W|$)", section, flags=re.I)]
        assert named, f"docs/{document}.md has no section {section!r}; it has {headings(document)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_links_in_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_tables_in_documents_have_as_many_cells_as_columns(path):
    """A bar inside a cell, as in ``|x|``, splits it: it must be written ``\\|``, in code too."""
    width = 0
    for line in path.read_text().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        if not line.startswith("|"):
            width = 0
            continue
        width = width or cells
        assert cells == width, f"{path.name}: {cells} cells where the head has {width}: {line}"


def test_rooms_of_the_house_are_described():
    package = REPO / "fedlora_kernels"
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    described = set(re.findall(r"`(\w+)[`./]", (REPO / "docs/design.md").read_text()))
    assert not {room for room in rooms if not room.startswith("_")} - described


def test_flags_of_the_command_line_are_described():
    document = (REPO / "docs/command-line.md").read_text()
    for command in ("aggregate", "resize", "convert", "inspect", "validate", "bench", "env", "demo"):
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
            parse([command, "--help"])
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown.getvalue())) - {"--help"}
        assert flags, f"{command} shows no flag: the pattern of this test is wrong"
        assert not {flag for flag in flags if not re.search(rf"`{flag}[` ]", document)}, (
            f"docs/command-line.md on {command}"
        )


@pytest.mark.usefixtures("three_clients")
def test_keys_of_the_report_are_described():
    report = fk.aggregate(["client_0", "client_1"], rule=fk.Energy(0.9)).report
    described = set(re.findall(r"`(\w+)`", (REPO / "docs/formats.md").read_text()))
    parts = (report, report["method"], report["backend"], report["totals"], report["seconds"])
    keys = {key for part in (*parts, *report["clients"], *report["modules"]) for key in part}
    assert not keys - described


def test_speed_tables_are_those_of_the_committed_figures():
    tables = runpy.run_path(str(REPO / "bench/tables.py"))
    readme = (REPO / "README.md").read_text()
    for name in ("small_svd", "product", "methods"):
        assert tables[name]() in readme, f"replace the table {name} in README.md by the one of bench/tables.py"
