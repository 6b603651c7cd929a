#include "engine/cpu/panel_matmul.h"

#include <algorithm>
#include <cstdint>

#include "engine/base/check.h"
#include "engine/cpu/amx_matmul.h"
#include "engine/cpu/panel_format.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/cpu/panel_matmul.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After highway.h.
#include "engine/cpu/panel_bf16-inl.h"
#include "engine/cpu/panel_int4-inl.h"
#include "engine/cpu/panel_int8-inl.h"
#include "engine/cpu/panel_tiles-inl.h"

HWY_BEFORE_NAMESPACE();
#if MINITRON_VNNI
#pragma GCC push_options
#pragma GCC target("avx512vnni")
#endif
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

// A panel is walked once, in slices or blocks of its depth that stay in the L1 cache while every row passes over them,
// so each weight byte crosses DRAM once however many rows there are. Sums live in memory between slices: kRowBlock rows
// * 32 outputs = 16 KiB. More rows than that walk the panel again, from the L2 cache.
constexpr int64_t kRowBlock = 128;

struct Scratch {
  HWY_ALIGN float sums[kRowBlock * kPanelOuts];
  HWY_ALIGN float wide[kSlice * kPanelOuts];  // an unpacked slice; of int8 int16 pairs, of int4 bytes
};

// Rows [first_row, first_row + rows) of one panel into scratch.sums.
HWY_NOINLINE void PanelRows(const PanelJob& job, const uint8_t* panel, int64_t first_row, int64_t rows,
                            Scratch& scratch) {
  std::fill_n(scratch.sums, rows * kPanelOuts, 0.0f);
  const int64_t depth = job.w.cols;
  if (job.quantized.pairs != nullptr) {
    const uint16_t* x = job.quantized.pairs + first_row * kSlice;
    for (int64_t i = 0; i < depth; i += kSlice, x += job.quantized.rows * kSlice) {
      Bf16PairsSlice(x, rows, panel + i / 2 * kBf16PairBytes, std::min(kSlice, depth - i), scratch.sums);
    }
  } else if (job.w.dtype == DType::kBf16Panels) {
    const float* x = job.quantized.floats + first_row * kSlice;
    for (int64_t i = 0; i < depth; i += kSlice, x += job.quantized.rows * kSlice) {
      Bf16Slice(x, rows, panel + i / 2 * kBf16PairBytes, std::min(kSlice, depth - i), scratch.wide, scratch.sums);
    }
  } else if (job.w.dtype == DType::kInt8Panels) {
    const int16_t* x = job.quantized.wide + first_row * kInt8Group;
    for (int64_t i = 0; i < depth; i += kInt8Group, panel += kInt8BlockBytes, x += job.quantized.rows * kInt8Group) {
      Int8Block(x, rows, panel, reinterpret_cast<int32_t*>(scratch.wide), scratch.sums);
    }
  } else {
    int64_t at = first_row;
    for (int64_t i = 0; i < depth; i += kInt4Group, panel += kInt4BlockBytes, at += job.quantized.rows) {
      Int4Block({job.quantized.narrow + at * kInt4Group, job.quantized.group_scales + at, job.quantized.offsets + at},
                rows, panel, reinterpret_cast<int32_t*>(scratch.wide), scratch.sums);
    }
  }
}

void PanelRangeForTarget(const PanelJob& job, int64_t begin, int64_t end) {
  Scratch scratch;
  const int64_t panel_bytes = PanelBytes(job.w.dtype, job.w.cols);
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* data = static_cast<const uint8_t*>(job.w.data) + panel * panel_bytes;
    const int64_t first_out = panel * kPanelOuts;
    const int64_t outs = std::min(kPanelOuts, job.w.rows - first_out);
    for (int64_t first = 0; first < job.x.rows; first += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, job.x.rows - first);
      PanelRows(job, data, first, rows, scratch);
      for (int64_t r = 0; r < rows; ++r) {
        const float scale = job.w.dtype == DType::kInt8Panels ? job.quantized.row_scales[first + r] : 1.0f;
        StorePanelRow(scratch.sums + r * kPanelOuts, scale, outs, job.out.row(first + r) + first_out);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
#if MINITRON_VNNI
#pragma GCC pop_options
#endif
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace minitron::engine::cpu {

HWY_EXPORT(PanelRangeForTarget);

bool Bf16ProductsUsable() {
#if HWY_ARCH_X86 && HWY_COMPILER_GCC_ACTUAL
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16") != 0;
  return has_bf16 && (hwy::SupportedTargets() & HWY_TARGETS & HWY_AVX3_DL) != 0;
#else
  return false;
#endif
}

void PanelRange(const PanelJob& job, int64_t begin, int64_t end) {
  if (job.quantized.for_amx) {
    AmxPanelRange(job, begin, end);
  } else {
    HWY_DYNAMIC_DISPATCH(PanelRangeForTarget)(job, begin, end);
  }
}

void PanelMatMul(ThreadPool& pool, MatrixView<const float> x, absl::Span<const PanelProduct> products,
                 QuantizedRowsBuffer& workspace) {
  const DType dtype = products.front().w.dtype;
  int64_t panels = 0;
  for (const PanelProduct& p : products) {
    CHECK(IsPanels(dtype) && p.w.dtype == dtype && x.rows == p.out.rows && x.cols == p.w.cols &&
          p.out.cols == p.w.rows);
    panels += NumPanels(p.w.rows);
  }
  if (x.rows == 0) return;
  const QuantizedRows quantized = workspace.Quantize(pool, x, dtype);
  // A claim is worth about 64 Ki multiply-adds or 128 KiB of weights, but leaves several claims to every thread, so
  // that a thread that loses its core costs its share and not half the step.
  const int64_t for_bytes = (128 << 10) / PanelBytes(dtype, x.cols);
  const int64_t for_balance = panels / (int64_t{4} * pool.num_threads());
  const int64_t for_work = (64 << 10) / (x.rows * x.cols * kPanelOuts);
  const int64_t grain = std::max<int64_t>({1, for_work, std::min(for_bytes, for_balance)});
  pool.ParallelFor(panels, grain, [&](int64_t begin, int64_t end, int) {
    int64_t first = 0;  // panel of the product at hand
    for (const PanelProduct& p : products) {
      const int64_t count = NumPanels(p.w.rows);
      const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, count);
      if (from < to) PanelRange({.w = p.w, .x = x, .quantized = quantized, .out = p.out}, from, to);
      first += count;
    }
  });
}

}  // namespace minitron::engine::cpu
#endif  // HWY_ONCE
