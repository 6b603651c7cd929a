#!/usr/bin/env bash
# Starts the server on free ports, streams one completion through the command-line client, and stops the server.
# Usage: deploy/demo.sh [--model DIR] [--prompt TEXT] [--bin DIR]
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
bin=$top/build/release/bin
model=$top/deploy/models/minitron-tiny
prompt="To be or not to be,"
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=$2 ;;
    --prompt) prompt=$2 ;;
    --bin) bin=$2 ;;
    *)
      echo "demo: unknown option $1" >&2
      exit 2
      ;;
  esac
  shift 2
done

scratch=$(mktemp -d)
server=
stop_server() {
  [ -z "$server" ] || kill -TERM "$server" 2>/dev/null || :
  [ -z "$server" ] || wait "$server" 2>/dev/null || :
  rm -rf "$scratch"
}
trap stop_server EXIT

"$bin/minitron-server" --model "$model" --host 127.0.0.1 --port 0 --metrics-port 0 --drain-delay 0 \
  --port-file "$scratch/ports" 2>"$scratch/log" &
server=$!
until [ -s "$scratch/ports" ]; do
  kill -0 "$server" 2>/dev/null || {
    echo "demo: the server did not start:" >&2
    cat "$scratch/log" >&2
    exit 1
  }
  sleep 0.02
done
port=$(sed -n 's/^grpc=//p' "$scratch/ports")
grep -o 'ready.*' "$scratch/log" | tail -n 1 >&2 || :

echo "\$ minitron generate --server 127.0.0.1:$port --prompt '$prompt'" >&2
"$bin/minitron" generate --server "127.0.0.1:$port" --prompt "$prompt" --max-tokens 96 --seed 7
