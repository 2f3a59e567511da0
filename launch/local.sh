#!/usr/bin/env bash
# Trains in one process on this machine. If the process exits with code 75 (a signal stopped it after saving), the
# script starts it again. If the script itself gets SIGINT or SIGTERM, the run saves and the script exits.
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
