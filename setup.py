"""Builds the plain shared libraries in `fedlora_kernels/_lib`; everything else is in pyproject.toml.

FEDLORA_BUILD_CPU   auto: build if there is a compiler, else say why not; 1: fail without one; 0: do not build
FEDLORA_BUILD_CUDA  the same with nvcc; auto builds for a wheel, or where there is a GPU driver: it takes minutes
CXX                 the C++ compiler (default g++)
CXXFLAGS            flags to add, e.g. for sanitizers
NVCC, CUDA_HOME     where nvcc is, if not on the PATH
FEDLORA_CUDA_ARCHS  compute capabilities to build for (default 80;90;100)
"""

import functools
import hashlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
HEADER = CSRC / "include" / "fedlora.h"
CPU = "fedlora_kernels._lib.libfedlora_cpu"
CUDA = "fedlora_kernels._lib.libfedlora_cuda"
# The package cannot be imported here: torch need not be installed where a wheel is built.
NVCC = SimpleNamespace(**runpy.run_path(str(ROOT / "fedlora_kernels" / "backends" / "cuda" / "nvcc.py")))
DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
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


def unavailable(variable, library, reason):
    """Why a library is not built, or an empty string; ends the run where FEDLORA_BUILD_* asks for what cannot be had."""
    choice = wanted(variable)
    if choice == "0":
        return f"{variable}=0"
    reason = reason()
    if reason and choice == "1":
        sys.exit(f"fedlora_kernels: {variable}=1, but the {library} library cannot be built: {reason}")
    return reason


def no_cpu():
    """Why the CPU library cannot be built here, or an empty string."""
    if not sys.platform.startswith("linux"):
        return f"it is served on Linux only, not on {sys.platform}"
    return "" if compiler() else f"no C++ compiler {os.environ.get('CXX', 'g++')!r}; install one or set CXX"


def no_cuda():
    """Why the CUDA library is not built here, or an empty string: nvcc is there on many machines that have no use for it."""
    if not sys.platform.startswith("linux"):
        return f"it is served on Linux only, not on {sys.platform}"
    if NVCC.find() is None:
        return "no nvcc; install the CUDA toolkit, or set NVCC or CUDA_HOME"
    asked = wanted("FEDLORA_BUILD_CUDA") == "1" or "bdist_wheel" in sys.argv
    if not asked and not any(map(os.path.exists, DRIVER)):
        return "no NVIDIA driver on this machine; FEDLORA_BUILD_CUDA=1 builds it all the same"
    return ""


def abi_stamp():
    """The number that ties library and package: see fedlora_kernels/backends/cpu/library.py."""
    return "0x" + hashlib.sha256(HEADER.read_bytes()).hexdigest()[:16] + "ull"


class Cpp:
    """How the CPU library is made."""

    variable, library, jobs = "FEDLORA_BUILD_CPU", "CPU", os.cpu_count()
    version = staticmethod(compiler_version)

    def compile(self, source):
        flags = [*shlex.split(FLAGS), f"-DFEDLORA_ABI_STAMP={abi_stamp()}", f"-I{HEADER.parent}", *extra_flags()]
        return [*compiler(), *flags, "-c", source]

    def link(self, objects, out):
        return [*compiler(), *shlex.split(FLAGS), *extra_flags(), *map(str, objects), "-o", str(out)]


class Cuda:
    """How the CUDA library is made: a source takes a core for up to minutes, and others want to work, too."""

    variable, library, jobs = "FEDLORA_BUILD_CUDA", "CUDA", max(2, (os.cpu_count() or 1) // 2)

    def version(self):
        return NVCC.version(NVCC.find())

    def compile(self, source):
        return NVCC.compile_command(NVCC.find(), CSRC, source, NVCC.architectures())

    def link(self, objects, out):
        return NVCC.link_command(NVCC.find(), objects, out, NVCC.architectures())


class BuildLibrary(build_ext):
    """Compiles one shared library with a C ABI; ctypes loads it, so it carries no Python suffix."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext):
        tool = Cuda() if ext.name == CUDA else Cpp()
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        # A running process may have the old file mapped: a new one takes its name.
        fresh = out.with_suffix(f".{os.getpid()}.so")
        try:
            version = tool.version()
            with ThreadPoolExecutor(tool.jobs) as pool:
                objects = list(pool.map(lambda source: self.compiled(tool, version, source), ext.sources))
            link = tool.link(objects, fresh)
            print(shlex.join(link), flush=True)
            subprocess.run(link, check=True, cwd=ROOT)
            fresh.replace(out)
        except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            failed = isinstance(error, subprocess.CalledProcessError)
            reason = f"the compiler failed with status {error.returncode}" if failed else error
            if wanted(tool.variable) == "1":
                sys.exit(f"fedlora_kernels: {tool.variable}=1, but {reason}")
            print(
                f"fedlora_kernels: {reason}; installing without the {tool.library} library", file=sys.stderr, flush=True
            )
        finally:
            fresh.unlink(missing_ok=True)

    def compiled(self, tool, version, source):
        """The object file of a source, from the run before where neither it nor a header nor a flag has changed since."""
        command = tool.compile(source)
        name = f"{Path(source).stem}-{hashlib.sha256((shlex.join(command) + version).encode()).hexdigest()[:16]}"
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
        used = target.with_suffix(".d").read_text().partition(":")[2].replace("\\\n", " ").split()
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
    found = []
    for tool, name, reason, pattern in ((Cpp, CPU, no_cpu, "cpu/*.cpp"), (Cuda, CUDA, no_cuda, "cuda/*.cu")):
        if reason := unavailable(tool.variable, tool.library, reason):
            print(f"fedlora_kernels: the {tool.library} library is not built: {reason}", file=sys.stderr, flush=True)
            continue
        sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.glob(pattern))
        found.append(Extension(name, sources, optional=wanted(tool.variable) != "1"))
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython, "bdist_wheel": Wheel},
)
