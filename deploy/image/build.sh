#!/usr/bin/env bash
# Builds the image with what is there: docker, podman or buildah. Usage: build.sh [cpu|cuda]
#
# BASE=debootstrap makes the Debian base from the distribution's mirror instead of pulling it: no registry is needed
# (buildah and root only). CCACHE_MOUNT=DIR lets the build use a compiler cache (buildah). The tag is localhost/minitron-server:TARGET.
# The cuda target takes NVIDIA's image with the toolkit (CUDA_BASE of the Dockerfile); with BASE=debootstrap it takes the toolkit of
# this machine (CUDA_ROOT, by default /usr/local/cuda). CUDA_ARCHS="90" builds for fewer architectures.
set -euo pipefail

target=${1:-cpu}
cd "$(dirname "$0")/../.."
tag=localhost/minitron-server:$target
base=${BASE:-docker.io/library/debian:bookworm-slim}
arguments=(--target "$target" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" --tag "$tag")
[ -z "${CUDA_ARCHS:-}" ] || arguments+=(--build-arg "CUDA_ARCHS=$CUDA_ARCHS")

if [ "$base" = debootstrap ]; then
  base=localhost/debian:bookworm-minbase
  export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
  if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    echo "image: making $base with debootstrap"
    container=$(buildah from scratch)
    root=$(buildah mount "$container")
    debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >/dev/null
    # The package sources of this machine: it may use a mirror, and the base must have the security updates.
    cp /etc/apt/sources.list "$root/etc/apt/" 2>/dev/null || :
    cp -r /etc/apt/sources.list.d/. "$root/etc/apt/sources.list.d/" 2>/dev/null || :
    cp /etc/apt/apt.conf.d/*proxy* "$root/etc/apt/apt.conf.d/" 2>/dev/null || :
    buildah umount "$container" >/dev/null
    buildah commit -q "$container" "$base" >/dev/null
    buildah rm "$container" >/dev/null
  fi
  if [ "$target" = cuda ]; then
    arguments+=(--build-arg "CUDA_BASE=$base" --volume "$(readlink -f "${CUDA_ROOT:-/usr/local/cuda}"):/usr/local/cuda:ro")
  fi
  [ -z "${CCACHE_MOUNT:-}" ] || arguments+=(--volume "$CCACHE_MOUNT:/ccache")
  exec buildah bud --pull-never --build-arg "BASE=$base" "${arguments[@]}" .
fi
for tool in docker podman; do
  if command -v $tool >/dev/null; then exec $tool build --build-arg "BASE=$base" "${arguments[@]}" .; fi
done
exec buildah bud --build-arg "BASE=$base" "${arguments[@]}" .
