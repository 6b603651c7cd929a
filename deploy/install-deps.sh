#!/usr/bin/env bash
# Installs what the project needs from the distribution (Debian 12, Ubuntu 24.04). Idempotent, asks nothing, and does
# not touch the package manager when everything is there.
#
# Usage: deploy/install-deps.sh [build] [test] [clients] [image] [browser] [perf] [peers] [lint] [golden]     (default: build)
#   build   compilers and libraries for the server and the clients
#   test    GoogleTest, Google Benchmark, Prometheus, promtool and HAProxy (in build/tools), Python with gRPC and YAML
#   clients the foreign clients of the integration tests, from PyPI, and clients/python, into build/venv
#   image   buildah and debootstrap, to build the image without a registry
#   browser Chromium and its driver from PyPI (build/venv-browser), to test the page as a person sees it
#   perf    NVIDIA's perf_analyzer and genai-perf from PyPI (build/venv-perf)
#   peers   the writer of llama.cpp's files from PyPI (build/venv-peers), for tests/bench/peers
#   lint    clang-format and clang-tidy
#   golden  PyTorch, only to make the golden files anew (tests/engine/goldens)
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
tools=$top/build/tools # promtool, prometheus and haproxy land here

build_packages=(
  build-essential cmake ninja-build pkg-config ccache git ca-certificates
  libgrpc++-dev libgrpc-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev
  prometheus-cpp-dev libcivetweb-dev libcurl4-openssl-dev zlib1g-dev libhwy-dev nlohmann-json3-dev libsentencepiece-dev
  libedit-dev
)
test_packages=(libgtest-dev libgmock-dev libbenchmark-dev python3 python3-grpcio python3-protobuf python3-yaml curl binutils openssl)
clients_packages=(python3 python3-venv)
image_packages=(buildah debootstrap crun)
browser_packages=(chromium fonts-dejavu-core python3 python3-venv)
perf_packages=(libb64-0d python3 python3-venv)
peers_packages=(python3 python3-venv)
lint_packages=(clang-format clang-tidy)
golden_packages=(python3 python3-venv python3-torch)

packages=()
want_services=no
venvs=()
for group in "${@:-build}"; do
  case $group in
    build) packages+=("${build_packages[@]}") ;;
    test) packages+=("${test_packages[@]}") want_services=yes ;;
    clients) packages+=("${clients_packages[@]}") venvs+=(clients) ;;
    image) packages+=("${image_packages[@]}") ;;
    browser) packages+=("${browser_packages[@]}") venvs+=(browser) ;;
    perf) packages+=("${perf_packages[@]}") venvs+=(perf) ;;
    peers) packages+=("${peers_packages[@]}") venvs+=(peers) ;;
    lint) packages+=("${lint_packages[@]}") ;;
    golden) packages+=("${golden_packages[@]}") ;;
    *)
      echo "install-deps: unknown group '$group' (build, test, clients, image, browser, perf, peers, lint, golden)" >&2
      exit 2
      ;;
  esac
done

as_root() {
  if [ "$(id -u)" = 0 ]; then
    env DEBIAN_FRONTEND=noninteractive "$@"
  else
    sudo -n true 2>/dev/null || echo "install-deps: needs root to install: ${missing[*]:-packages}" >&2
    sudo env DEBIAN_FRONTEND=noninteractive "$@"
  fi
}

updated=no
update_once() {
  [ $updated = yes ] || as_root apt-get update -qq
  updated=yes
}

command -v apt-get >/dev/null || {
  echo "install-deps: needs a Debian or Ubuntu system (apt-get); elsewhere install the packages listed in $0" >&2
  exit 1
}

install_packages() {
  local package
  missing=()
  for package in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  echo "install-deps: installing ${missing[*]}"
  update_once
  as_root apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" >/dev/null
}

# Programs of packages that would also start a service on this machine and enable it for ever: the programs alone, and the
# libraries that they lack.
fetch_programs() { # PACKAGE PATH...
  local package=$1 unpack path there=yes
  shift
  for path in "$@"; do [ -x "$tools/$(basename "$path")" ] || there=no; done
  [ $there = no ] || return 0
  echo "install-deps: fetching $* of $package"
  update_once
  mkdir -p "$tools"
  unpack=$(mktemp -d)
  (cd "$unpack" && apt-get download -qq "$package" 2>/dev/null && dpkg-deb -x "$package"_*.deb .)
  for path in "$@"; do install -m 755 "$unpack$path" "$tools/"; done
  rm -rf "$unpack"
  if ldd "${@/#*\//$tools/}" 2>&1 | grep -q 'not found'; then
    mapfile -t libraries < <(apt-cache depends --important "$package" | sed -n 's/^  Depends: \(lib[^ ]*\)$/\1/p')
    install_packages "${libraries[@]}"
  fi
}

[ ${#packages[@]} -eq 0 ] || install_packages "${packages[@]}"
if [ $want_services = yes ]; then
  fetch_programs prometheus /usr/bin/promtool /usr/bin/prometheus
  fetch_programs haproxy /usr/sbin/haproxy
fi

# Versions are pinned, and the mark keeps the file they came from: a second run does nothing.
for name in "${venvs[@]}"; do
  case $name in
    clients) requirements=$top/tests/integration/python/requirements.txt venv=$top/build/venv ;;
    browser) requirements=$top/tests/integration/python/requirements-browser.txt venv=$top/build/venv-browser ;;
    perf) requirements=$top/tests/integration/python/requirements-perf.txt venv=$top/build/venv-perf ;;
    peers) requirements=$top/tests/bench/peers/requirements.txt venv=$top/build/venv-peers ;;
  esac
  cmp -s "$requirements" "$venv/installed.txt" && continue
  echo "install-deps: installing $(basename "$requirements") into build/$(basename "$venv")"
  rm -rf "$venv"
  /usr/bin/python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
  cp "$requirements" "$venv/installed.txt"
done

# The Python client, built from a copy so that the tree stays clean; again when one of its files has changed.
for name in "${venvs[@]}"; do
  [ "$name" = clients ] || continue
  sum=$(cd "$top" && find clients/python proto/minitron -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
  [ "$sum" = "$(cat "$top/build/venv/minitron_client.sum" 2>/dev/null)" ] && continue
  echo "install-deps: installing clients/python into build/venv"
  copy=$(mktemp -d)
  mkdir "$copy/clients"
  cp -r "$top/proto" "$copy/"
  cp -r "$top/clients/python" "$copy/clients/"
  rm -rf "$copy/clients/python/build"
  "$top/build/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall \
    "$copy/clients/python"
  rm -rf "$copy"
  echo "$sum" >"$top/build/venv/minitron_client.sum"
done
