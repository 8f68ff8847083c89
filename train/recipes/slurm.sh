#!/usr/bin/env bash
# One run on several nodes under Slurm: a torchrun on each node, and they find one another at the first node (c10d).
#
#   sbatch --nodes 8 train/recipes/slurm.sh --config train/recipes/vit_b16.toml --train-data /shared/shards
#   sbatch --nodes 8 train/recipes/slurm.sh --config train/recipes/vit_b16.toml --train-data /shared/shards \
#       --parallel hsdp                      # sharded over the GPUs of a node, copied from node to node
#
# What comes after the script's name goes to train/main.py. --logs-dir must lie on a file system that all nodes see.
# A worker that dies is restarted with all others, up to MAX_RESTARTS times; --resume auto goes on from the newest
# whole checkpoint, and starts afresh where there is none. Two minutes before the time limit Slurm sends SIGTERM: the run
# saves and ends, and submitting the same line again goes on. torchrun waits 110 of the 120 seconds for that; its own default
# is 30.
#
#SBATCH --job-name=cllip
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

if [[ $# -eq 0 || -z "${SLURM_JOB_NODELIST:-}" ]]; then
    echo "usage: sbatch --nodes N $0 --config FILE.toml [options of train/main.py]" >&2
    exit 2
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Or workers that are started again find the addresses of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# When a collective of NCCL hangs: which one, on which rank, in a file for each rank beside the log.
export TORCH_FR_BUFFER_SIZE=20000
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${SLURM_SUBMIT_DIR:-$PWD}/nccl_trace_${SLURM_JOB_ID}_"

exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:${RDZV_PORT:-29500}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --shutdown-timeout 110 \
    train/main.py "$@" --resume auto
