#!/usr/bin/env bash
# Train on this machine, started again for as long as it ends with code 75 (stopped by a signal after saving).
# Usage: launch/local.sh --config configs/scenes.yaml [--train.steps 2000 ...]
set -uo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
trap 'stop=1' INT TERM
stop=0
while true; do
  mmgen train "$@"
  code=$?
  [ "$code" -eq 75 ] && [ "$stop" -eq 0 ] || exit "$code"
done
