"""What nvcc says of every kernel in csrc/cuda: registers, stack, shared memory, launch bounds and instructions."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from fedlora_kernels.backends.cuda import nvcc as compiler

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "gates"
SOURCES = compiler.sources(CSRC)
RUNTIME = (CSRC / "cuda" / "runtime.cuh").read_text() if SOURCES else ""


class Kernel(NamedTuple):
    """One instance of a kernel as it was compiled; spilled counts bytes, tensor and local count instructions, None if unknown."""

    name: str
    instance: str
    threads: int | None
    blocks: int | None
    registers: int
    stack: int
    spilled: int
    shared: int
    tensor: int | None
    local: int | None


def missing(nvcc):
    """Why nothing can be compiled here, or an empty string."""
    if not SOURCES:
        return "needs the source tree"
    if nvcc is None:
        return "no nvcc; set NVCC or CUDA_HOME"
    return "" if shutil.which("c++filt") else "no c++filt to read the names of kernels"


@functools.cache
def disassembler():
    """cuobjdump of the toolkit or of the triton wheel, or None."""
    candidates = [os.environ.get("FEDLORA_CUOBJDUMP"), "cuobjdump"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(f"{home}/bin/cuobjdump")
    if triton := importlib.util.find_spec("triton"):
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def kernels(nvcc, source, architecture):
    """Every kernel of a source, compiled for one architecture; from an earlier run where nothing it is made of has changed."""
    command = [*compiler.compile_command(nvcc, CSRC, source, [architecture])[:-2], f"-I{CSRC}/cuda"]
    digest = hashlib.sha256(repr((command, architecture, disassembler(), _version(tuple(nvcc)))).encode())
    for path in (*sorted(used(source)), Path(__file__)):
        digest.update(path.read_bytes())
    kept = CACHE / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            found = _compiled(command, source, architecture, Path(folder))
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(found))
        fresh.replace(kept)
    return [Kernel(*row) for row in json.loads(kept.read_text())]


@functools.cache
def _version(nvcc):
    return compiler.version(nvcc)


def used(source):
    """A source and the files of csrc that it includes, directly or not."""
    seen, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            there = [folder / name for folder in (path.parent, CSRC / "include", CSRC / "cuda", CSRC / "cpu")]
            waiting += [
                found for found in there if found.is_file() and found.resolve() not in {s.resolve() for s in seen}
            ]
    return seen


def _compiled(command, source, architecture, folder):
    """Source to PTX, which has the launch bounds, and that to machine code, of which the assembler tells the rest."""
    ptx, cubin = folder / "kernels.ptx", folder / "kernels.cubin"
    only = [word for word in command if not word.startswith("-gencode")]
    _run([*only, f"-arch=compute_{architecture}", "-ptx", str(source), "-o", str(ptx)])
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    said = _run([*only, target, "-Xptxas=-v", "-cubin", str(ptx), "-o", str(cubin)])
    bounds = _bounds(ptx.read_text())
    code = _instructions(cubin)
    found = []
    for mangled, report in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said, re.DOTALL):
        instance = _plain(mangled)
        tensor, local = code.get(mangled, (None, None))
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report).groups()
        )
        registers, shared = int(re.search(r"Used (\d+) registers", report)[1]), re.search(r"(\d+) bytes smem", report)
        found.append(
            Kernel(
                re.sub(r"<.*", "", instance),
                instance,
                *bounds[mangled],
                registers,
                stack,
                stores + loads,
                int(shared[1]) if shared else 0,
                tensor,
                local,
            )
        )
    return found


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def _bounds(ptx):
    """Threads and blocks of the launch bound by mangled name; None where there is none."""
    bounds = {}
    for name, directives in re.findall(r"\.entry (\w+)\(.*?\)\s*((?:\.\w+[^\n{]*\n)*)", ptx, re.DOTALL):
        threads, blocks = re.search(r"\.maxntid (\d+)", directives), re.search(r"\.minnctapersm (\d+)", directives)
        bounds[name] = (int(threads[1]) if threads else None, int(blocks[1]) if blocks else None)
    return bounds


def _instructions(cubin):
    """How many instructions of the float64 tensor cores, and of local memory, by mangled name."""
    if disassembler() is None:
        return {}
    parts = re.split(r"Function : (\w+)\n", _run([disassembler(), "-sass", str(cubin)]))
    return {
        name: (len(re.findall(r"\bDMMA\b", code)), len(re.findall(r"\b(?:LDL|STL)\b", code)))
        for name, code in zip(parts[1::2], parts[2::2], strict=True)
    }


def _plain(mangled):
    """The name of a kernel with its template arguments, without namespaces around it and parameters."""
    name = _run(["c++filt", mangled]).strip().replace("(anonymous namespace)::", "")
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    return re.sub(r"^(void )?(\w+::)*", "", name[:end])


def declared(source):
    """Names of the kernels that a source and what it includes write down."""
    pattern = r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\("
    return {name for path in used(source) for name in re.findall(pattern, path.read_text())}
