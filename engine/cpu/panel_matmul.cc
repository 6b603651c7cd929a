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
#include "engine/cpu/panel_tiles-inl.h"

HWY_BEFORE_NAMESPACE();
#if MINITRON_VNNI
#pragma GCC push_options
#pragma GCC target("avx512vnni")
#endif
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

// Blocking, for all formats: a panel is walked once, in slices of its depth that stay in the L1 cache while every row
// passes over them, so each weight byte crosses DRAM once however many rows there are. Sums live in memory between
// slices: kRowBlock rows * 32 outputs = 16 KiB. More rows than that walk the panel again, from the L2 cache.
constexpr int64_t kRowBlock = 128;
// bf16: 128 inputs * 32 outputs = 8 KiB as they are, 16 KiB widened to fp32.
constexpr int64_t kSlice = kFloatSlice;
// From this many rows on, a slice is unpacked once for all row tiles instead of once per tile.
constexpr int64_t kUnpackFrom = kLanes == 16 ? 25 : 9;
// How far ahead of the arithmetic a panel is fetched: past the slice at hand, so that DRAM works while rows repeat.
constexpr int64_t kPrefetchBytes = 1024;

HWY_INLINE void PrefetchLine(const void* p) { hwy::Prefetch(static_cast<const uint8_t*>(p) + kPrefetchBytes); }

// ---- bf16 ----

HWY_INLINE VF EvenInputs(VI pairs) { return hn::BitCast(F32(), hn::ShiftLeft<16>(pairs)); }
HWY_INLINE VF OddInputs(VI pairs) {
  return hn::BitCast(F32(), hn::And(pairs, hn::Set(I32(), static_cast<int32_t>(0xFFFF0000))));
}

