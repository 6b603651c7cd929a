// What the benchmarks of single kernels share: shapes, a device, operands, the clock.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cuda/cublaslt_matmul.h"
#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/matmul.h"
#include "tests/gpu/stream_kernels.h"

namespace minitron::gpu {

using namespace engine::cuda;  // NOLINT: programs about this room

inline double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The 8B's shapes, or the smallest that all kernels take.
struct Shapes {
  int hidden = 4096, inner = 16384, vocab = 256000, kv_heads = 8, group = 6, head_dim = 128;
  std::vector<int> batches = {1, 4, 8, 16, 32, 64, 128, 256};
  std::vector<int> product_rows = {1, 4, 8, 16, 32, 64, 128, 256, 2048};  // the last: a step full of prompts
  std::vector<int> contexts = {512, 2048, 4096};
  std::vector<int> prompts = {512, 2048};
  int64_t ceiling_bytes = int64_t{2} << 30;
  int gemm = 8192;
  int64_t cold_bytes = 256 << 20;  // operands rotate over more than the second-level cache holds
  int launches = 20, replays = 5;
  int most_launches = 400;
  double replay_s = 1.5e-3;  // so long that what it takes to start a replay and to wait for it does not count
  int query_width() const { return kv_heads * group * head_dim; }
};
inline Shapes TinyShapes() {
  return {.hidden = 64,
          .inner = 128,
          .vocab = 300,
          .kv_heads = 1,
          .group = 2,
          .head_dim = 64,
          .batches = {1, 2},
          .product_rows = {1, 2},
          .contexts = {40},
          .prompts = {24},
          .ceiling_bytes = 1 << 12,
          .gemm = 16,
          .cold_bytes = 0,
          .launches = 2,
          .replays = 1,
          .most_launches = 2};
}

// Dies with a message: a benchmark has nobody to return an error to.
inline void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "minitron-gpu-bench: %s\n", status.ToString().c_str());
  std::exit(1);
}
template <typename T>
T Must(absl::StatusOr<T> value) {
  Must(value.status());
  return *std::move(value);
}
inline void Must(cudaError_t error) { Must(ToStatus(error, "benchmark")); }

// One kernel at one shape; what a profiler is put on.
struct Only {
  std::string name;
  int rows = 0, context = 0;
};

class Bench {
 public:
  // `only`: nothing else is run, and that three times, without a graph. Empty name: everything is timed.
  explicit Bench(bool tiny, Only only = {})
      : shapes(tiny ? TinyShapes() : Shapes()),
        device(Must(OpenDevice())),
        only_(std::move(only)),
        stream_(Must(CreateStream())) {
    for (auto* matmul : {&matmul_, &free_matmul_, &first_matmul_}) {
#if defined(MINITRON_CUDA_EMULATION)
      *matmul = CreateReferenceMatMul();
#else
      *matmul = Must(CreateCublasLtMatMul({.batch_invariant = matmul == &matmul_, .tuning_file = {}}));
#endif
    }
  }

  bool Wants(const std::string& name, int rows, int context = 0) const {
    return only_.name.empty() || (only_.name == name && only_.rows == rows && only_.context == context);
  }

  // One algorithm per shape, whatever the number of rows.
  MatMul& matmul() { return *matmul_; }
  // The fastest for each number of rows.
  MatMul& free_matmul() { return *free_matmul_; }
  // The library's own first guess for each number of rows; after FirstChoice.
  MatMul& first_matmul() { return *first_matmul_; }

  // Has a product take its first candidate: while a stream captures, none can be timed. What was captured is dropped.
  void FirstChoice(const std::function<cudaError_t(int, cudaStream_t)>& launch) {
    Must(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
    const cudaError_t ignored = launch(0, stream_.get());  // that a kernel may not be loaded meanwhile is no matter
    cudaGraph_t captured = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream_.get(), &captured);
    const Graph graph(captured);
    if (ignored != cudaSuccess || ended != cudaSuccess) cudaGetLastError();
  }

