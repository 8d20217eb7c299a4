#!/usr/bin/env bash
# Everything a GPU can tell about this tree, in one command: build, GPU tests, then benchmarks against their peers.
# Figures are written only where the tests are green. Usage: bench/gpu_evidence.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
mkdir -p "$out"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '-')
python3 -m pip install -q --no-build-isolation --no-deps .
python3 -m pytest -p no:cacheprovider -m gpu -q tests
python3 bench/peers.py --device cuda --json "$out/peers-$gpu.json"
