#!/usr/bin/env bash
# run.sh BIN_DIR WORK_DIR [SHAPE]: operations, then prefill and decode of a random model in every weight format.
set -euo pipefail
bin=$1 work=$2 shape=${3:-1b}
mkdir -p "$work/$shape"
if [ ! -e "$work/$shape/model.safetensors" ]; then
  "$bin/minitron-make-checkpoint" "$shape" "$work/$shape"
fi
uname -m
grep -m1 'model name' /proc/cpuinfo || true
"$bin/minitron-bench-engine" --shape "$shape" --ops
for format in none int8 int4; do
  "$bin/minitron-bench-engine" --shape "$shape" --model "$work/$shape" --quantize "$format"
done
