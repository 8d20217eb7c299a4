#!/usr/bin/env bash
# What a GPU machine can tell about this tree, in one command and less than nine minutes: builds the CUDA library for its GPU, runs
# the tests marked gpu, small problems under compute-sanitizer, and the kernels against their peers. A stage that fails or runs out
# of time does not stop the next; each has its seconds and its end in the evidence, beside the machine. Ratios are only taken from
# answers that pass their gates. Needs torch with CUDA, nvcc and the extra `test`; nothing is downloaded.
# Usage: bench/gpu_evidence.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [[ -z $gpu ]]; then
    echo "gpu_evidence: torch finds no GPU here; nothing to tell" >&2
    exit 1
fi
mkdir -p "$out"
name=${gpu// /-}
evidence=$out/evidence-$name.json
log=$out/evidence-$name.log
stages=$(mktemp) facts=$(mktemp)
trap 'rm -f "$stages" "$facts"' EXIT
: >"$log"
SECONDS=0
LAST=530 # seconds after which nothing runs any more

# stage NAME SECONDS COMMAND...: runs it for so long at most, and writes down how it went.
stage() {
    local title=$1 most=$2 begin=$SECONDS status=0
    shift 2
    ((most > LAST - SECONDS)) && most=$((LAST - SECONDS))
    echo "== $title" | tee -a "$log"
    if ((most < 5)); then
        status=124
    else
        timeout --kill-after=5 "$most" "$@" > >(tee -a "$log") 2>&1 || status=$?
    fi
    printf '%s\t%d\t%d\n' "$title" "$status" "$((SECONDS - begin))" >>"$stages"
    write
    return "$status"
}

# What the figures are taken on, and with what.
look() {
    "$python" - >"$facts" <<'PYTHON'
import json
import sys

sys.path.insert(0, "bench")
from timing import machine

from fedlora_kernels.backends.cuda import BACKEND
from fedlora_kernels.backends.cuda import nvcc as compiler

nvcc = compiler.find()
version = compiler.version(nvcc) if nvcc else None
print(json.dumps({"machine": machine(), "nvcc": version, "cuda_library": BACKEND.library.available()[1]}))
PYTHON
}

# All that is known so far: partial evidence is evidence.
write() {
    "$python" - "$stages" "$facts" "$evidence" "$out/kernels-$name.json" "$out/peers-$name.json" <<'PYTHON'
import json
import sys
from pathlib import Path

stages, facts, evidence, *figures = map(Path, sys.argv[1:])
lines = [line.split("\t") for line in stages.read_text().splitlines()]
ends = {"0": "passed", "77": "left out", "124": "out of time", "137": "out of time"}
found = json.loads(facts.read_text()) | {
    "stages": [{"stage": name, "end": ends.get(end, f"failed, status {end}"), "seconds": int(took)} for name, end, took in lines]
}
for path in figures:
    if path.is_file():
        found[path.name.split("-")[0]] = json.loads(path.read_text())["rows"]
evidence.write_text(json.dumps(found, indent=1) + "\n")
PYTHON
}

# One tool of compute-sanitizer over every operation on small problems; 77 where the toolkit has no sanitizer.
sanitized() {
    local tool
    tool=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null) || {
        echo "compute-sanitizer is not here"
        return 77
    }
    "$tool" --tool "$1" --kernel-regex kns=fedlora --error-exitcode 9 "$python" -c '
from fedlora_kernels import environment
environment.SELF_TEST_SECONDS = float("inf")
found = environment.self_test("cuda")
print(found)
assert found["passed"]'
}
export -f sanitized
export python

arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
rm -f "$out/kernels-$name.json" "$out/peers-$name.json"
look
stage build 200 env FEDLORA_BUILD_CPU=0 FEDLORA_BUILD_CUDA=1 FEDLORA_CUDA_ARCHS="$arch" \
    "$python" setup.py -q build_ext --inplace
look
stage tests 150 "$python" -m pytest -q -p no:cacheprovider -m gpu tests
stage kernels 150 "$python" bench/gpu_kernels.py --seconds 0.5 --json "$out/kernels-$name.json"
stage peers 60 "$python" bench/peers.py --device cuda --quick --json "$out/peers-$name.json"
for tool in memcheck racecheck initcheck; do
    stage "$tool" 60 bash -c "sanitized $tool"
done
echo "gpu_evidence: $evidence after $SECONDS seconds"
! cut -f2 "$stages" | grep -qvE '^(0|77)$'
