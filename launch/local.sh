#!/usr/bin/env bash
# Train on this machine, started again for as long as it ends with code 75 (stopped by a signal after saving),
# unless the signal came to this script.
# Usage: launch/local.sh --config configs/scenes.yaml [--train.steps 2000 ...]
set -uo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
stop=0
trap 'stop=1; kill -TERM "$child"' INT TERM
while true; do
  mmgen train "$@" &
  child=$!
  wait "$child"; code=$?
  [ "$stop" -eq 1 ] && { wait "$child"; code=$?; }
  [ "$code" -eq 75 ] && [ "$stop" -eq 0 ] || exit "$code"
done
