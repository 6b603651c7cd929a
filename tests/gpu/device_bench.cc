#include "tests/gpu/device_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/base/check.h"
#include "engine/cuda/cublaslt_matmul.h"
#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/matmul.h"
#include "engine/cuda/quantized_weights.h"
#include "tests/gpu/stream_kernels.h"

namespace minitron::gpu {
namespace {

using namespace engine::cuda;  // NOLINT: a program about this room

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The 8B's shapes, or the smallest that all kernels take.
struct Shapes {
  int hidden = 4096, inner = 16384, vocab = 256000, kv_heads = 8, group = 6, head_dim = 128;
  std::vector<int> batches = {1, 4, 8, 16, 32, 64, 128, 256};
  std::vector<int> contexts = {512, 2048, 4096};
  std::vector<int> prompts = {512, 2048};
  int64_t ceiling_bytes = int64_t{2} << 30;
  int gemm = 8192;
  int64_t cold_bytes = 256 << 20;  // operands rotate over more than the second-level cache holds
  int launches = 20, replays = 5;
  int query_width() const { return kv_heads * group * head_dim; }
};
Shapes TinyShapes() {
  return {.hidden = 64,
          .inner = 128,
          .vocab = 300,
          .kv_heads = 1,
          .group = 2,
          .head_dim = 64,
          .batches = {1, 2},
          .contexts = {40},
          .prompts = {24},
          .ceiling_bytes = 1 << 12,
          .gemm = 16,
          .cold_bytes = 0,
          .launches = 2,
          .replays = 1};
}

// Dies with a message: a benchmark has nobody to return an error to.
void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "minitron-gpu-bench: %s\n", status.ToString().c_str());
  std::exit(1);
}
template <typename T>
T Must(absl::StatusOr<T> value) {
  Must(value.status());
  return *std::move(value);
}
void Must(cudaError_t error) { Must(ToStatus(error, "benchmark")); }

class Bench {
 public:
  explicit Bench(bool tiny)
      : shapes(tiny ? TinyShapes() : Shapes()), device(Must(OpenDevice())), stream_(Must(CreateStream())) {
#if defined(MINITRON_CUDA_EMULATION)
    matmul = CreateReferenceMatMul();
    free_matmul = CreateReferenceMatMul();
#else
    matmul = Must(CreateCublasLtMatMul({}));
    free_matmul = Must(CreateCublasLtMatMul({.batch_invariant = false, .tuning_file = {}}));
#endif
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
    return Make<Bf16>(count, [](int64_t i) {  // magnitudes around one half, either sign
      const auto hash = static_cast<uint32_t>(i * 2654435761u);
      return Bf16{static_cast<uint16_t>((hash >> 16 & 0x8000u) | 0x3E80u | (hash >> 8 & 0xFFu))};
    });
  }
  DeviceBuffer<unsigned char> MakeBytes(int64_t count) {
    return Make<unsigned char>(count, [](int64_t i) { return static_cast<unsigned char>(i * 37 % 113); });
  }

  // Seconds of one call: some are recorded together and replayed, so that launching costs nothing; the median replay.
  // `launch` gets a running number to rotate operands with.
  double Time(const std::function<cudaError_t(int, cudaStream_t)>& launch) {
    Must(launch(0, stream_.get()));  // settles what is settled on first use
    Must(cudaStreamSynchronize(stream_.get()));
    Must(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < shapes.launches; ++i) Must(launch(i, stream_.get()));
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
      if (replay > 0 || shapes.replays == 1) times.push_back((Now() - begin) / shapes.launches);
    }
    std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
    return times[times.size() / 2];
  }

  // How many operands of a size to rotate over.
  int Copies(int64_t num_bytes) const {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(shapes.launches, shapes.cold_bytes / num_bytes)));
  }

  void Print(const std::string& name, int rows, int context, double seconds, double bytes, double operations) const {
    std::printf("{\"kind\": \"kernel\", \"name\": \"%s\", \"rows\": %d, ", name.c_str(), rows);
    if (context > 0) std::printf("\"context\": %d, ", context);
    std::printf("\"us\": %.3f, \"bytes\": %.0f, \"flop\": %.0f}\n", seconds * 1e6, bytes, operations);
    std::fflush(stdout);
  }

  const Shapes shapes;
  const DeviceInfo device;
  std::unique_ptr<MatMul> matmul;       // one algorithm per shape, whatever the number of rows
  std::unique_ptr<MatMul> free_matmul;  // the fastest for each number of rows

 private:
  Stream stream_;
};

