#!/usr/bin/env bash
# One node's share of a run over several nodes: start it on every node. Not yet run on a GPU.
#
#   FIRST_NODE=node0 NUM_NODES=2 bash examples/multi_node/torchrun.sh recipe.yaml key=value ...
#
# Also read: GPUS_PER_NODE (8), PORT (29500), RUN_ID (megatron_rl; different for runs at once),
# NODE_RANK (0 on the first node; where it is not set, the node that has FIRST_NODE's address is the
# first), WAIT_S (1800: seconds that the other nodes wait for the first), PYTHON.
#
# Its exit code is 0 when the run is done, 143 when it was told to stop and the same command goes
# on, and else the code of the rank that failed: 1, 2, 75 (docs/reliability.md).
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

if [[ $# -eq 0 || -z "${FIRST_NODE:-}" || -z "${NUM_NODES:-}" ]]; then
    echo "usage: FIRST_NODE=<name> NUM_NODES=<n> $0 <recipe.yaml> [key=value ...]" >&2
    exit 2
fi
PORT="${PORT:-29500}"
PYTHON="${PYTHON:-.venv/bin/python}"
command -v "$PYTHON" > /dev/null || PYTHON=python # in the image there is no .venv

# Where the machine has several networks, name the one that connects the nodes:
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
#   export NCCL_IB_HCA=mlx5
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# What was told is passed on to torchrun as SIGTERM, the only signal that it handles as we need.
TOLD_TO_STOP=0
TORCHRUN=
pass_on() {
    TOLD_TO_STOP=1
    [[ -z "$TORCHRUN" ]] || kill -TERM "$TORCHRUN" 2> /dev/null
}
trap pass_on TERM INT USR1

CONF=
if [[ -n "${NODE_RANK:-}" ]]; then
    CONF=is_host=$([[ "$NODE_RANK" == 0 ]] && echo true || echo false)
    # torchrun gives up when the first node is a minute late, with an image to load for example.
    until [[ "$NODE_RANK" == 0 || $TOLD_TO_STOP -eq 1 ]] ||
        (exec 3<> "/dev/tcp/$FIRST_NODE/$PORT") 2> /dev/null; do
        if [[ $SECONDS -ge ${WAIT_S:-1800} ]]; then
            echo "$0: nothing answers at $FIRST_NODE:$PORT after $SECONDS s. FIRST_NODE must be" \
                "the first node's name or address, and the port open to the others" >&2
            exit 1
        fi
        sleep 1
    done
    [[ $TOLD_TO_STOP -eq 0 ]] || exit 143
fi

# Ranks write there why they end, since torchrun's own exit code is 1 for all but a success.
MEGATRON_RL_END_FILE="$(mktemp -u)"
export MEGATRON_RL_END_FILE

# c10d: the first node's agent keeps the store, and ranks are given out as nodes arrive.
# No restarts: a failed run resumes from its checkpoint when it is started again.
# SIGTERM is passed on to the ranks, which have 540 s to save and stop (torchrun gives 30 s).
# SIGUSR1, which a scheduler may send to every process, would end torchrun and is left to the ranks.
(
    trap '' USR1
    exec "$PYTHON" -m torch.distributed.run \
        --nnodes "$NUM_NODES" \
        --nproc-per-node "${GPUS_PER_NODE:-8}" \
        --rdzv-backend c10d \
        --rdzv-endpoint "$FIRST_NODE:$PORT" \
        --rdzv-id "${RUN_ID:-megatron_rl}" \
        --rdzv-conf "$CONF" \
        --max-restarts 0 \
        --shutdown-timeout 540 \
        -m megatron_rl train "$@"
) &
TORCHRUN=$!

STATUS=0
wait "$TORCHRUN" || STATUS=$?
while kill -0 "$TORCHRUN" 2> /dev/null; do # a signal cut the wait short
    STATUS=0
    wait "$TORCHRUN" || STATUS=$?
done

if [[ -s "$MEGATRON_RL_END_FILE" ]]; then
    STATUS="$(< "$MEGATRON_RL_END_FILE")"
elif [[ $STATUS -ne 0 && $TOLD_TO_STOP -eq 1 ]]; then
    STATUS=143 # while the run was still starting
fi
rm -f "$MEGATRON_RL_END_FILE"
exit "$STATUS"
