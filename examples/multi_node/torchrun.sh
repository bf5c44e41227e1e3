#!/usr/bin/env bash
# Not yet run on a GPU. One node's share of a run over several nodes: start it on every node.
#
#   FIRST_NODE=node0 NUM_NODES=2 bash examples/multi_node/torchrun.sh recipe.yaml key=value ...
#
# Also read: GPUS_PER_NODE (8), PORT (29500), RUN_ID (megatron_rl; different for runs at once).
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ $# -eq 0 || -z "${FIRST_NODE:-}" || -z "${NUM_NODES:-}" ]]; then
    echo "usage: FIRST_NODE=<name> NUM_NODES=<n> $0 <recipe.yaml> [key=value ...]" >&2
    exit 2
fi

# Where the machine has several networks, name the one that connects the nodes:
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
#   export NCCL_IB_HCA=mlx5
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# c10d: the first node's agent keeps the store, and ranks are given out as nodes arrive.
# No restarts: a failed run resumes from its checkpoint when it is started again.
# SIGTERM is passed on to the ranks, which have 540 s to save and stop (torchrun gives 30 s).
exec .venv/bin/python -m torch.distributed.run \
    --nnodes "$NUM_NODES" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$FIRST_NODE:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-megatron_rl}" \
    --max-restarts 0 \
    --shutdown-timeout 540 \
    -m megatron_rl train "$@"
