#!/usr/bin/env bash
# The same command on every node, NODE_RANK counting from 0; MASTER_ADDR is node 0 as the others reach it:
#   NNODES=16 NODE_RANK=0 MASTER_ADDR=node0 launch/multi_node_torchrun.sh experiment=deepseek_v3
# Ranks of a node are consecutive, as the layout wants them. MASTER_PORT (29500) and RANKS per node are optional.
set -euo pipefail

exec torchrun --nnodes "${NNODES:?how many nodes}" --node-rank "${NODE_RANK:?number of this node, from 0}" \
    --master-addr "${MASTER_ADDR:?address of node 0}" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${RANKS:-gpu}" --shutdown-timeout 45 \
    -m deepseek_train.cli.train "$@"