// sums[r][vector v] += over `count` inputs for kRows rows and kVectors vectors, straight from the packed slice.
template <int kRows, int kVectors>
HWY_INLINE void Bf16Tile(const float* HWY_RESTRICT x, const uint8_t* HWY_RESTRICT w, int64_t count,
                         float* HWY_RESTRICT sums) {
  VF acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::Load(F32(), sums + r * kPanelOuts + v * kLanes);
  }
  int64_t i = 0;
  for (; i + 2 <= count; i += 2, w += kBf16PairBytes) {
    PrefetchLine(w);
    VI pairs[kVectors];
    VF inputs[kVectors];
    for (int v = 0; v < kVectors; ++v) pairs[v] = hn::Load(I32(), reinterpret_cast<const int32_t*>(w) + v * kLanes);
    for (int v = 0; v < kVectors; ++v) inputs[v] = EvenInputs(pairs[v]);
    for (int r = 0; r < kRows; ++r) {
      const VF value = hn::Set(F32(), x[r * kSlice + i]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(value, inputs[v], acc[r][v]);
    }
    for (int v = 0; v < kVectors; ++v) inputs[v] = OddInputs(pairs[v]);
    for (int r = 0; r < kRows; ++r) {
      const VF value = hn::Set(F32(), x[r * kSlice + i + 1]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(value, inputs[v], acc[r][v]);
    }
  }
  if (i < count) {
    for (int v = 0; v < kVectors; ++v) {
      const VF inputs = EvenInputs(hn::Load(I32(), reinterpret_cast<const int32_t*>(w) + v * kLanes));
      for (int r = 0; r < kRows; ++r) acc[r][v] = hn::MulAdd(hn::Set(F32(), x[r * kSlice + i]), inputs, acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[r][v], F32(), sums + r * kPanelOuts + v * kLanes);
  }
}

// The same from a slice widened to fp32, [count][32].
template <int kRows>
HWY_INLINE void FloatTile(const float* HWY_RESTRICT x, const float* HWY_RESTRICT w, int64_t count,
                          float* HWY_RESTRICT sums) {
  VF acc[kRows][kTileVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) acc[r][v] = hn::Load(F32(), sums + r * kPanelOuts + v * kLanes);
  }
  for (int64_t i = 0; i < count; ++i, w += kPanelOuts) {
    VF inputs[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) inputs[v] = hn::Load(F32(), w + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const VF value = hn::Set(F32(), x[r * kSlice + i]);
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = hn::MulAdd(value, inputs[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) hn::Store(acc[r][v], F32(), sums + r * kPanelOuts + v * kLanes);
  }
}

HWY_INLINE void WidenSlice(const uint8_t* HWY_RESTRICT w, int64_t count, float* HWY_RESTRICT wide) {
  for (int64_t i = 0; i < count; i += 2, w += kBf16PairBytes, wide += 2 * kPanelOuts) {
    for (int v = 0; v < kPanelVectors; ++v) {
      PrefetchLine(w + v * kLanes * 4);
      const VI pairs = hn::Load(I32(), reinterpret_cast<const int32_t*>(w) + v * kLanes);
      hn::Store(EvenInputs(pairs), F32(), wide + v * kLanes);
      hn::Store(OddInputs(pairs), F32(), wide + kPanelOuts + v * kLanes);
    }
  }
}

// All rows over one slice. A single accumulator chain is as long as the latency of a multiply-add, so one and two rows
// take more vectors at a time.
HWY_INLINE void Bf16Slice(const float* x, int64_t rows, const uint8_t* w, int64_t count, float* wide, float* sums) {
  if (rows >= kUnpackFrom) {
    WidenSlice(w, count, wide);
    for (int64_t v = 0; v < kPanelVectors; v += kTileVectors) {
      ForRowTiles<kMaxFloatRows>(rows, [&](int64_t first, auto tile_rows) {
        FloatTile<tile_rows.value>(x + first * kSlice, wide + v * kLanes, count,
                                   sums + first * kPanelOuts + v * kLanes);
      });
    }
    return;
  }
  constexpr int kFewRowsVectors = static_cast<int>(std::min<int64_t>(4, kPanelVectors));
  if (rows == 1) {
    for (int64_t v = 0; v < kPanelVectors; v += kFewRowsVectors) {
      Bf16Tile<1, kFewRowsVectors>(x, w + v * kLanes * 4, count, sums + v * kLanes);
    }
    return;
  }
  if (rows == 2) {
    for (int64_t v = 0; v < kPanelVectors; v += kFewRowsVectors) {
      Bf16Tile<2, kFewRowsVectors>(x, w + v * kLanes * 4, count, sums + v * kLanes);
    }
    return;
  }
  for (int64_t v = 0; v < kPanelVectors; v += kTileVectors) {
    ForRowTiles<kMaxFloatRows>(rows, [&](int64_t first, auto tile_rows) {
      Bf16Tile<tile_rows.value, kTileVectors>(x + first * kSlice, w + v * kLanes * 4, count,
                                              sums + first * kPanelOuts + v * kLanes);
    });
  }
}

// ---- int8: 16 quads of inputs per group ----

constexpr int64_t kQuads = kInt8Group / 4;

// Where the 16 inputs-outputs quads of vector `v` start in a block, and how far apart.
constexpr int64_t Int8VectorOffset(int64_t v) { return v * kLanes / 16 * (16 * kInt8Group) + v * kLanes % 16 * 4; }
constexpr int64_t kQuadBytes = 64;

// sums[r][v] = fma(exact integer sum of the group, scale, sums[r][v]).
template <int kRows, int kVectors>
HWY_INLINE void AddGroup(const VI (&acc)[kRows][kVectors], const uint8_t* scales, float* HWY_RESTRICT sums) {
  for (int v = 0; v < kVectors; ++v) {
    const VF scale = LoadScales(scales + v * kLanes * 2);
    for (int r = 0; r < kRows; ++r) {
      float* sum = sums + r * kPanelOuts + v * kLanes;
      hn::Store(hn::MulAdd(hn::ConvertTo(F32(), acc[r][v]), scale, hn::Load(F32(), sum)), F32(), sum);
    }
  }
}

template <int kRows>
HWY_INLINE void Int8Tile(const int16_t* HWY_RESTRICT x, const uint8_t* HWY_RESTRICT block, int64_t v,
                         float* HWY_RESTRICT sums) {
  VI acc[kRows][kTileVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kTileVectors; ++n) acc[r][n] = hn::Zero(I32());
  }
  for (int64_t quad = 0; quad < kQuads; ++quad) {
    VI first[kTileVectors], second[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n) {
      const uint8_t* w = block + Int8VectorOffset(v + n) + quad * kQuadBytes;
      PrefetchLine(w);
      const VI quads = hn::Load(I32(), reinterpret_cast<const int32_t*>(w));
      first[n] = EvenBytes(quads);
      second[n] = OddBytes(quads);
    }
    for (int r = 0; r < kRows; ++r) {
      const VI low = Broadcast4(x + r * kInt8Group + quad * 4);
      for (int n = 0; n < kTileVectors; ++n) acc[r][n] = DotI16(acc[r][n], first[n], low);
      const VI high = Broadcast4(x + r * kInt8Group + quad * 4 + 2);
      for (int n = 0; n < kTileVectors; ++n) acc[r][n] = DotI16(acc[r][n], second[n], high);
    }
  }
  AddGroup(acc, block + kPanelOuts * kInt8Group + v * kLanes * 2, sums);
}

// From a block unpacked to int16 pairs, [32 pairs of inputs][32 outputs].
template <int kRows>
HWY_INLINE void PairsTile(const int16_t* HWY_RESTRICT x, const int32_t* HWY_RESTRICT pairs,
                          const uint8_t* HWY_RESTRICT scales, float* HWY_RESTRICT sums) {
  VI acc[kRows][kTileVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kTileVectors; ++n) acc[r][n] = hn::Zero(I32());
  }
  for (int64_t pair = 0; pair < 2 * kQuads; ++pair) {
    VI w[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n) w[n] = hn::Load(I32(), pairs + pair * kPanelOuts + n * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const VI value = Broadcast4(x + r * kInt8Group + pair * 2);
      for (int n = 0; n < kTileVectors; ++n) acc[r][n] = DotI16(acc[r][n], w[n], value);
    }
  }
  AddGroup(acc, scales, sums);
}

HWY_INLINE void UnpackInt8Block(const uint8_t* HWY_RESTRICT block, int32_t* HWY_RESTRICT pairs) {
  for (int64_t quad = 0; quad < kQuads; ++quad, pairs += 2 * kPanelOuts) {
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      const uint8_t* w = block + Int8VectorOffset(v) + quad * kQuadBytes;
      PrefetchLine(w);
      const VI quads = hn::Load(I32(), reinterpret_cast<const int32_t*>(w));
      hn::Store(EvenBytes(quads), I32(), pairs + v * kLanes);
      hn::Store(OddBytes(quads), I32(), pairs + kPanelOuts + v * kLanes);
    }
  }
}

