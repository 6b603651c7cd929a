// What the panel kernels share, once per Highway target: tile shapes, the walk over rows, integer dot products.
// Included by the kernels' .cc files inside foreach_target; may be included several times.
#if defined(MINITRON_ENGINE_CPU_PANEL_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MINITRON_ENGINE_CPU_PANEL_TILES_INL_H_
#undef MINITRON_ENGINE_CPU_PANEL_TILES_INL_H_
#else
#define MINITRON_ENGINE_CPU_PANEL_TILES_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine/cpu/panel_format.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

// Icelake and Zen 4 have VNNI, and Highway 1.0.3 checks for it before it chooses AVX3_DL, but does not tell the
// compiler.
#undef MINITRON_VNNI
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL && HWY_COMPILER_GCC_ACTUAL
#define MINITRON_VNNI 1
#else
#define MINITRON_VNNI 0
#endif

HWY_BEFORE_NAMESPACE();
#if MINITRON_VNNI
#pragma GCC push_options
#pragma GCC target("avx512vnni")
#endif
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// One lane per output. A panel's 32 outputs are kPanelVectors vectors.
using F32 = hn::CappedTag<float, 16>;
using I32 = hn::RebindToSigned<F32>;
using VF = hn::Vec<F32>;
using VI = hn::Vec<I32>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(F32()));
constexpr int64_t kPanelVectors = kPanelOuts / kLanes;

// A tile is kTileVectors vectors of outputs by up to kMaxRows rows. The accumulators, a tile row's weights and a
// broadcast have to fit the register file (16 registers to AVX2; 32 from AVX-512 on and on NEON) or they spill and a
// third of the speed is gone:
//   16 lanes (32 registers): 2 x 10 accumulators + 2 weights + broadcast and temporaries = 24; integers 2 x 8 + 4 + 2
//    8 lanes (16 registers): 2 x 6 accumulators + 2 weights + broadcast = 15;                  integers 2 x 4 + 4 + 2
//    4 lanes: the same as 8
// GCC 12 spills fp32 tiles of 11 and 12 rows, which would fit: 74 % of the FMA peak instead of 92 %.
constexpr int kTileVectors = 2;
constexpr int kMaxFloatRows = kLanes == 16 ? 10 : 6;
constexpr int kMaxIntRows = kLanes == 16 ? 8 : 4;

// Calls tile(first_row, integral_constant<rows>) over all rows in the fewest, most even tiles of at most kMax rows.
template <int kMax, class Tile>
HWY_INLINE void ForRowTiles(int64_t rows, const Tile& tile) {
  const int64_t tiles = CeilDiv(rows, kMax);
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t count = rows / tiles + (t < rows % tiles ? 1 : 0);
    switch (count) {
#define MINITRON_ROWS(n)                                                        \
  case n:                                                                       \
    if constexpr ((n) <= kMax) tile(first, std::integral_constant<int, (n)>()); \
    break;
      MINITRON_ROWS(1)
      MINITRON_ROWS(2)
      MINITRON_ROWS(3)
      MINITRON_ROWS(4)
      MINITRON_ROWS(5)
      MINITRON_ROWS(6)
      MINITRON_ROWS(7)
      MINITRON_ROWS(8)
      MINITRON_ROWS(9)
      MINITRON_ROWS(10)
#undef MINITRON_ROWS
      default:
        break;
    }
    first += count;
  }
}

// Unrolls the loop behind it `n` times. Fully unrolled, GCC keeps every address of a block and spills the accumulators.
#undef MINITRON_UNROLL
#undef MINITRON_PRAGMA
#define MINITRON_PRAGMA(text) _Pragma(#text)
#if HWY_COMPILER_GCC_ACTUAL
#define MINITRON_UNROLL(n) MINITRON_PRAGMA(GCC unroll n)
#else
#define MINITRON_UNROLL(n)
#endif

// 16 outputs' worth of 4 bytes of a block.
constexpr int64_t kQuadBytes = 64;

// How far ahead of the arithmetic a panel is fetched, in the order in which it lies: some 100 to 200 ns at full speed,
// whatever the number of rows.
constexpr int64_t kPrefetchBytes = 6144;
HWY_INLINE void PrefetchLine(const void* p) { hwy::Prefetch(static_cast<const uint8_t*>(p) + kPrefetchBytes); }

// 4 bytes of activations in every lane.
HWY_INLINE VI Broadcast4(const void* bytes) {
  int32_t word;
  std::memcpy(&word, bytes, 4);
  return hn::Set(I32(), word);
}

HWY_INLINE VI LowHalves(VI v) { return hn::ShiftRight<16>(hn::ShiftLeft<16>(v)); }
HWY_INLINE VI HighHalves(VI v) { return hn::ShiftRight<16>(v); }

// sum + a.low * b.low + a.high * b.high, the halves of each lane as int16.
HWY_INLINE VI DotI16(VI sum, VI a, VI b) {
#if MINITRON_VNNI
  return VI{_mm512_dpwssd_epi32(sum.raw, a.raw, b.raw)};
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return hn::Add(sum, VI{_mm512_madd_epi16(a.raw, b.raw)});
#elif HWY_TARGET == HWY_AVX2
  return hn::Add(sum, VI{_mm256_madd_epi16(a.raw, b.raw)});
#else
  return hn::Add(sum, hn::Add(hn::Mul(LowHalves(a), LowHalves(b)), hn::Mul(HighHalves(a), HighHalves(b))));
#endif
}

