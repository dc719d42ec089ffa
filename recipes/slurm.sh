#!/usr/bin/env bash
# Several nodes under Slurm: `sbatch recipes/slurm.sh recipes/imagenet100_simclr.yaml --data-root /data/imagenet`
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=48:00:00
set -euo pipefail
recipe=$1
shift
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
export head processes recipe
# One launcher a node; --batch-size and --equiv-splits stay those of all processes together.
srun bash -c 'accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
  --num_processes "$processes" --main_process_ip "$head" --main_process_port 29500 \
  --rdzv_backend static --mixed_precision no --dynamo_backend no \
  train.py --config "$recipe" "$@"' _ "$@"
