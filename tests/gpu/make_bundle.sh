#!/usr/bin/env bash
# Gathers what tests/gpu/run.sh runs into one folder that works on a machine with glibc >= 2.36 and a CUDA driver: programs,
# the shared libraries they need (not glibc's own, not CUDA's), the shipped model and the scripts. check_bundle.py then
# looks at every file of it. BUNDLE_DIR.tar.gz is the same in one piece, a third of the size, for the way there.
# Usage: tests/gpu/make_bundle.sh BUILD_DIR BUNDLE_DIR
set -euo pipefail

build=$1 bundle=$2
top=$(cd "$(dirname "$0")/../.." && pwd)
rm -rf "$bundle" "$bundle.tar.gz"
mkdir -p "$bundle/bin" "$bundle/lib" "$bundle/deploy/models"
for program in minitron-server minitron minitron-gpu-bench minitron-gpu-load minitron-make-checkpoint cuda_tests_gpu; do
  strip -o "$bundle/bin/$program" "$build/bin/$program"
done
# The C library and its loader belong to the machine, and must match each other.
ldd "$bundle"/bin/* | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
  grep -vE '/(libc|libm|libdl|librt|libpthread|ld-linux[^/]*)\.so|libcuda|libcublas' | xargs cp -Lt "$bundle/lib"
cp -r "$top/deploy/models/minitron-tiny" "$bundle/deploy/models/"
for script in run.sh run.py machine.py stages.py serving.py report.py details.py layers_check.py nemotron_torch.py peers.py; do
  cp "$top/tests/gpu/$script" "$bundle/"
done
git -C "$top" rev-parse --short HEAD >"$bundle/commit" 2>/dev/null || echo unknown >"$bundle/commit"
"$top/tests/gpu/check_bundle.py" "$bundle"
tar -C "$(dirname "$bundle")" -czf "$bundle.tar.gz" "$(basename "$bundle")"
echo "gpu-bundle: $(stat -c %s "$bundle.tar.gz") bytes in $bundle.tar.gz"
