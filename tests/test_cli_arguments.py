"""The parser: what it accepts, what it refuses in one line, and that it needs nothing heavy."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora_kernels import demo
from fedlora_kernels.arguments import RULE_FLAGS, parse
from fedlora_kernels.cli import main
from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg import rules
from fedlora_kernels.methods.florist import DEFAULT_RULE

BASE = ["aggregate", "a", "b", "-o", "out"]


def test_defaults_of_aggregate():
    options = parse(BASE)
    assert (options.clients, options.out, options.method) == (["a", "b"], "out", "florist")
    assert all(getattr(options, name) is None for name in RULE_FLAGS)
    assert options.weights is None
    assert options.normalize
    assert options.uniform_rank is None


@pytest.mark.parametrize("name", RULE_FLAGS)
def test_every_rule_flag_makes_its_rule(name):
    cls, _, _, _ = RULE_FLAGS[name]
    value = getattr(parse([*BASE, "--" + name.replace("_", "-"), "1"]), name)
    rule = getattr(rules, cls)(value)
    assert isinstance(rule, rules.RankRule)
    assert str(rule) == f"{cls}({value!r})"


@pytest.mark.parametrize("written", [["--weights", "-1,2.5"], ["--weights=-1,2.5"], ["--weights", "-1,2.5e0"]])
def test_weights_may_start_with_a_minus(written):
    assert parse([*BASE, *written]).weights == [-1.0, 2.5]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--energy", "0.9", "--rank", "4"], "not allowed with argument --energy"),
        (["--weights", "1,two"], "weight 2 is 'two'"),
        (["--weights", "1,,2"], "weight 2 is ''"),
        (["--rank", "x"], "--rank"),
        (["--max-rank", "0"], "--max-rank"),
        (["--round", "-1"], "--round"),
        (["--seed", "1.5"], "--seed"),
        (["--max-update-norm", "nan"], "--max-update-norm"),
        (["--policy", "kind"], "--policy"),
        (["--target", "gguf"], "--target"),
        (["--dtype", "int8"], "--dtype"),
        (["--per-clients"], "--per-clients"),
        (["--budget", "10MB", "--rank", "3"], "--rank"),
        (["--ener", "0.5"], "--ener"),
    ],
)
def test_refused_arguments_are_named(extra, named):
    with pytest.raises(InputError, match=named) as caught:
        parse([*BASE, *extra])
    assert "\n" not in str(caught.value)
    assert "fedlora aggregate --help" in str(caught.value)


@pytest.mark.parametrize("argv", [[], ["resize", "a"], ["aggregate", "-o", "out"], ["aggregate", "a"], ["inspect"]])
def test_incomplete_command_lines_are_refused(argv):
    with pytest.raises(InputError, match="--help"):
        parse(argv)


def test_the_page_on_the_command_line_names_every_flag_and_no_other(capsys):
    page = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()
    written = set(re.findall(r"--[a-z][a-z-]+", page)) - {"--help"}
    known = set()
    for command in ("aggregate", "resize", "convert", "inspect", "validate", "bench", "env", "demo"):
        with pytest.raises(SystemExit):
            parse([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert written == known


@pytest.mark.parametrize("command", ["aggregate", "resize", "convert", "inspect", "validate", "bench", "env", "demo"])
def test_every_argument_has_help(command, capsys):
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    entries = re.findall(r"^  (\S.*(?:\n {3,}\S.*)*)", capsys.readouterr().out, flags=re.M)
    assert any(entry.startswith("--verbose") for entry in entries)
    assert [entry for entry in entries if not re.search(r"\S\s{2,}\S", entry)] == []


def test_descriptions_keep_the_names_of_things(capsys):
    with pytest.raises(SystemExit):
        parse(["demo", "--help"])
    assert "Federated LoRA on real text" in capsys.readouterr().out


def test_help_names_the_default_rule():
    cls, _, _, text = RULE_FLAGS["energy"]
    assert f"default: {DEFAULT_RULE.threshold:g}" in text
    assert str(DEFAULT_RULE) == f"{cls}({DEFAULT_RULE.threshold:g})"


def test_the_demo_gets_the_folders_that_were_given(monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "run", lambda **folders: calls.append(folders) or 0)
    assert main(["demo"]) == 0
    assert main(["demo", "--data", "d", "--out", "o", "--cache", "c"]) == 0
    assert calls == [{}, {"data": "d", "out": "o", "cache": "c"}]


def test_the_demo_names_the_package_that_is_missing(monkeypatch, capsys):
    def run(**folders):
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "peft" in err
    assert "fedlora-kernels[demo]" in err


def test_parsing_loads_nothing_but_the_parser():
    code = (
        "import sys, types\n"
        "import importlib.util as u\n"
        "root = u.find_spec('fedlora_kernels').submodule_search_locations\n"
        "package = types.ModuleType('fedlora_kernels'); package.__path__ = root\n"
        "sys.modules['fedlora_kernels'] = package\n"
        "from fedlora_kernels.cli import main\n"
        "status = main(['aggregate', '--help'])\n"
        "print(status, *sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'rich'}))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--sv-cumulative" in out
    assert out.splitlines()[-1] == "0"