// sum of four products of unsigned by signed bytes per lane. Sums are kept as the target likes them: 32 bits with VNNI,
// else (but for a single lane) two halves of 16 bits. They start at -8 * sum(q) and end within
// 16 * 8 * 127 = 16256 of zero; what is between may wrap.
HWY_INLINE VI DotU8I8(VI sum, VI a, VI b) {
#if MINITRON_VNNI
  return VI{_mm512_dpbusd_epi32(sum.raw, a.raw, b.raw)};
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return VI{_mm512_add_epi16(sum.raw, _mm512_maddubs_epi16(a.raw, b.raw))};
#elif HWY_TARGET == HWY_AVX2
  return VI{_mm256_add_epi16(sum.raw, _mm256_maddubs_epi16(a.raw, b.raw))};
#elif HWY_TARGET == HWY_SCALAR
  // One lane: there are no halves, and the four products are summed in 32 bits.
  const auto product = [&](VI unsigned_byte, VI signed_byte) {
    return hn::Mul(hn::And(unsigned_byte, hn::Set(I32(), 0xFF)), hn::ShiftRight<24>(signed_byte));
  };
  sum = hn::Add(sum, hn::Add(product(a, hn::ShiftLeft<24>(b)), product(hn::ShiftRight<8>(a), hn::ShiftLeft<16>(b))));
  return hn::Add(sum, hn::Add(product(hn::ShiftRight<16>(a), hn::ShiftLeft<8>(b)), product(hn::ShiftRight<24>(a), b)));
#else
  const hn::Repartition<int16_t, I32> halves;
  const hn::Repartition<uint16_t, I32> unsigned_halves;
  const auto a_even = hn::BitCast(halves, hn::And(hn::BitCast(unsigned_halves, a), hn::Set(unsigned_halves, 0xFF)));
  const auto a_odd = hn::BitCast(halves, hn::ShiftRight<8>(hn::BitCast(unsigned_halves, a)));
  const auto b_even = hn::ShiftRight<8>(hn::ShiftLeft<8>(hn::BitCast(halves, b)));
  const auto b_odd = hn::ShiftRight<8>(hn::BitCast(halves, b));
  const auto products = hn::Add(hn::Mul(a_even, b_even), hn::Mul(a_odd, b_odd));
  return hn::BitCast(I32(), hn::Add(hn::BitCast(halves, sum), products));
#endif
}

// Whether those sums are two halves: of the first and of the last two bytes of each lane.
constexpr bool kSumHalves = !MINITRON_VNNI && HWY_TARGET != HWY_SCALAR;

// The 32-bit sums of DotU8I8.
HWY_INLINE VI FinishDotU8I8(VI sum) {
  return kSumHalves ? DotI16(hn::Zero(I32()), sum, hn::Set(I32(), 0x00010001)) : sum;
}

// Bytes 0 and 2, and bytes 1 and 3, of each lane as two int16: the input pairs (0, 1) and (2, 3) of an int8 quad.
HWY_INLINE VI EvenBytes(VI v) {
#if HWY_TARGET == HWY_SCALAR
  return hn::Or(hn::And(hn::ShiftRight<24>(hn::ShiftLeft<24>(v)), hn::Set(I32(), 0xFFFF)),
                hn::ShiftLeft<16>(hn::ShiftRight<24>(hn::ShiftLeft<8>(v))));
#else
  const hn::Repartition<int16_t, I32> halves;
  return hn::BitCast(I32(), hn::ShiftRight<8>(hn::ShiftLeft<8>(hn::BitCast(halves, v))));
#endif
}
HWY_INLINE VI OddBytes(VI v) {
#if HWY_TARGET == HWY_SCALAR
  return EvenBytes(hn::ShiftRight<8>(v));
#else
  const hn::Repartition<int16_t, I32> halves;
  return hn::BitCast(I32(), hn::ShiftRight<8>(hn::BitCast(halves, v)));
#endif
}

// Scales of kLanes outputs.
HWY_INLINE VF LoadScales(const uint8_t* scales) {
  const hn::Rebind<uint16_t, F32> narrow;
  const hn::RebindToUnsigned<F32> wide;
  return hn::BitCast(
      F32(), hn::ShiftLeft<16>(hn::PromoteTo(wide, hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(scales)))));
}

// Rows of a panel's outputs are summed here, [rows][kPanelOuts], and then copied to where they belong.
inline void StorePanelRow(const float* sums, float scale, int64_t outs, float* out) {
  const F32 tag;
  if (outs == kPanelOuts) {
    for (int64_t o = 0; o < kPanelOuts; o += kLanes) {
      hn::StoreU(hn::Mul(hn::Load(tag, sums + o), hn::Set(tag, scale)), tag, out + o);
    }
    return;
  }
  for (int64_t o = 0; o < outs; ++o) out[o] = sums[o] * scale;
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
#if MINITRON_VNNI
#pragma GCC pop_options
#endif
HWY_AFTER_NAMESPACE();

#endif  // include guard
