"""Building: the C sources under sanitizers, and the wheels with and without the library."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")
SOURCES = ("csrc", "fedlora_kernels", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler {CXX}")


def run(command, cwd, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def has_sanitizers(folder):
    """Whether a program of one line can be built and run with them."""
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    command = [CXX, "-fsanitize=address,undefined", "probe.cpp", "-o", "probe"]
    return run(command, folder)[0] == 0 and run(["./probe"], folder)[0] == 0


def check_kernels(folder, *flags):
    """Compiles the library with the program that exercises all its variants, and runs that."""
    sources = [*sorted(ROOT.glob("csrc/cpu/*.cpp")), *sorted(ROOT.glob("tests/csrc/*.cpp"))]
    common = ["-std=c++17", "-fopenmp", "-DFEDLORA_ABI_STAMP=1ull", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cpu"]
    code, output = run([CXX, *flags, *common, *sources, "-o", "check"], folder)
    assert code == 0, output
    code, output = run(["./check"], folder, OMP_NUM_THREADS="2")
    assert code == 0, output
    assert "portable" in output
    assert "failures: 0" in output


@pytest.mark.full
@pytest.mark.timeout(1200)
@needs_compiler
def test_sanitizers_find_nothing(tmp_path):
    if not has_sanitizers(tmp_path):
        pytest.skip(f"{CXX} has no libasan or libubsan here")
    check_kernels(tmp_path, "-O1", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.full
@needs_compiler
def test_every_variant_is_right_and_compiles_without_warnings(tmp_path):
    check_kernels(tmp_path, "-O2", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, with a stale library that no wheel may pick up."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_csrc"))
        elif source.is_file():
            shutil.copy(source, copy)
    (copy / "fedlora_kernels/_lib/libfedlora_cpu.so").write_bytes(b"stale")
    return copy


def build(checkout, **environment):
    """(exit status, output, wheel or None)."""
    code, output = run([sys.executable, "setup.py", "bdist_wheel"], checkout, **environment)
    wheels = list(checkout.glob("dist/*.whl"))
    return code, output, wheels[0] if wheels else None


def libraries(wheel):
    return {
        name: zipfile.ZipFile(wheel).read(name) for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")
    }


def test_pure_wheel(checkout):
    code, output, wheel = build(checkout, FEDLORA_BUILD_CPU="0")
    assert code == 0, output
    assert "FEDLORA_BUILD_CPU=0" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == {}
    assert "fedlora_kernels/_csrc/include/fedlora.h" in zipfile.ZipFile(wheel).namelist()
    assert not (checkout / "fedlora_kernels/_csrc").exists()


def test_no_compiler_is_a_printed_reason(checkout):
    code, output, wheel = build(checkout, CXX="no-such-compiler", FEDLORA_BUILD_CPU="auto")
    assert code == 0, output
    assert "no C++ compiler 'no-such-compiler'" in output
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FEDLORA_BUILD_CPU": "1", "CXX": "no-such-compiler"}, "FEDLORA_BUILD_CPU=1"),
        ({"FEDLORA_BUILD_CPU": "maybe"}, "needs auto, 0 or 1"),
        ({"FEDLORA_BUILD_CPU": "0", "FEDLORA_BUILD_CUDA": "1"}, "csrc/cuda holds no sources"),
    ],
)
def test_what_cannot_be_built_is_refused(checkout, environment, words):
    code, output, wheel = build(checkout, **environment)
    assert code != 0
    assert words in output
    assert wheel is None


@pytest.mark.full
@needs_compiler
def test_platform_wheel_installs_and_runs(checkout, tmp_path):
    code, output, wheel = build(checkout, FEDLORA_BUILD_CPU="1")
    assert code == 0, output
    assert "-py3-none-linux" in wheel.name
    built = libraries(wheel)
    assert set(built) == {"fedlora_kernels/_lib/libfedlora_cpu.so"}
    assert wheel.stat().st_size < 2 << 20
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code, output = run(
        [
            sys.executable,
            "-c",
            "from fedlora_kernels.backends.cpu import BACKEND as b; print(b.library.path, b.available())",
        ],
        tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert code == 0, output
    assert f"{tmp_path}/site/fedlora_kernels/_lib/libfedlora_cpu.so (True" in output


@pytest.mark.full
@needs_compiler
def test_a_failing_compiler_is_a_printed_reason_or_an_error(checkout):
    code, output, wheel = build(checkout, FEDLORA_BUILD_CPU="auto", CXXFLAGS="-no-such-flag")
    assert code == 0, output
    assert "the compiler failed" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == {}
    code, output, _ = build(checkout, FEDLORA_BUILD_CPU="1", CXXFLAGS="-no-such-flag")
    assert code != 0
    assert "FEDLORA_BUILD_CPU=1, but the compiler failed" in output
