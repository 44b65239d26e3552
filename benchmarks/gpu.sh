#!/usr/bin/env bash
# All that a Hopper GPU has to say, in one command of less than 8 minutes: the tests of the kernels, their times, one MoE layer, a
# training step. Needs torch >= 2.11, triton, pytest and this repository; with pytest-xdist kernels compile in parallel.
#
#   benchmarks/gpu.sh [FOLDER OF RESULTS] [REVISION]
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=kernels:.
out=${1:-benchmarks/results}
revision=${2:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
python=${PYTHON:-python3}
if ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
  echo "there is no GPU here: python3 -m pytest tests/gpu, and python3 -m benchmarks.kernels rehearse on a CPU" >&2
  exit 2
fi
mkdir -p "$out"

status=0
$python -c 'from deepseek_kernels.cuda_library import compile_for; compile_for("gemm"); compile_for("quant")' || status=1
parallel=$($python -c 'import xdist; print("-n 12")' 2>/dev/null)
# shellcheck disable=SC2086
$python -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q $parallel tests/gpu >"$out/gpu_tests.txt" 2>&1 || status=1
grep -E '^(FAILED|ERROR)|passed|failed' "$out/gpu_tests.txt" | cut -c1-180 | tail -n 30
for what in kernels moe_layer gpu_step; do
  $python -m "benchmarks.$what" --out "$out" --revision "$revision" || status=1
done
exit "$status"
