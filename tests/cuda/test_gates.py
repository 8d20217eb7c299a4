"""Gates: no kernel spills, and each stays within the registers and the shared memory that it declares, on every architecture.

Sources go through nvcc, which takes no GPU. The default form compiles a few for one architecture, `--full` all for all of them,
and again with the nvcc 12.8 that FEDLORA_NVCC_128 names: the oldest that has to take these sources.
"""

import os
import re
import shlex

import gates
import pytest
from limits import LIMITS, QUICK

from fedlora_kernels.backends.cuda.nvcc import ARCHITECTURES, find

REGISTERS = 65536
"""Of a multiprocessor of every architecture here; a thread has at most 255, and they are dealt out by eights."""
GRANTED_SHARED = int(re.search(r"kGrantedShared = (\d+) << 10", gates.RUNTIME)[1]) << 10 if gates.RUNTIME else 0
PLAIN_SHARED = (48 << 10) - GRANTED_SHARED
"""Bytes of static shared memory that a kernel may have, beside what launches take without asking."""


def cases():
    for source in gates.SOURCES:
        for architecture in ARCHITECTURES:
            quick = source.stem in QUICK and architecture == "90"
            yield pytest.param(
                source, architecture, id=f"{source.stem}-sm_{architecture}", marks=[] if quick else [pytest.mark.full]
            )


def check(nvcc, source, architecture):
    """Every kernel against its row, all faults at once."""
    faults = []
    found = gates.kernels(nvcc, source, architecture)
    rows = LIMITS.get(source.stem, {})
    for kernel in found:
        if kernel.name not in rows:
            faults.append(f"{kernel.instance}: no row in limits.py")
            continue
        row = rows[kernel.name]
        threads, blocks = kernel.threads or 1024, kernel.blocks or 1
        budget = min(255, REGISTERS // (threads * blocks) // 8 * 8)
        for wrong, text in (
            (threads != row.threads, f"{threads} threads by its launch bound, {row.threads} in limits.py"),
            (blocks < row.blocks, f"{blocks} blocks by its launch bound, {row.blocks} in limits.py"),
            (
                kernel.registers > budget,
                f"{kernel.registers} registers, but {blocks} x {threads} threads have {budget} each",
            ),
            (kernel.stack or kernel.spilled, f"{kernel.stack} bytes of stack, {kernel.spilled} spilled"),
            (kernel.local, f"{kernel.local} accesses to local memory"),
            (
                kernel.shared > min(row.shared, PLAIN_SHARED),
                f"{kernel.shared} bytes of shared memory, {row.shared} declared",
            ),
            (kernel.tensor is not None and bool(kernel.tensor) != row.tensor, f"{kernel.tensor} tensor instructions"),
        ):
            if wrong:
                faults.append(f"{kernel.instance}: {text}")
    faults += [f"{name}: in limits.py, but the compiler saw none" for name in set(rows) - {k.name for k in found}]
    assert not faults, f"{source.name}, sm_{architecture}:\n" + "\n".join(faults)


@pytest.mark.skipif(bool(reason := gates.missing(find())), reason=reason or "nvcc is here")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("source", "architecture"), list(cases()))
def test_kernels_stay_within_their_limits(source, architecture):
    check(find(), source, architecture)
    if gates.disassembler() is None:
        pytest.skip("no cuobjdump, so instructions were not looked at: install triton, or put the toolkit on the PATH")


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.skipif("FEDLORA_NVCC_128" not in os.environ, reason="FEDLORA_NVCC_128 names no nvcc 12.8")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", gates.SOURCES, ids=lambda source: source.stem)
def test_kernels_stay_within_their_limits_with_the_oldest_compiler(source, architecture):
    check(shlex.split(os.environ["FEDLORA_NVCC_128"]), source, architecture)


@pytest.mark.skipif(not gates.SOURCES, reason="needs the source tree")
@pytest.mark.parametrize("source", gates.SOURCES, ids=lambda source: source.stem)
def test_every_kernel_has_a_row(source):
    """Without a compiler: what the source and its headers write down."""
    written = gates.declared(source)
    rows = set(LIMITS.get(source.stem, {}))
    assert rows <= written, f"limits.py has rows of {source.name} for no kernel: {rows - written}"
    own = {name for name in written if f" {name}(" in source.read_text()}
    assert own <= rows, f"kernels of {source.name} without a row in limits.py: {own - rows}"


@pytest.mark.skipif(not gates.SOURCES, reason="needs the source tree")
def test_static_shared_memory_fits_beside_what_launches_take_without_asking():
    assert 0 < GRANTED_SHARED < 48 << 10
    assert max(limit.shared for rows in LIMITS.values() for limit in rows.values()) <= PLAIN_SHARED


def test_every_row_has_a_source():
    assert set(LIMITS) <= {source.stem for source in gates.SOURCES}


GOOD = gates.Kernel("mix", "mix<64>", 128, 2, 255, 0, 0, 2240, 32, 0)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"name": "other"}, "mix<64>: no row in limits.py"),
        ({"threads": None, "registers": 64}, "1024 threads by its launch bound, 128 in limits.py"),
        ({"blocks": 1}, "1 blocks by its launch bound, 2 in limits.py"),
        ({"blocks": 3}, "255 registers, but 3 x 128 threads have 168 each"),
        ({"stack": 16}, "16 bytes of stack, 0 spilled"),
        ({"spilled": 8}, "0 bytes of stack, 8 spilled"),
        ({"local": 2}, "2 accesses to local memory"),
        ({"shared": 2241}, "2241 bytes of shared memory, 2240 declared"),
        ({"tensor": 0}, "0 tensor instructions"),
    ],
)
def test_every_gate_closes(monkeypatch, wrong, text):
    sift = gates.Kernel("sift", "sift", 256, None, 48, 0, 0, 0, 0, 0)
    source = gates.CSRC / "cuda" / "mixed_sum.cu"
    monkeypatch.setattr(gates, "kernels", lambda *_: [GOOD, sift])
    check(["nvcc"], source, "90")
    monkeypatch.setattr(gates, "kernels", lambda *_: [GOOD._replace(**wrong), sift])
    with pytest.raises(AssertionError) as caught:
        check(["nvcc"], source, "90")
    assert text in str(caught.value)


def test_a_kernel_that_is_gone_has_no_row(monkeypatch):
    monkeypatch.setattr(gates, "kernels", lambda *_: [GOOD])
    with pytest.raises(AssertionError, match=r"sift: in limits\.py, but the compiler saw none"):
        check(["nvcc"], gates.CSRC / "cuda" / "mixed_sum.cu", "90")
