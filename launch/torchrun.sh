#!/usr/bin/env bash
# Train in PROCESSES processes of this machine (default: one per GPU, else one per core), started again for as long as
# a run ends after a signal to its processes; a signal to this script saves and ends.
# Usage: PROCESSES=4 launch/torchrun.sh --config configs/scenes.yaml --train.zero_stage 2 [...]
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
  # torchrun ends with 1 whatever its processes say, and names their codes in its report.
  [ "$code" -ne 0 ] && [ "$stop" -eq 0 ] && grep -q "exitcode  : 75" "$log" || exit "$code"
done
