#include "tests/gpu/device_bench.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "engine/cuda/kernels.h"
#include "engine/cuda/quantized_weights.h"
#include "tests/gpu/bench.h"
#include "tests/gpu/stream_kernels.h"

namespace minitron::gpu {
namespace {

// --- Products. ---

void TimeMatMul(Bench& bench, const std::string& name, int outs, int depth, Store store) {
  const int64_t bytes = int64_t{2} * outs * depth;
  const int copies = bench.Copies(bytes);
  const auto weights = bench.MakeBf16(int64_t{outs} * depth * copies);
  const int most = bench.shapes.product_rows.back();
  const auto x = bench.MakeBf16(int64_t{most} * depth);
  auto out = Must(DeviceBuffer<Bf16>::Allocate(int64_t{most} * outs));
  struct Choice {
    const char* suffix;
    MatMul& matmul;
    bool first;
  };
  // What batch invariance costs: with it, one algorithm serves every number of rows, chosen at a full step as the
  // runner does, which is why the largest comes first. And what timing the candidates gains over the library's guess.
  for (const Choice& choice : {Choice{" bf16", bench.matmul(), false},
                               {" bf16, free choice", bench.free_matmul(), false},
                               {" bf16, first choice", bench.first_matmul(), true}}) {
    const std::string full_name = name + choice.suffix;
    for (auto rows = bench.shapes.product_rows.rbegin(); rows != bench.shapes.product_rows.rend(); ++rows) {
      const auto launch = [&](int i, cudaStream_t stream) {
        const Bf16* w = weights.data() + int64_t{outs} * depth * (i % copies);
        const absl::Status status = choice.matmul.Run(x.data(), w, *rows, outs, depth, store, out.data(), stream);
        return status.ok() ? cudaSuccess : cudaErrorUnknown;
      };
      if (!bench.Wants(full_name, *rows)) continue;
      if (choice.first) bench.FirstChoice(launch);
      bench.Print(full_name, *rows, 0, bench.Time(launch),
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
    const int most = bench.shapes.product_rows.back();
    const auto x = bench.MakeBf16(int64_t{most} * depth);
    auto out = Must(DeviceBuffer<Bf16>::Allocate(int64_t{most} * outs));
    for (const int rows : bench.shapes.product_rows) {
      if (!bench.Wants(name + " " + format_name, rows)) continue;
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

// A cache of `rows` sequences of `context` tokens, blocks in order; as often as it takes that none of it is in the
// second-level cache when its turn comes, as no other layer's is.
struct AttentionScene {
  static constexpr int kShift = 5;
  AttentionScene(Bench& bench, int rows, int context, bool is_fp8) : fp8(is_fp8) {
    const Shapes& s = bench.shapes;
    const int blocks = (context + (1 << kShift) - 1) >> kShift;
    copy_rows = int64_t{rows} * blocks * (1 << kShift) * s.kv_heads;
    copies = bench.Copies(2 * copy_rows * (fp8 ? s.head_dim + 1 : 2 * s.head_dim));
    const int64_t cache_rows = copy_rows * copies;
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
  AttentionParams Params(const Shapes& s, int turn, const Bf16* q, Bf16* out) const {
    const int64_t row = copy_rows * (turn % copies), at = row * s.head_dim;
    KvCacheView cache{keys.data() + at, values.data() + at, s.kv_heads, kShift, {}};
    if (fp8) {
      cache = {nullptr,
               nullptr,
               s.kv_heads,
               kShift,
               {codes[0].data() + at, codes[1].data() + at, exponents[0].data() + row, exponents[1].data() + row}};
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
  int copies = 1;
  int64_t copy_rows = 0;  // of one token and head
  DeviceBuffer<Bf16> keys, values;
  DeviceBuffer<unsigned char> codes[2];
  DeviceBuffer<int8_t> exponents[2];
  DeviceBuffer<int32_t> block_ids, block_start;
};

void TimeDecode(Bench& bench, int rows, int context, bool fp8) {
  const char* name = fp8 ? "decode attention fp8" : "decode attention bf16";
  if (!bench.Wants(name, rows, context)) return;
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
  const int fit = ResidentDecodeItems(scene.Params(s, 0, q.data(), out.data()), bench.device.num_processors);
  const int blocks = std::min(rows * chunks, fit);
  const double seconds = bench.Time([&](int i, cudaStream_t stream) {
    return DecodeAttention(scene.Params(s, i, q.data(), out.data()), items.data(), merges.data(), counts.data(),
                           partials.data(), blocks, num_merges, stream);
  });
  const double row_bytes = fp8 ? s.head_dim + 1.0 : 2.0 * s.head_dim;
  bench.Print(name, rows, context, seconds, 2.0 * rows * context * s.kv_heads * row_bytes,
              4.0 * rows * context * s.query_width());
}

void TimePrefill(Bench& bench, int prompt, bool fp8) {
  const char* name = fp8 ? "prefill attention fp8" : "prefill attention bf16";
  if (!bench.Wants(name, prompt, prompt)) return;
  const Shapes& s = bench.shapes;
  const AttentionScene scene(bench, 1, prompt, fp8);
  const auto q = bench.MakeBf16(int64_t{prompt} * s.query_width());
  auto out = Must(DeviceBuffer<Bf16>::Allocate(int64_t{prompt} * s.query_width()));
  const int tile_rows = PrefillRows(s.group), num_tiles = (prompt + tile_rows - 1) / tile_rows;
  const auto tiles = bench.Make<PrefillTile>(num_tiles, [&](int64_t i) {
    const auto first = static_cast<int32_t>(i) * tile_rows;
    return PrefillTile{first, std::min(tile_rows, prompt - first), 0, first};
  });
  const double seconds = bench.Time([&](int i, cudaStream_t stream) {
    return PrefillAttention(scene.Params(s, i, q.data(), out.data()), tiles.data(), num_tiles, stream);
  });
  bench.Print(name, prompt, prompt, seconds, 4.0 * prompt * s.query_width(), 2.0 * prompt * prompt * s.query_width());
}

// --- Rows. ---

void TimeRope(Bench& bench) {
  const Shapes& s = bench.shapes;
  const int most = s.batches.back(), width = s.query_width() + 2 * s.kv_heads * s.head_dim;
  constexpr int kPosition = 7;
  const AttentionScene scene(bench, most, 1 << AttentionScene::kShift, false);
  auto rows = bench.MakeBf16(int64_t{most} * width);
  const auto positions = bench.Make<int32_t>(most, [](int64_t) { return kPosition; });
  const auto slots = bench.Make<int64_t>(most, [](int64_t i) { return (i << AttentionScene::kShift) + kPosition; });
  const auto angles = bench.Make<float>((kPosition + 1) * s.head_dim / 4, [](int64_t) { return 0.7f; });
  for (const int num_rows : s.batches) {
    if (!bench.Wants("rope", num_rows)) continue;
    const double seconds = bench.Time([&](int i, cudaStream_t stream) {
      const Bf16* k = rows.data() + s.query_width();
      return RopeAndStoreKv({.q = rows.data(),
                             .k = k,
                             .v = k + s.kv_heads * s.head_dim,
                             .positions = positions.data(),
                             .slot_mapping = slots.data(),
                             .cosines = angles.data(),
                             .sines = angles.data(),
                             .cache = scene.Params(s, i, nullptr, nullptr).cache,
                             .num_query_heads = s.kv_heads * s.group,
                             .head_dim = s.head_dim,
                             .rotary_dim = s.head_dim / 2,
                             .q_stride = width,
                             .kv_stride = width},
                            num_rows, stream);
    });
    bench.Print("rope", num_rows, 0, seconds, 4.0 * num_rows * width, 0.0);
  }
}

void TimeRows(Bench& bench) {
  const Shapes& s = bench.shapes;
  const int most = bench.shapes.batches.back();
  auto x = bench.MakeBf16(int64_t{most} * s.inner);
  auto residual = bench.MakeBf16(int64_t{most} * s.hidden), out = bench.MakeBf16(int64_t{most} * s.hidden);
  const auto ones = bench.Make<float>(s.hidden, [](int64_t) { return 0.1f; });
  for (const int rows : s.batches) {
    if (bench.Wants("norm", rows)) {
      const double norm = bench.Time([&](int, cudaStream_t stream) {
        return LayerNorm1p(residual.data(), ones.data(), ones.data(), 1e-5f, rows, s.hidden, out.data(), stream);
      });
      bench.Print("norm", rows, 0, norm, 4.0 * rows * s.hidden, 0.0);
    }
    if (!bench.Wants("squared relu", rows)) continue;
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
    return bench.free_matmul().Run(x.data(), w.data(), n, n, n, Store::kReplace, out.data(), stream).ok()
               ? cudaSuccess
               : cudaErrorUnknown;
  });
  std::printf("{\"kind\": \"ceiling\", \"name\": \"bf16 GEMM\", \"tflops\": %.3f}\n", 2e-12 * n * n * n / product);
  return 0;
}

namespace {

void TimeAll(Bench& bench) {
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
  TimeRope(bench);
  TimeRows(bench);
}

}  // namespace

int Roofline(bool tiny) {
  Bench bench(tiny);
  TimeAll(bench);
  return 0;
}

int OneKernel(bool tiny, const std::string& name, int rows, int context) {
  Bench bench(tiny, {name, rows, context});
  TimeAll(bench);
  if (bench.num_printed() == 1) return 0;
  std::fprintf(stderr, "minitron-gpu-bench: no kernel '%s' with %d rows, context %d\n", name.c_str(), rows, context);
  return 1;
}

}  // namespace minitron::gpu
