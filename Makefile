# make demo    installs, builds, starts the server with the shipped model and streams a completion
# make test    installs, builds and runs every check
# make serve   runs the server until Ctrl-C and prints its ports
# make bench-scheduling   the scheduler in virtual time and its cost, streams and refusals through gRPC; rewrites their tables
# make cuda-tables   what the CUDA backend's formats cost in quality, emulated; rewrites their tables
# make mutants plants bugs into the scheduler, checks that the simulator finds them, rewrites the table
# make lint    formatting and static analysis      make format  formats the sources
# make bench   measures the CPU engine against the limits of this machine (random weights, below build/bench)
# make bench-peers PEER=DIR   the same engine beside llama.cpp's build in DIR, then both servers (tests/bench/peers/README.md)
# make bench-8b   Minitron-8B's shape on this machine in every weight format: time to ready, memory, speed
# make image   builds the container image (docker, podman or buildah; BASE=debootstrap needs no registry)
# make soak    the long runs of the abuse and restart tests      make test-image  builds, runs and inspects the image
# make test-perf-analyzer   NVIDIA's perf_analyzer and genai-perf against the server; takes 1 GB from PyPI
# make test-page    the page and the load generator's report in a headless browser; screenshots in build/page
# make clean   removes build/
# make gpu-bundle    build/gpu-bundle: all that tests/gpu/run.sh needs on a machine with a GPU and nothing else
# make soak-sim HOURS=1   simulates the scheduler for that long, on JOBS cores
#
# Variables: MODEL=DIR PROMPT=TEXT PORT=N METRICS_PORT=N JOBS=N HOURS=N TARGET=cpu|cuda (of image and test-image)
#            PEER=DIR PEER_FLAGS=... (of bench-peers)

export PATH := $(CURDIR)/build/tools:$(PATH)
JOBS ?= $(shell nproc)
MODEL ?= deploy/models/minitron-tiny
TARGET ?= cpu
HOURS ?= 1
PROMPT ?= To be or not to be,
PORT ?= 50051
METRICS_PORT ?= 9090
SANITIZED_ROOMS ?= engine|scheduler|simulation|server|clients

.PHONY: help bench bench-8b bench-peers bench-scheduling cuda-tables mutants build demo serve test test-release test-asan test-tsan lint format clean soak-sim \
  test-page test-perf-analyzer gpu-bundle image test-image soak deps-build deps-test deps-clients deps-browser deps-perf deps-lint deps-image deps-peers

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

deps-build deps-test deps-clients deps-browser deps-perf deps-lint deps-image deps-peers:
	@deploy/install-deps.sh build $(patsubst deps-%,%,$@)

# The two programs of the product, without the tests.
build: deps-build
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=OFF
	@cmake --build --preset release -j $(JOBS) --target minitron-server minitron

demo: build
	@deploy/demo.sh --model "$(MODEL)" --prompt "$(PROMPT)"

serve: build
	@build/release/bin/minitron-server --model "$(MODEL)" --port $(PORT) --metrics-port $(METRICS_PORT)

# Cheap checks first; the release tests include the integration tests, the sanitizer runs do not.
test: lint test-asan test-tsan test-release

test-release: deps-test deps-clients
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS)
	@ctest --preset release -j $(JOBS)

test-asan: deps-test
	@cmake --preset asan --log-level=WARNING
	@cmake --build --preset asan -j $(JOBS) --target unit-tests
	@ctest --preset asan -j $(JOBS) -L '$(SANITIZED_ROOMS)'

# The simulator has one thread: here it would only be slow.
test-tsan: deps-test
	@cmake --preset tsan --log-level=WARNING
	@cmake --build --preset tsan -j $(JOBS) --target thread-tests
	@ctest --preset tsan -j $(JOBS) -L 'scheduler|simulation|server' -E scheduler_simulation_test

bench-scheduling: deps-test
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS) --target minitron-bench-scheduling minitron-bench-scheduler \
	  minitron-bench-streaming minitron-bench-refusals minitron-server
	@tests/bench/update_readme.py scheduling build/release/bin/minitron-bench-scheduling
	@tests/bench/update_readme.py host build/release/bin/minitron-bench-scheduler
	@tests/bench/update_readme.py streaming build/release/bin/minitron-bench-streaming
	@tests/bench/update_readme.py refusals build/release/bin/minitron-bench-refusals

