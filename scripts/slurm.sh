#!/usr/bin/env bash
# One pacevlm command on all GPUs of a Slurm job:
#
#     sbatch --nodes 2 --gpus-per-node 4 scripts/slurm.sh train --run-dir runs/mine --model.device cuda
#
# Every machine needs the same environment, model directory and run directory. torchrun starts the ranks of each machine and
# starts all again when one is gone; the job may be requeued, and the same command goes on.
#SBATCH --job-name=pacevlm
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --signal=TERM@60
set -euo pipefail

# As many ranks on a machine as it has GPUs, or as RANKS_PER_NODE says where there are none.
ranks="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port="${RENDEZVOUS_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
# A machine with several networks: the one that the others reach, for example GLOO_SOCKET_IFNAME=ib0.
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" --rdzv-id "$SLURM_JOB_ID" \
    -m pacevlm "$@"
