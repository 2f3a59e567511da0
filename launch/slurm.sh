#!/usr/bin/env bash
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
# Trains in one process per GPU. Two minutes before the time limit every process gets SIGUSR1; the run saves and exits
# with code 75, and the script puts the job back into the queue.
# Usage: sbatch --nodes 4 launch/slurm.sh --config my.yaml [...]
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python -m mmgen.cli train "$@"' mmgen "$@"
code=$?
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