cuda-tables: deps-test
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS) --target cuda_quality_test quantized_matmul_test
	@tests/bench/update_readme.py --readme engine/cuda/README.md quality build/release/bin/cuda_quality_test
	@tests/bench/update_readme.py --readme engine/cuda/README.md products build/release/bin/quantized_matmul_test

# About ten seconds per bug, most of it compiling.
mutants: deps-test
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS) --target scheduler_simulation_test enumeration_test
	@tests/simulation/planted_bugs.py run --build build/release --table tests/simulation/README.md

lint: deps-lint deps-test
	@cmake --preset lint --log-level=WARNING
	@cmake --build --preset lint -j $(JOBS) --target minitron_proto_headers
	@tests/lint.sh build/lint $(JOBS)

format: deps-lint
	@git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs clang-format -i

# Every core simulates worlds of its own: the seeds are far apart.
soak-sim: deps-test
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS) --target minitron-soak-sim
	@now=$$(date +%s); seq $(JOBS) | xargs -P $(JOBS) -I{} build/release/bin/minitron-soak-sim $(HOURS) $${now}{}00000000

# The tables of tests/bench/README.md. Run it on a quiet machine.
bench: deps-test
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS) --target minitron-bench-engine minitron-make-checkpoint
	@tests/bench/run.sh build/release/bin build/bench

# Takes a quarter of an hour on two cores. PEER_FLAGS: flags of compare.py, for example --target AVX2.
bench-peers: deps-test deps-peers
	@test -n "$(PEER)" || { echo "make bench-peers needs PEER=DIR, a build of llama.cpp: tests/bench/peers/README.md" >&2; exit 2; }
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS) --target minitron-bench-engine minitron-make-checkpoint minitron-server minitron-bench
	@tests/bench/peers/compare.py --peer "$(PEER)" $(PEER_FLAGS)
	@tests/bench/peers/serve.py --peer "$(PEER)"

# Minitron-8B's shape through the real server. Needs 24 GB of memory, 32 GB of disk below build/bench and some minutes.
bench-8b: deps-test
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS) --target minitron-bench-engine minitron-make-checkpoint minitron-server minitron
	@tests/bench/peers/large.py

# Needs the CUDA toolkit here, and there only a driver and the toolkit's cublasLt.
gpu-bundle: deps-test
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON -DMINITRON_CUDA=ON
	@cmake --build --preset release -j $(JOBS) --target gpu-tests minitron-server minitron
	@tests/gpu/make_bundle.sh build/release build/gpu-bundle

image:
	@deploy/image/build.sh $(TARGET)

test-image: deps-image
	@tests/deploy/image_test.sh $(TARGET)

# The bounded runs of `make test`, at full length: 100k connections reset, 10^6 calls reset, minutes of floods, 200 rolling
# restarts: three quarters of an hour; and HOURS of cancelled calls.
soak: deps-test
	@cmake --preset release --log-level=WARNING -DMINITRON_TESTS=ON
	@cmake --build --preset release -j $(JOBS) --target minitron-server
	@for test in transport edge; do SOAK=1 HOURS=$(HOURS) MINITRON_TEST_SERVER=build/release/bin/minitron-server /usr/bin/python3 -W ignore tests/deploy/$${test}_test.py -v || exit 1; done

# Needs a browser, which the other tests do not.
test-page: deps-browser build
	@cmake --build --preset release -j $(JOBS) --target minitron-bench
	@cd tests/integration/python && MINITRON_TEST_SERVER=$(CURDIR)/build/release/bin/minitron-server MINITRON_TEST_BENCH=$(CURDIR)/build/release/bin/minitron-bench $(CURDIR)/build/venv-browser/bin/python -B page_test.py

# Not part of `make test`: it installs a gigabyte.
test-perf-analyzer: deps-clients deps-perf build
	@cd tests/integration/python && MINITRON_TEST_SERVER=$(CURDIR)/build/release/bin/minitron-server $(CURDIR)/build/venv/bin/python -B perf_analyzer_test.py

clean:
	@rm -rf build
