// Products of int8 panels with int16 rows, once per Highway target.
// Included by panel_matmul.cc inside foreach_target.
#if defined(MINITRON_ENGINE_CPU_PANEL_INT8_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MINITRON_ENGINE_CPU_PANEL_INT8_INL_H_
#undef MINITRON_ENGINE_CPU_PANEL_INT8_INL_H_
#else
#define MINITRON_ENGINE_CPU_PANEL_INT8_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "engine/cpu/panel_format.h"
#include "engine/cpu/panel_tiles-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
#if MINITRON_VNNI
#pragma GCC push_options
#pragma GCC target("avx512vnni")
#endif
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

// 16 quads of inputs per group.
constexpr int64_t kQuads = kInt8Group / 4;

// Where the 16 inputs-outputs quads of vector `v` start in a block, and how far apart.
constexpr int64_t Int8VectorOffset(int64_t v) { return v * kLanes / 16 * (16 * kInt8Group) + v * kLanes % 16 * 4; }

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
  const uint8_t* fetch = block + v * kLanes * kInt8Group;
  MINITRON_UNROLL(1)
  for (int64_t quad = 0; quad < kQuads; ++quad) {
    VI first[kTileVectors], second[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n) {
      const uint8_t* w = block + Int8VectorOffset(v + n) + quad * kQuadBytes;
      PrefetchLine(fetch);
      fetch += kLanes * 4;
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
  const uint8_t* scales = block + kPanelOuts * kInt8Group + v * kLanes * 2;
  PrefetchLine(scales);
  AddGroup(acc, scales, sums);
}

// From a block unpacked to int16 pairs, [32 pairs of inputs][32 outputs].
template <int kRows>
HWY_INLINE void PairsTile(const int16_t* HWY_RESTRICT x, const int32_t* HWY_RESTRICT pairs,
                          const uint8_t* HWY_RESTRICT scales, float* HWY_RESTRICT sums) {
  VI acc[kRows][kTileVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kTileVectors; ++n) acc[r][n] = hn::Zero(I32());
  }
  MINITRON_UNROLL(1)
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

// From this many rows on, a block is unpacked once for all row tiles. Where registers are many the pairs are made
// faster than they are loaded again.
constexpr int64_t kUnpackPairsFrom = kLanes == 16 ? std::numeric_limits<int64_t>::max() : 9;

HWY_INLINE void UnpackInt8Block(const uint8_t* HWY_RESTRICT block, int32_t* HWY_RESTRICT pairs) {
  const uint8_t* fetch = block;
  for (int64_t quad = 0; quad < kQuads; ++quad, pairs += 2 * kPanelOuts) {
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      PrefetchLine(fetch);
      fetch += kLanes * 4;
      const uint8_t* w = block + Int8VectorOffset(v) + quad * kQuadBytes;
      const VI quads = hn::Load(I32(), reinterpret_cast<const int32_t*>(w));
      hn::Store(EvenBytes(quads), I32(), pairs + v * kLanes);
      hn::Store(OddBytes(quads), I32(), pairs + kPanelOuts + v * kLanes);
    }
  }
}

HWY_INLINE void Int8Block(const int16_t* x, int64_t rows, const uint8_t* block, int32_t* pairs, float* sums) {
  if (rows >= kUnpackPairsFrom) UnpackInt8Block(block, pairs);
  for (int64_t v = 0; v < kPanelVectors; v += kTileVectors) {
    // Inlined, or each call loads the addresses of its rows again.
    ForRowTiles<kMaxIntRows>(
        rows, [&](int64_t first, auto tile_rows) __attribute__((always_inline)) {
          const int16_t* tile_x = x + first * kInt8Group;
          float* tile_sums = sums + first * kPanelOuts + v * kLanes;
          if (rows >= kUnpackPairsFrom) {
            PairsTile<tile_rows.value>(tile_x, pairs + v * kLanes, block + kPanelOuts * kInt8Group + v * kLanes * 2,
                                       tile_sums);
          } else {
            Int8Tile<tile_rows.value>(tile_x, block, v, tile_sums);
          }
        });
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
#if MINITRON_VNNI
#pragma GCC pop_options
#endif
HWY_AFTER_NAMESPACE();

#endif  // include guard
