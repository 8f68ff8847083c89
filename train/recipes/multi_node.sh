#!/usr/bin/env bash
# One run on several machines without a scheduler: the same line on each of them, within a few minutes.
#
#   train/recipes/multi_node.sh NODES FIRST_HOST --config train/recipes/vit_b16.toml --train-data /shared/shards
#
# NODES is how many machines, FIRST_HOST the one at which they meet (its port RDZV_PORT must be open, and those that NCCL
# chooses). "2:4" for NODES lets the run begin with two and go on with what is left of four. --logs-dir must lie on a file
# system that all machines see. A worker that dies is restarted with all others, up to MAX_RESTARTS times, and --resume
# auto goes on from the newest whole checkpoint; batch k stays the same samples only while NODES x GPUs x --batch-size
# stays the same.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: $0 NODES FIRST_HOST --config FILE.toml [options of train/main.py]" >&2
    exit 2
fi
nodes=$1 first=$2
shift 2

# Or workers that are started again find the addresses of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# When a collective of NCCL hangs: which one, on which rank, in a file for each rank.
export TORCH_FR_BUFFER_SIZE=20000
export TORCH_NCCL_DUMP_ON_TIMEOUT=1

exec torchrun \
    --nnodes "$nodes" \
    --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:${RDZV_PORT:-29500}" \
    --rdzv-id "${RUN_ID:-cllip}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    train/main.py "$@" --resume auto