// --- Products. ---

void TimeMatMul(Bench& bench, const std::string& name, int outs, int depth, Store store) {
  const int64_t bytes = int64_t{2} * outs * depth;
  const int copies = bench.Copies(bytes);
  const auto weights = bench.MakeBf16(int64_t{outs} * depth * copies);
  const int most = bench.shapes.batches.back();
  const auto x = bench.MakeBf16(int64_t{most} * depth);
  auto out = Must(DeviceBuffer<Bf16>::Allocate(int64_t{most} * outs));
  // What batch invariance costs: with it, one algorithm serves every number of rows, chosen at a full step as the
  // runner does, which is why the largest comes first.
  for (const bool invariant : {true, false}) {
    MatMul& matmul = invariant ? *bench.matmul : *bench.free_matmul;
    for (auto rows = bench.shapes.batches.rbegin(); rows != bench.shapes.batches.rend(); ++rows) {
      const double seconds = bench.Time([&](int i, cudaStream_t stream) {
        const Bf16* w = weights.data() + int64_t{outs} * depth * (i % copies);
        const absl::Status status = matmul.Run(x.data(), w, *rows, outs, depth, store, out.data(), stream);
        return status.ok() ? cudaSuccess : cudaErrorUnknown;
      });
      bench.Print(name + (invariant ? " bf16" : " bf16, free choice"), *rows, 0, seconds,
                  static_cast<double>(bytes) + 2.0 * *rows * ((store == Store::kAdd ? 2 : 1) * outs + depth),
                  2.0 * *rows * outs * depth);
    }
  }
}

void TimeQuantized(Bench& bench, const std::string& name, int outs, int depth) {
  for (const auto& [format, format_name] :
       {std::pair{WeightFormat::kInt8, "int8"}, {WeightFormat::kInt4, "int4"}, {WeightFormat::kE4m3, "fp8"}}) {
    const int64_t bytes = NumTiles(outs) * TileBytes(format, depth);
    const int copies = bench.Copies(bytes);
    const auto tiles = bench.MakeBytes(bytes * copies);
    const int most = bench.shapes.batches.back();
    const auto x = bench.MakeBf16(int64_t{most} * depth);
    auto out = Must(DeviceBuffer<Bf16>::Allocate(int64_t{most} * outs));
    for (const int rows : bench.shapes.batches) {
      const double seconds = bench.Time([&, format = format](int i, cudaStream_t stream) {
        return QuantizedMatMul(format, x.data(), tiles.data() + bytes * (i % copies), rows, outs, depth,
                               Store::kReplace, out.data(), stream);
      });
      bench.Print(name + " " + format_name, rows, 0, seconds, static_cast<double>(bytes) + 2.0 * rows * (outs + depth),
                  2.0 * rows * outs * depth);
    }
  }
}

// --- Attention. ---

// A cache of `rows` sequences of `context` tokens, blocks in order.
struct AttentionScene {
  static constexpr int kShift = 5;
  AttentionScene(Bench& bench, int rows, int context, bool is_fp8) : fp8(is_fp8) {
    const Shapes& s = bench.shapes;
    const int blocks = (context + (1 << kShift) - 1) >> kShift;
    const int64_t cache_rows = int64_t{rows} * blocks * (1 << kShift) * s.kv_heads;
    if (fp8) {
      codes[0] = bench.MakeBytes(cache_rows * s.head_dim);
      codes[1] = bench.MakeBytes(cache_rows * s.head_dim);
      exponents[0] = bench.Make<int8_t>(cache_rows, [](int64_t i) { return static_cast<int8_t>(i % 3 - 8); });
      exponents[1] = bench.Make<int8_t>(cache_rows, [](int64_t i) { return static_cast<int8_t>(i % 5 - 9); });
    } else {
      keys = bench.MakeBf16(cache_rows * s.head_dim);
      values = bench.MakeBf16(cache_rows * s.head_dim);
    }
    block_ids = bench.Make<int32_t>(int64_t{rows} * blocks, [](int64_t i) { return static_cast<int32_t>(i); });
    block_start = bench.Make<int32_t>(rows + 1, [blocks](int64_t i) { return static_cast<int32_t>(i * blocks); });
  }
  AttentionParams Params(const Shapes& s, const Bf16* q, Bf16* out) const {
    KvCacheView cache{keys.data(), values.data(), s.kv_heads, kShift, {}};
    if (fp8) {
      cache = {nullptr,
               nullptr,
               s.kv_heads,
               kShift,
               {codes[0].data(), codes[1].data(), exponents[0].data(), exponents[1].data()}};
    }
    return {q,
            out,
            cache,
            block_ids.data(),
            block_start.data(),
            s.group,
            s.head_dim,
            s.query_width(),
            1.44269504f / std::sqrt(static_cast<float>(s.head_dim))};
  }
  bool fp8;
  DeviceBuffer<Bf16> keys, values;
  DeviceBuffer<unsigned char> codes[2];
  DeviceBuffer<int8_t> exponents[2];
  DeviceBuffer<int32_t> block_ids, block_start;
};

