#!/usr/bin/env bash
# `deepseek-train experiment=h100_proxy`, the whole command, on a machine with one Hopper GPU and no network: FP8 steps on real
# text, a checkpoint of 2.57B parameters, a report; one layer with averaged weights, saved and resumed; the steps again in BF16
# and with compiled glue. What fails is shown and the next part goes on. In 200 seconds, or as many as LIMIT says.
#
#   benchmarks/gpu_command.sh FOLDER_OF_RESULTS [OVERRIDE ...]     # of every part: cluster.device=cpu and tiny sizes rehearse
#
# PYTHON (python3) has the dependencies of pyproject.toml, or finds them on PYTHONPATH. STEP: tokens of a step. PARTS: which.
set -uo pipefail
mkdir -p "${1:?a folder for the results}"
out=$(cd "$1" && pwd)
shift
common=("$@")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3} step=${STEP:-32768} limit=${LIMIT:-200} status=0
parts=" ${PARTS:-fp8 layer bf16 compiled} "

# In memory where it holds two checkpoints, for disks are of all speeds.
shm=$(df --output=avail -BG /dev/shm 2>/dev/null | tail -n 1 | tr -dc 0-9)
if ((${shm:-0} >= 48)); then runs=$(mktemp -d /dev/shm/gpu_command.XXXXXX); else runs=$(mktemp -d); fi
trap 'rm -rf "$runs"' EXIT
ln -s "$PWD/configs" "$runs/deepseek_train_configs" # an installed package's name, from a source tree
export PYTHONPATH="$runs:$PWD/kernels:$PWD:${PYTHONPATH:-}"
export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo PYTHONUNBUFFERED=1
echo "runs in $runs: $(df -h --output=avail "$runs" | tail -n 1) free; GPUs: $(ls /dev/nvidia[0-9]* 2>/dev/null)"

command_of() { # NAME [OVERRIDE ...]: as words in $words
  words=("$python" -m deepseek_train.cli.train experiment=h100_proxy "name=$1" "run_dir=$runs/$1" "data.path=$runs/data")
  words+=("${common[@]}" "${@:2}")
}

most() { # SECONDS: of a part, where all have 200, or what is left
  local part=$(($1 * limit / 200)) left=$((limit - SECONDS))
  echo $((left < 1 ? 1 : left < part ? left : part))
}

tell() { # CODE PART BEGAN LOG
  echo "=== $2: code $1, $((SECONDS - $3)) s"
  if (($1)); then
    status=1
    tail -n 30 "$4" | cut -c1-220
  else
    tail -n 9 "$4" | cut -c1-200
  fi
  { echo "=== $2" && cat "$4"; } >>"$out/command.log"
}

train() { # NAME SECONDS [OVERRIDE ...]: a run to its end
  local began=$SECONDS code
  command_of "$1" "${@:3}"
  timeout -s KILL "$(most "$2")" "${words[@]}" >"$runs/log" 2>&1
  code=$?
  tell $code "$1" "$began" "$runs/log"
}

steps() { # NAME SECONDS STEPS [OVERRIDE ...]: a run that is cut off: its checkpoint would take longer than its steps
  local began=$SECONDS history="$runs/$1/metrics.jsonl" code=0 seconds pid
  seconds=$(most "$2")
  command_of "$1" "${@:4}"
  "${words[@]}" >"$runs/log" 2>&1 &
  pid=$!
  until (($(cat "$history" 2>/dev/null | wc -l) >= $3)); do
    if ((SECONDS - began >= seconds)) || ! kill -0 $pid 2>/dev/null; then
      code=1
      break
    fi
    sleep 0.2
  done
  { kill -KILL $pid && wait $pid; } 2>/dev/null
  tell $code "$1" "$began" "$runs/log"
}

# What each run would wait for, side by side: text, our CUDA kernels, modules read once.
began=$SECONDS
"$python" -m deepseek_train.cli.data prepare "data.path=$runs/data" data.source=builtin data.max_megabytes=16 &
"$python" -c 'import deepseek_train.cli.train_rank' &
if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  "$python" -c 'from deepseek_kernels.cuda_library import compile_for; compile_for("gemm"); compile_for("quant")' &
fi
wait
echo "=== prepared: $((SECONDS - began)) s"

if [[ $parts == *" fp8 "* ]]; then
  train fp8 110 "train.total_tokens=$((14 * step))"
  cp "$runs/fp8/report.md" "$runs/fp8/metrics.jsonl" "$out/"
  rm -rf "$runs/fp8"
fi

if [[ $parts == *" layer "* ]]; then
  layer=(model.num_layers=1 model.num_dense_layers=0 optim.ema_decay=0.9)
  train layer 60 "${layer[@]}" "train.total_tokens=$((4 * step))"
  echo "=== layer, resumed:"
  train layer 60 "${layer[@]}" "train.total_tokens=$((6 * step))" resume=must
  cp "$runs/layer/report.md" "$out/resumed.md"
  rm -rf "$runs/layer"
fi

if [[ $parts == *" bf16 "* ]]; then
  steps bf16 60 10 precision=bf16 "train.total_tokens=$((20 * step))"
  cp "$runs/bf16/metrics.jsonl" "$out/bf16.jsonl"
fi

if [[ $parts == *" compiled "* ]]; then
  steps compiled 90 10 train.compile=true "train.total_tokens=$((20 * step))"
  cp "$runs/compiled/metrics.jsonl" "$out/compiled.jsonl"
fi
echo "=== all: $SECONDS s, status $status"
exit "$status"
