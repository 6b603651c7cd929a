#!/usr/bin/env bash
# Formatting, static analysis and shell syntax. Usage: tests/lint.sh BUILD_DIR JOBS  (BUILD_DIR is one of preset lint)
# clang-tidy results are kept per file, keyed by the content of everything that could change them.
set -euo pipefail

build=$1 jobs=$2
cd "$(dirname "$0")/.."
mapfile -t sources < <(git ls-files '*.h' '*.cc' '*.cu' '*.cuh' ':!tests/layering_fixture')
mapfile -t scripts < <(git ls-files '*.sh' .ci/run)

clang-format --dry-run -Werror "${sources[@]}"
echo "lint: ${#sources[@]} files are formatted"
for script in "${scripts[@]}"; do bash -n "$script"; done

# A header can change any file's result, so all headers are part of every key.
cache=build/tidy
mkdir -p "$cache"
shared_key=$(cat .clang-tidy $(git ls-files '*.h' '*.proto' '*CMakeLists.txt') | sha256sum | cut -c1-16)
pending=()
# The product's translation units; most hold several files, so that the headers are read and matched once for all of them.
for unit in $(sed -n 's/^ *"file": "\(.*\)",*$/\1/p' "$build/compile_commands.json" | grep -v /proto/); do
  mapfile -t files < <(sed -n 's/^#include "\(.*\.cc\)"$/\1/p' "$unit")
  key=$(cat "${files[@]:-$unit}" | sha256sum | cut -c1-16)-$shared_key
  [ -e "$cache/$key" ] || pending+=("$unit:$key")
done
tidy_one() {
  unit=${1%%:*} key=${1##*:}
  if ! output=$(clang-tidy --quiet --extra-arg=-Wno-unknown-warning-option -p "$build" "$unit" 2>/dev/null); then
    printf '%s\n' "$output"
    echo "lint: clang-tidy found problems in $unit" >&2
    return 1
  fi
  touch "$cache/$key"
}
export -f tidy_one
export build cache
# With nothing pending, printf alone would name an empty unit.
if [ ${#pending[@]} -gt 0 ]; then printf '%s\n' "${pending[@]}" | xargs -P "$jobs" -I{} bash -c 'tidy_one {}'; fi
echo "lint: clang-tidy is clean"
