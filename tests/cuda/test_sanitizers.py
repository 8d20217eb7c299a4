"""The tests of the CUDA kernels once more, with the kernels under the sanitizers, and with faults put into the kernels.

The simulated device gives every tensor its own guarded memory under AddressSanitizer, and knows the bounds of shared arrays
through UBSan. A barrier that is taken out of a kernel must change a result under some order of threads, an index that is
shifted must change one under every order: else the tests of that kernel would let it pass.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulated

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_cuda_*.py"))
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(reason := simulated.missing()), reason=reason or "a compiler is here"),
]


def tested(file, library, *words, **environment):
    """(exit status, output) of the tests of a file on the simulated device of that library."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", str(file), *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=simulated.ROOT,
        env={**os.environ, "SIMT_LIBRARY": str(library), **environment},
        check=False,
    )
    return done.returncode, done.stdout[-8000:] + done.stderr[-8000:]


@pytest.fixture(scope="module")
def asan():
    """The library under the sanitizers, and the runtime that has to come first in the process that loads it."""
    runtime = subprocess.run([simulated.CXX, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    if not Path(runtime.stdout.strip()).is_file():
        pytest.skip(f"{simulated.CXX} has no libasan here")
    return simulated.build(SANITIZE), {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sanitizers_find_nothing(asan, file):
    library, environment = asan
    code, output = tested(file, library, **environment)
    assert code == 0, output
    assert " passed" in output


# Sources whose faults their own tests must see.
MUTANTS = ("orient", "turned")


def barriers(name):
    return [
        match.span() for match in re.finditer(r"__syncthreads\(\);", (simulated.CSRC / f"cuda/{name}.cu").read_text())
    ]


def mutant(name, text, folder):
    """The library with another text for one source."""
    original = simulated.CSRC / f"cuda/{name}.cu"
    changed = folder / original.name
    changed.write_text(text)
    return simulated.build(instead={original: changed})


@pytest.mark.parametrize(("name", "which"), [(name, i) for name in MUTANTS for i in range(len(barriers(name)))])
def test_a_barrier_taken_out_of_a_kernel_is_caught(name, which, tmp_path):
    text = (simulated.CSRC / f"cuda/{name}.cu").read_text()
    begin, end = barriers(name)[which]
    library = mutant(name, text[:begin] + text[end:], tmp_path)
    orders = ("forward", "reverse", "1", "2")
    file = HERE / f"test_cuda_{name}.py"
    assert any(tested(file, library, FEDLORA_SIMT_SCHEDULE=order)[0] == 1 for order in orders), (
        f"{name}: barrier {which}"
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_shifted_index_in_a_kernel_is_caught(name, tmp_path):
    text = (simulated.CSRC / f"cuda/{name}.cu").read_text()
    shifted = re.sub(
        r"(?<=[\[(=+ ])\(int\)threadIdx\.x|(?<=[\[(=+ ])threadIdx\.x(?= *[+;/\]])",
        "(int)(threadIdx.x + 1)",
        text,
        count=1,
    )
    assert shifted != text, "the pattern of this test is wrong"
    code, output = tested(HERE / f"test_cuda_{name}.py", mutant(name, shifted, tmp_path))
    assert code != 0, output


@pytest.mark.parametrize("name", MUTANTS)
def test_faults_are_not_seen_where_there_are_none(name, tmp_path):
    library = mutant(name, (simulated.CSRC / f"cuda/{name}.cu").read_text() + "\n", tmp_path)
    code, output = tested(HERE / f"test_cuda_{name}.py", library)
    assert code == 0, output
