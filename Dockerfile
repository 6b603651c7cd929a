# minitron-server as an image: `make image` (docker, podman or buildah). Targets: cpu (default), cuda.
#
# The result has no distribution and no shell: the program, the libraries it loads, the small model, licences and an SBOM
# (/usr/share/minitron/sbom.spdx.json). Runs as 65532, needs no writable file system, asks health by native gRPC probe.
ARG BASE=docker.io/library/debian:bookworm-slim
ARG CUDA_BASE=docker.io/nvidia/cuda:12.6.3-devel-ubuntu24.04

FROM ${BASE} AS build
# Only when a cache is mounted there (CCACHE_MOUNT of deploy/image/build.sh) does it outlive the build.
ENV CCACHE_DIR=/ccache CCACHE_BASEDIR=/src CCACHE_NOHASHDIR=1
COPY deploy/install-deps.sh /src/deploy/install-deps.sh
RUN apt-get update -qq && /src/deploy/install-deps.sh build
COPY . /src
WORKDIR /src
RUN cmake --preset release --log-level=WARNING -DMINITRON_TESTS=OFF -DMINITRON_CUDA=OFF \
 && cmake --build --preset release --target minitron-server minitron \
 && deploy/image/assemble.sh build/release/bin /rootfs

FROM ${CUDA_BASE} AS build-cuda
# Fewer architectures build faster, for one kind of GPU: CUDA_ARCHS=90.
ARG CUDA_ARCHS
ENV CCACHE_DIR=/ccache CCACHE_BASEDIR=/src CCACHE_NOHASHDIR=1
COPY deploy/install-deps.sh /src/deploy/install-deps.sh
RUN apt-get update -qq && /src/deploy/install-deps.sh build
COPY . /src
WORKDIR /src
RUN cmake --preset release --log-level=WARNING -DMINITRON_TESTS=OFF -DMINITRON_CUDA=ON ${CUDA_ARCHS:+"-DMINITRON_CUDA_ARCHS=$CUDA_ARCHS"} \
 && cmake --build --preset release --target minitron-server minitron \
 && deploy/image/assemble.sh build/release/bin /rootfs /usr/local/cuda/lib64/libcublasLt.so.[0-9][0-9]

# What both images are, but for their files.
FROM scratch AS image
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="minitron-server" \
      org.opencontainers.image.description="gRPC inference server for Nemotron-architecture language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 65532:65532
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/minitron-server"]

FROM image AS cuda
COPY --from=build-cuda /rootfs /
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM image AS cpu
COPY --from=build /rootfs /
