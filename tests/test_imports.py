"""The floors of the house: imports point down only, and importing stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora_kernels

ROOT = Path(fedlora_kernels.__file__).parent

FLOOR = {
    "_version": 0, "errors": 0, "memory": 0, "rows": 0, "text": 0,
    "backends": 1, "_lib": 1,
    "linalg": 2, "adapters": 2, "testing": 2, "training": 2,
    "methods": 3,
    "engine": 4, "aggregate": 4.1, "resize": 4.2,
    "arguments": 4.9, "reporting": 5, "environment": 5, "inspection": 5, "request": 5,
    "validate": 5.1, "bench": 5.1,
    "demo": 6, "cli": 7, "__main__": 8, "__init__": 8,
}  # fmt: skip
APART = {("linalg", "adapters"), ("adapters", "linalg")}


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [node.module] if node.module != "fedlora_kernels" else [f"{node.module}.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fedlora_kernels" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room(path)
    assert here in FLOOR, f"{here} has no floor: add it to FLOOR"
    for there in imported_rooms(path):
        assert there in FLOOR, f"{path} imports {there}, which has no floor"
        assert (here, there) not in APART, f"{path}: {here} must not know {there}"
        assert here == there or FLOOR[there] < FLOOR[here], (
            f"{path}: {here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"
        )


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"rich", "matplotlib", "scipy", "peft", "transformers", "safetensors", "pandas", "hypothesis", "triton"}
    code = "import torch, sys; before = set(sys.modules); import fedlora_kernels; print(*sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    new = {name.split(".")[0] for name in out}
    assert "fedlora_kernels" in new
    assert not new & heavy, f"importing fedlora_kernels pulls in {sorted(new & heavy)}"
