#!/bin/bash
#SBATCH --job-name=cddlib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --array=1-6%1
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --output=%x-%A.log
#SBATCH --open-mode=append

# Six jobs of four hours, one after another: each goes on where the last one stopped,
# and those that come after the end find nothing left to do. 180 s before its time is
# over, Slurm sends a job's processes SIGTERM.
set -eu
shared=${SHARED:?the folder of data, experts and runs, which all nodes see}
source "${VENV:?the Python environment}/bin/activate"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# torchrun forgets the addresses of processes that died, and gives those that it stops
# so many seconds.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

# One agent a node, which starts four processes, one a GPU.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 4 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" \
    -m cddlib distill --method datm --data cifar100 --ipc 50 --segments 8 \
    --root "$shared/data" --buffer "$shared/experts" --out "$shared/datm-8"
