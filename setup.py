"""Builds the plain shared libraries in `fedlora_kernels/_lib`; everything else is in pyproject.toml.

FEDLORA_BUILD_CPU   auto: build if there is a compiler, else say why not; 1: fail without one; 0: do not build
FEDLORA_BUILD_CUDA  the same for csrc/cuda, once it holds sources
CXX                 the C++ compiler (default g++)
CXXFLAGS            flags to add, e.g. for sanitizers
"""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
HEADER = CSRC / "include" / "fedlora.h"
CPU = "fedlora_kernels._lib.libfedlora_cpu"
FLAGS = "-O3 -std=c++17 -fopenmp -shared -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi"


def wanted(name):
    """One of auto, 0, 1 from the environment."""
    value = os.environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name}={value!r}: needs auto, 0 or 1")
    return value


def compiler():
    """The C++ compiler as a list of words, or None where there is none."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return words if shutil.which(words[0]) else None


@functools.cache
def compiler_version():
    """What the compiler says of itself: another one's object files are not used again."""
    return subprocess.run([*compiler(), "--version"], check=True, capture_output=True, text=True).stdout


def cpu_unavailable():
    """Why the CPU library is not built, or an empty string if it is."""
    choice = wanted("FEDLORA_BUILD_CPU")
    if choice == "0":
        return "FEDLORA_BUILD_CPU=0"
    reason = ""
    if not sys.platform.startswith("linux"):
        reason = f"it is served on Linux only, not on {sys.platform}"
    elif compiler() is None:
        reason = f"no C++ compiler {os.environ.get('CXX', 'g++')!r}; install one or set CXX"
    if reason and choice == "1":
        sys.exit(f"fedlora_kernels: FEDLORA_BUILD_CPU=1, but the CPU library cannot be built: {reason}")
    return reason


def check_cuda():
    """Refuses FEDLORA_BUILD_CUDA=1 as long as there is nothing to build."""
    if wanted("FEDLORA_BUILD_CUDA") == "1" and not list(CSRC.glob("cuda/*.cu")):
        sys.exit("fedlora_kernels: FEDLORA_BUILD_CUDA=1, but csrc/cuda holds no sources; unset it")


def abi_stamp():
    """The number that ties library and package: see fedlora_kernels/backends/cpu/library.py."""
    return "0x" + hashlib.sha256(HEADER.read_bytes()).hexdigest()[:16] + "ull"


class BuildLibrary(build_ext):
    """Compiles one shared library with a C ABI; ctypes loads it, so it carries no Python suffix."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        # A running process may have the old file mapped: a new one takes its name.
        fresh = out.with_suffix(f".{os.getpid()}.so")
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(self.compiled, ext.sources))
            link = [*compiler(), *shlex.split(FLAGS), *extra_flags(), *map(str, objects), "-o", str(fresh)]
            print(shlex.join(link), flush=True)
            subprocess.run(link, check=True, cwd=ROOT)
            fresh.replace(out)
        except subprocess.CalledProcessError as error:
            if wanted("FEDLORA_BUILD_CPU") == "1":
                sys.exit(
                    f"fedlora_kernels: FEDLORA_BUILD_CPU=1, but the compiler failed with status {error.returncode}"
                )
            print(
                "fedlora_kernels: the compiler failed; installing without the CPU library", file=sys.stderr, flush=True
            )
        finally:
            fresh.unlink(missing_ok=True)

    def compiled(self, source):
        """The object file of a source, from the run before where neither it nor a header nor a flag has changed since."""
        flags = [*shlex.split(FLAGS), f"-DFEDLORA_ABI_STAMP={abi_stamp()}", f"-I{HEADER.parent}", *extra_flags()]
        command = [*compiler(), *flags, "-c", source]
        name = f"{Path(source).stem}-{hashlib.sha256((shlex.join(command) + compiler_version()).encode()).hexdigest()[:16]}"
        target = (ROOT / self.build_temp / name).with_suffix(".o")
        if not up_to_date(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            command += ["-MMD", "-MF", str(target.with_suffix(".d")), "-o", str(target)]
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True, cwd=ROOT)
        return target


def extra_flags():
    """What the environment adds to every compilation."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def up_to_date(target):
    """Whether an object file is newer than all that the compiler read for it."""
    try:
        used = target.with_suffix(".d").read_text().replace("\\\n", " ").split()[1:]
        return all((ROOT / path).stat().st_mtime < target.stat().st_mtime for path in used)
    except OSError:
        return False


class BuildPython(build_py):
    """Carries csrc inside the package, as `_csrc`: the loader checks the header, and sources can be built elsewhere."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "fedlora_kernels", "_csrc")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(CSRC, target)


class Wheel(bdist_wheel):
    """py3-none-<platform>, since the library knows no Python version; py3-none-any where none was built."""

    def get_tag(self):
        built = any(Path(output).is_file() for output in self.get_finalized_command("build_ext").get_outputs())
        return ("py3", "none", super().get_tag()[2] if built else "any")


def extensions():
    """The libraries to build here and now."""
    check_cuda()
    reason = cpu_unavailable()
    if reason:
        print(f"fedlora_kernels: the CPU library is not built: {reason}", file=sys.stderr, flush=True)
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("cpu/*.cpp"))
    return [Extension(CPU, sources, optional=wanted("FEDLORA_BUILD_CPU") != "1")]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython, "bdist_wheel": Wheel},
)