HWY_INLINE void Int8Block(const int16_t* x, int64_t rows, const uint8_t* block, int32_t* pairs, float* sums) {
  if (rows >= kUnpackFrom) UnpackInt8Block(block, pairs);
  for (int64_t v = 0; v < kPanelVectors; v += kTileVectors) {
    ForRowTiles<kMaxIntRows>(rows, [&](int64_t first, auto tile_rows) {
      const int16_t* tile_x = x + first * kInt8Group;
      float* tile_sums = sums + first * kPanelOuts + v * kLanes;
      if (rows >= kUnpackFrom) {
        PairsTile<tile_rows.value>(tile_x, pairs + v * kLanes, block + kPanelOuts * kInt8Group + v * kLanes * 2,
                                   tile_sums);
      } else {
        Int8Tile<tile_rows.value>(tile_x, block, v, tile_sums);
      }
    });
  }
}

// ---- int4: 4 octets of inputs per group ----

constexpr int64_t kOctets = kInt4Group / 8;
constexpr int64_t Int4VectorOffset(int64_t v) { return v * kLanes / 16 * (16 * kInt4Group / 2) + v * kLanes % 16 * 4; }

HWY_INLINE VI LowNibbles(VI octets) { return hn::And(octets, hn::Set(I32(), 0x0F0F0F0F)); }
HWY_INLINE VI HighNibbles(VI octets) { return hn::And(hn::ShiftRight<4>(octets), hn::Set(I32(), 0x0F0F0F0F)); }

struct Int4Rows {
  const int8_t* values;    // [rows][kInt4Group]
  const float* scales;     // [rows]
  const int32_t* offsets;  // [rows]
};