void TimeDecode(Bench& bench, int rows, int context, bool fp8) {
  const Shapes& s = bench.shapes;
  const AttentionScene scene(bench, rows, context, fp8);
  const auto q = bench.MakeBf16(int64_t{rows} * s.query_width());
  auto out = Must(DeviceBuffer<Bf16>::Allocate(int64_t{rows} * s.query_width()));
  const int chunks = (context + kChunkKeys - 1) / kChunkKeys;
  const auto items = bench.Make<DecodeItem>(int64_t{rows} * chunks, [&](int64_t i) {
    const auto row = static_cast<int32_t>(i / chunks);
    return DecodeItem{row, row, context, static_cast<int32_t>(i % chunks)};
  });
  const auto merges = bench.Make<MergeRow>(rows, [&](int64_t i) {
    return MergeRow{static_cast<int32_t>(i), static_cast<int32_t>(i) * chunks, chunks, 0};
  });
  const int num_merges = chunks > 1 ? rows : 0;
  const auto counts = bench.Make<DecodeCounts>(1, [&](int64_t) { return DecodeCounts{rows * chunks, num_merges}; });
  auto partials = Must(DeviceBuffer<float>::Allocate(rows * chunks * PartialFloats(s.kv_heads, s.head_dim)));
  const AttentionParams params = scene.Params(s, q.data(), out.data());
  const int blocks = std::min(rows * chunks, 12 * bench.device.num_processors);
  const double seconds = bench.Time([&](int, cudaStream_t stream) {
    return DecodeAttention(params, items.data(), merges.data(), counts.data(), partials.data(), blocks, num_merges,
                           stream);
  });
  const double row_bytes = fp8 ? s.head_dim + 1.0 : 2.0 * s.head_dim;
  bench.Print(fp8 ? "decode attention fp8" : "decode attention bf16", rows, context, seconds,
              2.0 * rows * context * s.kv_heads * row_bytes, 4.0 * rows * context * s.query_width());
}

void TimePrefill(Bench& bench, int prompt, bool fp8) {
  const Shapes& s = bench.shapes;
  const AttentionScene scene(bench, 1, prompt, fp8);
  const auto q = bench.MakeBf16(int64_t{prompt} * s.query_width());
  auto out = Must(DeviceBuffer<Bf16>::Allocate(int64_t{prompt} * s.query_width()));
  const int tile_rows = PrefillRows(s.group), num_tiles = (prompt + tile_rows - 1) / tile_rows;
  const auto tiles = bench.Make<PrefillTile>(num_tiles, [&](int64_t i) {
    const auto first = static_cast<int32_t>(i) * tile_rows;
    return PrefillTile{first, std::min(tile_rows, prompt - first), 0, first};
  });
  const AttentionParams params = scene.Params(s, q.data(), out.data());
  const double seconds =
      bench.Time([&](int, cudaStream_t stream) { return PrefillAttention(params, tiles.data(), num_tiles, stream); });
  bench.Print(fp8 ? "prefill attention fp8" : "prefill attention bf16", prompt, prompt, seconds,
              4.0 * prompt * s.query_width(), 2.0 * prompt * prompt * s.query_width());
}

