#!/usr/bin/env bash
# One node, all its GPUs or RANKS ranks:  RANKS=4 launch/local_torchrun.sh experiment=tiny
# Ranks that fail are started again from the last checkpoint, RESTARTS (3) times.
set -euo pipefail

# Without it every restart finds the addresses of ranks that are gone (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --nproc-per-node "${RANKS:-gpu}" --max-restarts "${RESTARTS:-3}" --shutdown-timeout 300 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m deepseek_train.cli.train "$@"