template <int kRows>
HWY_INLINE void Int4Tile(const Int4Rows& x, const uint8_t* HWY_RESTRICT block, int64_t v, float* HWY_RESTRICT sums) {
  VI acc[kRows][kTileVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kTileVectors; ++n) acc[r][n] = hn::Zero(I32());
  }
  for (int64_t octet = 0; octet < kOctets; ++octet) {
    VI low[kTileVectors], high[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n) {
      const uint8_t* w = block + Int4VectorOffset(v + n) + octet * kQuadBytes;
      PrefetchLine(w);
      const VI octets = hn::Load(I32(), reinterpret_cast<const int32_t*>(w));
      low[n] = LowNibbles(octets);
      high[n] = HighNibbles(octets);
    }
    for (int r = 0; r < kRows; ++r) {
      const VI first = Broadcast4(x.values + r * kInt4Group + octet * 8);
      for (int n = 0; n < kTileVectors; ++n) acc[r][n] = DotU8I8(acc[r][n], low[n], first);
      const VI second = Broadcast4(x.values + r * kInt4Group + octet * 8 + 4);
      for (int n = 0; n < kTileVectors; ++n) acc[r][n] = DotU8I8(acc[r][n], high[n], second);
    }
  }
  const uint8_t* scales = block + kPanelOuts * kInt4Group / 2 + v * kLanes * 2;
  for (int n = 0; n < kTileVectors; ++n) {
    const VF scale = LoadScales(scales + n * kLanes * 2);
    for (int r = 0; r < kRows; ++r) {
      float* sum = sums + r * kPanelOuts + n * kLanes;
      const VF exact = hn::ConvertTo(F32(), FinishDotU8I8(acc[r][n], hn::Set(I32(), x.offsets[r])));
      const VF both_scales = hn::Mul(scale, hn::Set(F32(), x.scales[r]));
      hn::Store(hn::MulAdd(exact, both_scales, hn::Load(F32(), sum)), F32(), sum);
    }
  }
}

HWY_INLINE void Int4Block(const Int4Rows& x, int64_t rows, const uint8_t* block, float* sums) {
  for (int64_t v = 0; v < kPanelVectors; v += kTileVectors) {
    ForRowTiles<kMaxIntRows>(rows, [&](int64_t first, auto tile_rows) {
      Int4Tile<tile_rows.value>({x.values + first * kInt4Group, x.scales + first, x.offsets + first}, block, v,
                                sums + first * kPanelOuts + v * kLanes);
    });
  }
}

// ---- panels ----

struct Scratch {
  HWY_ALIGN float sums[kRowBlock * kPanelOuts];
  HWY_ALIGN float wide[kSlice * kPanelOuts];  // an unpacked slice; for int8, int16 pairs
};

// Rows [first_row, first_row + rows) of one panel into scratch.sums.
HWY_NOINLINE void PanelRows(const PanelJob& job, const uint8_t* panel, int64_t first_row, int64_t rows,
                            Scratch& scratch) {
  std::fill_n(scratch.sums, rows * kPanelOuts, 0.0f);
  const int64_t depth = job.w.cols;
  if (job.w.dtype == DType::kBf16Panels) {
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
                rows, panel, scratch.sums);
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

void PanelRange(const PanelJob& job, int64_t begin, int64_t end) {
  if (job.quantized.for_amx) {
    AmxPanelRange(job, begin, end);
  } else {
    HWY_DYNAMIC_DISPATCH(PanelRangeForTarget)(job, begin, end);
  }
}

void PanelMatMul(ThreadPool& pool, MatrixView<const float> x, const WeightView& w, QuantizedRowsBuffer& workspace,
                 MatrixView<float> out) {
  CHECK(IsPanels(w.dtype) && x.rows == out.rows && x.cols == w.cols && out.cols == w.rows);
  if (x.rows == 0) return;
  PanelJob job{.w = w, .x = x, .quantized = {}, .out = out};
  job.quantized = workspace.Quantize(pool, x, w.dtype);
  // A claim is worth about 64 Ki multiply-adds or 128 KiB of weights, but leaves several claims to every thread, so
  // that a thread that loses its core costs its share and not half the step.
  const int64_t panels = NumPanels(w.rows);
  const int64_t for_bytes = (128 << 10) / PanelBytes(w.dtype, w.cols);
  const int64_t for_balance = panels / (int64_t{4} * pool.num_threads());
  const int64_t for_work = (64 << 10) / (x.rows * w.cols * kPanelOuts);
  const int64_t grain = std::max<int64_t>({1, for_work, std::min(for_bytes, for_balance)});
  pool.ParallelFor(panels, grain, [&](int64_t begin, int64_t end, int) { PanelRange(job, begin, end); });
}

}  // namespace minitron::engine::cpu
#endif  // HWY_ONCE