// --- Rows. ---

void TimeRows(Bench& bench) {
  const Shapes& s = bench.shapes;
  const int most = bench.shapes.batches.back();
  auto x = bench.MakeBf16(int64_t{most} * s.inner);
  auto residual = bench.MakeBf16(int64_t{most} * s.hidden), out = bench.MakeBf16(int64_t{most} * s.hidden);
  const auto ones = bench.Make<float>(s.hidden, [](int64_t) { return 0.1f; });
  for (const int rows : s.batches) {
    const double norm = bench.Time([&](int, cudaStream_t stream) {
      return LayerNorm1p(residual.data(), ones.data(), ones.data(), 1e-5f, rows, s.hidden, out.data(), stream);
    });
    bench.Print("norm", rows, 0, norm, 4.0 * rows * s.hidden, 0.0);
    const double activation =
        bench.Time([&](int, cudaStream_t stream) { return SquaredRelu(x.data(), int64_t{rows} * s.inner, stream); });
    bench.Print("squared relu", rows, 0, activation, 4.0 * rows * s.inner, 0.0);
  }
}

}  // namespace

int Ceilings(bool tiny) {
  Bench bench(tiny);
  const int64_t bytes = bench.shapes.ceiling_bytes;
  const auto from = bench.MakeBytes(bytes);
  auto to = Must(DeviceBuffer<unsigned char>::Allocate(bytes));
  auto result = Must(DeviceBuffer<uint32_t>::Allocate(1));
  const double copy = bench.Time([&](int, cudaStream_t stream) {
    return cudaMemcpyAsync(to.data(), from.data(), static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream);
  });
  std::printf("{\"kind\": \"ceiling\", \"name\": \"copy\", \"gb_per_s\": %.3f}\n",
              2e-9 * static_cast<double>(bytes) / copy);
  const double read = bench.Time([&](int, cudaStream_t stream) {
    return ReadAll(from.data(), bytes, result.data(), 8 * bench.device.num_processors, stream);
  });
  std::printf("{\"kind\": \"ceiling\", \"name\": \"read\", \"gb_per_s\": %.3f}\n",
              1e-9 * static_cast<double>(bytes) / read);
  const int n = bench.shapes.gemm;
  const auto x = bench.MakeBf16(int64_t{n} * n), w = bench.MakeBf16(int64_t{n} * n);
  auto out = Must(DeviceBuffer<Bf16>::Allocate(int64_t{n} * n));
  const double product = bench.Time([&](int, cudaStream_t stream) {
    return bench.matmul->Run(x.data(), w.data(), n, n, n, Store::kReplace, out.data(), stream).ok() ? cudaSuccess
                                                                                                    : cudaErrorUnknown;
  });
  std::printf("{\"kind\": \"ceiling\", \"name\": \"bf16 GEMM\", \"tflops\": %.3f}\n", 2e-12 * n * n * n / product);
  return 0;
}

int Roofline(bool tiny) {
  Bench bench(tiny);
  const Shapes& s = bench.shapes;
  TimeMatMul(bench, "qkv", s.query_width() + 2 * s.kv_heads * s.head_dim, s.hidden, Store::kReplace);
  TimeMatMul(bench, "o", s.hidden, s.query_width(), Store::kAdd);  // to the residual, as fc2
  TimeMatMul(bench, "fc1", s.inner, s.hidden, Store::kReplace);
  TimeMatMul(bench, "fc2", s.hidden, s.inner, Store::kAdd);
  TimeMatMul(bench, "head", s.vocab, s.hidden, Store::kReplace);
  TimeQuantized(bench, "o", s.hidden, s.query_width());
  TimeQuantized(bench, "fc1", s.inner, s.hidden);
  TimeQuantized(bench, "fc2", s.hidden, s.inner);
  for (const bool fp8 : {false, true}) {
    for (const int context : s.contexts) {
      for (const int rows : s.batches) {
        if (int64_t{rows} * context <= 256 << 10) TimeDecode(bench, rows, context, fp8);
      }
    }
    for (const int prompt : s.prompts) TimePrefill(bench, prompt, fp8);
  }
  TimeRows(bench);
  return 0;
}

}  // namespace minitron::gpu