  // Device memory with varied, finite contents: zeros cost less power and would look faster.
  template <typename T>
  DeviceBuffer<T> Make(int64_t count, const std::function<T(int64_t)>& value) {
    DeviceBuffer<T> buffer = Must(DeviceBuffer<T>::Allocate(count));
    const int64_t most = std::min<int64_t>(count, 1 << 20);
    std::vector<T> values(most);
    for (int64_t i = 0; i < most; ++i) values[i] = value(i);
    for (int64_t first = 0; first < count; first += most) {
      Must(cudaMemcpyAsync(buffer.data() + first, values.data(), std::min(most, count - first) * sizeof(T),
                           cudaMemcpyHostToDevice, stream_.get()));
    }
    Must(cudaStreamSynchronize(stream_.get()));
    return buffer;
  }
  DeviceBuffer<Bf16> MakeBf16(int64_t count) {
    DeviceBuffer<Bf16> buffer = Must(DeviceBuffer<Bf16>::Allocate(count));
    Must(FillRandom(++seed_, count, 1.0f, buffer.data(), stream_.get()));
    return buffer;
  }
  DeviceBuffer<unsigned char> MakeBytes(int64_t count) {
    return Make<unsigned char>(count, [](int64_t i) { return static_cast<unsigned char>(i * 37 % 113); });
  }

  // Seconds of one call: some are recorded together and replayed, so that launching costs nothing; the median replay.
  // `launch` gets a running number to rotate operands with.
  double Time(const std::function<cudaError_t(int, cudaStream_t)>& launch) {
    Must(launch(0, stream_.get()));  // settles what is settled on first use
    Must(cudaStreamSynchronize(stream_.get()));
    if (!only_.name.empty()) {
      for (int i = 1; i < 3; ++i) Must(launch(i, stream_.get()));
      Must(cudaStreamSynchronize(stream_.get()));
      return 0.0;
    }
    const double seconds = TimeReplays(launch, shapes.launches);
    const int launches = std::min(shapes.most_launches, static_cast<int>(std::ceil(shapes.replay_s / seconds)));
    return launches <= shapes.launches ? seconds : TimeReplays(launch, launches);
  }

  // How many operands of a size to rotate over.
  int Copies(int64_t num_bytes) const {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(shapes.launches, shapes.cold_bytes / num_bytes)));
  }

  void Print(const std::string& name, int rows, int context, double seconds, double bytes, double operations) {
    ++num_printed_;
    std::printf("{\"kind\": \"kernel\", \"name\": \"%s\", \"rows\": %d, ", name.c_str(), rows);
    if (context > 0) std::printf("\"context\": %d, ", context);
    std::printf("\"us\": %.3f, \"bytes\": %.0f, \"flop\": %.0f}\n", seconds * 1e6, bytes, operations);
    std::fflush(stdout);
  }

  int num_printed() const { return num_printed_; }

  const Shapes shapes;
  const DeviceInfo device;

 private:
  double TimeReplays(const std::function<cudaError_t(int, cudaStream_t)>& launch, int launches) {
    Must(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) Must(launch(i, stream_.get()));
    cudaGraph_t captured = nullptr;
    Must(cudaStreamEndCapture(stream_.get(), &captured));
    const Graph graph(captured);
    cudaGraphExec_t executable = nullptr;
    Must(cudaGraphInstantiate(&executable, captured, 0));
    const GraphExec exec(executable);
    std::vector<double> times;
    for (int replay = 0; replay <= shapes.replays; ++replay) {
      const double begin = Now();
      Must(cudaGraphLaunch(exec.get(), stream_.get()));
      Must(cudaStreamSynchronize(stream_.get()));
      if (replay > 0 || shapes.replays == 1) times.push_back((Now() - begin) / launches);
    }
    std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
    return times[times.size() / 2];
  }

  const Only only_;
  std::unique_ptr<MatMul> matmul_, free_matmul_, first_matmul_;
  uint64_t seed_ = 0;
  int num_printed_ = 0;
  Stream stream_;
};

}  // namespace minitron::gpu
