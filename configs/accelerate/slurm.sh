#!/bin/bash
# Two machines with 8 GPUs each, by SLURM; what follows the file are the words of `vlafit train`:
#   sbatch configs/accelerate/slurm.sh RECIPE --out runs/many --resume --train.sharding full
# --resume lets a job that was requeued go on; the first time there is nothing to resume. On each machine one task
# starts torchrun, and that a process for each GPU (PROCESSES=4 before sbatch: four). All machines read the same
# data and write to one shared folder. The first machine's port 29500 must be free (PORT=...).
# Without SLURM, on each machine with its own --node-rank:
#   torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 29500 -m vlafit train RECIPE
#SBATCH --job-name=vlafit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail

FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST PORT="${PORT:-29500}"
# In each task, because SLURM numbers the machines there.
exec srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
  --nproc-per-node "${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" --master-addr "$FIRST" --master-port "$PORT" \
  -m vlafit train "$@"' vlafit "$@"
