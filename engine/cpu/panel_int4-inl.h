// Products of int4 panels with int8 rows, once per Highway target.
// Included by panel_matmul.cc inside foreach_target.
#if defined(MINITRON_ENGINE_CPU_PANEL_INT4_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MINITRON_ENGINE_CPU_PANEL_INT4_INL_H_
#undef MINITRON_ENGINE_CPU_PANEL_INT4_INL_H_
#else
#define MINITRON_ENGINE_CPU_PANEL_INT4_INL_H_
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

// 4 octets of inputs per group.
constexpr int64_t kOctets = kInt4Group / 8;
constexpr int64_t Int4VectorOffset(int64_t v) { return v * kLanes / 16 * (16 * kInt4Group / 2) + v * kLanes % 16 * 4; }

HWY_INLINE VI LowNibbles(VI octets) { return hn::And(octets, hn::Set(I32(), 0x0F0F0F0F)); }
HWY_INLINE VI HighNibbles(VI octets) { return hn::And(hn::ShiftRight<4>(octets), hn::Set(I32(), 0x0F0F0F0F)); }

// From this many rows on, a block is unpacked once for all row tiles. Where registers are many the nibbles are taken
// apart faster than they are loaded again.
constexpr int64_t kUnpackNibblesFrom = kLanes == 16 ? std::numeric_limits<int64_t>::max() : 32;

struct Int4Rows {
  const int8_t* values;    // [rows][kInt4Group]
  const float* scales;     // [rows]
  const int32_t* offsets;  // [rows]
};

// sums[r][v] = fma(exact integer sum of the group, weight scale * row scale, sums[r][v]).
template <int kRows>
HWY_INLINE void AddInt4Group(const VI (&acc)[kRows][kTileVectors], const Int4Rows& x, const uint8_t* scales,
                             float* HWY_RESTRICT sums) {
  for (int n = 0; n < kTileVectors; ++n) {
    const VF scale = LoadScales(scales + n * kLanes * 2);
    for (int r = 0; r < kRows; ++r) {
      float* sum = sums + r * kPanelOuts + n * kLanes;
      const VF both_scales = hn::Mul(scale, hn::Set(F32(), x.scales[r]));
      const VF exact = hn::ConvertTo(F32(), FinishDotU8I8(acc[r][n]));
      hn::Store(hn::MulAdd(exact, both_scales, hn::Load(F32(), sum)), F32(), sum);
    }
  }
}

template <int kRows>
HWY_INLINE void StartInt4Group(const Int4Rows& x, VI (&acc)[kRows][kTileVectors]) {
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kTileVectors; ++n) acc[r][n] = hn::Set(I32(), x.offsets[r]);
  }
}

template <int kRows>
HWY_INLINE void Int4Tile(const Int4Rows& x, const uint8_t* HWY_RESTRICT block, int64_t v, float* HWY_RESTRICT sums) {
  VI acc[kRows][kTileVectors];
  StartInt4Group(x, acc);
  const uint8_t* fetch = block + v * kLanes * kInt4Group / 2;
  MINITRON_UNROLL(1)
  for (int64_t octet = 0; octet < kOctets; ++octet) {
    VI low[kTileVectors], high[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n) {
      const uint8_t* w = block + Int4VectorOffset(v + n) + octet * kQuadBytes;
      PrefetchLine(fetch);
      fetch += kLanes * 4;
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
  PrefetchLine(scales);
  AddInt4Group(acc, x, scales, sums);
}

// From a block unpacked to a nibble a byte, [8 quads of inputs][32 outputs][4 inputs].
template <int kRows>
HWY_INLINE void NibblesTile(const Int4Rows& x, const int32_t* HWY_RESTRICT quads, const uint8_t* HWY_RESTRICT scales,
                            float* HWY_RESTRICT sums) {
  VI acc[kRows][kTileVectors];
  StartInt4Group(x, acc);
  MINITRON_UNROLL(4)
  for (int64_t quad = 0; quad < 2 * kOctets; ++quad) {
    VI w[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n) w[n] = hn::Load(I32(), quads + quad * kPanelOuts + n * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const VI value = Broadcast4(x.values + r * kInt4Group + quad * 4);
      for (int n = 0; n < kTileVectors; ++n) acc[r][n] = DotU8I8(acc[r][n], w[n], value);
    }
  }
  AddInt4Group(acc, x, scales, sums);
}

HWY_INLINE void UnpackInt4Block(const uint8_t* HWY_RESTRICT block, int32_t* HWY_RESTRICT quads) {
  const uint8_t* fetch = block;
  for (int64_t octet = 0; octet < kOctets; ++octet, quads += 2 * kPanelOuts) {
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      PrefetchLine(fetch);
      fetch += kLanes * 4;
      const uint8_t* w = block + Int4VectorOffset(v) + octet * kQuadBytes;
      const VI octets = hn::Load(I32(), reinterpret_cast<const int32_t*>(w));
      hn::Store(LowNibbles(octets), I32(), quads + v * kLanes);
      hn::Store(HighNibbles(octets), I32(), quads + kPanelOuts + v * kLanes);
    }
  }
  PrefetchLine(fetch);
}

HWY_INLINE void Int4Block(const Int4Rows& x, int64_t rows, const uint8_t* block, int32_t* quads, float* sums) {
  const bool unpack = rows >= kUnpackNibblesFrom;
  if (unpack) UnpackInt4Block(block, quads);
  for (int64_t v = 0; v < kPanelVectors; v += kTileVectors) {
    // Inlined, or each call loads the addresses of its rows again.
    ForRowTiles<kMaxIntRows>(
        rows, [&](int64_t first, auto tile_rows) __attribute__((always_inline)) {
          const Int4Rows tile_x{x.values + first * kInt4Group, x.scales + first, x.offsets + first};
          float* tile_sums = sums + first * kPanelOuts + v * kLanes;
          if (unpack) {
            NibblesTile<tile_rows.value>(tile_x, quads + v * kLanes,
                                         block + kPanelOuts * kInt4Group / 2 + v * kLanes * 2, tile_sums);
          } else {
            Int4Tile<tile_rows.value>(tile_x, block, v, tile_sums);
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
