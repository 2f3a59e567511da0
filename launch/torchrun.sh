#!/usr/bin/env bash
# Trains in PROCESSES processes on this machine (default: one per GPU, or one per core without GPUs). If a signal to one
# of the processes stops the run after saving, the script starts it again. If the script itself gets SIGINT or SIGTERM,
# the run saves and the script exits.
# Usage: PROCESSES=4 launch/torchrun.sh --config my.yaml --train.zero_stage 2 [...]
set -uo pipefail
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
processes=${PROCESSES:-$(( gpus > 0 ? gpus : $(nproc) ))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / processes > 0 ? $(nproc) / processes : 1 ))}
log=$(mktemp); trap 'rm -f "$log"' EXIT
stop=0
trap 'stop=1; kill -TERM "$child"' INT TERM
while true; do
  torchrun --standalone --nproc-per-node "$processes" -m mmgen.cli train "$@" 2> >(tee "$log" >&2) &
  child=$!
  wait "$child"; code=$?
  [ "$stop" -eq 1 ] && { wait "$child"; code=$?; }
  # torchrun exits with 1 for any failure, and prints the exit codes of its processes on standard error.
  [ "$code" -ne 0 ] && [ "$stop" -eq 0 ] && grep -q "exitcode  : 75" "$log" || exit "$code"
done
