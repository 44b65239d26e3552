#!/usr/bin/env bash
# One node, all its GPUs or RANKS ranks:  RANKS=4 launch/local_torchrun.sh experiment=tiny
set -euo pipefail

exec torchrun --standalone --nproc-per-node "${RANKS:-gpu}" --shutdown-timeout 45 \
    -m deepseek_train.cli.train "$@"
