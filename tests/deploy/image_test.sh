#!/usr/bin/env bash
# Builds the image without a registry, runs it as the manifests do, and looks inside. `make test-image`: minutes, root,
# buildah and debootstrap, so not part of `make test`. Usage: image_test.sh [cpu|cuda]; cuda needs the CUDA toolkit, no GPU.
set -euo pipefail

cd "$(dirname "$0")/../.."
target=${1:-cpu}
export BASE=debootstrap BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
image=localhost/minitron-server:$target
fail() { echo "image_test: $*" >&2; exit 1; }

deploy/image/build.sh "$target"
container=$(buildah from --pull-never "$image")
server=
folder=$(mktemp -d)
log=$folder/log
cleanup() {
  [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || :
  rm -rf "$folder"
  buildah umount "$container" >/dev/null 2>&1 || :
  buildah rm "$container" >/dev/null 2>&1 || :
}
trap cleanup EXIT
root=$(buildah mount "$container")

# What is in it.
[ "$(buildah inspect --format '{{.OCIv1.Config.User}}' "$container")" = 65532:65532 ] || fail "does not run as 65532"
for label in title description licenses version revision; do
  buildah inspect --format '{{.OCIv1.Config.Labels}}' "$container" | grep -q "org.opencontainers.image.$label:." || fail "has no label $label"
done
for shell in bin/sh bin/bash bin/dash usr/bin/sh bin/busybox usr/bin/perl usr/bin/python3 usr/bin/apt usr/bin/dpkg; do
  [ ! -e "$root/$shell" ] || fail "has /$shell"
done
programs=$(find "$root" -type f -perm /111 ! -name '*.so*' -printf '%P\n' | sort | xargs)
[ "$programs" = "usr/bin/minitron usr/bin/minitron-server" ] || fail "has programs: $programs"
[ -z "$(find "$root" -perm /6000)" ] || fail "has files that change the user"
/usr/bin/python3 - "$root" "$target" <<'PYTHON'
import json, pathlib, sys
root, target = pathlib.Path(sys.argv[1]), sys.argv[2]
sbom = json.loads((root / "usr/share/minitron/sbom.spdx.json").read_text())
names = {p["name"]: p.get("versionInfo", "") for p in sbom["packages"]}
ids = [p["SPDXID"] for p in sbom["packages"]]
assert len(ids) == len(set(ids)) and all(i.replace("SPDXRef-", "").replace("-", "").replace(".", "").isalnum() for i in ids), ids
links = {(r["relationshipType"], r["relatedSpdxElement"]) for r in sbom["relationships"]}
needed = [("DYNAMIC", "libc6"), ("DYNAMIC", "libssl3"), ("DYNAMIC", "libgrpc-plus--plus-1.51"), ("STATIC", "libprotobuf-dev"),
          ("STATIC", "nlohmann-json3-dev")] + ([("DYNAMIC", "libcublasLt"), ("STATIC", "libcudart-static")] if target == "cuda" else [])
for kind, name in needed:
    assert (kind + "_LINK", "SPDXRef-" + name) in links, (name, sorted(links))
assert [n for n, v in names.items() if not v] == ["minitron-server"], names
libraries = [p for p in root.rglob("*.so*")]
assert libraries and len(names) > 10
related = {r["relatedSpdxElement"] for r in sbom["relationships"]}
assert set(ids) <= related, set(ids) - related
print(f"image_test: SBOM names {len(names)} packages for {len(libraries)} libraries")
PYTHON
echo "image_test: $(du -sm "$root" | cut -f1) MB unpacked"

# As a runtime does it: the root read-only, /proc, user 65532, no new privileges. In a mount space that ends with the program.
caged='mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && mount -t proc proc "$0/proc" && exec setpriv --no-new-privs \
  chroot --userspec=65532:65532 --groups= "$0" "$@"'
run() { unshare --mount sh -c "$caged" "$root" "$@"; }

run /bin/sh -c : 2>"$log" && fail "ran a shell"
run /usr/bin/minitron-server --metrics-port=0 --port=0 --port-file=/tmp/ports 2>"$log" && fail "wrote to /tmp"
grep -q -- '--port-file=/tmp/ports: cannot be written' "$log" || { cat "$log" >&2; fail "ended for another reason"; }
if [ "$target" = cuda ]; then
  # cublasLt is opened at run time: the loader must find all that it needs. The driver's library comes from the host. Without
  # a GPU the server says so, and serves on the CPU when it may.
  cublas=$(cd "$root" && ls usr/local/cuda/lib64/libcublasLt.so.*)
  run /lib64/ld-linux-x86-64.so.2 --list "/$cublas" >"$log" && ! grep -q 'not found' "$log" || { cat "$log" >&2; fail "cannot open $cublas"; }
  run /usr/bin/minitron-server --metrics-port=0 --port=0 --backend=cuda 2>"$log" && fail "found a GPU"
  grep -qi 'cuda' "$log" || { cat "$log" >&2; fail "ended for another reason"; }
  tail -1 "$log"
fi

read -r port health < <(/usr/bin/python3 -c 'import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')
unshare --mount sh -c "$caged" "$root" /usr/bin/minitron-server --host=127.0.0.1 --port="$port" --health-port="$health" --metrics-port=0 \
  --threads=1 --kv-cache-mib=64 --log-format=json 2>"$log" &
server=$!
for _ in $(seq 200); do
  grep -q '"event":"ready' "$log" && break
  kill -0 "$server" 2>/dev/null || { cat "$log" >&2; fail "did not start"; }
  sleep 0.05
done
status=$(cat "/proc/$server/status")
for line in 'Uid:.65532.65532' 'Gid:.65532.65532' 'CapEff:.0*$' 'NoNewPrivs:.1'; do
  grep -q "^$line" <<<"$status" || fail "is not $line: $status"
done
grep -q ' / ro[, ]' "/proc/$server/mountinfo" || fail "its root is writable: $(cat "/proc/$server/mountinfo")"

# The probes of the manifests.
/usr/bin/python3 - "$health" <<'PYTHON'
import sys
sys.path.insert(0, "tests/deploy")
from harness import health
for service in ("", "minitron.v1.GenerationService", "minitron.v1.ModelService", "liveness"):
    assert health(f"127.0.0.1:{sys.argv[1]}", service) == 1, service
print("image_test: the health probes answer SERVING")
PYTHON
run /usr/bin/minitron generate --server "127.0.0.1:$port" "To be or not to be," --max-tokens 8 || fail "no completion"
kill -TERM "$server"
wait "$server" || fail "ended with $?"
server=
echo "image_test: passed"
