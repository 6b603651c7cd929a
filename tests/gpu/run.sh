#!/usr/bin/env bash
# What only a GPU can show, in stages that can be repeated: device, kernels, model, end to end. Needs a CUDA driver and the
# folder `make gpu-bundle` makes (or a build with MINITRON_CUDA=ON); no network, no distribution packages.
#
# Usage: tests/gpu/run.sh [--bundle DIR] [--out DIR] [STAGE...]      stages: device kernels model serve   (default: all)
# A stage that passed leaves OUT/STAGE.ok and is skipped the next time; remove the file to repeat it.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
bundle=$here # the script lies in the bundle, or in the repository
[ -d "$bundle/bin" ] || bundle=$here/../../build/gpu-bundle
out=${OUT:-${TMPDIR:-/tmp}/minitron-gpu}
stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --bundle) bundle=$2 && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    *) stages+=("$1") && shift ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(device kernels model serve)
mkdir -p "$out"
export LD_LIBRARY_PATH=$bundle/lib:${LD_LIBRARY_PATH:-}

stage_device() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv,noheader
}
# The kernel tests of the emulation, compiled for the device.
stage_kernels() {
  local failed=0
  for test in row_kernels_test_gpu attention_kernels_test_gpu quantized_matmul_test_gpu sampler_kernels_test_gpu; do
    timeout 120 "$bundle/bin/$test" --gtest_brief=1 || failed=1
  done
  return $failed
}
# The runner over cublasLt: the same bits in any batch, and the CPU backend's tokens.
stage_model() {
  (cd "$bundle" && timeout 240 bin/cuda_runner_test_gpu --gtest_brief=1)
}
# The server on the device streams a completion to the command line.
stage_serve() {
  local ports=$out/ports server port result=1
  rm -f "$ports"
  timeout 180 "$bundle/bin/minitron-server" --model "$bundle/deploy/models/minitron-tiny" --backend cuda \
    --host 127.0.0.1 --port 0 --metrics-port 0 --drain-delay 0 --port-file "$ports" &
  server=$!
  for _ in $(seq 600); do
    [ -s "$ports" ] && break
    kill -0 $server 2>/dev/null || return 1
    sleep 0.1
  done
  port=$(sed -n 's/^grpc=//p' "$ports")
  timeout 60 "$bundle/bin/minitron" generate --server "127.0.0.1:$port" --prompt "To be or not to be," --max-tokens 64 \
    --seed 7 && result=0
  kill -TERM $server
  wait $server
  return $result
}

status=0
for stage in "${stages[@]}"; do
  if [ -e "$out/$stage.ok" ]; then
    echo "gpu: $stage passed before ($out/$stage.ok)"
    continue
  fi
  begin=$SECONDS
  if "stage_$stage" >"$out/$stage.log" 2>&1; then
    touch "$out/$stage.ok"
    echo "gpu: $stage passed in $((SECONDS - begin)) s"
  else
    status=1
    echo "gpu: $stage FAILED in $((SECONDS - begin)) s, see $out/$stage.log"
    tail -20 "$out/$stage.log" | sed 's/^/gpu:   /'
  fi
done
exit $status
