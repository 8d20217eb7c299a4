#!/usr/bin/env bash
# What a GPU machine can tell about this tree, in one command: the tests marked gpu, then what torch itself reaches there
# (bench/peers.py). Figures are written only where the tests are green. Needs torch with CUDA and the extra `test`.
# Usage: bench/gpu_evidence.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
python=${PYTHON:-python3}

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [[ -z $gpu ]]; then
    echo "gpu_evidence: torch finds no GPU here; nothing to tell" >&2
    exit 1
fi
mkdir -p "$out"
"$python" setup.py -q build_ext --inplace
"$python" -m pytest -p no:cacheprovider -m gpu tests
"$python" bench/peers.py --device cuda --json "$out/peers-${gpu// /-}.json"
