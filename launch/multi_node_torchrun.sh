#!/usr/bin/env bash
# The same command on every node, NODE_RANK counting from 0; MASTER_ADDR is node 0 as the others reach it:
#   NNODES=16 NODE_RANK=0 MASTER_ADDR=node0 launch/multi_node_torchrun.sh experiment=deepseek_v3
# Ranks of a node are consecutive, as the layout wants them. MASTER_PORT (29500), RANKS per node and LOCAL_ADDR, this node
# as the others reach it where its hostname does not lead to it, are optional.
#
# NNODES=14:16 goes on with 14 or 15 nodes when some are lost, if parallel.fallbacks has a layout for as many ranks, and
# takes them back when they return. RESTARTS (3) are counted by each node. Node 0 holds the meeting: it must not be lost.
set -euo pipefail

# Without it every restart finds the addresses of ranks that are gone (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ ${NODE_RANK:?number of this node, from 0} == 0 ]]; then is_host=1; else is_host=0; fi
# last_call: how long nodes beyond the fewest are waited for; the rest: a node that is silent for 3 x 5 s is lost.
meeting="is_host=$is_host,last_call_timeout=30,keep_alive_interval=5,keep_alive_max_attempt=3"
# The last checkpoint of a run that is told to stop gets shutdown-timeout seconds.
exec torchrun --nnodes "${NNODES:?how many nodes, or fewest:most}" \
    --rdzv-backend c10d --rdzv-id "${RUN_ID:-deepseek_train}" --rdzv-conf "$meeting" \
    --rdzv-endpoint "${MASTER_ADDR:?address of node 0}:${MASTER_PORT:-29500}" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} --nproc-per-node "${RANKS:-gpu}" \
    --max-restarts "${RESTARTS:-3}" --shutdown-timeout 300 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m deepseek_train.cli.train "$@"
