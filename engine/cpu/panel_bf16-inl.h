// Products of bf16 panels with fp32 or bf16 rows, once per Highway target.
// Included by panel_matmul.cc inside foreach_target.
#if defined(MINITRON_ENGINE_CPU_PANEL_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MINITRON_ENGINE_CPU_PANEL_BF16_INL_H_
#undef MINITRON_ENGINE_CPU_PANEL_BF16_INL_H_
#else
#define MINITRON_ENGINE_CPU_PANEL_BF16_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "engine/base/check.h"
#include "engine/cpu/panel_format.h"
#include "engine/cpu/panel_tiles-inl.h"
#include "engine/cpu/quantize_rows.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
#if MINITRON_VNNI
#pragma GCC push_options
#pragma GCC target("avx512vnni")
#endif
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

// 128 inputs * 32 outputs = 8 KiB as they are, 16 KiB widened to fp32.
constexpr int64_t kSlice = kFloatSlice;
HWY_INLINE VF EvenInputs(VI pairs) { return hn::BitCast(F32(), hn::ShiftLeft<16>(pairs)); }
HWY_INLINE VF OddInputs(VI pairs) {
  return hn::BitCast(F32(), hn::And(pairs, hn::Set(I32(), static_cast<int32_t>(0xFFFF0000))));
}

template <int kRows, int kVectors>
HWY_INLINE void LoadSums(const float* HWY_RESTRICT sums, VF (&acc)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::Load(F32(), sums + r * kPanelOuts + v * kLanes);
  }
}

template <int kRows, int kVectors>
HWY_INLINE void StoreSums(const VF (&acc)[kRows][kVectors], float* HWY_RESTRICT sums) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[r][v], F32(), sums + r * kPanelOuts + v * kLanes);
  }
}

// Rows and weights are added in pairs of inputs, the odd one first. `count` is rounded up to pairs: what is past the
// end is zero on both sides.

// sums[r][vector v] += over `count` inputs for kRows rows and kVectors vectors, straight from the packed slice.
template <int kRows, int kVectors>
HWY_INLINE void Bf16Tile(const float* HWY_RESTRICT x, const uint8_t* HWY_RESTRICT w, int64_t count,
                         float* HWY_RESTRICT sums) {
  VF acc[kRows][kVectors];
  LoadSums(sums, acc);
  for (int64_t i = 0; i < count; i += 2, w += kBf16PairBytes) {
    for (int v = 0; v < kVectors; v += 16 / kLanes) PrefetchLine(w + v * kLanes * 4);
    VI pairs[kVectors];
    VF inputs[kVectors];
    for (int v = 0; v < kVectors; ++v) pairs[v] = hn::Load(I32(), reinterpret_cast<const int32_t*>(w) + v * kLanes);
    for (int v = 0; v < kVectors; ++v) inputs[v] = OddInputs(pairs[v]);
    for (int r = 0; r < kRows; ++r) {
      const VF value = hn::Set(F32(), x[r * kSlice + i]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(value, inputs[v], acc[r][v]);
    }
    for (int v = 0; v < kVectors; ++v) inputs[v] = EvenInputs(pairs[v]);
    for (int r = 0; r < kRows; ++r) {
      const VF value = hn::Set(F32(), x[r * kSlice + i + 1]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(value, inputs[v], acc[r][v]);
    }
  }
  StoreSums(acc, sums);
}

// The same from a slice widened to fp32, [inputs][32], `count` of them even.
template <int kRows>
HWY_INLINE void FloatTile(const float* HWY_RESTRICT x, const float* HWY_RESTRICT w, int64_t count,
                          float* HWY_RESTRICT sums) {
  VF acc[kRows][kTileVectors];
  LoadSums(sums, acc);
  for (int64_t i = 0; i < count; ++i, w += kPanelOuts) {
    VF inputs[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) inputs[v] = hn::Load(F32(), w + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const VF value = hn::Set(F32(), x[r * kSlice + i]);
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = hn::MulAdd(value, inputs[v], acc[r][v]);
    }
  }
  StoreSums(acc, sums);
}

HWY_INLINE void WidenSlice(const uint8_t* HWY_RESTRICT w, int64_t count, float* HWY_RESTRICT wide) {
  for (int64_t i = 0; i < count; i += 2, w += kBf16PairBytes, wide += 2 * kPanelOuts) {
    for (int v = 0; v < kPanelVectors; ++v) {
      PrefetchLine(w + v * kLanes * 4);
      const VI pairs = hn::Load(I32(), reinterpret_cast<const int32_t*>(w) + v * kLanes);
      hn::Store(OddInputs(pairs), F32(), wide + v * kLanes);
      hn::Store(EvenInputs(pairs), F32(), wide + kPanelOuts + v * kLanes);
    }
  }
}

// From this many rows on, a slice is widened once for all row tiles instead of once per tile. Where registers are many,
// tiles are tall and widening costs less than loading twice as much.
constexpr int64_t kWidenFrom = kLanes == 16 ? std::numeric_limits<int64_t>::max() : 9;

// All rows over one slice. A single accumulator chain is as long as the latency of a multiply-add, so one and two rows
// take more vectors at a time.
HWY_INLINE void Bf16Slice(const float* x, int64_t rows, const uint8_t* w, int64_t count, float* wide, float* sums) {
  if (rows >= kWidenFrom) {
    WidenSlice(w, count, wide);
    for (int64_t v = 0; v < kPanelVectors; v += kTileVectors) {
      ForRowTiles<kMaxFloatRows>(rows, [&](int64_t first, auto tile_rows) {
        FloatTile<tile_rows.value>(x + first * kSlice, wide + v * kLanes, CeilDiv(count, 2) * 2,
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

#if MINITRON_VNNI
#pragma GCC push_options
#pragma GCC target("avx512bf16")

// The same of rows in bf16: the instruction adds the product of the odd inputs, then that of the even ones, each
// rounded once.
template <int kRows>
HWY_INLINE void Bf16PairsTile(const uint16_t* HWY_RESTRICT x, const uint8_t* HWY_RESTRICT w, int64_t count,
                              float* HWY_RESTRICT sums) {
  VF acc[kRows][kTileVectors];
  LoadSums(sums, acc);
  for (int64_t i = 0; i < count; i += 2, w += kBf16PairBytes) {
    VI pairs[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      PrefetchLine(w + v * kLanes * 4);
      pairs[v] = hn::Load(I32(), reinterpret_cast<const int32_t*>(w) + v * kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const auto value = reinterpret_cast<__m512bh>(Broadcast4(x + r * kSlice + i).raw);
      for (int v = 0; v < kTileVectors; ++v) {
        acc[r][v] = VF{_mm512_dpbf16_ps(acc[r][v].raw, value, reinterpret_cast<__m512bh>(pairs[v].raw))};
      }
    }
  }
  StoreSums(acc, sums);
}

HWY_NOINLINE void Bf16PairsSlice(const uint16_t* x, int64_t rows, const uint8_t* w, int64_t count, float* sums) {
  ForRowTiles<kMaxFloatRows>(rows, [&](int64_t first, auto tile_rows) {
    Bf16PairsTile<tile_rows.value>(x + first * kSlice, w, count, sums + first * kPanelOuts);
  });
}

#pragma GCC pop_options
#else
HWY_INLINE void Bf16PairsSlice(const uint16_t*, int64_t, const uint8_t*, int64_t, float*) { CHECK(false); }
#endif

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
#if MINITRON_VNNI
#pragma GCC pop_options
#endif
HWY_AFTER_NAMESPACE();

#endif  // include guard
