#!/usr/bin/env bash
# Several nodes under Slurm: `sbatch slurm.sh imagenet100_simclr --data-root /data/imagenet`
# Two minutes before the time is up, or when preempted, the run saves, and the job goes back to the queue.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
recipe=$1
shift
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
# A process for each GPU, started by Slurm itself: no launcher stands between it and signals or exit status.
# The job keeps its number when it is requeued, so the same command starts the run and resumes it.
status=0
srun bash -c 'exec env RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" python "$@"' _ \
  -m care_hub train --config "$recipe" --run-name "slurm-$SLURM_JOB_ID" --resume auto "$@" || status=$?
if ((status == 75)); then # saved, to be resumed
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
