#include "tests/bench/op_bench.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "engine/cpu/aligned_buffer.h"
#include "engine/cpu/panel_format.h"
#include "engine/cpu/panel_matmul.h"
#include "tests/bench/random_checkpoint.h"

namespace minitron::bench {
namespace {

using engine::DType;
using engine::WeightView;
namespace cpu = engine::cpu;

constexpr int64_t kColdBytes = int64_t{1} << 30;
constexpr int kRuns = 5;

struct Format {
  const char* name;
  DType dtype;
  bool round = false;  // rows to bf16
};
constexpr Format kFormats[] = {{"bf16", DType::kBf16Panels},
                               {"bf16, rows bf16", DType::kBf16Panels, true},
                               {"int8", DType::kInt8Panels},
                               {"int4", DType::kInt4Panels}};

struct Copies {
  cpu::AlignedBuffer<uint8_t> memory;
  std::vector<WeightView> views;
};

Copies MakeCopies(cpu::ThreadPool& pool, DType dtype, int64_t outs, int64_t depth) {
  std::vector<uint16_t> source(outs * depth);
  RandomBf16(1, 0, outs * depth, 0.05f, source.data());
  const WeightView rows{.data = source.data(), .dtype = DType::kBf16, .rows = outs, .cols = depth};
  const int64_t bytes = cpu::PackedBytes(dtype, outs, depth);
  const int64_t count = kColdBytes / bytes + 1;
  Copies copies;
  copies.memory = cpu::AlignedBuffer<uint8_t>(count * bytes);
  madvise(copies.memory.data(), copies.memory.num_bytes(), MADV_HUGEPAGE);
  const int64_t panel_bytes = cpu::PanelBytes(dtype, depth);
  pool.ParallelFor(cpu::NumPanels(outs), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) cpu::PackPanel(rows, dtype, p, copies.memory.data() + p * panel_bytes);
  });
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0) std::memcpy(copies.memory.data() + i * bytes, copies.memory.data(), bytes);
    copies.views.push_back({.data = copies.memory.data() + i * bytes, .dtype = dtype, .rows = outs, .cols = depth});
  }
  return copies;
}

}  // namespace

void BenchMatMul(cpu::ThreadPool& pool, const Limits& limits, const engine::NemotronConfig& config,
                 const std::vector<int>& rows) {
  const int64_t outs = config.intermediate_size, depth = config.hidden_size;
  const int64_t max_rows = *std::max_element(rows.begin(), rows.end());
  std::printf("matmul %ld x %ld, %d threads\n", static_cast<long>(outs), static_cast<long>(depth), pool.num_threads());
  std::printf("  %-15s %5s %10s %9s %9s %16s\n", "type", "rows", "us", "GB/s", "GFLOP/s", "of read / of FMA");
  const cpu::AlignedBuffer<float> x(max_rows * depth), out(max_rows * outs);
  for (int64_t i = 0; i < max_rows * depth; ++i) x.data()[i] = static_cast<float>(i % 255) * 0.01f - 1.0f;
  for (const Format& format : kFormats) {
    cpu::QuantizedRowsBuffer workspace(max_rows, depth, format.round);
    const Copies copies = MakeCopies(pool, format.dtype, outs, depth);
    const double bytes = static_cast<double>(cpu::PackedBytes(format.dtype, outs, depth));
    for (const int64_t m : rows) {
      std::vector<double> seconds;
      const size_t per_run = m <= 16 ? copies.views.size() : std::max<size_t>(2, copies.views.size() / 8);
      size_t next = 0;
      for (int run = 0; run < kRuns; ++run) {
        const auto start = std::chrono::steady_clock::now();
        for (size_t i = 0; i < per_run; ++i) {
          const WeightView& w = copies.views[next++ % copies.views.size()];
          cpu::PanelMatMul(pool, {x.data(), m, depth}, {{.w = w, .out = {out.data(), m, outs}}}, workspace);
        }
        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        seconds.push_back(elapsed.count() / static_cast<double>(per_run));
      }
      std::sort(seconds.begin(), seconds.end());
      const double median = seconds[kRuns / 2];
      const double flops = 2.0 * static_cast<double>(m * outs * depth) / median;
      std::printf("  %-15s %5ld %10.1f %9.1f %9.1f %7.0f %% %5.0f %%\n", format.name, static_cast<long>(m),
                  median * 1e6, bytes / median * 1e-9, flops * 1e-9, 100.0 * bytes / median / limits.read_bytes_per_s,
                  100.0 * flops / limits.fma_flops_per_s);
    }
  }
}

}  // namespace minitron::bench
