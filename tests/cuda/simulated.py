"""The CUDA library on the simulated device: csrc/cuda compiled by the C++ compiler against csrc/simt, object by object."""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from fedlora_kernels.backends.native.library import abi_stamp

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "simt"
CXX = os.environ.get("CXX", "g++")
HEADER = CSRC / "include" / "fedlora.h"
FLAGS = [
    *shlex.split(
        "-O1 -std=c++17 -fPIC -fvisibility=hidden -pthread -fno-math-errno -ffp-contract=off -Wall -Wno-unknown-pragmas"
    ),
    f"-DFEDLORA_ABI_STAMP=0x{abi_stamp(HEADER):016x}ull" if HEADER.is_file() else "",
    '-DFEDLORA_CUDA_ARCHITECTURES="simulated"',
    *[f"-I{CSRC / folder}" for folder in ("include", "cuda", "simt")],
]


def missing():
    """Why the library cannot be built here, or an empty string."""
    if not (CSRC / "cuda").is_dir():
        return "needs the source tree"
    return "" if shutil.which(CXX) else f"no C++ compiler {CXX}"


def build(flags=(), sources=(), instead=None):
    """The library compiled with these flags and sources as well, from the run before as far as nothing has changed since.

    ``instead`` has other files for some sources.
    """
    instead = instead or {}
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker builds, the others wait
        objects = [
            _object(instead.get(source, source), flags) for source in (*sorted(CSRC.glob("cuda/*.cu")), *sources)
        ]
        pending = [(command, target) for command, target in objects if not target.is_file()]
        for i in range(0, len(pending), 2):
            _run_all(pending[i : i + 2])
        name = hashlib.sha256("".join(str(target) for _, target in objects).encode()).hexdigest()[:16]
        library = BUILD / f"libfedlora_simt-{name}.so"
        if not library.is_file():
            _run_all([([CXX, "-shared", "-pthread", *flags, *(str(target) for _, target in objects), "-ldl"], library)])
    return library


def _object(source, flags):
    """The command that compiles a source, and a file named after all that it depends on."""
    command = [CXX, *FLAGS, *flags, "-x", "c++", "-c", str(source)]
    listing = subprocess.run([*command, "-M"], check=True, capture_output=True, text=True).stdout
    used = [
        path for path in listing.replace("\\\n", " ").split()[1:] if path.startswith(str(ROOT)) or path == str(source)
    ]
    digest = hashlib.sha256(shlex.join(command).encode())
    for path in sorted(used):
        digest.update(Path(path).read_bytes())
    return command, BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"


def _run_all(jobs):
    """Commands side by side; each file appears whole or not at all."""
    partial = [target.with_suffix(f".{os.getpid()}") for _, target in jobs]
    running = [
        subprocess.Popen([*command, "-o", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for (command, _), out in zip(jobs, partial, strict=True)
    ]
    said = [process.communicate()[0] for process in running]
    for process, (command, target), out, text in zip(running, jobs, partial, said, strict=True):
        assert process.returncode == 0, f"{shlex.join(command)}\n{text}"
        out.replace(target)
