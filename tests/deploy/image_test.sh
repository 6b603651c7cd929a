#!/usr/bin/env bash
# Builds the image without a registry, runs it as the manifests do, and looks inside. `make test-image`: minutes, root,
# buildah and debootstrap, so not part of `make test`.
set -euo pipefail

cd "$(dirname "$0")/../.."
export BASE=debootstrap BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
image=localhost/minitron-server:cpu
fail() { echo "image_test: $*" >&2; exit 1; }

deploy/image/build.sh cpu
container=$(buildah from --pull-never "$image")
server=
cleanup() {
  [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || :
  umount "$root/proc" 2>/dev/null || :
  buildah umount "$container" >/dev/null 2>&1 || :
  buildah rm "$container" >/dev/null 2>&1 || :
}
trap cleanup EXIT
root=$(buildah mount "$container")

# What is in it.
[ "$(buildah inspect --format '{{.OCIv1.Config.User}}' "$container")" = 65532:65532 ] || fail "does not run as 65532"
for shell in bin/sh bin/bash usr/bin/sh bin/busybox usr/bin/apt usr/bin/dpkg; do
  [ ! -e "$root/$shell" ] || fail "has /$shell"
done
[ -z "$(find "$root" -perm /6000)" ] || fail "has files that change the user"
/usr/bin/python3 - "$root" <<'PYTHON'
import json, pathlib, sys
root = pathlib.Path(sys.argv[1])
sbom = json.loads((root / "usr/share/minitron/sbom.spdx.json").read_text())
names = {p["name"]: p.get("versionInfo", "") for p in sbom["packages"]}
ids = [p["SPDXID"] for p in sbom["packages"]]
assert len(ids) == len(set(ids)) and all(i.replace("SPDXRef-", "").replace("-", "").replace(".", "").isalnum() for i in ids), ids
links = {(r["relationshipType"], r["relatedSpdxElement"]) for r in sbom["relationships"]}
for kind, needed in (("DYNAMIC", "libc6"), ("DYNAMIC", "libssl3"), ("DYNAMIC", "libgrpc-plus--plus-1.51"),
                     ("STATIC", "libprotobuf-dev"), ("STATIC", "nlohmann-json3-dev")):
    assert (kind + "_LINK", "SPDXRef-" + needed) in links, (needed, sorted(links))
assert [n for n, v in names.items() if not v] == ["minitron-server"], names
libraries = [p for p in root.rglob("*.so*")]
assert libraries and len(names) > 10
related = {r["relatedSpdxElement"] for r in sbom["relationships"]}
assert set(ids) <= related, set(ids) - related
print(f"image_test: SBOM names {len(names)} packages for {len(libraries)} libraries")
PYTHON
echo "image_test: $(du -sm "$root" | cut -f1) MB unpacked"

mount --bind /proc "$root/proc"  # as every container has it

# It runs, as that user, with a read-only root, and ends with 0.
port=$(/usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
chroot --userspec=65532:65532 "$root" /usr/bin/minitron-server --host=127.0.0.1 --port="$port" --metrics-port=0 \
  --threads=1 --kv-cache-mib=64 --log-format=json 2>"$root/../image_test.log" &
server=$!
for _ in $(seq 200); do
  grep -q '"event":"ready' "$root/../image_test.log" && break
  kill -0 "$server" 2>/dev/null || { cat "$root/../image_test.log" >&2; fail "did not start"; }
  sleep 0.05
done
grep -q '^Uid:.65532' "/proc/$server/status" || fail "runs as another user"
chroot --userspec=65532:65532 "$root" /usr/bin/minitron generate --server "127.0.0.1:$port" "To be or not to be," --max-tokens 8 || fail "no completion"
kill -TERM "$server"
wait "$server" || fail "ended with $?"
server=
rm -f "$root/../image_test.log"
echo "image_test: passed"
