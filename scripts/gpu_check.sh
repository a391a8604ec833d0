#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one command and about ten minutes a backend: correctness of every
# kernel against dense, then times of layers, and of decoding with whole models of LLaMA's sizes. For a bare machine with
# one NVIDIA GPU and jax, numpy and triton; installs nothing. The backend "triton" is run where jax-triton is there too.
#
#   scripts/gpu_check.sh [FOLDER]      writes kernels_DEVICE.json, .svg and decode_DEVICE.json there, or to docs/results
#   BACKENDS=triton SECONDS_OF_BENCH=120 scripts/gpu_check.sh
#   TINY=1 scripts/gpu_check.sh DIR    on any machine, in the interpreter: only to see that the scripts work
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-docs/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
options=()
needed=jax_triton
if [[ -n ${TINY:-} ]]; then
  options=(--tiny --interpret)
  needed=triton
fi

if [[ -z ${BACKENDS:-} ]]; then
  BACKENDS=pallas
  if "$python" -c "import $needed" 2> /dev/null; then
    BACKENDS='pallas triton'
  else
    echo "$needed cannot be imported: the backend \"triton\" is not checked" >&2
  fi
fi

for backend in $BACKENDS; do
  if [[ $backend == triton && -n ${TINY:-} ]]; then
    export TRITON_INTERPRET=1
  fi
  "$python" scripts/check_kernels.py --backend "$backend" "${options[@]}" || failed="${failed:-} $backend"
done
# Times of kernels that are wrong would mean nothing.
if [[ -n ${failed:-} ]]; then
  echo "kernels are wrong on this machine ($failed ): no benchmark" >&2
  exit 1
fi
for backend in $BACKENDS; do
  "$python" scripts/bench_kernels.py --backend "$backend" --seconds "${SECONDS_OF_BENCH:-270}" --out "$out" \
    --plot "$out" "${options[@]}"
  # Without a GPU jax multiplies, whatever the backend.
  if [[ -z ${TINY:-} || $backend == pallas ]]; then
    "$python" scripts/bench_decode.py --backend "$backend" --seconds "${SECONDS_OF_DECODE:-200}" --out "$out" \
      ${TINY:+--tiny}
  fi
done
