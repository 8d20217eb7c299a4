"""NVIDIA's compiler: where it is, what it says of itself, and the commands that make the CUDA library from csrc.

Of the standard library alone, and without imports from this package: setup.py reads this file before there is one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ARCHITECTURES", "FLAGS", "architectures", "compile_command", "find", "link_command", "sources", "version"]

ARCHITECTURES = ("80", "90", "100")
"""What the library holds code for where nobody asks for another; newer GPUs compile the intermediate code of the last."""

FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden")
"""What every source is compiled with."""


def find(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The compiler as a list of words: of NVCC, CUDA_HOME, the PATH, or NVIDIA's wheels (extra ``nvcc``); None where there is none."""
    words = shlex.split(environ.get("NVCC", ""))
    if words:
        return words if shutil.which(words[0], path=environ.get("PATH")) else None
    home = environ.get("CUDA_HOME")
    for candidate in (f"{home}/bin/nvcc" if home else None, "nvcc", *_wheels()):
        if candidate and (found := shutil.which(candidate, path=environ.get("PATH"))):
            return [found]
    return None


def _wheels() -> list[str]:
    """Compilers that pip installed, newest first."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    return sorted(
        (str(nvcc) for folder in folders or () for nvcc in Path(folder).glob("cu[0-9]*/bin/nvcc")), reverse=True
    )


def version(nvcc: Sequence[str]) -> str:
    """Of the compiler, such as 13.0.88; RuntimeError where it does not say."""
    try:
        said = subprocess.run([*nvcc, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{shlex.join(nvcc)} does not run: {error}") from error
    if not (found := re.search(r"\bV(\d+\.\d+\.\d+)", said)):
        raise RuntimeError(f"{shlex.join(nvcc)} names no version: {said.strip()!r}")
    return found[1]


def architectures(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Compute capabilities without their point, of FEDLORA_CUDA_ARCHS or `ARCHITECTURES`; ValueError for what is none."""
    named = tuple(re.split(r"[\s;,]+", environ.get("FEDLORA_CUDA_ARCHS", "").strip(" ;,"))) or ("",)
    if named == ("",):
        return ARCHITECTURES
    for name in named:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", name) or int(name.rstrip("af")) < 80:
            raise ValueError(
                f"FEDLORA_CUDA_ARCHS: {name!r} is no compute capability from 80 on; write such as '80;90;100'"
            )
    return named


def sources(csrc: Path) -> list[Path]:
    """The files to compile, one object each."""
    return sorted(csrc.glob("cuda/*.cu"))


def compile_command(nvcc: Sequence[str], csrc: Path, source: str | Path, targets: Sequence[str]) -> list[str]:
    """All words but those that name outputs."""
    header = (csrc / "include" / "fedlora.h").read_bytes()
    return [
        *nvcc,
        *FLAGS,
        *_targets(targets),
        f"-I{csrc / 'include'}",
        f"-DFEDLORA_ABI_STAMP=0x{hashlib.sha256(header).hexdigest()[:16]}ull",
        f'-DFEDLORA_CUDA_ARCHITECTURES="{" ".join(f"sm_{name}" for name in targets)}"',
        "-c",
        str(source),
    ]


def link_command(nvcc: Sequence[str], objects: Sequence[str | Path], out: Path, targets: Sequence[str]) -> list[str]:
    """The runtime goes in and stays hidden, so that the library loads without a driver and beside another runtime."""
    hidden = "-Xlinker=--exclude-libs,ALL"
    return [*nvcc, "-shared", "--cudart=static", hidden, *_targets(targets), *map(str, objects), "-o", str(out)]


def _targets(names: Sequence[str]) -> list[str]:
    """Code for each, and intermediate code of the last for whatever comes after it."""
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*code, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]
