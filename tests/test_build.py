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
    """(exit status, output); the CUDA library, which takes minutes, only where it is asked for."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "FEDLORA_BUILD_CUDA": "0", **environment},
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
        (
            {"FEDLORA_BUILD_CPU": "0", "FEDLORA_BUILD_CUDA": "1", "NVCC": "no-such-nvcc"},
            "no nvcc; install the CUDA toolkit",
        ),
        ({"FEDLORA_BUILD_CPU": "0", "FEDLORA_BUILD_CUDA": "yes"}, "needs auto, 0 or 1"),
    ],
)
def test_what_cannot_be_built_is_refused(checkout, environment, words):
    code, output, wheel = build(checkout, **environment)
    assert code != 0
    assert words in output
    assert wheel is None


# Says that it is version 13.0.88, and makes files that tell how it was called.
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; fi
[ -z "$NVCC_STATUS" ] || exit "$NVCC_STATUS"
echo called >> "$NVCC_CALLS"
for word; do
    [ "$last" = -o ] && out="$word"
    [ "$last" = -MF ] && depends="$word"
    [ "$last" = -c ] && source="$word"
    last="$word"
done
echo "$@" > "$out"
[ -z "$depends" ] || echo "$out : $source" > "$depends"
"""


@pytest.fixture
def nvcc(checkout, tmp_path):
    """A compiler of its own and the environment that asks for it alone."""
    script = tmp_path / "nvcc"
    script.write_text(NVCC)
    script.chmod(0o755)
    return {
        "NVCC": str(script),
        "NVCC_CALLS": str(tmp_path / "calls"),
        "FEDLORA_BUILD_CPU": "0",
        "FEDLORA_BUILD_CUDA": "1",
    }


def test_wheel_with_the_cuda_library(checkout, nvcc, tmp_path):
    code, output, wheel = build(checkout, **nvcc, FEDLORA_CUDA_ARCHS="90;100")
    assert code == 0, output
    assert "-py3-none-linux" in wheel.name
    (made,) = libraries(wheel).values()
    assert "--cudart=static" in made.decode()
    assert "fedlora_kernels/_csrc/cuda/library.cu" in zipfile.ZipFile(wheel).namelist()
    sources = len(list(ROOT.glob("csrc/cuda/*.cu")))
    calls = tmp_path / "calls"
    assert calls.read_text().count("called") == sources + 1
    assert "-gencode=arch=compute_100,code=sm_100 -gencode=arch=compute_100,code=compute_100" in output
    # Again, with one source changed: that one and the link.
    (checkout / "csrc/cuda/library.cu").write_text("// another\n")
    assert build(checkout, **nvcc, FEDLORA_CUDA_ARCHS="90;100")[0] == 0
    assert calls.read_text().count("called") == sources + 3


def test_wheels_take_the_cuda_library_where_there_is_a_compiler(checkout, nvcc):
    code, output, wheel = build(checkout, **nvcc | {"FEDLORA_BUILD_CUDA": "auto"})
    assert code == 0, output
    assert len(libraries(wheel)) == 1


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="there is an NVIDIA driver")
def test_in_place_no_driver_is_a_printed_reason(checkout, nvcc):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, output = run(command, checkout, **nvcc | {"FEDLORA_BUILD_CUDA": "auto"})
    assert code == 0, output
    assert (
        "the CUDA library is not built: no NVIDIA driver on this machine; FEDLORA_BUILD_CUDA=1 builds it all the same"
        in output
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NVCC_STATUS": "7"}, "the compiler failed with status 7"),
        ({"FEDLORA_CUDA_ARCHS": "90;sm_100"}, "FEDLORA_CUDA_ARCHS: 'sm_100' is no compute capability from 80 on"),
        ({"NVCC": "true"}, "true names no version"),
    ],
)
def test_a_failing_nvcc_is_a_printed_reason_or_an_error(checkout, nvcc, environment, words):
    code, output, wheel = build(checkout, **nvcc | {"FEDLORA_BUILD_CUDA": "auto"} | environment)
    assert code == 0, output
    assert words in output
    assert "installing without the CUDA library" in output
    assert libraries(wheel) == {}
    code, output, _ = build(checkout, **nvcc | environment)
    assert code != 0
    assert f"FEDLORA_BUILD_CUDA=1, but {words}" in output


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_the_cuda_library_is_built_and_loads_without_a_driver(checkout, tmp_path):
    code, output, wheel = build(checkout, FEDLORA_BUILD_CPU="0", FEDLORA_BUILD_CUDA="1")
    assert code == 0, output
    assert set(libraries(wheel)) == {"fedlora_kernels/_lib/libfedlora_cuda.so"}
    assert wheel.stat().st_size < 40 << 20
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    look = "from fedlora_kernels.backends.cuda import BACKEND as b; print(b.library.path, b.library.available())"
    code, output = run([sys.executable, "-c", look], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert code == 0, output
    assert (
        f"{tmp_path}/site/fedlora_kernels/_lib/libfedlora_cuda.so (True, 'libfedlora_cuda.so, sm_80 sm_90 sm_100')"
        in output
    )


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
    assert f"{tmp_path}/site/fedlora_kernels/_lib/libfedlora_cpu.so (True" in output, output


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
