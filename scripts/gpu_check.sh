#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one command and less than eight minutes: correctness of every kernel
# against dense, then times. For a bare machine with one NVIDIA GPU and jax, numpy and triton; installs nothing.
#
#   scripts/gpu_check.sh [FOLDER]      writes kernels_DEVICE.json and .svg there; docs/results without one
#   SECONDS_OF_BENCH=120 scripts/gpu_check.sh
#   TINY=1 scripts/gpu_check.sh DIR    on any machine, in the interpreter: only to see that the scripts work
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-docs/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
options=()
if [[ -n ${TINY:-} ]]; then
  options=(--tiny --interpret)
fi

"$python" scripts/check_kernels.py "${options[@]}" || failed=1
# Times of kernels that are wrong would mean nothing.
if [[ -n ${failed:-} ]]; then
  echo "kernels are wrong on this machine: no benchmark" >&2
  exit 1
fi
"$python" scripts/bench_kernels.py --seconds "${SECONDS_OF_BENCH:-270}" --out "$out" --plot "$out" "${options[@]}"
